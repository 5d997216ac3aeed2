"""The classifiers on ConvMAE's encoder against the official codes of ConvMAE and DMJD."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.losses import cross_entropy
from mim_jax.methods.finetune import FineTune
from mim_jax.models.transformer import drop_path_scales
from mim_jax.training.optimizer import is_decayed
from mim_jax.training.tree import flatten, unflatten
from tests.golden.cases import (
    Case,
    assert_close,
    assert_gradient_close,
    case_params,
    images_nhwc,
)

convmae = pytest.mark.parametrize("path", case_params("mr_mae", "convvit"))
dmjd = pytest.mark.parametrize("path", case_params("dmjd", "finetune"))
both = pytest.mark.parametrize(
    ("variant", "path"),
    [
        pytest.param(variant, *given.values, id=f"{variant}-{given.id}", marks=given.marks)
        for variant, cases in (
            ("convmae_b16", case_params("mr_mae", "convvit")),
            ("dmjd_b16", case_params("dmjd", "finetune")),
        )
        for given in cases
    ],
)

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@functools.cache
def read(path) -> Case:
    return Case(path)


def images_of(case: Case) -> jax.Array:
    if "in/imgs" in case:
        return jnp.asarray(images_nhwc(case["in/imgs"]))
    return jnp.asarray((case["in/image_uint8_nhwc"] / 255 - MEAN) / STD, jnp.float32)


def build(case: Case, variant: str, **changes):
    """The method and its config from the official constructor's arguments."""
    cfg = case.cfg
    sizes = {"patch_size": [4, 2, 2], **cfg, **cfg.get("constructor", {})}
    assert cfg["global_pool"]
    first, second, third = sizes["mlp_ratio"]
    images = images_of(case)
    fields = {
        "model.size": "",
        "model.widths": tuple(sizes["embed_dim"]),
        "model.depths": tuple(sizes["depth"]),
        "model.heads": sizes["num_heads"],
        "model.patch_sizes": tuple(sizes["patch_size"]),
        "model.conv_mlp_ratios": (float(first), float(second)),
        "model.mlp_ratio": float(third),
        "model.num_classes": cfg["num_classes"],
        "model.labels": "single",
        "model.drop_path": cfg.get("drop_path_rate", 0.1),
        "model.layer_decay": cfg.get("layer_decay", 0.65),
        "optimizer.weight_decay": cfg.get("weight_decay", 0.05),
        "data.image_size": images.shape[1:3],
        "data.channels": images.shape[-1],
        "compute_dtype": "float32",
    }
    config = configs.load(f"finetune:{variant}", {**fields, **changes})
    return FineTune.build(config), config


def load(method: FineTune, case: Case):
    images = images_of(case)
    like = jax.eval_shape(lambda: method.init(jax.random.key(0), {"image": images}))["params"]
    return images, method.layout().load(case.group("param"), like)


@both
def test_features_logits_loss_and_all_gradients_match(variant, path):
    case = read(path)
    method, _ = build(case, variant)
    images, params = load(method, case)
    labels = jnp.asarray(case["in/labels"].astype(np.int32))
    outputs = "out/eval_{}" if "out/eval_logits" in case else "out/{}"

    def loss_of(params):
        logits = method.logits({"params": params}, images)
        return cross_entropy(logits, labels), logits

    (loss, logits), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    assert_close(logits, case[outputs.format("logits")], "logits")
    assert_close(loss, case["out/loss"], "loss")
    ours = method.layout().save(jax.device_get(gradient))
    assert set(case.group("grad")) == set(ours)
    for key, value in case.group("grad").items():
        assert_gradient_close(ours[key], value, key)
    features = method.features({"params": params}, {"image": images})
    assert_close(features.pooled, case[outputs.format("features")], "features")
    assert features.tokens.shape[1] == math.prod(features.grid)


@both
def test_the_official_checkpoint_goes_through_ours_exactly(variant, path):
    case = read(path)
    method, _ = build(case, variant)
    _, params = load(method, case)
    again = method.layout().save(params)
    assert set(again) == set(case.group("param"))
    for key, value in case.group("param").items():
        np.testing.assert_array_equal(again[key], value, err_msg=key)
    assert method.sized_like(case.group("param"), {}) == method


@convmae
@pytest.mark.parametrize("scan", [False, True])
def test_rate_scales_and_decay_equal_the_reference_table(path, scan):
    case = read(path)
    method, config = build(case, "convmae_b16", **{"model.scan": scan})
    _, params = load(method, case)
    scales, decays = {}, {}
    for key, value in flatten(params).items():
        scales[key] = np.broadcast_to(method.rate_scale(key, value.shape), value.shape)
        decay = config.optimizer.weight_decay * is_decayed(key, value, method.no_decay)
        decays[key] = np.full(value.shape, decay)
    layout = method.layout()
    scale_of, decay_of = (layout.save(unflatten(tree)) for tree in (scales, decays))
    table = case.text("out/param_groups")
    assert set(table) == set(scale_of)
    for key, (scale, decay, _) in table.items():
        np.testing.assert_allclose(scale_of[key], scale, rtol=1e-6, err_msg=key)
        np.testing.assert_allclose(decay_of[key], decay, rtol=1e-6, err_msg=key)


@convmae
def test_drop_path_rates_grow_over_the_blocks_of_all_stages(path):
    case = read(path)
    method, _ = build(case, "convmae_b16")
    rates = case["out/drop_path_rates"]
    assert method.model.depth == len(rates)
    noise = jnp.full((len(rates), 2, 1), 0.999)
    scales = drop_path_scales(noise, method.model.encoder.transformer.drop_path)
    assert_close(1 - 1 / scales[:, 0, 0, 0, 0], rates, "rates")


@dmjd
def test_a_pre_trained_file_of_another_part_is_read_without_its_fusion_and_decoder(path):
    case = read(path)
    method, _ = build(case, "dmjd_b16")
    _, params = load(method, case)
    state = {k: v for k, v in case.group("param").items() if not k.startswith(("fc_norm", "head"))}
    rest = ("stage1_output_decode.weight", "decoder_pos_embed", "proj_embed.0.bias", "norm.bias")
    state |= {key: np.zeros(3, np.float32) for key in rest}
    found = method.layout().load(state, params)
    assert set(found) == {"encoder"}
    assert method.layout().left_out(state) == sorted(rest)
