"""MAE against the official code: every loss, prediction, gradient and update."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from mim_jax import config as configs
from mim_jax.masking import random_masking
from mim_jax.methods.mae import MAE
from mim_jax.models.transformer import Transformer
from mim_jax.models.vit import PatchEmbed, ViT
from mim_jax.targets import normalize_patches, patchify, unpatchify
from mim_jax.training.optimizer import adamw, is_decayed, warmup_cosine
from mim_jax.training.tree import flatten
from tests.golden.cases import (
    Case,
    assert_close,
    assert_gradient_close,
    case_params,
    images_nhwc,
)


def pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def build(cfg: dict, **changes) -> MAE:
    """The method from the official constructor's arguments."""
    c = cfg["constructor"]
    fields = {
        "model.size": "",
        "model.width": c["embed_dim"],
        "model.depth": c["depth"],
        "model.heads": c["num_heads"],
        "model.mlp_ratio": c["mlp_ratio"],
        "model.patch_size": pair(c["patch_size"]),
        "model.decoder_width": c["decoder_embed_dim"],
        "model.decoder_depth": c["decoder_depth"],
        "model.decoder_heads": c["decoder_num_heads"],
        "model.normalize_target": c["norm_pix_loss"],
        "model.mask_ratio": cfg["mask_ratio"],
        "data.image_size": pair(c["img_size"]),
        "data.channels": c.get("in_chans", 3),
        "compute_dtype": "float32",
    }
    return MAE.build(configs.load("mae", {**fields, **changes}))


@functools.cache
def read(path) -> Case:
    return Case(path)


def load(method: MAE, case: Case):
    images = jnp.asarray(images_nhwc(case["in/imgs"]))
    like = jax.eval_shape(lambda: method.init(jax.random.key(0), {"image": images}))["params"]
    return images, method.layout().load(case.group("param"), like)


def loss_and_output(params, method: MAE, images, noise):
    output = method.model.apply({"params": params}, images, noise)
    return method.reconstruction_loss(images, output), output


pretraining = pytest.mark.parametrize("path", case_params("mae"))


@pretraining
@pytest.mark.parametrize("changes", [{}, {"model.scan": True, "model.remat": "full"}])
def test_loss_predictions_and_all_gradients_match(path, changes):
    case = read(path)
    method = build(case.cfg, **changes)
    images, params = load(method, case)
    noise = jnp.asarray(case["draw/noise"])
    (loss, output), gradient = jax.jit(
        jax.value_and_grad(lambda p: loss_and_output(p, method, images, noise), has_aux=True)
    )(params)
    assert_close(loss, case["out/loss"], "loss")
    assert_close(output.latent, case["out/latent"], "latent")
    assert_close(output.pred, case["out/pred"], "pred")
    assert_close(output.masking.mask, case["out/mask"], "mask")
    np.testing.assert_array_equal(output.masking.keep_ids, case["out/ids_keep"])
    np.testing.assert_array_equal(output.masking.restore_ids, case["out/ids_restore"])
    ours = method.layout().save(jax.device_get(gradient))
    golden = case.group("grad")
    assert set(golden) == set(ours) - {"pos_embed", "decoder_pos_embed"}
    for key, value in golden.items():
        assert_gradient_close(ours[key], value, key)


@pretraining
def test_targets_and_both_losses_match(path):
    case = read(path)
    method = build(case.cfg)
    images, params = load(method, case)
    patches = patchify(images, method.model.encoder.patch_size)
    assert_close(patches, case["out/target_raw"], "raw target")
    assert_close(normalize_patches(patches), case["out/target_norm"], "normalized target")
    for normalize, name in ((True, "out/loss_norm_pix"), (False, "out/loss_raw_pix")):
        variant = MAE(method.model, normalize)
        loss, output = loss_and_output(params, variant, images, case["draw/noise"])
        assert_close(loss, case[name], name)
    encoder = method.model.encoder
    picture = unpatchify(output.pred, encoder.image_size, encoder.patch_size)
    assert_close(picture, images_nhwc(case["out/unpatchify_pred"]), "unpatchified prediction")


@pretraining
def test_every_module_output_matches(path):
    case = read(path)
    method = build(case.cfg)
    images, params = load(method, case)
    encoder = method.model.encoder
    masking = random_masking(jnp.asarray(case["draw/noise"]), method.model.kept)
    latent, blocks = encoder.apply({"params": params["encoder"]}, images, masking.keep_ids)
    assert_close(latent, case["out/act/norm"], "norm")
    for i, output in enumerate(blocks):
        assert_close(output, case[f"out/act/blocks.{i}"], f"block {i}")
    embed = PatchEmbed(encoder.width, encoder.patch_size, encoder.channels)
    tokens = embed.apply(
        {"params": params["encoder"]["patch_embed"]}, patchify(images, encoder.patch_size)
    )
    assert_close(tokens, case["out/act/patch_embed"], "patch embedding")


@pretraining
def test_three_adamw_steps_match(path):
    case = read(path)
    cfg = case.cfg
    method = build(cfg)
    images, params = load(method, case)
    settings = ml_collections.ConfigDict(
        dict(
            b1=cfg["adamw"]["betas"][0],
            b2=cfg["adamw"]["betas"][1],
            eps=cfg["adamw"]["eps"],
            weight_decay=cfg["adamw"]["weight_decay"],
            decay_all=False,
        )
    )
    schedule = schedule_of(cfg, steps_per_epoch=1)
    optimizer = adamw(settings, schedule)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, noise, epoch):
        (loss, _), gradient = jax.value_and_grad(
            lambda p: loss_and_output(p, method, images, noise), has_aux=True
        )(params)
        updates, state = optimizer.update(gradient, state, params, step=epoch)
        return optax.apply_updates(params, updates), state, loss

    for i, epoch in enumerate(cfg["step_epochs"]):
        assert_close(schedule(epoch), case["out/step_lr"][i].astype(np.float32), "rate")
        params, state, loss = step(params, state, case["draw/step_noise"][i], epoch)
        assert_close(loss, case["out/step_loss"][i], f"loss of step {i}")
    after = method.layout().save(jax.device_get(params))
    for key, value in case.group("out/param_after_3_steps").items():
        # Adam turns a gradient of pure round-off (the key bias has no true gradient) into steps of
        # full size and random sign: there the golden value is a bound, not a number.
        gradient = np.abs(case[f"grad/{key}"])
        is_signal = gradient > 1e-5 * gradient.max()
        assert is_signal.mean() > 0.6, key
        assert_close(after[key][is_signal], value[is_signal], key, relative=1e-3)
        moved = np.abs(after[key] - case[f"param/{key}"])[~is_signal]
        assert np.all(moved <= 1.1 * case["out/step_lr"].sum()), key


def schedule_of(cfg: dict, steps_per_epoch: int):
    s = cfg["schedule"]
    return warmup_cosine(
        s["lr"],
        min_lr=s["min_lr"],
        warmup_epochs=s["warmup_epochs"],
        epochs=s["epochs"],
        steps_per_epoch=steps_per_epoch,
    )


@pretraining
def test_schedule_matches(path):
    case = read(path)
    schedule = schedule_of(case.cfg, steps_per_epoch=8)
    ours = jax.vmap(schedule)(jnp.asarray(case["in/sched_epochs"] * 8, jnp.float32))
    assert_close(ours, case["out/sched_lr"].astype(np.float32), "schedule")


@pretraining
def test_weight_decay_groups_match(path):
    case = read(path)
    method = build(case.cfg)
    _, params = load(method, case)
    groups: dict[bool, set[str]] = {True: set(), False: set()}
    paths = {rule.path: rule.key for rule in method.layout().rules}
    for name, leaf in flatten(params).items():
        groups[is_decayed(name, leaf)].add(paths[name])
    assert groups[True] == set(case.text("out/decay_names"))
    assert groups[False] == set(case.text("out/no_decay_names"))


@pretraining
def test_official_checkpoint_round_trip_is_exact(path):
    case = read(path)
    for changes in ({}, {"model.scan": True}):
        method = build(case.cfg, **changes)
        _, params = load(method, case)
        saved = method.layout().save(params)
        official = case.group("param")
        assert set(saved) == set(official)
        for key, value in official.items():
            np.testing.assert_allclose(
                saved[key], value, atol=0 if "pos_embed" not in key else 1e-6
            )
        again = flatten(method.layout().load(saved, params))
        for key, value in flatten(params).items():
            np.testing.assert_array_equal(again[key], value)


def test_vit_needs_no_square_image():
    encoder = ViT((8, 12), (4, 2), channels=1, width=8, transformer=Transformer(1, 2))
    tokens, _ = encoder.init_with_output(jax.random.key(0), jnp.ones((2, 8, 12, 1)))[0]
    assert tokens.shape == (2, 1 + 2 * 6, 8)
