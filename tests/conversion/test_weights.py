import json

import numpy as np
import pytest

from mim_jax.conversion.files import write_state_dict
from mim_jax.conversion.huggingface import to_huggingface
from mim_jax.conversion.weights import read_weights
from tests.conversion.models import build, classifier_config, mae_config, variables, written
from tests.methods.tiny import tiny_mae, tiny_params


def official() -> dict[str, np.ndarray]:
    return tiny_mae().layout().save(tiny_params())


def encoder_only() -> dict[str, np.ndarray]:
    return {k: v for k, v in official().items() if not k.startswith(("decoder_", "mask_token"))}


@pytest.fixture
def folder(tmp_path):
    """An MAE as a model folder of transformers."""
    config = mae_config()
    method = build(config)
    return written("hf-mae", config, method, variables(method), tmp_path / "folder")


def edit(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


FORMATS = {
    "hf-mae": mae_config,
    "hf-vit": mae_config,
    "hf-classifier": lambda: classifier_config("cls"),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_folder_is_recognized_and_comes_in_the_papers_names(kind, tmp_path):
    config = FORMATS[kind]()
    method = build(config)
    written(kind, config, method, variables(method), tmp_path)
    weights = read_weights(tmp_path)
    assert weights.format == kind
    assert weights.notes == ()
    expected = method.layout().save(variables(method)["params"])
    assert set(weights.state) == {
        key for key in expected if kind != "hf-vit" or not key.startswith(("decoder", "mask"))
    }
    for key, value in weights.state.items():
        np.testing.assert_array_equal(value, expected[key], err_msg=key)


def test_an_official_file_comes_as_it_is(tmp_path):
    write_state_dict(tmp_path / "x.safetensors", official())
    weights = read_weights(tmp_path / "x.safetensors")
    assert (weights.format, weights.sizes, weights.notes) == ("official", {}, ())
    assert set(weights.state) == set(official())


def test_a_file_with_the_keys_of_a_vit_alone_is_timms(tmp_path):
    write_state_dict(tmp_path / "x.safetensors", encoder_only())
    weights = read_weights(tmp_path / "x.safetensors")
    assert (weights.format, weights.sizes) == ("timm", {})


def test_sizes_that_no_shape_tells_come_from_the_file_beside_the_weights(folder, tmp_path):
    assert read_weights(folder).sizes == {"heads": 2, "decoder_heads": 2, "image_size": (12, 12)}
    config = classifier_config("mean", {"model.heads": 4})
    method = build(config)
    path = written("timm", config, method, variables(method), tmp_path / "x.safetensors")
    assert read_weights(path).sizes == {"heads": 4, "image_size": (12, 12)}


def test_another_epsilon_is_noted(folder):
    edit(folder, layer_norm_eps=1e-12)
    (note,) = read_weights(folder).notes
    assert "has layer_norm_eps 1e-12; our models compute with 1e-06" in note


def test_another_activation_is_an_error(folder):
    edit(folder, hidden_act="gelu_new")
    with pytest.raises(ValueError, match="hidden_act is 'gelu_new'; our models compute 'gelu'"):
        read_weights(folder)


@pytest.mark.parametrize("architectures", [["BeitModel"], [], None])
def test_another_architecture_is_an_error_that_lists_the_known(folder, architectures):
    edit(folder, architectures=architectures)
    with pytest.raises(ValueError, match="known are ViTMAEForPreTraining, ViTMAEModel, ViTModel"):
        read_weights(folder)


def test_a_pooler_is_not_read_and_named(folder):
    theirs = to_huggingface(encoder_only(), prefix="")
    write_state_dict(folder / "model.safetensors", {**theirs, "pooler.dense.bias": np.zeros(2)})
    edit(folder, architectures=["ViTModel"])
    weights = read_weights(folder)
    assert set(weights.state) == set(encoder_only())
    assert weights.notes == ("not read: pooler.dense.bias",)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "is a folder, but no run of ours .* no model folder"),
        ("model.safetensors", r"holds neither model\.safetensors nor pytorch_model\.bin"),
    ],
)
def test_an_incomplete_folder_is_an_error_that_names_what_is_missing(folder, name, message):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        read_weights(folder)


def test_a_missing_path_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        read_weights(tmp_path / "nowhere")
