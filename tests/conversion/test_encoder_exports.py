"""Encoders of all kinds for transformers and timm: the same function, or a refusal with reason."""

import dataclasses

import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.conversion.check import TOLERANCE, fixed_noise, largest_difference, outputs
from mim_jax.conversion.export import FORMATS, export_variables
from mim_jax.conversion.files import read_state_dict
from mim_jax.conversion.formats import Model, split_biases
from mim_jax.conversion.timm_models import constructor_arguments
from mim_jax.conversion.weights import read_weights
from mim_jax.method import method_class
from mim_jax.training.tree import flatten, unflatten
from tests.conversion.libraries import need_timm, need_transformers
from tests.conversion.models import build, mae_config, variables, written


def changed(blocks=None, **encoder):
    """An MAE whose encoder has other features, and its config."""
    config = mae_config()
    method = build(config)
    ours = method.model.encoder
    ours = ours.clone(transformer=ours.transformer.clone(**(blocks or {})), **encoder)
    return config, dataclasses.replace(method, model=method.model.clone(encoder=ours))


HELD_BY_TIMM = {
    "layer scale, registers and learned positions": dict(
        blocks=dict(layer_scale=0.1), registers=2, positions="learned"
    ),
    "registers and biases of query and value": dict(
        blocks=dict(qkv_bias="query_value"), registers=2
    ),
    "a norm before blocks of another activation without biases": dict(
        blocks=dict(activation="quick_gelu", qkv_bias="none"), pre_norm=True, patch_bias=False
    ),
    "stacked blocks": dict(blocks=dict(scan=True, layer_scale=0.1, qkv_bias="query_value")),
}
NOT_HELD_BY_TIMM = {
    "bounds its attention logits": dict(blocks=dict(logit_cap=30.0)),
    "adds a bias of relative positions": dict(blocks=dict(position_bias=(3, 3))),
    "adds a bias of relative positions to its attention": dict(shared_position_bias=True),
    "has a bias in its patch embedding": dict(pre_norm=True),
    "has no bias in its patch embedding": dict(patch_bias=False),
    "has LayerNorms of epsilon 1e-05": dict(blocks=dict(epsilon=1e-5)),
    "has attention heads of a width of their own": dict(blocks=dict(head_width=4)),
    "has no positions": dict(positions="none"),
}
HELD_BY_TRANSFORMERS = {
    "biases of query and value": dict(blocks=dict(qkv_bias="query_value")),
    "another epsilon": dict(blocks=dict(epsilon=1e-3)),
}
NOT_HELD_BY_TRANSFORMERS = {
    **{text: case for text, case in NOT_HELD_BY_TIMM.items() if "epsilon" not in text},
    "scales its branches by learned factors": dict(blocks=dict(layer_scale=0.1)),
    "has register tokens": dict(registers=2),
    "normalizes the tokens before its first block": dict(pre_norm=True, patch_bias=False),
    "has the activation 'quick_gelu'": dict(blocks=dict(activation="quick_gelu")),
}


@pytest.mark.parametrize(
    ("kind", "text", "case"),
    [("timm", *item) for item in NOT_HELD_BY_TIMM.items()]
    + [("hf-vit", *item) for item in NOT_HELD_BY_TRANSFORMERS.items()]
    + [("hf-mae", *item) for item in NOT_HELD_BY_TRANSFORMERS.items()],
)
def test_what_a_reader_cannot_compute_is_refused_with_the_reason(kind, text, case):
    config, method = changed(**case)
    assert text in FORMATS[kind].refusal(Model(method, config, {}))


def assert_same(kind, config, method, path):
    """What was written gives the parameters back, and the library computes what we compute."""
    given = variables(method)
    written(kind, config, method, given, path)
    model = Model(method, config, flatten(given["params"]))
    table = FORMATS[kind].table(model)
    held = {rule.path: model.params[rule.path] for rule in table.rules}
    again = table.load(split_biases(read_weights(path).state, table), unflatten(held))
    for name, value in flatten(again).items():
        np.testing.assert_array_equal(value, held[name], err_msg=name)
    shape = (2, *config.data.image_size, config.data.channels)
    images = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    noise = np.tile(fixed_noise(method)[:1], (2, 1))
    theirs = FORMATS[kind].forward(path, images, noise)
    ours = outputs(method, given, images, noise)
    assert largest_difference({"tokens": ours["tokens"]}, {"tokens": theirs["tokens"]}) < TOLERANCE


@pytest.mark.parametrize("title", HELD_BY_TIMM)
def test_timm_computes_what_we_compute(title, tmp_path):
    need_timm()
    config, method = changed(**HELD_BY_TIMM[title])
    assert_same("timm", config, method, tmp_path / "x.safetensors")


def test_timm_has_encoders_without_class_token():
    config, method = changed(class_token=False)
    model = Model(method, config, {})
    assert not FORMATS["timm"].refusal(model)
    arguments = constructor_arguments(model)
    assert (arguments["class_token"], arguments["global_pool"]) == (False, "avg")
    assert "has no class token" in FORMATS["hf-vit"].refusal(model)


@pytest.mark.parametrize("title", HELD_BY_TRANSFORMERS)
def test_transformers_computes_what_we_compute(title, tmp_path):
    need_transformers()
    config, method = changed(**HELD_BY_TRANSFORMERS[title])
    assert_same("hf-vit", config, method, tmp_path / "x")


def test_key_part_of_a_written_bias_is_zero(tmp_path):
    config, method = changed(blocks=dict(qkv_bias="query_value"))
    given = variables(method)
    path = written("timm", config, method, given, tmp_path / "x.safetensors")
    query, key, value = np.split(read_state_dict(path)["blocks.0.attn.qkv.bias"], 3)
    block = given["params"]["encoder"]["transformer"]["blocks_0"]["attention"]
    np.testing.assert_array_equal(query, block["query_bias"].reshape(-1))
    np.testing.assert_array_equal(key, np.zeros(16))
    np.testing.assert_array_equal(value, block["value_bias"].reshape(-1))


STUDENTS = {
    "maskalign": ("timm", "hf-vit"),
    "mr_mae": ("timm", "hf-vit"),
    "cae": ("timm",),
}
"""Formats that hold the student of a method's tiny variant."""


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n, ks in STUDENTS.items() for k in ks])
def test_aligned_student_travels_without_its_teacher(name, kind, tmp_path):
    need_timm() if kind == "timm" else need_transformers()
    small = {"model.width": 16, "model.depth": 4, "model.heads": 2, "compute_dtype": "float32"}
    config = configs.load(f"{name}:tiny", small)
    method = method_class(name).build(config)
    output = tmp_path / ("x.safetensors" if kind == "timm" else "x")
    notes = export_variables(method, config, variables(method), output, kind)
    assert "read back exactly" in notes
    assert "checked: tokens by" in notes
    assert not any("teacher" in key for key in read_weights(output).state)
