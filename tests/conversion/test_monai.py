"""Encoders for volumes as files for MONAI, and what other formats say of them."""

import jax
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.conversion.export import FORMATS, Model, export_variables, find_format
from mim_jax.conversion.initial import read_donor
from mim_jax.method import Method, method_class
from mim_jax.training.tree import flatten
from tests.methods.tiny import tiny_config, tiny_mae

SIZES = {
    "model.width": 12,
    "model.depth": 4,
    "model.heads": 2,
    "model.patch_size": (2, 2, 2),
    "model.taps": (0, 1, 2),
    "data.image_size": (4, 4, 4),
    "compute_dtype": "float32",
}
OWN = {"hi_end_mae": {"model.decoder_width": 12}, "unetr": {"model.feature_size": 2}}


def built(name: str) -> tuple[Method, object, dict]:
    config = configs.load(f"{name}:tiny", {**SIZES, **OWN[name]})
    method = method_class(name).build(config)
    batch = {"image": np.zeros((1, 4, 4, 4, 1), np.float32)}
    return method, config, jax.device_get(method.init(jax.random.key(0), batch))


def test_pre_trained_encoder_goes_to_monai_without_its_class_token(tmp_path):
    method, config, variables = built("hi_end_mae")
    path = tmp_path / "vit.safetensors"
    notes = export_variables(method, config, variables, path, "monai-vit")
    assert "left out: encoder (1 arrays); it travels by official" in notes
    unetr, *_ = built("unetr")
    found = read_donor(str(path), unetr)
    given = flatten(variables["params"])
    for name, value in found.variables.items():
        part = name.removeprefix("params/")
        if part != "encoder/positions":
            np.testing.assert_array_equal(value, given[part])
    table = method.encoder.position_table()[1:]
    np.testing.assert_array_equal(found.variables["params/encoder/positions"], table)
    assert not any(name.startswith("params/decoder/") for name in found.variables)


def test_official_exports_of_both_check_the_features_of_volumes(tmp_path):
    for name in OWN:
        method, config, variables = built(name)
        notes = export_variables(method, config, variables, tmp_path / f"{name}.safetensors")
        assert "checked: features" in notes


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"official", "monai-vit"}))
def test_formats_for_images_refuse_encoders_of_volumes(name):
    method, config, variables = built("hi_end_mae")
    model = Model(method, config, flatten(variables["params"]))
    with pytest.raises(ValueError, match="cannot hold this model") as error:
        find_format(name, model)
    assert "Formats that can: official, monai-vit" in str(error.value)


def test_monai_refuses_encoders_of_images():
    model = Model(tiny_mae(), tiny_config(), {})
    with pytest.raises(ValueError, match="its encoder takes images"):
        find_format("monai-vit", model)
