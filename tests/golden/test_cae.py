"""CAE and CAE v2 against the official code: every latent, prediction, loss and gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax import targets
from mim_jax.masking import gather_tokens, split_by_mask
from mim_jax.methods.cae import CAE
from mim_jax.training.state import split_trainable
from mim_jax.training.tree import flatten
from tests.golden.cases import (
    Case,
    assert_close,
    assert_gradient_close,
    case_params,
    images_nhwc,
)

TOKENS = [case for case in case_params("cae") if not case.id.endswith("_caev2")]
FEATURES = case_params("cae", "caev2")


def pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def build(cfg: dict, outputs: int, **changes) -> CAE:
    """The method from the official constructor's arguments."""
    v2 = cfg["model_type"] == "caev2"
    fields = {
        "model.target": "features" if v2 else "tokens",
        "model.size": "",
        "model.width": cfg["embed_dim"],
        "model.depth": cfg["depth"],
        "model.heads": cfg["num_heads"],
        "model.mlp_ratio": cfg["mlp_ratio"],
        "model.patch_size": pair(cfg["patch_size"]),
        "model.layer_scale": cfg["init_values"],
        "model.drop_path": cfg["drop_path_rate"],
        "model.decoder_width": cfg["decoder_embed_dim"],
        "model.regressor_depth": cfg["regressor_depth"],
        "model.decoder_depth": cfg["decoder_depth"],
        "model.decoder_heads": cfg["decoder_num_heads"],
        "model.decoder_layer_scale": cfg["decoder_layer_scale_init_value"],
        "model.masked": cfg["num_mask_patches"],
        "model.min_block": cfg["min_block"],
        "model.align_weight": 0.0 if v2 else cfg["align_loss_weight"],
        "model.target_weight": cfg.get("latent_alignment_loss_weight", 1.0),
        "model.tokenizer.vocabulary": outputs,
        "model.teacher.outputs": outputs,
        "model.teacher.image_size": pair(cfg["img_size"]),
        "model.teacher.patch_size": pair(cfg["patch_size"]),
        "data.image_size": pair(cfg["img_size"]),
        "compute_dtype": "float32",
    }
    return CAE.build(configs.load("cae", {**fields, **changes}))


@functools.cache
def read(path) -> Case:
    return Case(path)


def load(path, **changes):
    """Method, images, ids of visible and masked patches, and parameters without frozen networks."""
    case = read(path)
    method = build(case.cfg, len(case["param/decoder.head.bias"]), **changes)
    images = jnp.asarray(images_nhwc(case["in/images"]))
    mask = jnp.asarray(case["in/bool_masked_pos"], jnp.float32)
    visible, masked = split_by_mask(mask, case.cfg["num_mask_patches"])
    like = jax.eval_shape(
        lambda: method.model.init(jax.random.key(0), images, visible, masked)["params"]
    )
    params = method.layout().load(case.group("param"), like)
    return method, images, visible, masked, params


def target_of(case: Case, visible, masked) -> jax.Array:
    if "in/token_ids" in case:
        return jnp.take_along_axis(jnp.asarray(case["in/token_ids"]), masked, axis=1)
    features = jnp.asarray(case["in/clip_features"])
    order = jnp.concatenate([visible, masked], axis=1)
    return jnp.concatenate([features[:, :1], gather_tokens(features[:, 1:], order)], axis=1)


def gradient_of(method: CAE, images, visible, masked, target):
    def loss(params):
        output = method.predict({"params": params}, images, visible, masked)
        value, metrics = method.objective(output, target)
        return value, (output, metrics)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


variants = pytest.mark.parametrize(
    "changes", [{}, {"model.scan": True, "model.remat": "full"}], ids=["plain", "scan"]
)


@pytest.mark.parametrize("path", TOKENS)
@variants
def test_token_loss_latents_and_all_gradients_match(path, changes):
    case = read(path)
    method, images, visible, masked, params = load(path, **changes)
    target = target_of(case, visible, masked)
    step = gradient_of(method, images, visible, masked, target)
    (loss, (output, metrics)), gradient = step(params)
    assert_close(output.latent, case["out/encoder_latent"], "encoder")
    assert_close(output.states[0], case["out/regressor_block0"], "first block of the regressor")
    for name in ("regressor_out", "latent_predict"):
        assert_close(output.predicted, case[f"out/{name}"], name)
    assert_close(output.aligned, case["out/latent_target"], "alignment target")
    logits = output.pred.reshape(-1, output.pred.shape[-1])
    assert_close(logits, case["out/logits"], "logits")
    np.testing.assert_array_equal(target.reshape(-1), case["out/labels"])
    assert_close(loss, case["out/loss"], "loss")
    for name in ("loss_main", "loss_align", "mlm_acc"):
        assert_close(metrics[name], case[f"out/{name}"], name)
    assert_gradients(case, method, gradient)


@pytest.mark.parametrize("path", FEATURES)
@variants
def test_feature_loss_latents_and_all_gradients_match(path, changes):
    case = read(path)
    method, images, visible, masked, params = load(path, **changes)
    target = target_of(case, visible, masked)
    step = gradient_of(method, images, visible, masked, target)
    (loss, (output, metrics)), gradient = step(params)
    assert_close(output.latent, case["out/encoder_latent"], "encoder")
    assert_close(output.states[0], case["out/regressor_block0"], "first block of the regressor")
    assert_close(output.predicted, case["out/regressor_out"], "regressor")
    assert_close(targets.unit_length(output.pred), case["out/predictions_l2"], "predictions")
    assert_close(targets.unit_length(target), case["out/labels_l2"], "labels")
    assert output.aligned is None
    assert_close(loss, case["out/loss"], "loss")
    assert_close(metrics["loss_main"], case["out/loss_main"], "loss_main")
    model = method.model.clone(encoder=method.model.encoder, align=False)
    _, found = model.apply({"params": params}, images, visible, masked, capture_intermediates=True)
    normed = found["intermediates"]["decoder"]["norm"]["__call__"][0]
    assert_close(normed[:, -masked.shape[1] :], case["out/latent_predict"], "normalized latents")
    assert_gradients(case, method, gradient)


def assert_gradients(case: Case, method: CAE, gradient) -> None:
    """Those of the official code, for what it trains and for nothing else."""
    golden = case.group("grad")
    own = dataclasses.replace(method, tower=None, tokenizer=None)
    trainable = flatten(split_trainable(own, gradient)[0])
    keys = {rule.key for rule in method.layout().rules if rule.path in trainable}
    assert {key for key in keys if not key.startswith("alignment_encoder.")} == set(golden)
    ours = method.layout().save(jax.device_get(gradient))
    for key, value in golden.items():
        assert_gradient_close(ours[key], value, key)
    for key in case.cfg["trainable_without_grad"]:
        np.testing.assert_array_equal(ours[key], 0)


@pytest.mark.parametrize("path", [*TOKENS, *FEATURES])
@variants
def test_official_checkpoint_round_trip_is_exact(path, changes):
    case = read(path)
    method, *_, params = load(path, **changes)
    saved = method.layout().save(params)
    official = case.group("param")
    assert set(saved) == set(official)
    for key, value in official.items():
        tolerance = 1e-6 if "pos_embed" in key else 0
        np.testing.assert_allclose(saved[key], value, atol=tolerance, err_msg=key)
    again = flatten(method.layout().load(saved, params))
    for name, value in flatten(params).items():
        np.testing.assert_array_equal(again[name], value)


@pytest.mark.parametrize("path", [*TOKENS, *FEATURES])
def test_sizes_are_read_off_the_official_checkpoint(path):
    case = read(path)
    method, *_, params = load(path)
    known = {"heads": case.cfg["num_heads"], "decoder_heads": case.cfg["decoder_num_heads"]}
    other = build(
        case.cfg,
        7,
        **{
            "model.width": 24,
            "model.depth": 1,
            "model.decoder_width": 48,
            "model.decoder_depth": 0,
            "model.align_weight": 0.0 if case.cfg["model_type"] == "caev2" else 2.0,
        },
    )
    sized = other.sized_like(case.group("param"), known)
    assert sized.model == method.model
    loaded = sized.layout().load(case.group("param"), params)
    assert set(flatten(loaded)) == set(flatten(params))
