"""CAE's classifier against the official code: relative position bias, layer scale, mean pool."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.losses import cross_entropy
from mim_jax.methods.finetune import FineTune
from tests.golden.cases import (
    Case,
    assert_close,
    assert_gradient_close,
    case_params,
    images_nhwc,
)
from tests.golden.test_mae import pair

classifiers = pytest.mark.parametrize("path", case_params("cae", "finetune"))


@functools.cache
def read(path) -> Case:
    return Case(path)


def build(cfg: dict, channels: int, **changes) -> FineTune:
    """The method from the official constructor's arguments."""
    assert cfg["mode"] == "finetune" and cfg["sin_pos_emb"] and cfg["qkv_bias"]
    assert cfg["norm_eps"] == 1e-6
    fields = {
        "model.size": "",
        "model.width": cfg["embed_dim"],
        "model.depth": cfg["depth"],
        "model.heads": cfg["num_heads"],
        "model.mlp_ratio": cfg["mlp_ratio"],
        "model.patch_size": pair(cfg["patch_size"]),
        "model.position_bias": cfg["use_rel_pos_bias"],
        "model.layer_scale": cfg["init_values"],
        "model.num_classes": cfg["num_classes"],
        "model.labels": "single",
        "data.image_size": pair(cfg["img_size"]),
        "data.channels": channels,
        "compute_dtype": "float32",
    }
    return FineTune.build(configs.load("finetune:cae_b16", {**fields, **changes}))


def load(case: Case, **changes):
    images = jnp.asarray(images_nhwc(case["in/images"]))
    method = build(case.cfg, images.shape[-1], **changes)
    like = jax.eval_shape(lambda: method.init(jax.random.key(0), {"image": images}))["params"]
    return method, images, method.layout().load(case.group("param"), like)


@classifiers
@pytest.mark.parametrize("scan", [False, True])
def test_features_logits_loss_and_all_gradients_match(path, scan):
    case = read(path)
    method, images, params = load(case, **{"model.scan": scan})
    labels = jnp.asarray(case["in/labels"].astype(np.int32))

    def loss_of(params):
        logits = method.logits({"params": params}, images)
        return cross_entropy(logits, labels), logits

    (loss, logits), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    assert_close(logits, case["out/logits"], "logits")
    assert_close(loss, case["out/loss"], "loss")
    ours = method.layout().save(jax.device_get(gradient))
    golden = case.group("grad")
    fixed = {table.key for table in method.layout().constants}
    assert set(golden) == set(ours) - fixed
    for key, value in golden.items():
        assert_gradient_close(ours[key], value, key)
    features = method.features({"params": params}, {"image": images})
    assert_close(features.pooled, case["out/features"], "features")


@classifiers
def test_the_official_checkpoint_goes_through_ours_exactly_with_its_index_tables(path):
    case = read(path)
    method, _, params = load(case)
    again = method.layout().save(params)
    assert set(again) == set(case.group("param"))
    fixed = {table.key for table in method.layout().constants}
    for key, value in case.group("param").items():
        if key in fixed:
            np.testing.assert_allclose(again[key], value, atol=1e-6, err_msg=key)
        else:
            np.testing.assert_array_equal(again[key], value, err_msg=key)


@classifiers
def test_a_classifier_takes_its_sizes_from_the_file(path):
    case = read(path)
    method, _, _ = load(case)
    other = build(
        {**case.cfg, "depth": case.cfg["depth"] + 1, "num_classes": 3},
        method.model.encoder.channels,
        **{"data.image_size": tuple(2 * side for side in method.model.encoder.image_size)},
    )
    assert other.sized_like(case.group("param"), {}) == method
