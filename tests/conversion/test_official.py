import json
import re

import jax
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.cli import main
from mim_jax.conversion.files import read_state_dict, write_state_dict
from mim_jax.conversion.official import export_run, import_checkpoint
from mim_jax.conversion.towers import read_tower
from mim_jax.method import method_class, parameter_shapes
from mim_jax.training.checkpoints import read_variables
from mim_jax.training.tree import flatten
from tests.conversion.models import build, classifier_config, mae_config, variables, written
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
    first, checked, card = note.splitlines()
    assert first == f"wrote 62 arrays to {tmp_path / 'again.safetensors'}; read back exactly"
    assert checked.startswith("checked: features of 2 fixed images")
    assert card == f"model card: {tmp_path / 'again.md'}"
    assert "| checkpoint | step 0 |" in (tmp_path / "again.md").read_text()


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


def exported(config, kind, output):
    method = build(config)
    return written(kind, config, method, variables(method), output)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("hf-mae", mae_config()),
        ("timm", classifier_config("mean")),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_whole_model_comes_back_from_any_format(kind, config, tmp_path):
    source = exported(config, kind, tmp_path / ("x.safetensors" if kind == "timm" else "x"))
    import_checkpoint(config, source, tmp_path / "run")
    params = read_variables(tmp_path / "run")[0]["params"]
    expected = flatten(variables(build(config))["params"])
    assert set(flatten(params)) == set(expected)
    for path, value in flatten(params).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


@pytest.mark.parametrize("kind", ["hf-vit", "timm"])
def test_an_encoder_leaves_the_decoder_of_an_mae_fresh_and_lists_it(kind, tmp_path):
    config = mae_config()
    source = exported(config, kind, tmp_path / ("x.safetensors" if kind == "timm" else "x"))
    notes = import_checkpoint(config, source, tmp_path / "run").splitlines()
    assert notes[0].startswith("initialized 29 of 60 arrays")
    (listed,) = [note for note in notes if "at their initial values" in note]
    assert sum(map(int, re.findall(r"decoder/\w+ \((\d+) arrays\)", listed))) == 30
    assert "decoder/mask_token" in listed
    params = read_variables(tmp_path / "run")[0]["params"]
    given = variables(build(config))["params"]
    np.testing.assert_array_equal(params["encoder"]["cls_token"], given["encoder"]["cls_token"])
    assert np.all(params["decoder"]["norm"]["scale"] == 1)


def test_a_run_goes_to_any_format(run, tmp_path):
    note = export_run(run, tmp_path / "folder", "hf-vit")
    assert f"wrote 30 arrays to {tmp_path / 'folder'}" in note
    assert "left out: decoder (31 arrays)" in note


def test_a_run_is_not_exported_into_itself(run):
    before = (run / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"is a run, with a config\.json of its own; choose"):
        export_run(run, run, "hf-vit")
    assert (run / "config.json").read_bytes() == before


def test_the_command_line_takes_a_format(run, tmp_path, capsys):
    command = ["convert", f"--run={run}", f"--output={tmp_path / 'x.safetensors'}"]
    assert main([*command, "--format=timm"]) == 0
    assert "left out: decoder (31 arrays); it travels by official" in capsys.readouterr().out
    assert (tmp_path / "x.json").is_file()
    assert main([*command, "--format=onnx"]) == 1
    assert "unknown format 'onnx'; known are official, hf-mae" in capsys.readouterr().err


def test_exporting_what_is_no_run_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint"):
        export_run(tmp_path, tmp_path / "again.safetensors")


def test_exporting_a_step_that_is_not_there_is_an_error_that_lists_the_steps(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7; it has steps \[0\]"):
        export_run(run, tmp_path / "again.safetensors", step=7)


def test_a_classifier_s_file_tells_its_number_of_classes(tmp_path):
    source = exported(classifier_config("cls"), "official", tmp_path / "x.safetensors")
    unknown = classifier_config("cls", {"model.num_classes": 0, "model.labels": ""})
    import_checkpoint(unknown, source, tmp_path / "run")
    params, about = read_variables(tmp_path / "run")
    assert about["config"]["model"]["num_classes"] == 5
    assert params["params"]["head"]["bias"].shape == (5,)


def test_a_pre_trained_file_asks_for_the_number_of_classes(source, tmp_path):
    sizes = {"data.image_size": (8, 12), "data.channels": 1, "data.mean": (0,), "data.std": (1,)}
    unknown = classifier_config("cls", {"model.num_classes": 0, **sizes})
    with pytest.raises(ValueError, match=r"has no classifier to tell model.num_classes: set it"):
        import_checkpoint(unknown, source, tmp_path / "run")


@pytest.mark.parametrize("path", ["tiny", ""])
def test_a_teacher_comes_from_its_own_file_if_the_config_has_one(path, tmp_path):
    small = {"model.width": 16, "model.heads": 2, "compute_dtype": "float32"}
    wrong = {"model.teacher.width": 32, "model.teacher.path": path} if path else {}
    config = configs.load("maskalign:tiny", {**small, "batch_size": 8})
    method = method_class("maskalign").build(config)
    ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), parameter_shapes(method))
    student = method.layout().save(ones)
    write_state_dict(
        tmp_path / "x.safetensors", {k: v for k, v in student.items() if "teacher" not in k}
    )
    configs.override(config, {**wrong, "model.teacher.path": path})
    notes = import_checkpoint(config, tmp_path / "x.safetensors", tmp_path / "run")
    variables, about = read_variables(tmp_path / "run")
    given, ours = read_tower("tiny")[1], flatten(variables["params"]["teacher"])
    equal = [np.array_equal(ours[name], given[name]) for name in ours]
    assert about["config"]["model"]["teacher"]["width"] == 64
    if path:
        assert all(equal) and "teacher/" not in notes
    else:
        assert not all(equal) and "at their initial values: teacher/" in notes
