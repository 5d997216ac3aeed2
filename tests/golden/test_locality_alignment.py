"""Locality Alignment against the official code: MaskEmbed, its MIM precursor, and calibration."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mim_jax import config as configs
from mim_jax.methods.locality_alignment import (
    CALIBRATION,
    LocalityAlignment,
    hide_pixels,
    no_values,
    scale_of,
    with_values,
)
from mim_jax.models import tower
from mim_jax.models.tower import Family, tower_settings
from mim_jax.training.optimizer import build_optimizer
from mim_jax.training.tree import flatten, split
from tests.golden.cases import (
    Case,
    assert_close,
    assert_gradient_close,
    case_params,
    images_nhwc,
)
from tests.golden.test_mae import pair

MASK_EMBED = case_params("locality_alignment")
MIM = case_params("locality_alignment", "mim")

LOSSES = ("mse", "cosine", "l1", "masked_mse", "unmasked_mse")


def family_of(cfg: dict) -> Family:
    """The backbone of a case, which need not be that of a published tower."""
    backbone = cfg["backbone"]
    encoder = dict(
        positions="learned",
        class_token=backbone["class_token"],
        pre_norm=backbone["pre_norm"],
        patch_bias=not backbone["pre_norm"],
        floor_grid=True,
    )
    blocks = dict(
        activation=backbone["act_layer"],
        qkv_bias="full" if cfg["qkv_bias"] else "none",
        epsilon=1e-5,
    )
    return Family(encoder, blocks)


def build(case: Case, changes: dict | None = None):
    """The method, and its config."""
    cfg, backbone = case.cfg, case.cfg["backbone"]
    mim = not any(key.startswith("encoder.") for key in case.group("param"))
    mean, std = (0.5, 0.4, 0.3), (0.3, 0.2, 0.1)
    size, patch = pair(backbone["img_size"]), pair(backbone["patch_size"])
    settings = tower_settings(
        "tiny",
        family="case",
        width=backbone["embed_dim"],
        depth=backbone["depth"],
        heads=backbone["num_heads"],
        mlp_ratio=float(backbone["mlp_ratio"]),
        channels=3,
        mean=mean,
        std=std,
    )
    settings |= {"patch_size": patch, "image_size": size}
    fields = {
        **{f"model.teacher.{field}": value for field, value in settings.items()},
        "model.task": "mim" if mim else "mask_embed",
        "model.skip_blocks": 0 if mim else cfg["skip_blocks"],
        "model.logit_cap": float(cfg["max_attn_val"]),
        "model.output_head": cfg.get("output_head", "linear"),
        "model.decoder_width": 0 if mim else cfg["decoder_width"],
        "model.decoder_heads": cfg["decoder_heads"],
        "model.decoder_depth": cfg["decoder_layers"],
        "model.norm_epsilon": 1e-5,
        "data.image_size": size,
        "data.channels": 3,
        "data.mean": mean,
        "data.std": std,
        "optimizer.lr": cfg["adamw"]["lr"],
        "optimizer.eps": cfg["adamw"]["eps"],
        "optimizer.b1": cfg["adamw"]["betas"][0],
        "optimizer.b2": cfg["adamw"]["betas"][1],
        "optimizer.weight_decay": cfg["adamw"]["weight_decay"],
        "optimizer.clip_norm": cfg["adamw"]["clip"],
        "compute_dtype": "float32",
    }
    config = configs.load("locality_alignment:clip_b16", {**fields, **(changes or {})})
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(tower.FAMILIES, "case", family_of(cfg))
        method = LocalityAlignment.build(config)
    return method, config


@functools.cache
def read(path) -> Case:
    return Case(path)


def statistics(scale: float) -> dict:
    """What gives a scale by hand."""
    return {CALIBRATION: {"count": 1.0, "mean": 0.0, "squares": 1 / scale**2}}


def load(method: LocalityAlignment, case: Case) -> dict:
    """Variables of a case."""
    images = jnp.zeros((1, *method.inputs["image"].shape))
    like = jax.eval_shape(lambda: method.init(jax.random.key(0), {"image": images}))["params"]
    params = method.layout().load(case.group("param"), like)
    extra = statistics(case.cfg["teacher_scale"]) if method.is_calibrated else {}
    return {"params": params, **extra}


def objective(params, method: LocalityAlignment, extra, images, kept):
    variables = {"params": params, **extra}
    target = method.target(variables, images, kept)
    output = method.predict(variables, images, kept)
    return method.objective(output.reconstruction, target, kept), (target, output)


@functools.cache
def computed(path, **changes):
    case = read(path)
    method, config = build(case, {f"model.{name}": value for name, value in changes.items()})
    variables = load(method, case)
    params = variables.pop("params")
    images, kept = jnp.asarray(images_nhwc(case["in/imgs"])), jnp.asarray(case["out/mask"])
    value = jax.value_and_grad(objective, has_aux=True)
    (loss, rest), gradient = jax.jit(value, static_argnums=1)(
        params, method, variables, images, kept
    )
    return method, config, params, loss, rest, jax.device_get(gradient)


def check_gradients(method: LocalityAlignment, gradient, case: Case) -> None:
    ours, golden = method.layout().save(gradient), case.group("grad")
    assert set(golden) == {key for key in ours if not key.startswith("teacher.")}
    for key, value in golden.items():
        assert_gradient_close(ours[key], value, key)
    for path, leaf in flatten(gradient).items():
        assert not path.startswith("teacher/") or not np.any(leaf), path


@pytest.mark.parametrize("path", [*MASK_EMBED, *MIM])
@pytest.mark.parametrize("scan", [False, True])
def test_loss_targets_reconstruction_and_all_gradients_match(path, scan):
    case = read(path)
    changes = {"scan": True, "remat": "full"} if scan else {}
    method, _, _, loss, (target, output), gradient = computed(path, **changes)
    assert_close(target, case["out/teacher"], "teacher")
    assert_close(output.reconstruction, case["out/reconstruction"], "reconstruction")
    assert_close(loss, case["out/loss"], "loss")
    check_gradients(method, gradient, case)


@pytest.mark.parametrize("path", MASK_EMBED)
def test_encoder_and_masked_images_match(path):
    case = read(path)
    method, _, _, _, (_, output), gradient = computed(path)
    images, kept = jnp.asarray(images_nhwc(case["in/imgs"])), jnp.asarray(case["out/mask"])
    masked = hide_pixels(images, kept, method.encoder)
    assert_close(masked, images_nhwc(case["out/masked_imgs"]), "masked images")
    assert_close(output.latent, case["out/act/encoder.norm"], "encoder's norm")
    assert_close(output.tokens, case["out/encoder_tokens"], "encoder's tokens")
    assert_close(output.tokens, case["out/act/encoder"], "encoder")
    trained = {name: leaf for name, leaf in gradient.items() if name != "teacher"}
    assert_close(optax.tree.norm(trained), case["out/grad_norm"], "gradient norm")


@pytest.mark.parametrize("path", MASK_EMBED)
def test_outputs_of_every_block_match(path):
    case = read(path)
    method, _, params, _, (_, output), _ = computed(path)
    images, kept = jnp.asarray(images_nhwc(case["in/imgs"])), jnp.asarray(case["out/mask"])
    _, blocks = jax.jit(method.encoder.apply)({"params": params["encoder"]}, images)
    for i, block in enumerate(blocks):
        assert_close(block, case[f"out/act/encoder.blocks.{i}"], f"encoder's block {i}")
    decoder = method.model.decoder
    tokens = output.tokens.repeat(len(kept) // len(images), axis=0)
    apply = functools.partial(decoder.apply, capture_intermediates=True, mutable=True)
    _, seen = jax.jit(apply)({"params": params["decoder"]}, tokens, kept)
    seen = seen["intermediates"]
    for i, block in enumerate(seen["transformer"]["__call__"][0][1]):
        assert_close(block, case[f"out/act/decoder.blocks.{i}"], f"decoder's block {i}")
    assert_close(seen["norm"]["__call__"][0], case["out/act/decoder.norm"], "decoder's norm")


@pytest.mark.parametrize("path", [*MASK_EMBED, *MIM])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_matches(path, name):
    case = read(path)
    method, _ = build(case, {"model.loss": name})
    loss = method.objective(
        jnp.asarray(case["out/reconstruction"]),
        jnp.asarray(case["out/teacher"]),
        jnp.asarray(case["out/mask"]),
    )
    assert_close(loss, case[f"out/loss_{name}"], name)


@pytest.mark.parametrize("path", MASK_EMBED)
def test_a_step_with_decay_on_every_tensor_matches(path):
    case = read(path)
    method, config, params, _, _, gradient = computed(path)
    rate = config.optimizer.lr
    optimizer = build_optimizer(
        config.optimizer, (), {"default": lambda step: rate}, no_decay=method.no_decay
    )
    trained, _ = split(params, method.frozen)
    changes, _ = split(gradient, method.frozen)

    @jax.jit
    def step(params, gradient):
        updates, _ = optimizer.update(gradient, optimizer.init(params), params, step=0)
        return optax.apply_updates(params, updates)

    stepped = jax.device_get(step(trained, changes))
    after = method.layout().save({**params, **stepped})
    golden = case.group("out/param_after_step")
    assert golden
    for key, value in golden.items():
        moved = np.abs(value - case[f"param/{key}"]).max()
        assert moved > 0.5 * rate, key
        # Adam's first step is the sign of the gradient, so what is near zero decides little.
        gradient_of = np.abs(case[f"grad/{key}"])
        sure = gradient_of > 1e-4 * gradient_of.max()
        assert sure.mean() > 0.6, key
        assert_close(after[key][sure], value[sure], key, relative=1e-3)
        np.testing.assert_allclose(after[key], value, atol=2.1 * rate, err_msg=key)


@pytest.mark.parametrize("path", MASK_EMBED)
def test_calibration_matches(path):
    case = read(path)
    method, _ = build(case)
    variables = load(method, case)
    teacher = jax.jit(method.unscaled_target)
    known = no_values()
    for images, kept in zip(case["in/calib_imgs"], case["out/calib_masks"], strict=True):
        known = with_values(known, teacher(variables, images_nhwc(images), kept))
    variance = known["squares"] / known["count"]
    assert_close(variance, case["out/calib_variance"].astype(np.float32), "variance")
    assert_close(scale_of(known), case["out/calib_scale"].astype(np.float32), "scale")
    assert float(known["count"]) == math.prod(case["out/calib_masks"].shape[:2]) * math.prod(
        case["out/teacher"].shape[1:]
    )


@pytest.mark.parametrize("path", MASK_EMBED)
def test_initial_values_match(path):
    case = read(path)
    method, _ = build(case, {"model.decoder_depth": 1})
    key, fresh, model = jax.random.key(0), case.cfg["fresh_init"], method.model
    tokens = jnp.zeros((1, *case["out/encoder_tokens"].shape[1:]))
    for leaf in jax.tree.leaves(model.head.init(key, tokens)):
        assert np.abs(leaf).sum() == fresh["head_abs_sum"]
    decoder = jax.jit(model.decoder.init)(key, tokens, case["out/mask"][:1])["params"]
    block = decoder["transformer"]["blocks_0"]
    for name in ("layer_scale1", "layer_scale2"):
        np.testing.assert_allclose(block[name]["scale"], fresh["decoder_layer_scale"])


@pytest.mark.parametrize("path", [*MASK_EMBED, *MIM])
def test_official_checkpoint_round_trip_is_exact(path):
    case = read(path)
    for changes in ({}, {"model.scan": True}):
        method, _ = build(case, changes)
        params = load(method, case)["params"]
        saved = method.layout().save(params)
        official = case.group("param")
        # The scale is no parameter, but measured by every run.
        assert method.layout().left_out(official) == ["teacher.output_scaling.scale"]
        assert set(saved) == set(official) - {"teacher.output_scaling.scale"}
        for key, value in saved.items():
            np.testing.assert_array_equal(value, official[key], err_msg=key)
        again = flatten(method.layout().load(saved, params))
        for name, value in flatten(params).items():
            np.testing.assert_array_equal(again[name], value)
