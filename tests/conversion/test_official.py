import json

import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.conversion.files import read_state_dict, write_state_dict
from mim_jax.conversion.official import export_run, import_checkpoint
from mim_jax.training.checkpoints import read_variables
from tests.methods.tiny import tiny_config, tiny_mae, tiny_params


def official() -> dict[str, np.ndarray]:
    return tiny_mae().layout().save(tiny_params())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "mae.safetensors"
    write_state_dict(path, official())
    return path


@pytest.fixture(scope="module")
def run(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "imported"
    import_checkpoint(tiny_config(), source, folder)
    return folder


def test_import_and_export_give_back_the_identical_file(source, run, tmp_path):
    note = export_run(run, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == source.read_bytes()
    assert note == f"wrote 62 arrays to {tmp_path / 'again.safetensors'}; read back exactly"


def test_a_file_for_pytorch_holds_the_same_arrays(run, tmp_path):
    pytest.importorskip("torch")
    export_run(run, tmp_path / "again.pth", step=0)
    again = read_state_dict(tmp_path / "again.pth")
    assert set(again) == set(official())
    for key, value in official().items():
        np.testing.assert_array_equal(again[key], value)


def test_an_imported_run_knows_its_config_and_method(run):
    about = read_variables(run)[1]
    assert about["method"] == "mae"
    expected = configs.leaves(tiny_config())
    assert configs.leaves(configs.from_json(about["config"])) == expected
    assert configs.leaves(configs.from_json((run / "config.json").read_text())) == expected
    assert json.loads((run / "config.json").read_text())["model"]["width"] == 16


def test_a_run_is_never_overwritten(source, run, tmp_path):
    with pytest.raises(ValueError, match="holds checkpoints already; choose another --output"):
        import_checkpoint(tiny_config(), source, run)


def test_an_import_that_does_not_fit_leaves_no_folder(tmp_path):
    other = official()
    del other["norm.bias"]
    write_state_dict(tmp_path / "mae.safetensors", other)
    with pytest.raises(ValueError, match=r"does not fit the model:\n  missing: norm\.bias"):
        import_checkpoint(tiny_config(), tmp_path / "mae.safetensors", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_importing_a_missing_file_leaves_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        import_checkpoint(tiny_config(), tmp_path / "nowhere.safetensors", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_exporting_to_an_unknown_kind_of_file_is_an_error(run, tmp_path):
    with pytest.raises(ValueError, match=r"unknown kind '.npz'; write \.safetensors or \.pth"):
        export_run(run, tmp_path / "again.npz")
    assert list(tmp_path.iterdir()) == []


def test_exporting_what_is_no_run_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint"):
        export_run(tmp_path, tmp_path / "again.safetensors")


def test_exporting_a_step_that_is_not_there_is_an_error_that_lists_the_steps(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7; it has steps \[0\]"):
        export_run(run, tmp_path / "again.safetensors", step=7)
