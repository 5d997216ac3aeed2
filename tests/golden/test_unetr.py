"""UNETR against the official code on MONAI: loss, stages, logits, gradients, and the layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax import losses
from mim_jax.methods.unetr import SegmentationFineTune
from mim_jax.models.unetr import UNETR
from mim_jax.training.tree import flatten
from tests.golden.cases import Case, assert_close, assert_gradient_close, case_params

POSITIONS = {"perceptron": "learned_patches"}


def triple(size) -> tuple[int, int, int]:
    return (size, size, size) if isinstance(size, int) else tuple(size)


def taps_of(case: Case) -> tuple[int, ...]:
    """Numbers of the blocks whose outputs the file holds."""
    return tuple(sorted(int(k[6:]) for k in case.group("out") if k.startswith("hidden")))


def build(case: Case, **changes) -> SegmentationFineTune:
    """The method from the official constructor's arguments."""
    cfg = case.cfg
    fields = {
        "model.width": cfg["hidden_size"],
        "model.depth": cfg["layers"],
        "model.heads": cfg["num_heads"],
        "model.mlp_ratio": cfg["mlp_dim"] / cfg["hidden_size"],
        "model.patch_size": triple(cfg["patch_size"]),
        "model.positions": POSITIONS[cfg["pos_embed"]],
        "model.taps": taps_of(case),
        "model.feature_size": cfg["feature_size"],
        "model.num_classes": cfg["out_channels"],
        "data.image_size": triple(cfg["img_size"]),
        "data.channels": cfg["in_channels"],
        "compute_dtype": "float32",
    }
    return SegmentationFineTune.build(configs.load("unetr", {**fields, **changes}))


@functools.cache
def read(path) -> Case:
    return Case(path)


def load(method: SegmentationFineTune, case: Case):
    volumes = np.moveaxis(case["in/image"], 1, -1)
    batch = {"image": jnp.asarray(volumes), "segmentation": jnp.asarray(case["in/label"][:, 0])}
    like = jax.eval_shape(lambda: method.init(jax.random.key(0), batch))["params"]
    return batch, method.layout().load(case.group("param"), like)


finetuning = pytest.mark.parametrize("path", case_params("hi_end_mae", "unetr"))


@finetuning
@pytest.mark.parametrize("changes", [{}, {"model.scan": True, "model.remat": "full"}])
def test_loss_and_all_gradients_match(path, changes):
    case = read(path)
    method = build(case, **changes)
    batch, params = load(method, case)
    step = jax.jit(
        jax.value_and_grad(lambda p: method.loss({"params": p}, batch, {}, 0), has_aux=True)
    )
    (loss, aux), gradient = step(params)
    assert_close(loss, case["out/loss"], "loss")
    assert_close(aux.metrics["dice_loss"], case["out/loss_dice"], "Dice")
    assert_close(aux.metrics["cross_entropy"], case["out/loss_ce"], "cross-entropy")
    ours = method.layout().save(jax.device_get(gradient))
    golden = case.group("grad")
    assert set(golden) == set(ours)
    for key, value in golden.items():
        assert_gradient_close(ours[key], value, key)


@finetuning
def test_levels_and_logits_match(path):
    case = read(path)
    method = build(case)
    batch, params = load(method, case)
    output, levels = method.model.apply({"params": params}, batch["image"], method=UNETR.encode)
    assert_close(output, case["out/vit_out"], "output of the ViT")
    for tap, level in zip(method.model.taps, levels, strict=True):
        assert_close(level, case[f"out/hidden{tap}"], f"output of block {tap}")
    logits = jax.jit(method.logits)({"params": params}, batch)
    assert_close(logits.mean(axis=(1, 2, 3)), case["out/logits_mean"], "mean logits")
    official = np.moveaxis(np.asarray(logits), -1, 1)
    stride = official.shape[2] // case["out/logits_sub"].shape[2]
    thinned = official[:, :, ::stride, ::stride, ::stride]
    assert_close(thinned, case["out/logits_sub"], "logits")
    assert_close(losses.dice_loss(logits, batch["segmentation"]), case["out/loss_dice"], "Dice")


@finetuning
def test_checkpoint_round_trip_is_exact(path):
    case = read(path)
    for changes in ({}, {"model.scan": True}):
        method = build(case, **changes)
        _, params = load(method, case)
        saved = method.layout().save(params)
        official = case.group("param")
        assert set(saved) == set(official)
        for key, value in official.items():
            np.testing.assert_array_equal(saved[key], value)
        again = flatten(method.layout().load(saved, params))
        for key, value in flatten(params).items():
            np.testing.assert_array_equal(again[key], value)


@finetuning
def test_checkpoint_tells_its_sizes(path):
    case = read(path)
    method = build(case)
    other = configs.load("unetr", {"model.taps": method.model.taps, "compute_dtype": "float32"})
    known = {"heads": case.cfg["num_heads"]}
    ours = SegmentationFineTune.build(other).sized_like(case.group("param"), known)
    assert isinstance(ours, SegmentationFineTune)
    assert ours.model == method.model
