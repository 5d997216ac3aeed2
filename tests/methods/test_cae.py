import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.conversion.dvae import dvae_layout
from mim_jax.conversion.export import export_variables
from mim_jax.conversion.files import read_state_dict, write_state_dict
from mim_jax.conversion.pretrained import load_pretrained
from mim_jax.method import method_class, parameter_shapes
from mim_jax.methods.cae import CAE
from mim_jax.models.dvae import token_ids
from mim_jax.models.tower import see
from mim_jax.targets import patchify
from mim_jax.training.experiment import Experiment
from mim_jax.training.optimizer import is_decayed
from mim_jax.training.state import split_trainable
from mim_jax.training.tree import flatten

SIZES = {
    "model.target": "tokens",
    "model.width": 16,
    "model.depth": 2,
    "model.heads": 2,
    "model.patch_size": (4, 4),
    "model.drop_path": 0.0,
    "model.regressor_depth": 2,
    "model.decoder_width": 16,
    "model.decoder_depth": 1,
    "model.decoder_heads": 2,
    "model.layer_scale": 0.5,
    "model.decoder_layer_scale": 0.5,
    "model.masked": 5,
    "model.min_block": 2,
    "model.tokenizer.path": "random",
    "model.tokenizer.hidden": 8,
    "model.tokenizer.blocks_per_group": 1,
    "model.tokenizer.vocabulary": 11,
    "model.tokenizer.channels": 1,
    "data.image_size": (12, 16),
    "data.channels": 1,
    "data.mean": (0.5,),
    "data.std": (0.25,),
    "compute_dtype": "float32",
    "batch_size": 8,
}
FEATURES = {
    "model.target": "features",
    "model.decoder_depth": 0,
    "model.align_weight": 0.0,
    "model.teacher.width": 8,
    "model.teacher.depth": 1,
    "model.teacher.heads": 2,
    "model.teacher.patch_size": (4, 4),
    "model.teacher.image_size": (12, 16),
    "model.teacher.channels": 1,
    "model.teacher.mean": (0.5,),
    "model.teacher.std": (0.25,),
    "model.teacher.outputs": 6,
}
PIXELS = {"model.target": "pixels"}
WIDER = {"model.decoder_width": 24, "model.decoder_heads": 5}
TOKENS, MASKED = 12, 5
KINDS = pytest.mark.parametrize(
    "kind", [{}, FEATURES, PIXELS], ids=["tokens", "features", "pixels"]
)


def tiny(changes: dict[str, Any] | None = None) -> CAE:
    return CAE.build(configs.load("cae:tiny", {**SIZES, **(changes or {})}))


def batch(seed: int = 0, size: int = 3) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "image": random.normal(size=(size, 12, 16, 1)).astype(np.float32),
        "target_image": random.random((size, 24, 32, 1), np.float32),
    }


@functools.cache
def _params(changes: tuple) -> dict[str, Any]:
    method = tiny(dict(changes))
    shapes = jax.eval_shape(lambda: method.init(jax.random.key(0), batch()))["params"]
    random = np.random.default_rng(0)
    # None of them zero, so that no mistake can hide behind zeros.
    return jax.tree.map(lambda p: 0.3 * random.normal(size=p.shape).astype(np.float32), shapes)


def variables(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"params": _params(tuple((changes or {}).items()))}


def rngs(seed: int = 0) -> dict[str, jax.Array]:
    mask, drop_path = jax.random.split(jax.random.key(seed))
    return {"mask": mask, "drop_path": drop_path}


@functools.cache
def _compiled(name: str, changes: tuple):
    return jax.jit(getattr(tiny(dict(changes)), name))


def compiled(name: str, changes: dict[str, Any] | None = None):
    return _compiled(name, tuple((changes or {}).items()))


def ids(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Visible and masked patches of three images, in raster order."""
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(TOKENS), (3, 1)), axis=1)
    return np.sort(order[:, MASKED:], axis=1), np.sort(order[:, :MASKED], axis=1)


def with_other_patches(images: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Images in which the patches at some places are others."""
    chosen = np.zeros((len(images), TOKENS), bool)
    np.put_along_axis(chosen, places, True, axis=1)
    pixels = chosen.reshape(-1, 3, 4).repeat(4, axis=1).repeat(4, axis=2)[..., None]
    return np.where(pixels, 7 * batch(seed=9)["image"], images)


def predict(images: np.ndarray, visible, masked, changes: dict[str, Any] | None = None):
    return compiled("predict", changes)(variables(changes), images, visible, masked)


@pytest.mark.parametrize("mask", ["block", "random"])
def test_exactly_the_configured_number_of_patches_is_masked_in_raster_order(mask):
    choose = jax.jit(tiny({"model.mask": mask}).choose, static_argnums=1)
    visible, masked = choose(rngs(1)["mask"], 40)
    assert visible.shape == (40, TOKENS - MASKED) and masked.shape == (40, MASKED)
    both = np.sort(np.concatenate([visible, masked], axis=1), axis=1)
    np.testing.assert_array_equal(both, np.tile(np.arange(TOKENS), (40, 1)))
    for chosen in (visible, masked):
        assert np.all(np.diff(chosen, axis=1) > 0)
    assert len({tuple(row) for row in np.asarray(masked)}) > 10


def test_masked_pixels_change_nothing_but_the_alignment_target():
    visible, masked = ids()
    images = batch()["image"]
    before = predict(images, visible, masked)
    after = predict(with_other_patches(images, masked), visible, masked)
    for name in ("latent", "predicted", "pred"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name), err_msg=name)
    assert np.all(np.any(after.aligned != before.aligned, axis=-1))


def test_visible_pixels_change_everything_but_the_alignment_target():
    visible, masked = ids()
    images = batch()["image"]
    before = predict(images, visible, masked)
    after = predict(with_other_patches(images, visible), visible, masked)
    np.testing.assert_array_equal(after.aligned, before.aligned)
    for name in ("latent", "predicted", "pred"):
        assert np.all(np.any(getattr(after, name) != getattr(before, name), axis=-1)), name


def test_the_alignment_target_is_the_encoder_on_the_inverted_mask():
    visible, masked = ids()
    images = batch()["image"]
    output = predict(images, visible, masked)
    inverted, _ = tiny().encoder.apply({"params": variables()["params"]["encoder"]}, images, masked)
    np.testing.assert_allclose(output.aligned, inverted[:, 1:], atol=1e-5)


def test_tokens_that_change_places_with_their_positions_change_places_in_the_output():
    visible, masked = ids()
    images = batch()["image"]
    output = predict(images, visible, masked)
    turned = predict(images, visible[:, ::-1], masked[:, ::-1])
    for name in ("predicted", "aligned", "pred"):
        np.testing.assert_allclose(
            getattr(turned, name)[:, ::-1], getattr(output, name), atol=2e-5, err_msg=name
        )
    np.testing.assert_allclose(turned.latent[:, :0:-1], output.latent[:, 1:], atol=2e-5)


def test_the_regressor_is_told_where_the_masked_patches_are():
    visible, _ = ids()
    other = np.setdiff1d(np.arange(TOKENS), visible[0])[None].repeat(3, 0)
    images = batch()["image"]
    first = predict(images[:1].repeat(3, 0), visible[:1].repeat(3, 0), other)
    moved = other.copy()
    moved[1] = visible[0][:MASKED]
    second = predict(images[:1].repeat(3, 0), visible[:1].repeat(3, 0), moved)
    np.testing.assert_allclose(second.predicted[0], first.predicted[0], atol=1e-6)
    assert np.all(np.abs(second.predicted[1] - first.predicted[1]).max(axis=-1) > 1e-4)


def test_alignment_moves_what_predicts_and_not_its_target():
    method, (visible, masked) = tiny(), ids()
    images = batch()["image"]
    fixed = predict(images, visible, masked).aligned

    def alignment(params, target=None):
        output = method.predict({"params": params}, images, visible, masked)
        aligned = output.aligned if target is None else target
        return jnp.mean((output.predicted - aligned) ** 2)

    params = variables()["params"]
    both = jax.jit(lambda p: (jax.grad(alignment)(p), jax.grad(alignment)(p, fixed)))
    ours, with_constant = map(flatten, both(params))
    for path, gradient in with_constant.items():
        np.testing.assert_allclose(ours[path], gradient, atol=1e-6, err_msg=path)
    assert np.any(ours["encoder/cls_token"] != 0)
    assert not np.any(ours["decoder/head/kernel"])


def test_losses_are_the_cross_entropy_of_masked_tokens_and_twice_the_squared_error():
    method, (visible, masked) = tiny(), ids()
    given = batch()
    output = predict(given["image"], visible, masked)
    labels = np.asarray(method.targets(variables(), given, visible, masked))
    loss, metrics = method.objective(output, labels)
    logits = np.asarray(output.pred, np.float64)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    main = -np.take_along_axis(logits, labels[..., None], axis=-1).mean()
    align = 2 * ((output.predicted - output.aligned) ** 2).mean()
    assert float(metrics["loss_main"]) == pytest.approx(main, rel=1e-5)
    assert float(metrics["loss_align"]) == pytest.approx(float(align), rel=1e-5)
    assert float(loss) == pytest.approx(main + float(align), rel=1e-5)
    assert float(metrics["mlm_acc"]) == np.mean(logits.argmax(axis=-1) == labels)


def test_token_targets_are_those_of_the_masked_squares_of_the_second_rendering():
    method, (visible, masked) = tiny(), ids()
    given = batch()
    labels = np.asarray(method.targets(variables(), given, visible, masked))
    tokenizer = variables()["params"]["tokenizer"]
    every = np.asarray(token_ids(method.tokenizer, tokenizer, given["target_image"]))
    assert every.shape == (3, TOKENS)
    np.testing.assert_array_equal(labels, np.take_along_axis(every, masked, axis=1))


def test_feature_targets_are_ordered_class_visible_masked():
    method, (visible, masked) = tiny(FEATURES), ids()
    given = batch()
    target = method.targets(variables(FEATURES), given, visible, masked)
    seen = see(method.tower, variables(FEATURES)["params"]["teacher"], given["image"])
    assert target.shape == (3, 1 + TOKENS, 6)
    for i in range(3):
        order = [0, *(1 + visible[i]), *(1 + masked[i])]
        np.testing.assert_allclose(target[i], seen.projected[i][np.asarray(order)], atol=1e-5)


def test_the_feature_loss_lies_between_zero_and_two_and_sees_every_row():
    method, (visible, masked) = tiny(FEATURES), ids()
    output = predict(batch()["image"], visible, masked, FEATURES)
    assert output.pred.shape == (3, 1 + TOKENS, 6)
    assert output.aligned is None
    pred = np.asarray(output.pred)
    assert float(method.objective(output, 3 * pred)[0]) == pytest.approx(0, abs=1e-6)
    assert float(method.objective(output, -pred)[0]) == pytest.approx(2, abs=1e-6)
    for row in range(1 + TOKENS):
        target = pred.copy()
        target[:, row] *= -1
        assert float(method.objective(output, target)[0]) == pytest.approx(2 / 13, rel=1e-4)


def test_a_teacher_of_another_image_size_sees_a_rendering_of_its_own():
    changes = {**FEATURES, "model.teacher.image_size": (24, 32), "model.teacher.patch_size": (8, 8)}
    method, (visible, masked) = tiny(changes), ids()
    assert method.inputs["target_image"].shape == (24, 32, 1)
    assert "target_image" not in tiny(FEATURES).inputs
    given = batch()
    target = method.targets(variables(changes), given, visible, masked)
    shown = (given["target_image"] - 0.5) / 0.25
    seen = see(method.tower, variables(changes)["params"]["teacher"], shown)
    np.testing.assert_allclose(target[:, 0], seen.projected[:, 0], atol=1e-5)


def test_a_teacher_without_class_token_has_no_row_for_ours():
    changes = {**FEATURES, "model.teacher.family": "siglip", "model.teacher.outputs": 0}
    method, (visible, masked) = tiny(changes), ids()
    target = jax.eval_shape(method.targets, variables(changes), batch(), visible, masked)
    assert target.shape == (3, TOKENS, 8)
    output = predict(batch()["image"], visible, masked, changes)
    exact = np.asarray(output.pred)[:, 1:]
    assert float(method.objective(output, exact)[0]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_pixel_targets_are_the_masked_patches(normalize):
    method = tiny({**PIXELS, "model.normalize_target": normalize})
    visible, masked = ids()
    patches = np.asarray(patchify(jnp.asarray(batch()["image"]), (4, 4)))
    expected = np.take_along_axis(patches, masked[..., None], axis=1)
    target = np.asarray(method.targets({}, batch(), visible, masked))
    if normalize:
        expected = expected - expected.mean(axis=-1, keepdims=True)
        expected /= np.sqrt(expected.var(axis=-1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(target, expected, atol=1e-4)
    assert method.inputs.keys() == {"image"}


@KINDS
def test_gradients_reach_every_trained_parameter_and_no_frozen_one(kind):
    method = tiny(kind)
    trainable, fixed = split_trainable(method, variables(kind)["params"])

    def loss(trainable):
        params = {**fixed, **trainable}
        # The regressor of CAE v2 is partly trained.
        if "regressor" in fixed:
            params["regressor"] = {**fixed["regressor"], **trainable["regressor"]}
        return method.loss({"params": params}, batch(), rngs(), jnp.int32(0))[0]

    gradient = flatten(jax.jit(jax.grad(loss))(trainable))
    for path, leaf in gradient.items():
        assert np.any(np.asarray(leaf) != 0), path
    frozen = set(flatten(fixed))
    names = {path.split("/")[0] for path in frozen}
    if not kind:
        assert names == {"tokenizer"}
    elif kind is FEATURES:
        assert names == {"teacher", "regressor"}
        assert {path for path in frozen if path.startswith("regressor")} == {
            "regressor/norm/scale",
            "regressor/norm/bias",
        }
    else:
        assert not frozen


@KINDS
def test_the_loss_is_a_float32_function_of_its_keys(kind):
    loss = compiled("loss", kind)
    values = [float(loss(variables(kind), batch(), rngs(seed), 0)[0]) for seed in (1, 1, 2)]
    assert values[0] == values[1] != values[2]
    half = tiny({**kind, "compute_dtype": "bfloat16"})
    value, aux = jax.eval_shape(half.loss, variables(kind), batch(), rngs(), 0)
    assert {value.dtype, *(x.dtype for x in aux.metrics.values())} == {jnp.dtype("float32")}
    expected = {"loss_main"} | ({"loss_align"} if kind is not FEATURES else set())
    assert set(aux.metrics) == expected | ({"mlm_acc"} if not kind else set())


def test_without_alignment_its_branch_is_not_computed():
    changes = {"model.align_weight": 0.0}
    value, aux = compiled("loss", changes)(variables(changes), batch(), rngs(), 0)
    assert set(aux.metrics) == {"loss_main", "mlm_acc"}
    assert float(value) == float(aux.metrics["loss_main"])
    with_it = compiled("loss")(variables(), batch(), rngs(), 0)[1].metrics
    assert float(value) == pytest.approx(float(with_it["loss_main"]), rel=1e-5)


def test_encoder_and_alignment_switch_off_branches_of_their_own():
    method = tiny({"model.drop_path": 0.9})
    visible, masked = ids()
    kept, noise = np.ones((2, 2, 3), np.float32) - 1e-3, np.zeros((2, 2, 3), np.float32)
    call = jax.jit(method.predict)

    def with_noise(encoder, alignment):
        rest = (np.ones((2, 2, 3), np.float32) - 1e-3, np.ones((1, 2, 3), np.float32) - 1e-3)
        drawn = (encoder, alignment, *rest)
        return call(variables(), batch()["image"], visible, masked, drawn)

    whole, other = with_noise(kept, kept), with_noise(kept, noise)
    np.testing.assert_array_equal(other.latent, whole.latent)
    assert np.any(other.aligned != whole.aligned)
    other = with_noise(noise, kept)
    np.testing.assert_array_equal(other.aligned, whole.aligned)
    assert np.any(other.latent != whole.latent)


def test_positions_encode_the_row_before_the_column():
    method = tiny()
    for table in (method.encoder.position_table(), method.model.position_table()):
        assert not table[0].any()
        grid = table[1:].reshape(3, 4, 16)
        assert np.ptp(grid[..., :8], axis=1).max() == 0  # constant along a row
        assert np.ptp(grid[..., 8:], axis=0).max() == 0


def test_features_are_the_normalized_tokens_of_whole_images():
    features = compiled("features")(variables(), {"image": batch()["image"]})
    assert features.pooled.shape == (3, 16) and features.grid == (3, 4)
    tokens, _ = tiny().encoder.apply({"params": variables()["params"]["encoder"]}, batch()["image"])
    np.testing.assert_allclose(features.pooled, tokens[:, 0], atol=1e-5)
    np.testing.assert_allclose(features.tokens, tokens[:, 1:], atol=1e-5)


def test_pictures_show_true_visible_and_predicted_masked_patches():
    images = batch()["image"]
    shown = compiled("pictures", PIXELS)(variables(PIXELS), {"image": images}, rngs(3))
    columns = shown["reconstruction"].columns
    assert list(columns) == ["image", "visible", "prediction + visible"]
    visible, masked = tiny(PIXELS).choose(rngs(3)["mask"], 3)
    pred = predict(images, visible, masked, PIXELS).pred
    patches = {name: np.asarray(patchify(x, (4, 4))) for name, x in columns.items()}
    for i in range(3):
        filled = patches["prediction + visible"][i]
        np.testing.assert_allclose(filled[masked[i]], pred[i], atol=1e-5)
        np.testing.assert_array_equal(filled[visible[i]], patches["image"][i][visible[i]])
        assert not patches["visible"][i][masked[i]].any()
    assert tiny().pictures(variables(), batch(), rngs()) == {}


def own(method: CAE, params: dict[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in params.items() if name not in ("tokenizer", "teacher")}


@pytest.mark.parametrize(
    "changes",
    [
        WIDER,
        {"model.layer_scale": 0.0, "model.decoder_layer_scale": 0.0},
        {**FEATURES, **WIDER, "model.decoder_heads": 4},
    ],
    ids=["projected, uneven heads", "no layer scale", "features"],
)
def test_the_official_names_hold_every_parameter_and_tell_the_sizes(changes):
    method = tiny(changes)
    params = own(method, variables(changes)["params"])
    state = method.layout().save(params)
    again = flatten(method.layout().load(state, params))
    for path, value in flatten(params).items():
        np.testing.assert_array_equal(again[path], value, err_msg=path)
    template = tiny(FEATURES if "model.target" in changes else None)
    known = {"heads": 2, "decoder_heads": changes.get("model.decoder_heads", 2)}
    sized = template.sized_like(state, known)
    like = parameter_shapes(sized)
    assert flatten(sized.layout().load(state, like)).keys() == again.keys()
    assert sized.model.regressor.width == method.model.regressor.width


def test_heads_that_do_not_divide_the_width_are_rounded_down():
    # As of a decoder of width 1024 with 12 heads, whose projections have 3060 rows.
    state = tiny(WIDER).layout().save(own(tiny(WIDER), variables(WIDER)["params"]))
    assert state["decoder.decoder_blocks.0.attn.qkv.weight"].shape == (3 * 5 * 4, 24)
    assert state["regresser.regressor_blocks.0.cross_attn.q.weight"].shape == (20, 24)
    assert state["encoder_to_regresser.weight"].shape == (24, 16)
    assert state["rd_pos_embed"].shape == (1, 1 + TOKENS, 24)


def test_layer_scales_that_are_fixed_are_ones_in_the_regressor_and_absent_elsewhere():
    changes = {"model.layer_scale": 0.0, "model.decoder_layer_scale": 0.0}
    state = tiny(changes).layout().save(own(tiny(changes), variables(changes)["params"]))
    scales = {key for key in state if "gamma" in key}
    assert scales == {
        f"regresser.regressor_blocks.{i}.gamma_{j}_cross" for i in (0, 1) for j in (1, 2)
    }
    for key in scales:
        np.testing.assert_array_equal(state[key], np.ones(16))


def test_the_copy_of_the_encoder_is_written_and_may_be_missing():
    method = tiny()
    params = own(method, variables()["params"])
    state = method.layout().save(params)
    start = "alignment_encoder."
    copies = {key for key in state if key.startswith(start)}
    assert {key.removeprefix(start) for key in copies} == {
        key.removeprefix("encoder.") for key in state if key.startswith("encoder.")
    }
    for key in copies:
        np.testing.assert_array_equal(state[key], state[key.removeprefix("alignment_")])
    without = {key: value for key, value in state.items() if key not in copies}
    again = flatten(method.layout().load(without, params))
    for path, value in flatten(params).items():
        np.testing.assert_array_equal(again[path], value)
    # What the copy holds never decides over the encoder.
    other = {key: value + (key in copies) for key, value in state.items() if "pos_embed" not in key}
    other |= {key: value for key, value in state.items() if "pos_embed" in key}
    again = flatten(method.layout().load(other, params))
    np.testing.assert_array_equal(again["encoder/cls_token"], params["encoder"]["cls_token"])


def test_an_export_holds_what_the_official_file_does_and_no_tokenizer(tmp_path):
    config = configs.load("cae:tiny", SIZES)
    path = tmp_path / "cae.safetensors"
    notes = export_variables(tiny(), config, variables(), path, run_library=False)
    assert "left out: tokenizer" in notes
    state = tiny().layout().save(own(tiny(), variables()["params"]))
    assert set(read_state_dict(path)) == set(state)


def test_a_checkpoint_of_something_else_is_refused():
    with pytest.raises(ValueError, match="no pre-trained CAE; it begins with head"):
        tiny().sized_like({"head.weight": np.zeros((2, 2))}, {})


@pytest.mark.parametrize("scan", [False, True])
def test_decayed_parameters_are_those_of_the_official_rule(scan):
    """Excluded are tensors of one dimension and names ending in `.bias`; tokens are decayed."""
    method = tiny({"model.scan": scan})
    shapes = own(method, parameter_shapes(method))
    official = tiny().layout().save(own(tiny(), variables()["params"]))
    ours = flatten(shapes)
    for rule in method.layout().rules:
        expected = official[rule.key].ndim > 1 and not rule.key.endswith(".bias")
        assert is_decayed(rule.path, ours[rule.path]) == expected, rule.path
    assert is_decayed("regressor/mask_token", ours["regressor/mask_token"])


def test_initial_values_end_up_as_in_the_official_code():
    method = CAE.build(configs.load("cae:tiny", {**SIZES, "model.width": 128, **PIXELS}))
    params = flatten(jax.jit(method.init)(jax.random.key(0), batch())["params"])
    for path in ("encoder/patch_embed/kernel", "encoder/cls_token", "regressor/mask_token"):
        values = np.asarray(params[path])
        assert np.abs(values).max() <= 0.02
        # One deviation left and right of a normal leaves 0.54 of its deviation.
        assert values.std() == pytest.approx(0.0108, rel=0.25), path
    kernel = np.asarray(params["encoder/patch_embed/kernel"])
    assert kernel.std() == pytest.approx(0.0108, rel=0.03)
    for path, value in params.items():
        if path.endswith("bias"):
            assert not np.any(value), path
        elif path.endswith("norm/scale") or "norm" in path.split("/")[-2]:
            assert np.all(np.asarray(value) == 1), path
        elif "layer_scale" in path:
            assert np.all(np.asarray(value) == 0.5), path
    qkv = np.asarray(params["encoder/transformer/blocks_0/attention/qkv/kernel"])
    bound = np.sqrt(6 / (128 + 3 * 128))
    assert 0.98 * bound < np.abs(qkv).max() <= bound


def full_size(variant: str) -> tuple[CAE, dict[str, int]]:
    """A published size, and the number of elements of each official array."""
    method = CAE.build(configs.load(f"cae:{variant}", {"compute_dtype": "float32"}))
    shapes = flatten(parameter_shapes(method))
    return method, {path: int(np.prod(leaf.shape)) for path, leaf in shapes.items()}


@pytest.mark.parametrize(
    ("variant", "trained", "encoder", "whole"),
    [("vit_b16", 148.7, 85.8, 234.8), ("vit_l16_as_released", None, None, 670.6)],
)
def test_parameter_counts_are_the_papers(variant, trained, encoder, whole):
    method, sizes = full_size(variant)
    sizes = {path: size for path, size in sizes.items() if not path.startswith("tokenizer/")}
    of_encoder = sum(size for path, size in sizes.items() if path.startswith("encoder/"))
    tables = [method.encoder.position_table().size] * 2 + [method.model.position_table().size]
    total = sum(sizes.values())
    if trained:
        assert total / 1e6 == pytest.approx(trained, abs=0.05)
        assert (of_encoder + tables[0]) / 1e6 == pytest.approx(encoder, abs=0.1)
    # The official model has a copy of the encoder, and its tables are parameters.
    assert (total + of_encoder + sum(tables)) / 1e6 == pytest.approx(whole, abs=0.05)


def test_every_variant_fits_together():
    module = configs.CONFIG_FOLDER / "cae.py"
    assert module.is_file()
    from configs.cae import VARIANTS

    methods = {
        name: CAE.build(configs.load(f"cae:{name}", {"compute_dtype": "float32"}))
        for name in VARIANTS
    }
    assert {name: method.target for name, method in methods.items()} == {
        **dict.fromkeys(VARIANTS, "tokens"),
        **dict.fromkeys(("v2_t16", "v2_s16", "v2_b16"), "features"),
        "pixels_b16": "pixels",
        "tiny": "pixels",
    }
    for name, method in methods.items():
        size = configs.load(f"cae:{name}").data.target_size
        wanted = method.inputs.get("target_image")
        assert size == (() if wanted is None else wanted.shape[:2]), name
    large = methods["vit_l16"]
    assert not hasattr(large.model, "project") and large.model.regressor.width == 1024
    assert methods["vit_l16_as_released"].model.regressor.settings.heads == 12
    small = methods["v2_t16"]
    assert (small.encoder.width, small.encoder.transformer.heads) == (192, 12)
    assert (small.model.regressor.width, small.masked, small.tower.outputs) == (96, 30, 512)


def test_a_missing_second_rendering_is_an_error_that_names_the_field():
    tiny().check(batch())
    with pytest.raises(ValueError, match=r"'target_image'.*Set data\.target_size to \(24, 32\)"):
        tiny().check({"image": batch()["image"]})


def test_the_method_is_known_by_its_name():
    assert method_class("cae") is CAE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.target": "colours"}, "'colours'; known are tokens, features, pixels"),
        ({"model.mask": "blocks"}, "'blocks'; known are block, random"),
        ({"model.masked": 12}, "between 1 and 11, since an image has 12 patches"),
        ({"model.masked": 0}, "between 1 and 11"),
        ({"model.target": "features"}, r"set model\.decoder_depth and model\.align_weight to 0"),
        (
            {**FEATURES, "model.teacher.image_size": (12, 12)},
            r"teacher's grid is 3 x 3 .* is 3 x 4; set model\.teacher\.image_size to \(12, 16\)",
        ),
    ],
)
def test_what_does_not_fit_together_is_an_error_when_built(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(changes)


def test_the_tokenizer_starts_from_its_file_and_is_never_trained(tmp_path):
    tokenizer = tiny().tokenizer
    weights = variables()["params"]["tokenizer"]
    path = tmp_path / "encoder.safetensors"
    write_state_dict(path, dvae_layout(tokenizer).save(weights))
    changes = {**SIZES, "model.tokenizer.path": str(path)}
    experiment = Experiment.without_data(configs.load("cae:tiny", changes))
    state = experiment.initial_state(experiment.batch_shapes())
    state, notes = load_pretrained(experiment.method, state)
    assert notes == [f"tokenizer: {len(flatten(weights))} arrays from {path}"]
    for name, value in flatten(weights).items():
        np.testing.assert_array_equal(flatten(state.params["tokenizer"])[name], value)
    assert not [
        x for x in flatten(split_trainable(experiment.method, state.params)[0]) if "tokenizer" in x
    ]
    # A run that knows no file keeps its random tokenizer, and one without a word has none.
    assert tiny().pretrained == ()
    assert tiny({"model.tokenizer.path": ""}).pretrained[0].field == "model.tokenizer.path"
    wrong = {**changes, "model.tokenizer.vocabulary": 12}
    experiment = Experiment.without_data(configs.load("cae:tiny", wrong))
    state = experiment.initial_state(experiment.batch_shapes())
    with pytest.raises(
        ValueError, match=r"blocks\.output\.conv\.w.*model has|in the model"
    ) as error:
        load_pretrained(experiment.method, state)
    assert "model.tokenizer.path" in str(error.value) and "conv.b" in str(error.value)
