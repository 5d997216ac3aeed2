"""Fine-tuning against the official code: groups, stochastic depth, resized positions, one step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax import losses
from mim_jax.methods.finetune import FineTune
from mim_jax.models.positions import resize_positions
from mim_jax.models.transformer import drop_path_scales
from mim_jax.training.optimizer import build_optimizer, is_decayed, warmup_cosine
from mim_jax.training.tree import flatten, unflatten
from tests.golden.cases import (
    Case,
    assert_close,
    assert_gradient_close,
    case_params,
    images_nhwc,
)
from tests.golden.test_mae import pair


def build(cfg: dict, **changes):
    """The method from the official constructor's arguments."""
    c = cfg["constructor"]
    fields = {
        "model.size": "",
        "model.width": c["embed_dim"],
        "model.depth": c["depth"],
        "model.heads": c["num_heads"],
        "model.mlp_ratio": c["mlp_ratio"],
        "model.patch_size": pair(c["patch_size"]),
        "model.num_classes": c["num_classes"],
        "model.labels": "single",
        "model.pool": "mean" if cfg["global_pool"] else "cls",
        "model.drop_path": cfg["drop_path_rate"],
        "model.layer_decay": cfg["layer_decay"],
        "data.image_size": pair(c["img_size"]),
        "data.channels": c.get("in_chans", 3),
        "optimizer.weight_decay": cfg["weight_decay"],
        "optimizer.b1": cfg["adamw"]["betas"][0],
        "optimizer.b2": cfg["adamw"]["betas"][1],
        "optimizer.eps": cfg["adamw"]["eps"],
        "compute_dtype": "float32",
    }
    config = configs.load("finetune", {**fields, **changes})
    return FineTune.build(config), config


@functools.cache
def read(path) -> Case:
    return Case(path)


def load(method: FineTune, case: Case):
    images = jnp.asarray(images_nhwc(case["in/imgs"]))
    like = jax.eval_shape(lambda: method.init(jax.random.key(0), {"image": images}))["params"]
    return images, method.layout().load(case.group("param"), like)


finetuning = pytest.mark.parametrize("path", case_params("mae", "finetune"))


@finetuning
@pytest.mark.parametrize("changes", [{}, {"model.scan": True, "model.remat": "full"}])
def test_logits_loss_and_all_gradients_match_with_replayed_drop_path(path, changes):
    case = read(path)
    method, _ = build(case.cfg, **changes)
    images, params = load(method, case)
    noise, targets = jnp.asarray(case["draw/drop_path_u"]), jnp.asarray(case["in/soft_targets"])

    def loss_of(params):
        logits = method.logits({"params": params}, images, noise)
        return method.objective(logits, targets), logits

    (loss, logits), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    assert_close(logits, case["out/train_logits"], "train logits")
    assert_close(loss, case["out/loss"], "loss")
    ours = method.layout().save(jax.device_get(gradient))
    golden = case.group("grad")
    assert set(golden) == set(ours)
    for key, value in golden.items():
        assert_gradient_close(ours[key], value, key)


@finetuning
def test_evaluation_features_logits_and_losses_match(path):
    case = read(path)
    method, _ = build(case.cfg)
    images, params = load(method, case)
    features = method.features({"params": params}, {"image": images})
    assert_close(features.pooled, case["out/eval_features"], "features")
    logits = method.logits({"params": params}, images)
    assert_close(logits, case["out/eval_logits"], "logits")
    labels = jnp.asarray(case["in/labels"])
    classes = logits.shape[1]
    soft = jnp.asarray(case["in/soft_targets"])
    assert_close(losses.soft_cross_entropy(logits, soft), case["out/eval_soft_ce"], "soft")
    smooth = losses.smoothed_targets(labels, classes, 0.1)
    assert_close(losses.soft_cross_entropy(logits, smooth), case["out/eval_smooth_ce"], "smooth")
    assert_close(losses.cross_entropy(logits, labels), case["out/eval_ce"], "plain")


@finetuning
@pytest.mark.parametrize("scan", [False, True])
def test_rate_scales_decay_and_layers_equal_the_reference_table(path, scan):
    case = read(path)
    method, config = build(case.cfg, **{"model.scan": scan})
    _, params = load(method, case)
    scales, decays = {}, {}
    for key, value in flatten(params).items():
        scale = np.broadcast_to(method.rate_scale(key, value.shape), value.shape)
        decay = config.optimizer.weight_decay * is_decayed(key, value, method.no_decay)
        scales[key], decays[key] = scale, np.full(value.shape, decay)
    layout = method.layout()
    nested = [unflatten(tree) for tree in (scales, decays)]
    scale_of, decay_of = (layout.save(tree) for tree in nested)
    table = case.text("out/param_groups")
    assert set(table) == set(scale_of)
    for key, (scale, decay, layer) in table.items():
        np.testing.assert_allclose(scale_of[key], scale, rtol=1e-6, err_msg=key)
        np.testing.assert_allclose(decay_of[key], decay, rtol=1e-6, err_msg=key)
        del layer  # the scale is the decay to the power of the layers above, so it says the same


@finetuning
def test_drop_path_rates_grow_linearly(path):
    case = read(path)
    method, _ = build(case.cfg)
    noise = jnp.full((len(case["out/drop_path_rates"]), 2, 1), 0.999)
    scales = drop_path_scales(noise, method.encoder.transformer.drop_path)
    assert_close(1 - 1 / scales[:, 0, 0, 0, 0], case["out/drop_path_rates"], "rates")


@finetuning
def test_one_optimizer_step_and_the_schedule_match(path):
    case = read(path)
    method, config = build(case.cfg)
    _, params = load(method, case)
    s = case.cfg["schedule"]
    schedule = warmup_cosine(
        s["lr"],
        min_lr=s["min_lr"],
        warmup_epochs=s["warmup_epochs"],
        epochs=s["epochs"],
        steps_per_epoch=1,
    )
    rates = [float(schedule(jnp.asarray(e))) for e in case["in/sched_epochs"]]
    assert_close(rates, case["out/sched_lr"], "schedule")
    optimizer = build_optimizer(
        config.optimizer,
        (),
        {"default": schedule},
        no_decay=method.no_decay,
        rate_scale=method.rate_scale,
    )
    like = jax.tree.map(jnp.zeros_like, params)
    golden = {**case.group("param"), **case.group("grad")}
    gradient = method.layout().load(golden, like)
    state = optimizer.init(params)
    updates, _ = optimizer.update(gradient, state, params, step=jnp.asarray(s["step_epoch"]))
    after = method.layout().save(jax.tree.map(lambda p, u: np.asarray(p + u), params, updates))
    for key, value in case.group("out/param_after_step").items():
        assert_close(after[key], value, key)
        moved = np.abs(after[key] - case[f"param/{key}"])
        assert moved.max() > 0, key


@finetuning
def test_positions_are_resized_as_by_the_official_code(path):
    case = read(path)
    old, new = (pair(case.cfg["interp"][key]) for key in ("from_grid", "to_grid"))
    resized = resize_positions(case["in/interp_pos_embed"][0], old, new)
    assert_close(resized[None], case["out/interp_pos_embed"], "positions")


@finetuning
def test_the_official_checkpoint_goes_through_ours_exactly(path):
    case = read(path)
    method, _ = build(case.cfg)
    _, params = load(method, case)
    again = method.layout().save(params)
    assert set(again) == set(case.group("param"))
    for key, value in case.group("param").items():
        np.testing.assert_array_equal(again[key], value, err_msg=key)
