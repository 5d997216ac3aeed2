"""Invariants of Locality Alignment on images of 2 x 3 patches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from mim_jax import config as configs
from mim_jax.data.configured import training_source
from mim_jax.method import method_class
from mim_jax.methods.locality_alignment import (
    CALIBRATION,
    LocalityAlignment,
    hide_pixels,
    no_values,
    scale_of,
    with_values,
)
from mim_jax.models.tower import tower_settings
from mim_jax.models.transformer import attention_weights
from mim_jax.models.vit import adopted
from mim_jax.training.experiment import Experiment, training_batches
from mim_jax.training.state import split_trainable
from mim_jax.training.stretch import first_state, without_host_entries
from mim_jax.training.tree import flatten, unflatten
from tests.methods.tiny import TOKENS, images

PREFIX, ROWS = 1, 3
BATCH = images(batch=2)

TOWER = tower_settings(
    "tiny", width=16, depth=2, heads=2, patch_size=4, image_size=(8, 12), mean=(0.5,), std=(0.25,)
)

SIZES = {
    **{f"model.teacher.{field}": value for field, value in TOWER.items()},
    "model.decoder_depth": 1,
    "data.image_size": (8, 12),
    "data.mean": (0.5,),
    "data.std": (0.25,),
    "compute_dtype": "float32",
    "batch_size": 8,
}


def build(**changes) -> LocalityAlignment:
    fields = {f"model.{name.replace('__', '.')}": value for name, value in changes.items()}
    return LocalityAlignment.build(configs.load("locality_alignment:tiny", {**SIZES, **fields}))


@functools.cache
def initial() -> dict:
    init = jax.jit(lambda key: build().init(key, {"image": BATCH}))
    return jax.device_get(init(jax.random.key(0)))


def drawn(shapes: dict) -> dict:
    """Parameters of which none is zero, so that no mistake can hide behind zeros."""
    random = np.random.default_rng(0)
    flat = {
        path: (path.endswith("scale") + 0.2 * random.normal(size=leaf.shape)).astype(np.float32)
        for path, leaf in flatten(shapes).items()
    }
    return unflatten(flat)


@functools.cache
def variables(**changes) -> dict:
    method = build(**changes)
    shapes = jax.eval_shape(lambda: method.init(jax.random.key(0), {"image": BATCH}))
    known = {"count": 4.0, "mean": 0.0, "squares": 1.0}
    extra = {CALIBRATION: known} if CALIBRATION in shapes else {}
    return {"params": drawn(shapes["params"]), **extra}


@functools.cache
def compiled(name: str, **changes):
    return jax.jit(getattr(build(**changes), name))


STREAMS = LocalityAlignment.streams


def rngs(seed: int = 0) -> dict[str, jax.Array]:
    return {name: jax.random.fold_in(jax.random.key(seed), i) for i, name in enumerate(STREAMS)}


def some_masks(seed: int = 0) -> np.ndarray:
    """Triples in which neither mask is all kept or all hidden."""
    kept = np.array([[1, 0, 0, 1, 1, 0], [0, 0, 1, 0, 1, 0]], np.float32)
    return np.stack([kept, 1 - kept, np.ones_like(kept)], axis=1).reshape(-1, TOKENS)


MASKS = some_masks()


def pixels_of(mask: np.ndarray) -> np.ndarray:
    """`[rows, tokens]` -> `[rows, 8, 12, 1]`."""
    return mask.reshape(-1, 2, 3).repeat(4, axis=1).repeat(4, axis=2)[..., None]


# Masks and targets


def test_every_image_has_its_mask_its_complement_and_the_null_mask():
    rows = np.asarray(build().masks(rngs()["mask"], 5))
    first, second, third = rows.reshape(5, ROWS, TOKENS).swapaxes(0, 1)
    np.testing.assert_array_equal(second, 1 - first)
    np.testing.assert_array_equal(third, 1)
    assert len(np.unique(first, axis=0)) > 1


def test_the_number_of_kept_patches_is_uniform():
    draw = jax.jit(build(complement=False, null_mask=False).masks, static_argnums=1)
    counts = np.asarray(draw(jax.random.key(0), 10_000)).sum(axis=1).astype(int)
    assert scipy.stats.chisquare(np.bincount(counts, minlength=TOKENS + 1)).pvalue > 1e-3


def test_bernoulli_masks_keep_the_configured_share():
    method = build(mask_sampler="bernoulli", kept_share=0.25, complement=False)
    rows = np.asarray(method.masks(jax.random.key(1), 5000)).reshape(5000, 2, TOKENS)
    assert abs(rows[:, 0].mean() - 0.25) < 0.01
    np.testing.assert_array_equal(rows[:, 1], 1)


def test_blockwise_masks_need_a_grid_that_holds_a_block():
    fields = {
        **SIZES,
        "model.teacher.image_size": (32, 32),
        "data.image_size": (32, 32),
        "model.mask_sampler": "blockwise",
        "model.kept_share": 0.4,
        "model.null_mask": False,
    }
    method = LocalityAlignment.build(configs.load("locality_alignment:tiny", fields))
    rows = np.asarray(method.masks(jax.random.key(0), 4))
    assert rows.shape == (8, 64)
    assert np.all(rows[::2].mean(axis=1) >= 0.4)
    with pytest.raises(ValueError, match="bounds a block to 2, but min_block is 16"):
        build(mask_sampler="blockwise", kept_share=0.4)


def target_of(given: np.ndarray, **changes) -> np.ndarray:
    return np.asarray(compiled("target", **changes)(variables(**changes), given, MASKS))


def test_the_target_does_not_depend_on_hidden_pixels():
    repeated = BATCH.repeat(ROWS, axis=0)
    noise = images(2 * ROWS, seed=1)
    hidden = np.where(pixels_of(MASKS) == 0, noise, repeated)
    shown = np.where(pixels_of(MASKS) == 1, noise, repeated)
    for row in range(ROWS):
        # Only this row of the triple has the mask that the change respects.
        for changed, same in ((hidden, True), (shown, False)):
            target = target_of(changed[row::ROWS])[row::ROWS]
            assert np.array_equal(target, target_of(BATCH)[row::ROWS]) == same


def test_the_null_mask_gives_what_the_teacher_makes_of_the_whole_image():
    method, given = build(), variables()
    whole, _ = method.teacher.apply({"params": given["params"]["teacher"]}, BATCH)
    scale = float(scale_of(given[CALIBRATION]))
    assert scale == 2.0
    np.testing.assert_allclose(target_of(BATCH)[2::ROWS], scale * whole, rtol=1e-5, atol=1e-5)


def test_the_teacher_is_the_tower_without_its_last_block_but_with_its_final_norm():
    method, given = build(), variables()
    whole = method.encoder.clone(
        transformer=method.teacher.transformer.clone(depth=2), norm_epsilon=None
    )
    teacher = given["params"]["teacher"]
    full = {**given["params"]["encoder"], **teacher}
    full["transformer"] = {**given["params"]["encoder"]["transformer"], **teacher["transformer"]}
    _, blocks = whole.apply({"params": full}, BATCH)
    assert method.teacher.transformer.depth == 1
    mean, std = blocks[0].mean(-1, keepdims=True), blocks[0].std(-1, keepdims=True)
    expected = (blocks[0] - mean) / std * teacher["norm"]["scale"] + teacher["norm"]["bias"]
    np.testing.assert_allclose(target_of(BATCH)[2::ROWS] / 2, expected, atol=1e-4)


def test_pixels_that_fill_no_patch_are_hidden_under_every_mask():
    encoder = build().encoder.clone(image_size=(9, 14), floor_grid=True)
    whole = np.ones((2, 9, 14, 1), np.float32)
    seen = np.asarray(hide_pixels(whole, MASKS, encoder))
    np.testing.assert_array_equal(seen[:, :8, :12], pixels_of(MASKS))
    assert not seen[:, 8:].any() and not seen[:, :, 12:].any()


def test_after_calibration_the_variance_of_all_targets_is_one():
    method, given = build(), variables()
    batches = [images(2, seed=seed) for seed in range(3)]
    given = {**given, CALIBRATION: no_values()}
    seen = []
    for seed, batch in enumerate(batches):
        kept = method.masks(rngs(seed)["mask"], len(batch))
        seen.append(compiled("unscaled_target")(given, batch, kept))
        given |= compiled("calibrate")(given, {"image": batch}, rngs(seed))
    values = np.concatenate([np.asarray(x, np.float64).ravel() for x in seen])
    known = given[CALIBRATION]
    assert float(known["count"]) == values.size
    np.testing.assert_allclose(known["mean"], values.mean(), atol=1e-6)
    np.testing.assert_allclose(known["squares"] / known["count"], values.var(), rtol=1e-5)
    np.testing.assert_allclose(np.var(values * float(scale_of(known))), 1, rtol=1e-5)


def test_statistics_do_not_depend_on_how_values_are_split():
    values = np.random.default_rng(0).normal(5, 2, (6, 4)).astype(np.float32)
    known = no_values()
    for part in (values[:1], values[1:3], values[3:]):
        known = with_values(known, jnp.asarray(part))
    np.testing.assert_allclose(known["squares"], ((values - values.mean()) ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(float(scale_of(known)), 1 / values.std(), rtol=1e-5)
    assert float(scale_of(no_values())) == 1


def test_a_teacher_with_twice_the_outputs_gives_the_same_targets_after_calibration():
    given, targets = variables(), []
    teacher = given["params"]["teacher"]
    twice = {**teacher, "norm": jax.tree.map(lambda p: 2 * p, teacher["norm"])}
    for weights in (teacher, twice):
        fresh = {"params": {**given["params"], "teacher": weights}, CALIBRATION: no_values()}
        fresh |= compiled("calibrate")(fresh, {"image": BATCH}, rngs())
        targets.append(compiled("target")(fresh, BATCH, MASKS))
    np.testing.assert_allclose(*targets, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "l1", "masked_mse", "unmasked_mse"])
def test_only_the_squared_error_calibrates(name):
    method = build(loss=name)
    assert method.calibration_batches == 0
    assert build().calibration_batches == 5
    shapes = jax.eval_shape(lambda: method.init(jax.random.key(0), {"image": BATCH}))
    assert set(shapes) == {"params"}


# The student


def predicted(given: np.ndarray = BATCH, **changes):
    return compiled("predict", **changes)(variables(**changes), given, MASKS)


def test_the_decoder_sees_kept_patches_alone():
    decoder = build().model.decoder
    params = {"params": variables()["params"]["decoder"]}
    tokens = np.random.default_rng(0).normal(size=(6, PREFIX + TOKENS, 16)).astype(np.float32)
    weights = np.random.default_rng(1).normal(size=tokens.shape)

    @jax.jit
    @jax.grad
    def slope(tokens):
        return jnp.sum(decoder.apply(params, tokens, MASKS) * weights)

    seen = np.any(np.asarray(slope(tokens)) != 0, axis=-1)
    np.testing.assert_array_equal(seen[:, PREFIX:], MASKS == 1)
    assert not seen[:, :PREFIX].any()


def test_the_encoder_sees_everything_whatever_the_masks():
    other = 1 - MASKS
    before, after = (compiled("predict")(variables(), BATCH, kept) for kept in (MASKS, other))
    np.testing.assert_array_equal(before.latent, after.latent)
    assert before.latent.shape == (2, PREFIX + TOKENS, 16)
    assert before.reconstruction.shape == (6, PREFIX + TOKENS, 16)
    assert np.any(before.reconstruction != after.reconstruction)


def test_at_first_the_encoders_tokens_are_zero_and_no_prediction_depends_on_the_image():
    first, second = (compiled("predict")(initial(), x, MASKS) for x in (BATCH, images(2, seed=5)))
    assert not np.any(first.tokens)
    np.testing.assert_array_equal(first.reconstruction, second.reconstruction)
    for row in first.reconstruction:
        np.testing.assert_array_equal(row, first.reconstruction[0])


def test_an_mlp_as_head_has_the_encoders_hidden_width_and_starts_at_zero_as_well():
    head = build(output_head="mlp").model.head
    tokens, params = head.init_with_output(jax.random.key(0), jnp.ones((1, 3, 16)))
    assert not np.any(tokens)
    assert params["params"]["fc1"]["kernel"].shape == (16, 4 * 16)
    assert np.any(params["params"]["fc1"]["kernel"])


def test_the_new_norm_is_the_identity_and_has_an_epsilon_of_its_own():
    norm = initial()["params"]["encoder"]["norm"]
    np.testing.assert_array_equal(norm["scale"], 1)
    np.testing.assert_array_equal(norm["bias"], 0)
    method = build()
    assert method.encoder.norm_epsilon == method.model.decoder.transformer.epsilon == 1e-5
    assert method.teacher.transformer.epsilon == 1e-6


def test_bounded_logits_lie_within_the_bound_and_small_ones_stay_as_they_are():
    random = np.random.default_rng(0)
    query, key = (jnp.asarray(random.normal(size=(2, 5, 2, 8)), jnp.float32) for _ in range(2))
    for factor, bounded in ((1e-2, False), (30.0, True)):
        capped = np.asarray(attention_weights(factor * query, factor * key, logit_cap=30.0))
        plain = np.asarray(attention_weights(factor * query, factor * key))
        spread = np.log(capped).max(-1) - np.log(capped).min(-1)
        assert np.all(spread <= 60 + 1e-3)
        if bounded:
            assert np.abs(capped - plain).max() > 1e-2
        else:
            np.testing.assert_allclose(capped, plain, rtol=1e-5)


def test_student_alone_has_bounded_logits():
    method = build()
    assert method.encoder.transformer.logit_cap == 30
    assert method.teacher.transformer.logit_cap is None
    assert method.model.decoder.transformer.logit_cap is None
    assert build(logit_cap=0.0).encoder.transformer.logit_cap is None


# Losses and gradients


@functools.cache
def gradient(**changes) -> dict[str, np.ndarray]:
    method, given = build(**changes), variables(**changes)

    def loss(params):
        return method.loss({**given, "params": params}, {"image": BATCH}, rngs(), jnp.int32(0))[0]

    return flatten(jax.device_get(jax.jit(jax.grad(loss))(given["params"])))


def test_the_teacher_has_no_gradient_and_everything_else_has():
    for path, leaf in gradient().items():
        assert np.any(leaf) != path.startswith("teacher/"), path
    trainable, fixed = split_trainable(build(), variables()["params"])
    assert set(trainable) == {"encoder", "head", "decoder"}
    assert set(fixed) == {"teacher"}


def test_a_frozen_student_trains_its_decoder_on_the_encoder_as_it_is():
    method = build(freeze_student=True)
    trainable, _ = split_trainable(method, variables(freeze_student=True)["params"])
    assert set(trainable) == {"decoder"}
    assert method.encoder.norm_epsilon is None
    assert all(not part.fresh for part in method.pretrained)
    output = predicted(freeze_student=True)
    np.testing.assert_array_equal(output.tokens, output.latent)


def test_the_class_token_is_compared_with_its_own_target_alone():
    changes = {"prefix_only": True, "skip_blocks": 0}
    target = target_of(BATCH, **changes)
    assert target.shape == (6, 1, 16)
    output = predicted(**changes).reconstruction
    loss = build(**changes).objective(output, target, MASKS)
    expected = np.mean([(output[i, 0] - target[i, 0]) ** 2 for i in range(6)])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    all_pairs = np.mean((output[None, :, 0] - target) ** 2)
    assert abs(all_pairs - expected) > 1e-3 * expected


def test_masked_and_unmasked_errors_share_the_error_and_both_have_the_class_token():
    output, target = predicted().reconstruction, target_of(BATCH)
    masked, unmasked, both = (
        float(build(loss=name).objective(output, target, MASKS))
        for name in ("masked_mse", "unmasked_mse", "mse")
    )
    prefix = np.sum((output[:, :PREFIX] - target[:, :PREFIX]) ** 2) / output.size
    np.testing.assert_allclose(masked + unmasked, both + prefix, rtol=1e-5)
    assert masked != unmasked


def test_the_loss_weighs_the_three_masks_of_an_image_alike():
    output, target = predicted().reconstruction, target_of(BATCH)
    loss = float(build().objective(output, target, MASKS))
    parts = [
        float(build().objective(output[row::ROWS], target[row::ROWS], MASKS[row::ROWS]))
        for row in range(ROWS)
    ]
    np.testing.assert_allclose(loss, np.mean(parts), rtol=1e-5)


def test_the_precursor_sees_masked_images_and_predicts_whole_ones():
    changes = {"task": "mim", "skip_blocks": 0}
    noise = images(2, seed=1)
    hidden = np.where(pixels_of(MASKS[::ROWS]) == 0, noise, BATCH)
    before, after = predicted(**changes), predicted(hidden, **changes)
    np.testing.assert_array_equal(before.latent[::ROWS], after.latent[::ROWS])
    assert np.any(before.latent[1::ROWS] != after.latent[1::ROWS])
    target = target_of(BATCH, **changes)
    np.testing.assert_array_equal(target[::ROWS], target[2::ROWS])
    assert np.any(target_of(hidden, **changes) != target)
    assert set(split_trainable(build(**changes), variables(**changes)["params"])[0]) == {
        "encoder",
        "head",
    }


def test_loss_and_target_are_float32_under_bfloat16_compute():
    method = LocalityAlignment.build(
        configs.load("locality_alignment:tiny", {**SIZES, "compute_dtype": "bfloat16"})
    )
    value, _ = jax.eval_shape(method.loss, variables(), {"image": BATCH}, rngs(), 0)
    assert value.dtype == jnp.float32 and value.shape == ()
    target = jax.eval_shape(method.target, variables(), BATCH, MASKS)
    assert target.dtype == jnp.float32


def test_loss_is_a_pure_function_of_its_random_keys():
    values = [
        float(compiled("loss")(variables(), {"image": BATCH}, rngs(seed), 0)[0])
        for seed in (1, 1, 2, 3)
    ]
    assert values[0] == values[1]
    assert len(set(values)) == 3


def test_mixed_images_are_what_teacher_and_student_see():
    mixed = build(mixup=0.5).mixed(rngs()["mixing"], jnp.asarray(BATCH))
    assert np.any(mixed != BATCH)
    np.testing.assert_allclose(mixed.sum(axis=0), BATCH.sum(axis=0), atol=1e-5)
    np.testing.assert_array_equal(build().mixed(rngs()["mixing"], jnp.asarray(BATCH)), BATCH)


# What evaluation and other programs see


def test_features_are_the_normalized_patch_tokens_and_their_mean():
    features = compiled("features")(variables(), {"image": BATCH})
    latent = predicted().latent
    assert features.grid == (2, 3)
    np.testing.assert_allclose(features.tokens, latent[:, PREFIX:], atol=1e-5)
    np.testing.assert_allclose(features.pooled, latent[:, PREFIX:].mean(axis=1), atol=1e-5)


LAYOUTS = [
    {},
    {"output_head": "mlp"},
    {"freeze_student": True},
    {"task": "mim", "skip_blocks": 0},
    {"decoder_width": 8},
]


@pytest.mark.parametrize("changes", LAYOUTS)
def test_the_layout_has_a_place_for_every_parameter_and_gives_it_back(changes):
    method, params = build(**changes), variables(**changes)["params"]
    saved = method.layout().save(params)
    again = flatten(method.layout().load(saved, params))
    assert set(again) == set(flatten(params))
    for path, value in flatten(params).items():
        np.testing.assert_array_equal(again[path], value)
    scanned = build(scan=True, **changes)
    shapes = jax.eval_shape(lambda: scanned.init(jax.random.key(0), {"image": BATCH}))["params"]
    stacked = scanned.layout().save(scanned.layout().load(saved, shapes))
    assert set(stacked) == set(saved)
    for key, value in saved.items():
        np.testing.assert_array_equal(stacked[key], value)


def test_official_files_may_lack_the_teacher_and_an_encoder_may_come_alone():
    method, params = build(), variables()["params"]
    saved = method.layout().save(params)
    student = {key: value for key, value in saved.items() if not key.startswith("teacher.")}
    assert set(method.layout().load(student, params)) == {"encoder", "head", "decoder"}
    alone = {k: v for k, v in student.items() if k.startswith("encoder.") and ".head." not in k}
    assert set(method.layout().load(alone, params)) == {"encoder"}
    with_scale = {**saved, "teacher.output_scaling.scale": np.float32(2)}
    assert set(method.layout().load(with_scale, params)) == set(params)
    del alone["encoder.norm.weight"]
    with pytest.raises(ValueError, match=r"missing: encoder\.norm\.weight"):
        method.layout().load(alone, params)


@pytest.mark.parametrize("scans", [(False, False), (True, False), (True, True)])
def test_layer_scale_is_folded_into_the_layer_in_front_of_it(scans):
    scaled = build().encoder
    donor, receiver = (
        scaled.clone(transformer=scaled.transformer.clone(layer_scale=value, scan=scan))
        for value, scan in zip((0.5, None), scans)
    )
    given = drawn(jax.eval_shape(donor.init, jax.random.key(0), BATCH)["params"])
    flat = flatten({"encoder": given})
    wanted = jax.eval_shape(receiver.init, jax.random.key(0), BATCH)["params"]
    folded = {name: adopted(name, flat, donor, receiver) for name in flatten({"encoder": wanted})}
    before, _ = jax.jit(donor.apply)({"params": given}, BATCH)
    after, _ = jax.jit(receiver.apply)({"params": unflatten(folded)["encoder"]}, BATCH)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def test_a_run_starts_from_the_teachers_weights_and_measures_its_scale():
    config = configs.load(
        "locality_alignment:tiny",
        {
            "data.split": "train[:128]",
            "batch_size": 64,
            "steps": 1,
            "model.calibration_batches": 2,
            "model.decoder_depth": 1,
            "compute_dtype": "float32",
        },
    )
    source = training_source(config)
    experiment = Experiment.build(config, len(source), jax.devices()[:1])
    batch = without_host_entries(next(training_batches(experiment.config, source, 0, 1)))
    state, notes = first_state(experiment, source, batch)
    params = flatten(jax.device_get(state.params))
    copied = 0
    for path, value in params.items():
        twin = path.replace("teacher/", "encoder/", 1)
        if path.startswith("teacher/norm/"):
            assert np.any(value != params[twin]), path
        elif path.startswith("teacher/"):
            np.testing.assert_array_equal(value, params[twin], err_msg=path)
            copied += 1
    assert copied > 20
    assert np.any(params["teacher/norm/scale"] != 1)
    np.testing.assert_array_equal(params["encoder/norm/scale"], 1)
    depth = experiment.method.encoder.transformer.depth
    assert f"teacher/transformer/blocks_{depth - 1}/norm1/scale" not in params
    assert any(note == "calibrated on 2 batches" for note in notes)
    rows, tokens = 3 * 64 * 2, 1 + experiment.method.tokens
    assert float(state.mutable[CALIBRATION]["count"]) == rows * tokens * 64
    assert 0.1 < float(scale_of(state.mutable[CALIBRATION])) < 10


def test_the_method_is_known_by_its_name():
    assert method_class("locality_alignment") is LocalityAlignment


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "mae"}, "'mae'; known are mask_embed, mim"),
        ({"loss": "l2"}, "'l2'; known are mse, cosine"),
        ({"mask_sampler": "blocks"}, "known are uniform, bernoulli, blockwise"),
        ({"output_head": "two"}, "known are linear, mlp"),
        ({"skip_blocks": 2}, "skip_blocks is 2, but the teacher has 2 blocks"),
        ({"prefix_only": True}, "set model.skip_blocks to 0"),
        ({"task": "mim", "freeze_student": True}, "leaves nothing to train"),
        ({"freeze_student": True, "decoder_width": 8}, "could change its width 16"),
        ({"decoder_width": 9}, "decoder_width 9 is not divisible by model.decoder_heads 2"),
        ({"kept_share": 1.5}, r"must be in \[0, 1\]"),
        ({"teacher__mean": (0.25,)}, r"data.mean is \(0.5,\), but the teacher"),
        ({"teacher__image_size": (8, 8)}, r"data.image_size is \(8, 12\), but the teacher"),
        ({"teacher__family": "unknown"}, "family is 'unknown'"),
    ],
)
def test_what_does_not_fit_together_is_an_error_when_built(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)
