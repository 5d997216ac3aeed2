"""Hi-End-MAE against the official code: loss, every stage, every gradient, and the layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.masking import gather_tokens, masking_of_order
from mim_jax.methods.hi_end_mae import HiEndMAE
from mim_jax.targets import patchify
from mim_jax.training.tree import flatten
from tests.golden.cases import Case, assert_close, assert_gradient_close, case_params

FIXED = {"encoder_pos_embed", "decoder_pos_embed"}
POSITIONS = {"sincos": "sincos", "perceptron": "learned_patches"}


def triple(size) -> tuple[int, int, int]:
    return (size, size, size) if isinstance(size, int) else tuple(size)


def build(cfg: dict, **changes) -> HiEndMAE:
    """The method from the official constructor's arguments."""
    encoder, decoder = cfg["encoder"], cfg["decoder"]
    taps = tuple(cfg["tapped_block_outputs_zero_based"])
    assert len(taps) == decoder["cross_depth"]
    fields = {
        "model.width": encoder["embed_dim"],
        "model.depth": encoder["depth"],
        "model.heads": encoder["num_heads"],
        "model.mlp_ratio": encoder["mlp_ratio"],
        "model.patch_size": triple(cfg["patch_size"]),
        "model.positions": POSITIONS[cfg["pos_embed_type"]],
        "model.taps": taps,
        "model.decoder_width": decoder["embed_dim"],
        "model.decoder_depth": decoder["self_depth"],
        "model.decoder_heads": decoder["num_heads"],
        "model.mask_ratio": cfg["mask_ratio"],
        "data.image_size": triple(cfg["img_size"]),
        "data.channels": cfg["in_chans"],
        "compute_dtype": "float32",
    }
    return HiEndMAE.build(configs.load("hi_end_mae", {**fields, **changes}))


@functools.cache
def read(path) -> Case:
    return Case(path)


def load(method: HiEndMAE, case: Case):
    volumes = jnp.asarray(np.moveaxis(case["in/image"], 1, -1))
    like = jax.eval_shape(lambda: method.init(jax.random.key(0), {"image": volumes}))["params"]
    return volumes, method.layout().load(case.group("param"), like)


pretraining = pytest.mark.parametrize("path", case_params("hi_end_mae"))


@pretraining
@pytest.mark.parametrize("changes", [{}, {"model.scan": True, "model.remat": "full"}])
def test_loss_every_stage_and_all_gradients_match(path, changes):
    case = read(path)
    method = build(case.cfg, **changes)
    volumes, params = load(method, case)
    noise = jnp.asarray(case["draw/noise"])

    def loss_of(params):
        output = method.reconstruct({"params": params}, volumes, noise)
        return method.reconstruction_loss(volumes, output), output

    (loss, output), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    kept = method.model.kept
    assert (kept, method.tokens - kept) == (case.cfg["sel_length"], case.cfg["msk_length"])
    assert_close(loss, case["out/loss"], "loss")
    np.testing.assert_array_equal(output.order, case["out/ids_shuffle"])
    chosen = masking_of_order(output.order, kept)
    np.testing.assert_array_equal(chosen.restore_ids, case["out/ids_restore"])
    np.testing.assert_array_equal(chosen.mask, case["out/mask"])
    assert_close(output.latent, case["out/latent"], "latent")
    for tap, level, keys in zip(
        method.model.taps, output.levels, output.decoded.levels, strict=True
    ):
        assert_close(level, case[f"out/hidden{tap}"], f"output of block {tap}")
        assert_close(keys, case[f"out/kv{tap}"], f"keys and values of block {tap}")
    assert_close(output.decoded.tokens, case["out/dec_in"], "decoder input")
    assert_close(output.decoded.pred, case["out/pred_shuffled"], "prediction")
    assert_close(method.target(volumes, output.order), case["out/target_masked"], "target")
    recon = method.reconstructed_patches(volumes, output)
    assert_close(recon, case["out/recon_patches"], "reconstruction")
    ours = method.layout().save(jax.device_get(gradient))
    golden = case.group("grad")
    assert set(golden) | FIXED == set(ours) | FIXED
    for key, value in golden.items():
        assert_gradient_close(ours[key], value, key)


@pretraining
def test_patches_match(path):
    case = read(path)
    method = build(case.cfg)
    patches = patchify(
        jnp.moveaxis(jnp.asarray(case["in/image"]), 1, -1), method.encoder.patch_size
    )
    np.testing.assert_array_equal(patches, case["out/patches"])
    masked = gather_tokens(patches, jnp.asarray(case["out/ids_shuffle"])[:, method.model.kept :])
    assert masked.shape == case["out/target_masked"].shape


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
            np.testing.assert_allclose(saved[key], value, atol=1e-6 if key in FIXED else 0)
        again = flatten(method.layout().load(saved, params))
        for key, value in flatten(params).items():
            np.testing.assert_array_equal(again[key], value)


@pretraining
def test_official_checkpoint_tells_its_sizes(path):
    case = read(path)
    method = build(case.cfg)
    fields = {"model.taps": method.model.taps, "data.image_size": (24, 24, 24)}
    other = configs.load("hi_end_mae:base_p16", {**fields, "data.image_size": (96, 96, 96)})
    other.compute_dtype = "float32"
    heads = {
        "heads": case.cfg["encoder"]["num_heads"],
        "decoder_heads": case.cfg["decoder"]["num_heads"],
    }
    ours = HiEndMAE.build(other).sized_like(case.group("param"), heads)
    assert ours.model == method.model
