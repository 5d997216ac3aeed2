import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mim_jax import config as configs
from mim_jax.data.on_device import normalize
from mim_jax.masking import for_views, gather_tokens
from mim_jax.method import method_class
from mim_jax.methods.dmjd import DMJD
from mim_jax.models.conv_vit import STAGES, VisibleCells
from mim_jax.training.optimizer import is_decayed
from mim_jax.training.state import split_trainable
from mim_jax.training.tree import flatten

few = settings(max_examples=10, deadline=None)
seeds = st.integers(0, 2**31 - 1)

COMMON = {
    "model.size": "",
    "model.heads": 2,
    "model.decoder_width": 8,
    "model.decoder_depth": 1,
    "model.decoder_heads": 2,
    "data.channels": 1,
    "data.mean": (0.5,),
    "data.std": (0.25,),
    "compute_dtype": "float32",
    "batch_size": 8,
}
# 4 x 6 tokens, not square, in blocks of 2 x 2: 6 units, of which a view shows 2.
PLAIN = {
    "model.width": 16,
    "model.depth": 1,
    "model.patch_size": (4, 4),
    "model.hog_cell_size": 2,
    "data.image_size": (16, 24),
}
HYBRID = {
    "model.widths": (4, 6, 16),
    "model.depths": (1, 1, 1),
    "model.patch_sizes": (2, 2, 2),
    "model.conv_mlp_ratios": (2.0, 2.0),
    "model.decoder_mlp_ratio": 2.0,
    "model.hog_cell_size": 4,
    "data.image_size": (32, 48),
}
TEACHER = {
    "model.target": "teacher",
    "model.teacher.family": "vit",
    "model.teacher.path": "somewhere.pth",
    "model.teacher.width": 12,
    "model.teacher.depth": 1,
    "model.teacher.heads": 2,
    "model.teacher.outputs": 0,
    "model.teacher.patch_size": (4, 4),
    "model.teacher.image_size": (16, 24),
    "model.teacher.channels": 1,
    "model.teacher.mean": (0.4,),
    "model.teacher.std": (0.2,),
}
TOKENS = 24


def tiny_config(kind: str = "plain", changes: dict | None = None):
    name, sizes = ("dmjd:vit_b16", PLAIN) if kind == "plain" else ("dmjd:convvit_b16", HYBRID)
    return configs.load(name, {**COMMON, **sizes, **(changes or {})})


def tiny(kind: str = "plain", changes: dict | None = None) -> DMJD:
    return DMJD.build(tiny_config(kind, changes))


def pixels(kind: str = "plain", batch: int = 3, seed: int = 0) -> np.ndarray:
    size = (PLAIN if kind == "plain" else HYBRID)["data.image_size"]
    return np.random.default_rng(seed).integers(0, 256, (batch, *size, 1)).astype(np.uint8)


def images(kind: str = "plain", batch: int = 3, seed: int = 0) -> jax.Array:
    return normalize(jnp.asarray(pixels(kind, batch, seed)), (0.5,), (0.25,))


@functools.cache
def variables(kind: str = "plain"):
    """Parameters, none of them zero, so that no mistake can hide behind zeros."""
    method, random = tiny(kind), np.random.default_rng(0)
    init = jax.jit(lambda key: method.init(key, {"image": images(kind, 1)}))
    params = jax.device_get(init(jax.random.key(0)))
    return jax.tree.map(lambda p: p + 0.1 * random.normal(size=p.shape).astype(np.float32), params)


@functools.cache
def predict(kind: str = "plain"):
    return jax.jit(tiny(kind).predict)


@functools.cache
def compiled_loss(kind: str = "plain", order: str = "aligned"):
    return jax.jit(tiny(kind, {"model.visible_target_order": order}).loss)


def rngs(seed: int = 0) -> dict[str, jax.Array]:
    return {"mask": jax.random.key(seed)}


def enlarged(mask, side: int) -> np.ndarray:
    """`[batch, tokens]` -> `[batch, rows, columns, 1]` in pixels."""
    return np.kron(np.asarray(mask).reshape(-1, 4, 6), np.ones((side, side)))[..., None]


@few
@given(seeds, st.sampled_from([("block", 0.6), ("rand", 0.6), ("rand", 0.75), ("block", 0.5)]))
def test_views_mask_equally_much_show_nothing_in_common_and_hide_everything_together(seed, setting):
    kind, ratio = setting
    method = tiny(changes={"model.mask_type": kind, "model.mask_ratio": ratio})
    chosen = method.choose(jax.random.key(seed), 3)
    masked = np.asarray(chosen.mask).reshape(3, 2, TOKENS)
    assert len(np.unique(masked.sum(axis=2))) == 1
    np.testing.assert_array_equal(masked.max(axis=1), 1)
    shown = 1 - masked
    assert not np.any(shown[:, 0] * shown[:, 1])
    for keep, restore in zip(chosen.keep_ids, chosen.restore_ids, strict=True):
        np.testing.assert_array_equal(restore[keep], np.arange(len(keep)))


def test_a_smaller_prediction_ratio_leaves_tokens_that_no_view_masks():
    method = tiny(changes={"model.mask_type": "rand", "model.prediction_ratio": 0.8})
    masked = np.asarray(method.choose(jax.random.key(0), 3).mask).reshape(3, 2, TOKENS)
    # 9 of 24 tokens are visible in the first view; the second masks floor(0.2 * 24) = 4 of them.
    np.testing.assert_array_equal(masked.max(axis=1).sum(axis=1), 15 + 4)


@pytest.mark.parametrize(("kind", "side"), [("plain", 4), ("hybrid", 8)])
def test_a_view_never_sees_what_it_masks(kind, side):
    chosen = tiny(kind).choose(jax.random.key(0), 3)
    given, other = images(kind), 5 * images(kind, seed=1)
    before = predict(kind)(variables(kind), given, chosen)
    for view in (0, 1):
        rows = slice(view, None, 2)
        removed = enlarged(chosen.mask[rows], side)
        after = predict(kind)(variables(kind), jnp.where(removed == 1, other, given), chosen)
        np.testing.assert_allclose(after.latent[rows], before.latent[rows], atol=1e-6)
        np.testing.assert_allclose(after.masked[rows], before.masked[rows], atol=1e-6)
        changed = predict(kind)(variables(kind), jnp.where(removed == 1, given, other), chosen)
        assert np.abs(changed.latent[rows] - before.latent[rows]).max() > 0.1


def test_visible_positions_of_the_convolutional_stages_do_not_see_masked_ones_either():
    method = tiny("hybrid", {"model.removed": "zeroed"})
    encoder, params = method.model.encoder, variables("hybrid")["params"]["encoder"]
    chosen = method.choose(jax.random.key(1), 3)
    cells = VisibleCells.of(chosen.keep_ids, encoder.grid)
    given, other = images("hybrid"), 5 * images("hybrid", seed=1)
    removed = enlarged(chosen.mask[::2], 8)

    @jax.jit
    def stages(given):
        seen = encoder.apply({"params": params}, given, chosen.keep_ids, mutable=[STAGES])[1]
        return [cells.pick(seen[STAGES][f"stage{stage}"]) for stage in (1, 2)]

    for before, after in zip(
        stages(given), stages(jnp.where(removed == 1, other, given)), strict=True
    ):
        np.testing.assert_allclose(after[::2], before[::2], atol=1e-6)
        assert np.abs(after[1::2] - before[1::2]).max() > 0.1  # the other view sees them


def test_both_views_of_an_image_lie_together():
    chosen = tiny().choose(jax.random.key(0), 3)
    together = predict()(variables(), images(), chosen)
    again = predict()(variables(), images().at[1].mul(-1), chosen)
    changed = np.any(np.asarray(together.latent != again.latent), axis=(1, 2))
    np.testing.assert_array_equal(changed, [False, False, True, True, False, False])


def test_the_target_is_computed_from_the_exact_bytes_of_the_image():
    method = tiny()
    exact = dataclasses.replace(method, mean=(0.0,), std=(1.0,))
    from_bytes = exact.target({}, jnp.asarray(pixels(), jnp.float32) / 255)
    np.testing.assert_array_equal(method.target({}, images()), from_bytes)
    assert from_bytes.shape == (3, TOKENS, 2 * 2 * 9)


def objective(aligned: bool, shuffle: bool) -> float:
    """The visible tokens' loss when they come in another order."""
    method = dataclasses.replace(tiny(), aligned=aligned)
    chosen = method.choose(jax.random.key(0), 3)
    prediction = predict()(variables(), images(), chosen)
    if shuffle:
        order = np.random.default_rng(0).permutation(chosen.keep_ids.shape[1])
        chosen = chosen._replace(keep_ids=chosen.keep_ids[:, order])
        prediction = prediction._replace(visible=prediction.visible[:, order])
    _, terms = method.joint_loss(prediction, method.target({}, images()), chosen)
    return float(terms["loss_vis"])


def test_the_aligned_loss_does_not_depend_on_the_order_of_visible_tokens_but_the_raster_one_does():
    assert objective(True, True) == pytest.approx(objective(True, False), rel=1e-6)
    assert objective(False, True) != pytest.approx(objective(False, False), rel=1e-4)
    assert objective(False, False) != pytest.approx(objective(True, False), rel=1e-4)


def test_the_aligned_loss_of_a_perfect_visible_branch_is_zero_and_the_raster_one_is_not():
    method = tiny()
    chosen = method.choose(jax.random.key(0), 3)
    target = method.target({}, images())
    seen = gather_tokens(for_views(target, 2), chosen.keep_ids)
    prediction = predict()(variables(), images(), chosen)._replace(visible=seen)
    _, terms = method.joint_loss(prediction, target, chosen)
    assert terms["loss_vis"] == 0
    _, terms = dataclasses.replace(method, aligned=False).joint_loss(prediction, target, chosen)
    assert terms["loss_vis"] > 0.1


@pytest.mark.parametrize("masked", ["l2", "smooth_l1"])
@pytest.mark.parametrize("visible", ["l2", "smooth_l1"])
def test_the_loss_is_the_masked_term_plus_theta_times_the_visible_one(masked, visible):
    method = tiny(
        changes={
            "model.masked_loss": masked,
            "model.visible_loss": visible,
            "model.theta": 0.5,
        }
    )
    chosen = method.choose(jax.random.key(0), 3)
    target = np.asarray(method.target({}, images()), np.float64)
    prediction = predict()(variables(), images(), chosen)

    def distance(name, a, b):
        d = np.abs(np.asarray(a, np.float64) - b)
        return d**2 if name == "l2" else np.where(d < 2, d**2 / 4, d - 1)

    twice = np.repeat(target, 2, axis=0)
    loss_mim = distance(masked, prediction.masked, twice)[np.asarray(chosen.mask) == 1].mean()
    seen = np.take_along_axis(twice, np.asarray(chosen.keep_ids)[..., None], axis=1)
    loss_vis = distance(visible, prediction.visible, seen).mean()
    loss, terms = method.joint_loss(prediction, jnp.asarray(target, jnp.float32), chosen)
    assert float(terms["loss_mim"]) == pytest.approx(loss_mim, rel=1e-4)
    assert float(terms["loss_vis"]) == pytest.approx(loss_vis, rel=1e-4)
    assert float(loss) == pytest.approx(loss_mim + 0.5 * loss_vis, rel=1e-4)


def test_the_loss_is_a_pure_function_of_its_random_key():
    def loss(seed):
        value, aux = compiled_loss()(variables(), {"image": images()}, rngs(seed), 0)
        assert float(value) == pytest.approx(
            float(aux.metrics["loss_mim"] + aux.metrics["loss_vis"]), rel=1e-6
        )
        return float(value)

    assert loss(1) == loss(1)
    assert len({loss(seed) for seed in range(4)}) == 4


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_loss_is_float32_under_bfloat16_compute(kind):
    method = tiny(kind, {"compute_dtype": "bfloat16"})
    value, aux = jax.eval_shape(method.loss, variables(kind), {"image": images(kind)}, rngs(), 0)
    assert {value.dtype, *(x.dtype for x in aux.metrics.values())} == {jnp.dtype(jnp.float32)}
    assert value.shape == ()


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_the_gradient_reaches_every_parameter(kind):
    def loss(params):
        return tiny(kind).loss({"params": params}, {"image": images(kind)}, rngs(), 0)[0]

    gradient = flatten(jax.jit(jax.grad(loss))(variables(kind)["params"]))
    assert not [path for path in gradient if "pos" in path]
    for path, leaf in gradient.items():
        assert np.any(np.asarray(leaf) != 0), path


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_devices_exchange_gradients_but_no_images(kind):
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    everywhere, rows = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))

    def loss(params, batch, key):
        return tiny(kind).loss({"params": params}, batch, {"mask": key}, 0)[0]

    step = jax.jit(
        jax.value_and_grad(loss), in_shardings=(everywhere, rows, everywhere), out_shardings=None
    )
    batch = {"image": images(kind, batch=8)}
    program = step.lower(variables(kind)["params"], batch, jax.random.key(0)).compile().as_text()
    exchanges = re.findall(
        r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)", program
    )
    assert set(exchanges) == {"all-reduce"}


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_features_are_patch_tokens_before_norm_and_fusion_and_their_standardized_mean(kind):
    method = tiny(kind)
    features = jax.jit(method.features)(variables(kind), {"image": images(kind)})
    assert features.tokens.shape == (3, TOKENS, 16)
    assert features.grid == (4, 6)
    mean = np.asarray(features.tokens, np.float64).mean(axis=1)
    mean -= mean.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(
        features.pooled, mean / mean.std(axis=1, keepdims=True), rtol=1e-3, atol=1e-3
    )
    scales = jax.tree.map(np.copy, variables(kind))
    scales["params"]["encoder"]["norm"]["scale"] *= 100
    same = jax.jit(method.features)(scales, {"image": images(kind)})
    np.testing.assert_array_equal(same.tokens, features.tokens)


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_official_layout_round_trip_is_exact(kind):
    method, params = tiny(kind), variables(kind)["params"]
    state = method.layout().save(params)
    again = flatten(method.layout().load(state, params))
    for path, value in flatten(params).items():
        np.testing.assert_array_equal(again[path], value)
    heads = {"heads": 2, "decoder_heads": 2, "image_size": method.inputs["image"].shape[:2]}
    published = DMJD.build(
        configs.load("dmjd:vit_b16" if kind == "plain" else "dmjd", {"compute_dtype": "float32"})
    )
    sized = published.sized_like(state, heads)
    assert sized.model == method.model
    assert sized.cell_size == method.cell_size


def test_a_checkpoint_of_the_other_kind_of_encoder_is_refused():
    plain, hybrid = (tiny(k).layout().save(variables(k)["params"]) for k in ("plain", "hybrid"))
    with pytest.raises(ValueError, match="no hybrid encoder in the naming of ConvMAE"):
        tiny("hybrid").sized_like(plain, {})
    with pytest.raises(ValueError, match=r"no patch_embed\.proj\.weight"):
        tiny("plain").sized_like(hybrid, {})


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_another_dmjd_gives_all_its_parameters_and_other_methods_only_their_encoder(kind):
    method, given = tiny(kind), flatten(variables(kind)["params"])
    for path, value in given.items():
        np.testing.assert_array_equal(method.adopt(path, given, method), value)
    if kind == "plain":
        mae = method_class("mae").build(
            configs.load("mae:tiny", {"data.image_size": (28, 28), "compute_dtype": "float32"})
        )
        assert method.adopt("decoder/pred/bias", given, mae) is None
        assert method.adopt("encoder/norm/bias", given, mae) is not None


def test_the_mask_token_is_decayed_and_biases_and_norms_are_not():
    paths = flatten(variables("hybrid")["params"])
    decayed = {path for path, leaf in paths.items() if is_decayed(path, leaf)}
    assert "decoder/mask_token" in decayed
    assert decayed == {
        path
        for path in paths
        if path == "decoder/mask_token" or path.rsplit("/", 1)[-1] == "kernel"
    }


@functools.cache
def with_teacher():
    method = tiny(changes=TEACHER)
    init = jax.jit(lambda key: method.init(key, {"image": images(batch=1)}))
    return method, init(jax.random.key(0))


def test_a_teachers_features_are_targets_standardized_in_every_token():
    method, initial = with_teacher()
    target = np.asarray(jax.jit(method.target)(initial, images()), np.float64)
    assert target.shape == (3, TOKENS, 12)
    np.testing.assert_allclose(target.mean(axis=-1), 0, atol=1e-5)
    np.testing.assert_allclose(target.var(axis=-1), 1, rtol=1e-2)
    loss, _ = jax.jit(method.loss)(initial, {"image": images()}, rngs(), 0)
    assert np.isfinite(loss)


def test_the_teacher_is_frozen_and_starts_from_weights_of_its_own():
    method, initial = with_teacher()
    trainable, fixed = split_trainable(method, initial["params"])
    assert {path.split("/")[0] for path in flatten(fixed)} == {"teacher"}
    assert {path.split("/")[0] for path in flatten(trainable)} == {"encoder", "decoder", "head"}
    (part,) = method.pretrained
    assert (part.target, part.path) == ("teacher", "somewhere.pth")
    assert tiny().pretrained == tiny().frozen == ()


def test_the_layout_with_a_teacher_is_complete():
    method, initial = with_teacher()
    params = jax.device_get(initial["params"])
    again = flatten(method.layout().load(method.layout().save(params), params))
    for path, value in flatten(params).items():
        np.testing.assert_array_equal(again[path], value)


def test_a_teacher_of_another_grid_is_refused():
    with pytest.raises(ValueError, match="grid is 4 x 4 patches"):
        tiny(changes={**TEACHER, "model.teacher.image_size": (16, 16)})


@pytest.mark.parametrize(
    ("variant", "whole", "encoder"),
    [
        ("convvit_b16_dec2", 104.4, 92.3),
        ("convvit_b16", 135.9, 92.3),
        ("convvit_l16", 375.2, 331.4),
    ],
)
def test_parameter_counts_are_those_of_the_official_models(variant, whole, encoder):
    method = DMJD.build(configs.load(f"dmjd:{variant}", {"compute_dtype": "float32"}))
    shapes = {"image": jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)}
    params = jax.eval_shape(lambda: method.init(jax.random.key(0), shapes))["params"]
    counts = {name: sum(x.size for x in jax.tree.leaves(params[name])) for name in params}
    # The official counts include the fixed position tables, of the encoder and the decoder.
    tables = np.asarray([196 * method.model.encoder.width, 196 * 512]) / 1e6
    assert counts["encoder"] / 1e6 + tables[0] == pytest.approx(encoder, abs=0.06)
    assert sum(counts.values()) / 1e6 + tables.sum() == pytest.approx(whole, abs=0.06)


def test_the_learning_rate_counts_predicted_tokens():
    config = configs.load("dmjd")
    rate = config.optimizer.base_lr * config.batch_size / 256
    assert rate == pytest.approx(6e-4 * 512 * (1.0 / 0.6) / 256)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.encoder": "resnet"}, "'resnet'; known are conv_vit, vit"),
        ({"model.mask_type": "blocks"}, "'blocks'; known are block, rand"),
        ({"model.target": "pixels"}, "known are hog, teacher"),
        ({"model.visible_target_order": "sorted"}, "known are aligned, raster"),
        ({"model.hog_cell_size": 3}, "hog_cell_size is 3, but a token stands for 4 x 4"),
        ({"data.image_size": (12, 24)}, r"grid of 3 x 6 .* both sides are even"),
        ({"model.prediction_ratio": 0.5}, r"between mask_ratio 0\.6 and 1"),
        ({"model.mask_ratio": 0.9}, "leaves none of 6 tokens"),
    ],
)
def test_what_does_not_fit_together_is_an_error_when_built(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(changes=changes)


def test_the_method_is_known_by_its_name():
    assert method_class("dmjd") is DMJD
