"""What a config would train, before anything is trained."""

import json

import jax
import pytest

from mim_jax.conversion.files import write_state_dict
from mim_jax.layout.towers import tower_layout
from mim_jax.training import experiment
from mim_jax.training.derived import complete_without_data, derive
from mim_jax.training.inspection import inspection
from tests.methods.tiny import tiny_config
from tests.training.follower import SMALL, follower_config, random_tower
from tests.training.toy import Toy


def rows_of(table) -> dict[str, list[str]]:
    """Cells of a table by the first of their row."""
    path, *columns = ([*column.cells] for column in table.columns)
    return {name: list(cells) for name, *cells in zip(path, *columns, strict=True)}


@pytest.fixture
def config(tmp_path):
    """With a teacher whose file holds another than the config says, and data that are nowhere."""
    tower, params = random_tower()
    path = tmp_path / "teacher.safetensors"
    write_state_dict(path, tower_layout(tower, "timm", "tower").save({"tower": params}))
    about = {"architecture": "vit", "model_args": {"num_heads": SMALL["heads"]}}
    path.with_suffix(".json").write_text(json.dumps(about))
    other = {"model.teacher.width": 48, "model.teacher.depth": 5, "model.teacher.heads": 3}
    return follower_config(str(path), **other, **{"data.source": "folder:/nowhere"})


def test_towers_have_the_sizes_of_their_weights_and_are_shown_as_frozen(config):
    table, summary = inspection(config)
    rows = rows_of(table)
    towers = jax.tree.leaves(random_tower()[1])
    frozen = [path for path, (*_, how) in rows.items() if how == "frozen"]
    assert len(frozen) == len(towers)
    assert all(path.startswith("teacher/") for path in frozen)
    assert rows["student/Dense_0/kernel"] == [
        "(784, 16)",
        "(None, None)",
        f"{784 * 16 * 4:,}",
        "yes",
    ]
    trained, fixed = 784 * 16 + 16, sum(leaf.size for leaf in towers)
    assert f"parameters:  {trained + fixed:,}, of which {trained:,} are trained, " in summary
    assert f"are trained, {fixed:,} frozen\n" in summary
    assert f"(frozen {fixed * 4 / 2**20:,.1f} MiB)" in summary
    # Adam keeps two numbers for each trained parameter, and none for the frozen ones.
    assert f"optimizer state {trained * 8 / 2**20:,.1f} MiB" in summary


def test_without_data_towers_are_those_that_training_derives(config, tmp_path):
    completed = complete_without_data(config)
    derived, settings = derive(config, tmp_path / "run")
    assert completed.to_dict() == derived.to_dict()
    assert {s.field.rpartition(".")[2] for s in settings} >= {"width", "depth", "heads"}
    assert config.model.teacher.width == 48, "the given config is left as it is"
    assert complete_without_data(completed).to_dict() == completed.to_dict()


def test_config_whose_towers_have_no_path_stays_as_it_is():
    config = follower_config("")
    assert complete_without_data(config).to_dict() == config.to_dict()


def test_tower_that_is_not_there_is_an_error(config):
    config.model.teacher.path = "/nowhere.safetensors"
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        inspection(config)


def test_parameters_that_follow_others_are_neither_trained_nor_frozen(monkeypatch):
    monkeypatch.setattr(experiment, "method_class", lambda name: Toy)
    config = tiny_config({"data.flip": False})
    table, summary = inspection(config)
    hows = {path: how for path, (*_, how) in rows_of(table).items()}
    assert {path.split("/")[0]: how for path, how in hows.items()} == {
        "student": "yes",
        "critic": "yes",
        "projection": "frozen",
        "teacher": "EMA",
    }
    assert "are trained, 42 frozen, 42 EMA\n" in summary
