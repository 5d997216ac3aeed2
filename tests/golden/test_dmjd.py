"""DMJD against the official code (and an independent write-up for the plain ViT)."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.data.on_device import normalize
from mim_jax.masking import disjoint_masking
from mim_jax.methods.dmjd import DMJD, JointDistillation
from mim_jax.models.conv_vit import STAGES, StridedConv
from mim_jax.targets import hog
from mim_jax.training.tree import flatten
from tests.golden.cases import (
    Case,
    assert_close,
    assert_gradient_close,
    case_params,
    images_nhwc,
    mask_major,
)


@functools.cache
def read(path) -> Case:
    return Case(path)


def common(cfg: dict) -> dict:
    return {
        "model.size": "",
        "model.heads": cfg["num_heads"],
        "model.decoder_width": cfg["decoder_embed_dim"],
        "model.decoder_depth": cfg["decoder_depth"],
        "model.decoder_heads": cfg["decoder_num_heads"],
        "model.mask_ratio": cfg["mask_ratio"],
        "model.prediction_ratio": cfg["pred_ratio"],
        "model.mask_type": cfg["mask_type"],
        "model.theta": cfg["theta"],
        "compute_dtype": "float32",
    }


def build(cfg: dict, **changes) -> DMJD:
    """The method on the hybrid encoder, from the official constructor's arguments."""
    *conv_ratios, ratio = cfg["mlp_ratio"]
    fields = {
        **common(cfg),
        "model.widths": tuple(cfg["embed_dim"]),
        "model.depths": tuple(cfg["depth"]),
        "model.conv_mlp_ratios": tuple(conv_ratios),
        "model.mlp_ratio": ratio,
        "model.patch_sizes": tuple(cfg["patch_size"]),
        "model.decoder_mlp_ratio": conv_ratios[0],
        "model.masked_loss": cfg["mim_loss_type"],
        "model.visible_loss": cfg["vis_loss_type"],
        "model.visible_target_order": "raster",
        "data.image_size": (cfg["img_size"][0],) * 2,
    }
    return DMJD.build(configs.load("dmjd:convvit_b16", {**fields, **changes}))


def build_vit(cfg: dict, **changes) -> DMJD:
    """The method on a plain ViT, for a target of the case's own width."""
    fields = {
        **common(cfg),
        "model.width": cfg["embed_dim"],
        "model.depth": cfg["depth"],
        "model.mlp_ratio": cfg["mlp_ratio"],
        "model.decoder_mlp_ratio": cfg["mlp_ratio"],
        "model.patch_size": (cfg["patch_size"],) * 2,
        "model.hog_cell_size": cfg["patch_size"],
        "data.image_size": (cfg["img_size"],) * 2,
    }
    method = DMJD.build(configs.load("dmjd:vit_b16", {**fields, **changes}))
    model, outputs = method.model, cfg["target_dim"]
    decoder, head = model.decoder.clone(outputs=outputs), model.head.clone(outputs=outputs)
    return dataclasses.replace(method, model=JointDistillation(model.encoder, decoder, head))


def masking_of(case: Case, method: DMJD):
    _, kept, swapped = method.counts
    assert kept == len(case["draw/perm_visible"])
    return disjoint_masking(
        jnp.asarray(case["draw/noise"]),
        jnp.asarray(case["draw/perm_visible"]),
        jnp.asarray(case["draw/perm_masked"]),
        swapped,
        method.block_grid,
    )


def load(method: DMJD, case: Case, images):
    like = jax.eval_shape(lambda: method.init(jax.random.key(0), {"image": images}))["params"]
    return method.layout().load(case.group("param"), like)


def normalized(case: Case, method: DMJD):
    return normalize(jnp.asarray(case["in/image_uint8_nhwc"]), method.mean, method.std)


def loss_and_gradient(method: DMJD, params, images, target, chosen):
    def loss_of(params):
        prediction = method.predict({"params": params}, images, chosen)
        loss, terms = method.joint_loss(prediction, target, chosen)
        return loss, (terms, prediction)

    return jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)


def assert_gradients_match(case: Case, method: DMJD, gradient) -> None:
    ours = method.layout().save(jax.device_get(gradient))
    golden = case.group("grad")
    assert set(golden) == set(ours) - {"pos_embed", "decoder_pos_embed"}
    for key, value in golden.items():
        assert_gradient_close(ours[key], value, key)


official = functools.partial(mask_major, views=2)


def assert_masks_match(case: Case, chosen) -> None:
    np.testing.assert_array_equal(official(chosen.keep_ids), case["out/ids_keep"])
    np.testing.assert_array_equal(official(chosen.restore_ids), case["out/ids_restore"])
    np.testing.assert_array_equal(official(chosen.mask), case["out/mask"])


def assert_predictions_match(case: Case, prediction, step: tuple[int, int] = (1, 1)) -> None:
    latent, masked, visible = map(official, prediction)
    assert_close(latent, case["out/latent"], "latent")
    assert_close(masked[:, :: step[0]], case["out/pred_masked"], "masked branch")
    assert_close(visible[:, :: step[1]], case["out/pred_visible"], "visible branch")


hybrid = pytest.mark.parametrize("path", case_params("dmjd"))
plain = pytest.mark.parametrize("path", case_params("dmjd", "vit"))


@hybrid
def test_hog_targets_match(path):
    case = read(path)
    method = build(case.cfg)
    pixels = jnp.asarray(case["in/image_uint8_nhwc"])
    raw = np.asarray(hog(pixels, method.cell_size)).transpose(0, 4, 1, 2, 3)
    assert_close(raw, case["out/hog_raw"], "histograms")
    # From the normalized images, which is what the step has.
    assert_close(method.target({}, normalized(case, method)), case["out/target"], "target")


@hybrid
@pytest.mark.parametrize("removed", ["skipped", "zeroed"])
def test_losses_predictions_and_all_gradients_match(path, removed):
    case = read(path)
    method = build(case.cfg, **{"model.removed": removed, "model.scan": removed == "zeroed"})
    images = normalized(case, method)
    params = load(method, case, images)
    chosen = masking_of(case, method)
    assert_masks_match(case, chosen)
    (loss, (terms, prediction)), gradient = loss_and_gradient(
        method, params, images, method.target({}, images), chosen
    )
    assert_predictions_match(case, prediction, (7, 5))
    assert_close(terms["loss_mim"], case["out/loss_mim"], "masked loss")
    assert_close(terms["loss_vis"], case["out/loss_vis_official"], "visible loss, raster order")
    assert_close(loss, case["out/loss"], "loss")
    aligned = dataclasses.replace(method, aligned=True)
    _, terms = aligned.joint_loss(prediction, case["out/target"], chosen)
    assert_close(terms["loss_vis"], case["out/loss_vis_aligned"], "visible loss, aligned")
    assert_gradients_match(case, method, gradient)


@hybrid
def test_outputs_of_both_convolutional_stages_match_at_every_token(path):
    case = read(path)
    method = build(case.cfg, **{"model.removed": "zeroed"})
    images = normalized(case, method)
    params = load(method, case, images)["encoder"]
    encoder = method.model.encoder
    _, collected = encoder.apply(
        {"params": params}, images, masking_of(case, method).keep_ids, mutable=[STAGES]
    )
    for stage, side in ((1, math.prod(encoder.patch_sizes[1:])), (2, encoder.patch_sizes[2])):
        fusion = StridedConv(encoder.width, side)
        weights = {"params": params[f"stage{stage}_fusion"]}
        ours = fusion.apply(weights, collected[STAGES][f"stage{stage}"])
        golden = images_nhwc(case[f"out/stage{stage}_map"])
        assert_close(official(ours), golden, f"stage {stage}")


@plain
def test_losses_predictions_and_all_gradients_of_a_plain_vit_match(path):
    case = read(path)
    method = build_vit(case.cfg)
    images = jnp.asarray(images_nhwc(case["in/images"]))
    params = load(method, case, images)
    chosen = masking_of(case, method)
    assert_masks_match(case, chosen)
    target = jnp.asarray(case["in/target"])
    (loss, (terms, prediction)), gradient = loss_and_gradient(
        method, params, images, target, chosen
    )
    assert_predictions_match(case, prediction)
    assert_close(terms["loss_mim"], case["out/loss_mim"], "masked loss")
    assert_close(terms["loss_vis"], case["out/loss_vis_aligned"], "visible loss, aligned")
    assert_close(loss, case["out/loss"], "loss")
    raster = dataclasses.replace(method, aligned=False)
    _, terms = raster.joint_loss(prediction, target, chosen)
    assert_close(terms["loss_vis"], case["out/loss_vis_official"], "visible loss, raster order")
    assert_gradients_match(case, method, gradient)


@pytest.mark.parametrize(
    ("path", "make"),
    [
        *(pytest.param(*p.values, build, id=p.id, marks=p.marks) for p in case_params("dmjd")),
        *(
            pytest.param(*p.values, build_vit, id=p.id, marks=p.marks)
            for p in case_params("dmjd", "vit")
        ),
    ],
)
def test_official_checkpoint_round_trip_is_exact_and_tells_all_sizes(path, make):
    case = read(path)
    official = case.group("param")
    for changes in ({}, {"model.scan": True}):
        method = make(case.cfg, **changes)
        images = jnp.zeros((1, *method.inputs["image"].shape))
        params = load(method, case, images)
        saved = method.layout().save(params)
        assert set(saved) == set(official)
        for key, value in official.items():
            np.testing.assert_allclose(
                saved[key], value, atol=0 if "pos_embed" not in key else 1e-6, rtol=0
            )
        again = flatten(method.layout().load(saved, params))
        for key, value in flatten(params).items():
            np.testing.assert_array_equal(again[key], value)
    published = DMJD.build(
        configs.load("dmjd:vit_b16" if make is build_vit else "dmjd", {"compute_dtype": "float32"})
    )
    heads = {"heads": case.cfg["num_heads"], "decoder_heads": case.cfg["decoder_num_heads"]}
    sized = published.sized_like(official, heads)
    assert sized.model == make(case.cfg).model
