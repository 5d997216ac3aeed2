import json
import types

import pytest

from mim_jax import cli
from mim_jax import config as configs
from mim_jax.data import open_source
from mim_jax.generation import run
from tests.generation.stub import SIZE, VARIABLES, Stub


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A run whose model is the stub, wherever it is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = configs.load("vec2face:tiny")
    config.data.image_size = (2, 2)
    config.model.face_model.outputs = SIZE
    about = {"config": json.loads(configs.to_json(config))}
    found = types.SimpleNamespace(method=Stub())
    monkeypatch.setattr(run, "read_variables", lambda folder, step: (VARIABLES, about))
    monkeypatch.setattr(run, "checkpoint_steps", lambda folder: [100, 200])
    monkeypatch.setattr(run.Experiment, "on_one_device", lambda config: found)
    return found


def generate(tmp_path, *arguments):
    flags = (f"--run={tmp_path / 'faces'}", f"--output={tmp_path / 'out'}", "--threshold=0.9")
    return cli.main(["generate", *flags, *arguments])


@pytest.mark.parametrize("kind", ["folder", "array_record"])
def test_generate_writes_a_data_set_and_says_how_to_read_it(tmp_path, capsys, trained, kind):
    arguments = ("--identities=6", "--images_per_identity=4", f"--format={kind}", "--known=none")
    assert generate(tmp_path, *arguments) == 0
    out = capsys.readouterr().out
    assert f"24 images of 6 people: --data {kind}:{tmp_path / 'out'}" in out
    assert "largest cosine" not in out
    assert len(open_source(f"{kind}:{tmp_path / 'out'}")) == 24
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| model | vec2face, run faces, step 200 |" in card
    assert "from a normal distribution" in card


def test_people_are_drawn_like_and_compared_with_those_of_the_training(tmp_path, capsys, trained):
    known = "--known=synthetic:faces"
    assert generate(tmp_path, "--identities=3", "--images_per_identity=2", known) == 0
    assert "largest cosine to a known person: " in capsys.readouterr().out
    assert "drawn like those of | synthetic:faces |" in (
        (tmp_path / "out" / "README.md").read_text()
    )


def test_a_method_that_cannot_generate_is_an_error(tmp_path, capsys, trained):
    trained.method = object()
    assert generate(tmp_path, "--identities=3") == 1
    assert "object cannot generate images; take a run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_known_people_that_are_not_there_are_an_error_with_a_mend(tmp_path, capsys, trained):
    assert generate(tmp_path, "--identities=3", f"--known=folder:{tmp_path / 'no'}") == 1
    assert "labelled source by --known, or set it to 'none'" in capsys.readouterr().err


def test_flags_that_are_missing_are_named(capsys):
    assert cli.main(["generate", "--run=x", "--output=y"]) == 1
    assert "generate needs --identities" in capsys.readouterr().err
