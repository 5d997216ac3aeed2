import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.masking import Masking, enlarge_mask, random_masking
from mim_jax.method import method_class, parameter_shapes
from mim_jax.methods.mae import MAE
from mim_jax.methods.mr_mae import MRMAE, ends_of_quarters
from mim_jax.methods.parts.encoders import (
    conv_encoder_of,
)
from mim_jax.targets import whiten
from mim_jax.training.tree import flatten, unflatten

SIDE, TOKENS, KEPT, BATCH = 4, 16, 4, 2

COMMON = {
    "model.size": "",
    "model.heads": 2,
    "model.decoder_width": 8,
    "model.decoder_depth": 1,
    "model.decoder_heads": 2,
    "model.normalize_target": True,
    "model.mask_ratio": 0.75,
    "model.teacher.family": "clip",
    "model.teacher.width": 12,
    "model.teacher.depth": 2,
    "model.teacher.heads": 2,
    "model.teacher.patch_size": (SIDE, SIDE),
    "model.teacher.image_size": (16, 16),
    "model.teacher.channels": 3,
    "model.teacher.outputs": 5,
    "model.teacher.mean": (),
    "model.teacher.std": (),
    "data.image_size": (16, 16),
    "data.channels": 3,
    "data.mean": (0.5, 0.4, 0.3),
    "data.std": (0.2, 0.3, 0.25),
    "compute_dtype": "float32",
    "batch_size": 8,
}
SIZES = {
    "tiny": {"model.width": 16, "model.depth": 2, "model.patch_size": (SIDE, SIDE)},
    "mcmae_b16": {
        "model.widths": (4, 6, 16),
        "model.depths": (1, 1, 1),
        "model.patch_sizes": (2, 2, 1),
        "model.removed": "skipped",
    },
}
VIT, HYBRID = "tiny", "mcmae_b16"


def build(variant: str, changes: dict | None = None) -> MRMAE:
    fields = {**COMMON, **SIZES[variant], **{f"model.{k}": v for k, v in (changes or {}).items()}}
    return MRMAE.build(configs.load(f"mr_mae:{variant}", fields))


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


IMAGES = draw(BATCH, 16, 16, 3)
NOISE = jnp.asarray(np.random.default_rng(0).random((BATCH, TOKENS)), jnp.float32)
RNGS = {"mask": jax.random.key(0)}


@functools.cache
def params_of(variant: str, **changes) -> dict:
    """Drawn parameters, none of them zero, so that no mistake can hide behind zeros."""
    random = np.random.default_rng(1)
    drawn = {}
    for path, shape in flatten(parameter_shapes(build(variant, changes))).items():
        noise = random.normal(size=shape.shape).astype(np.float32)
        drawn[path] = 1 + 0.1 * noise if path.endswith("scale") else 0.2 * noise
    return unflatten(drawn)


@functools.cache
def compiled(variant: str, name: str, **changes):
    return jax.jit(getattr(build(variant, changes), name))


def predict(variant: str, images, chosen: Masking, **changes):
    variables = {"params": params_of(variant, **changes)}
    return compiled(variant, "predict", **changes)(variables, images, chosen)


@functools.cache
def seen_by_teacher():
    """What the teacher makes of the images."""
    return jax.jit(build(VIT).seen)({"params": params_of(VIT)}, IMAGES)


def loss_of(variant: str, params=None, images=IMAGES, **changes):
    variables = {"params": params or params_of(variant, **changes)}
    loss, aux = compiled(variant, "loss", **changes)(variables, {"image": images}, RNGS, 0)
    return float(loss), {name: float(value) for name, value in aux.metrics.items()}


def removed_pixels(mask) -> np.ndarray:
    return np.asarray(enlarge_mask(mask, (4, 4), SIDE))[..., None] == 1


@pytest.mark.parametrize("variant", [VIT, HYBRID])
def test_encoder_and_mimic_head_never_see_removed_patches(variant):
    chosen = random_masking(NOISE, KEPT)
    other = np.where(removed_pixels(chosen.mask), 100 * draw(*IMAGES.shape, seed=2), IMAGES)
    before, after = (predict(variant, x, chosen) for x in (IMAGES, other))
    np.testing.assert_array_equal(after.latent, before.latent)
    np.testing.assert_array_equal(after.mimic, before.mimic)
    np.testing.assert_array_equal(after.pred, before.pred)


@pytest.mark.parametrize("variant", [VIT, HYBRID])
def test_views_show_every_patch_once_and_each_is_what_its_mask_gives_alone(variant):
    method = build(variant, {"views": 4})
    chosen = method.random(NOISE)
    visible = np.asarray(1 - chosen.mask).reshape(BATCH, 4, TOKENS)
    np.testing.assert_array_equal(visible.sum(axis=1), 1)
    together = predict(variant, IMAGES, chosen)
    for view in range(4):
        rows = slice(view, None, 4)
        alone = predict(variant, IMAGES, Masking(*(x[rows] for x in chosen)))
        for ours, expected in zip(together, alone):
            np.testing.assert_allclose(ours[rows], expected, atol=2e-5)


def test_in_four_views_no_view_knows_the_pixels_of_another():
    chosen = build(HYBRID, {"views": 4}).random(NOISE)
    before = np.asarray(predict(HYBRID, IMAGES, chosen).latent)
    hidden = removed_pixels(chosen.mask[::4])  # to the first view
    other = np.where(hidden, 100 * draw(*IMAGES.shape, seed=2), IMAGES)
    after = np.asarray(predict(HYBRID, other, chosen).latent)
    changed = np.abs(after - before).max(axis=(1, 2)).reshape(BATCH, 4)
    np.testing.assert_array_equal(changed[:, 0], 0)
    assert np.all(changed[:, 1:] > 0)


def test_without_mimicking_a_vit_is_an_mae():
    ours = params_of(VIT, mimic_weight=0.0)
    assert set(ours) == {"encoder", "decoder"}
    fields = {**COMMON, **SIZES[VIT]}
    fields = {k: v for k, v in fields.items() if not k.startswith("model.teacher")}
    mae = MAE.build(configs.load("mae:tiny", fields))
    expected = jax.jit(mae.loss)({"params": ours}, {"image": IMAGES}, RNGS, 0)[0]
    loss, terms = loss_of(VIT, mimic_weight=0.0)
    assert loss == float(expected)
    assert terms == {"loss_rec": loss}


def test_the_three_arms_share_their_terms():
    params = params_of(VIT)
    both, terms = loss_of(VIT)
    assert both == pytest.approx(terms["loss_rec"] + terms["loss_mimic"], rel=1e-6)
    reconstruct = {k: v for k, v in params.items() if k in ("encoder", "decoder")}
    pixels, _ = loss_of(VIT, reconstruct, mimic_weight=0.0)
    assert pixels == pytest.approx(terms["loss_rec"], rel=1e-6)
    mimic = {k: v for k, v in params.items() if k != "decoder"}
    weighted, alone = loss_of(VIT, mimic, reconstruct=False, mimic_weight=0.5)
    assert set(alone) == {"loss_mimic"}
    assert weighted == pytest.approx(0.5 * terms["loss_mimic"], rel=1e-6)


def test_mimic_loss_is_the_squared_error_of_visible_tokens_to_their_own_whitened_features():
    method, seen = build(HYBRID), seen_by_teacher()
    chosen = random_masking(NOISE, KEPT)
    output = predict(HYBRID, IMAGES, chosen)
    assert output.mimic.shape == (BATCH, KEPT, 12)
    patches = np.asarray(seen.blocks[-1], np.float64)[:, 1:]
    deviation = np.sqrt(patches.var(axis=-1, keepdims=True) + 1e-5)
    patches = (patches - patches.mean(axis=-1, keepdims=True)) / deviation
    own = [patches[b, i] for b in range(BATCH) for i in np.asarray(chosen.keep_ids)[b]]
    expected = ((np.asarray(output.mimic).reshape(-1, 12) - own) ** 2).mean()
    _, terms = method.objective(output, IMAGES, seen, chosen)
    assert float(terms["loss_mimic"]) == pytest.approx(expected, rel=1e-4)


def test_each_loss_term_reaches_only_what_it_trains():
    method = build(VIT)

    @jax.jit
    def gradients(params):
        def terms(params):
            return method.loss({"params": params}, {"image": IMAGES}, RNGS, 0)[1].metrics

        values, pullback = jax.vjp(terms, params)
        one = {term: {name: jnp.float32(name == term) for name in values} for term in values}
        return {term: pullback(unit)[0] for term, unit in one.items()}

    reached = {
        term: {path.split("/")[0] for path, g in flatten(gradient).items() if np.any(g)}
        for term, gradient in gradients(params_of(VIT)).items()
    }
    assert reached["loss_rec"] == {"encoder", "decoder"}
    assert reached["loss_mimic"] == {"encoder", "mimic_head"}


def test_the_frozen_part_is_the_teacher_which_starts_from_its_own_weights():
    method = build(VIT, {"teacher.path": "clip.safetensors"})
    assert method.frozen == ("^teacher/",)
    (part,) = method.pretrained
    assert (part.target, part.module, part.path) == ("teacher", method.teacher, "clip.safetensors")
    without = build(VIT, {"mimic_weight": 0.0})
    assert (without.frozen, without.pretrained, without.teacher) == ((), (), None)


def test_teacher_sees_the_whole_image_in_its_own_normalization():
    method = build(VIT)
    shares = IMAGES * np.array(method.std, np.float32) + np.array(method.mean, np.float32)
    expected = (shares - method.teacher.mean) / method.teacher.std
    np.testing.assert_allclose(
        method.teacher.inputs(IMAGES, method.mean, method.std), expected, atol=1e-5
    )


@pytest.mark.parametrize("focus_p", ["attention", "softmax"])
def test_visible_patches_are_drawn_by_the_teachers_attention(focus_p):
    method = build(VIT, {"mask_type": "attention", "focus_p": focus_p})
    seen = seen_by_teacher()
    exponential = jnp.asarray(np.random.default_rng(3).exponential(size=(BATCH, TOKENS)))
    chosen = method.focused(exponential, seen)
    weights = np.asarray(seen.class_attention, np.float64)
    if focus_p == "softmax":
        weights = np.exp(weights)  # the sum does not matter
    order = np.argsort(np.asarray(exponential) / weights, axis=1)
    np.testing.assert_array_equal(chosen.keep_ids, order[:, :KEPT])
    focused = seen._replace(class_attention=jnp.eye(TOKENS)[jnp.array([5, 9])] + 1e-4)
    if focus_p == "attention":
        np.testing.assert_array_equal(method.focused(exponential, focused).keep_ids[:, 0], [5, 9])


def test_without_mimicking_attention_still_needs_the_teacher():
    assert build(VIT, {"mimic_weight": 0.0, "mask_type": "attention"}).teacher is not None


def test_projected_features_are_those_of_clips_shared_space():
    changes = {"teacher_output": "projected", "target_norm": "none"}
    method, params, seen = build(VIT, changes), params_of(VIT, **changes), seen_by_teacher()
    target = method.mimic_target(seen)
    assert target.shape == (BATCH, TOKENS, 5)
    np.testing.assert_array_equal(target, seen.projected[:, 1:])
    assert params["mimic_head"]["out"]["kernel"].shape == (16, 5)


def test_layers_of_quarters_each_go_through_a_layer_of_their_own():
    assert ends_of_quarters(12) == (2, 5, 8, 11)
    assert ends_of_quarters(11) == (2, 5, 8, 10)
    assert ends_of_quarters(2) == (0, 1)
    method = build(VIT, {"mimic_layers": "quarters"})
    params = params_of(VIT, mimic_layers="quarters")
    chosen = random_masking(NOISE, KEPT)
    output = predict(VIT, IMAGES, chosen, mimic_layers="quarters")
    encode = jax.jit(method.encoder.apply)
    latent, blocks = encode({"params": params["encoder"]}, IMAGES, chosen.keep_ids)
    head = params["mimic_head"]
    parts = [
        x[:, 1:] @ head[f"fusion_{i}"]["kernel"] + head[f"fusion_{i}"]["bias"]
        for i, x in enumerate((blocks[0], latent))
    ]
    expected = sum(parts) @ head["out"]["kernel"] + head["out"]["bias"]
    np.testing.assert_allclose(output.mimic, expected, atol=2e-5)
    saved = method.layout().save(params)
    assert {"mimic_head.weight", "mimic_fusion.0.weight", "mimic_fusion.1.bias"} < set(saved)


def test_class_token_of_the_hybrid_encoder_is_neither_mimicked_nor_decoded():
    chosen = random_masking(NOISE, KEPT)
    output = predict(HYBRID, IMAGES, chosen, cls_token=True)
    assert output.latent.shape == (BATCH, 1 + KEPT, 16)
    assert output.mimic.shape == (BATCH, KEPT, 12)
    assert output.pred.shape == (BATCH, TOKENS, 4 * 4 * 3)
    head = params_of(HYBRID, cls_token=True)["mimic_head"]["out"]
    expected = output.latent[:, 1:] @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(output.mimic, expected, atol=2e-5)
    assert not build(HYBRID, {"cls_token": True}).model.decoder.class_token


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("in_model", [False, True])
def test_files_of_the_hybrid_encoder_may_have_a_class_token_or_not(in_file, in_model):
    theirs, ours = build(HYBRID, {"cls_token": in_file}), build(HYBRID, {"cls_token": in_model})
    state = theirs.layout().save(params_of(HYBRID, cls_token=in_file))
    assert ("cls_token" in state) == in_file
    params = ours.layout().load(state, parameter_shapes(ours))
    assert ("cls_token" in params["encoder"]) == (in_file and in_model)
    assert ours.layout().left_out(state) == (["cls_token"] if in_file and not in_model else [])
    assert ours.sized_like(state, {"heads": 2}).model.encoder.class_token == in_file


def test_released_files_lack_parts():
    method = build(HYBRID)
    state = method.layout().save(params_of(HYBRID))

    def without(*prefixes: str) -> dict:
        return {k: v for k, v in state.items() if not k.startswith(prefixes)}

    v2 = without("decoder_", "teacher", "mimic_head")  # they have the mask token, but no decoder
    loaded = flatten(method.layout().load(v2, parameter_shapes(method)))
    assert "decoder/mask_token" in loaded
    assert {name.split("/")[0] for name in loaded} == {"encoder", "decoder"}
    v1 = without("decoder_", "teacher", "mimic_head", "mask_token", "stage")
    loaded = flatten(method.layout().load(v1, parameter_shapes(method)))
    assert not [name for name in loaded if "fusion" in name or not name.startswith("encoder")]
    with pytest.raises(ValueError, match=r"missing: blocks1\.0\.conv1\.bias"):
        method.layout().load(without("blocks1.0.conv1.bias"), parameter_shapes(method))
    deeper = {**state, "decoder_blocks.1.norm1.bias": state["decoder_blocks.0.norm1.bias"]}
    with pytest.raises(ValueError, match=r"unexpected: decoder_blocks\.1\.norm1\.bias"):
        method.layout().load(deeper, parameter_shapes(method))


def test_one_arm_reads_the_files_of_both():
    state = build(VIT).layout().save(params_of(VIT))
    for changes in ({"mimic_weight": 0.0}, {"reconstruct": False}):
        arm = build(VIT, changes)
        loaded = flatten(arm.layout().load(state, parameter_shapes(arm)))
        assert set(loaded) == set(flatten(parameter_shapes(arm)))


def test_a_file_of_another_encoder_is_refused_by_name():
    state = {k: np.asarray(v) for k, v in build(VIT).layout().save(params_of(VIT)).items()}
    with pytest.raises(ValueError, match=r"no hybrid encoder .* begins with"):
        build(HYBRID).sized_like(state, {})
    hybrid = build(HYBRID).layout().save(params_of(HYBRID))
    with pytest.raises(ValueError, match="no ViT"):
        build(VIT).sized_like(hybrid, {})


def adopted(receiver: MRMAE, donor, given: dict) -> dict:
    flat = flatten(given)
    return {name: receiver.adopt(name, flat, donor) for name in flatten(parameter_shapes(receiver))}


def test_a_hybrid_encoder_is_adopted_whatever_the_image_size_and_stacking():
    donor, given = build(HYBRID), params_of(HYBRID)
    config = configs.load(
        "mr_mae:mcmae_b16",
        {
            **COMMON,
            **SIZES[HYBRID],
            "model.scan": True,
            "data.image_size": (24, 16),
            "model.teacher.image_size": (24, 16),
        },
    )
    receiver = MRMAE.build(config)
    taken = adopted(receiver, donor, given)
    shapes = flatten(parameter_shapes(receiver))
    for name, value in taken.items():  # the teacher's positions are resized like its images
        assert value.shape == shapes[name].shape, name
    assert conv_encoder_of(donor) is donor.model.encoder
    other = adopted(donor, build(VIT), given)
    assert not [
        name for name, value in other.items() if name.startswith("encoder/") and value is not None
    ]


def test_encoder_and_decoder_of_an_mae_are_adopted_but_no_head_or_teacher():
    receiver = build(VIT)
    fields = {k: v for k, v in {**COMMON, **SIZES[VIT]}.items() if "teacher" not in k}
    donor = MAE.build(configs.load("mae:tiny", fields))
    given = {k: params_of(VIT)[k] for k in ("encoder", "decoder")}
    taken = adopted(receiver, donor, given)
    assert {k for k, v in taken.items() if v is not None} == set(flatten(given))
    for name, value in flatten(given).items():
        np.testing.assert_array_equal(taken[name], value)


def test_another_teacher_keeps_its_own_weights_and_gets_a_new_head():
    donor, given = build(VIT, {"teacher.path": "clip"}), params_of(VIT)
    same, other = donor, build(VIT, {"teacher.path": "dino", "teacher.width": 8})
    assert all(value is not None for value in adopted(same, donor, given).values())
    taken = {k for k, v in adopted(other, donor, given).items() if v is not None}
    assert {name.split("/")[0] for name in taken} == {"encoder", "decoder"}


def test_features_of_a_vit_are_those_of_mae_and_of_the_hybrid_those_of_its_classifier():
    features = compiled(VIT, "features")({"params": params_of(VIT)}, {"image": IMAGES})
    encode = jax.jit(build(VIT).encoder.apply)
    tokens, _ = encode({"params": params_of(VIT)["encoder"]}, IMAGES)
    np.testing.assert_allclose(features.pooled, tokens[:, 0], atol=2e-5)
    np.testing.assert_allclose(features.tokens, tokens[:, 1:], atol=2e-5)
    features = compiled(HYBRID, "features")({"params": params_of(HYBRID)}, {"image": IMAGES})
    encode = jax.jit(build(HYBRID).model.encoder.apply)
    _, blocks = encode({"params": params_of(HYBRID)["encoder"]}, IMAGES)
    np.testing.assert_allclose(features.tokens, blocks[-1], atol=2e-5)
    np.testing.assert_allclose(features.pooled, whiten(blocks[-1].mean(axis=1), 1e-6), atol=1e-4)
    assert features.grid == (4, 4)


@pytest.mark.parametrize("changes", [{"views": 4}, {"mask_type": "attention"}])
def test_pictures_show_one_masked_view_of_each_image(changes):
    variables = {"params": params_of(HYBRID)}
    picture = compiled(HYBRID, "pictures", **changes)(variables, {"image": IMAGES}, RNGS)
    columns = picture["reconstruction"].columns
    assert list(columns) == ["image", "visible", "prediction", "prediction + visible"]
    for column in columns.values():
        assert column.shape == IMAGES.shape
    hidden = np.asarray(columns["visible"] == 0).all(axis=-1).mean()
    assert hidden == pytest.approx(0.75, abs=0.02)


def test_an_arm_without_decoder_has_no_pictures():
    method = build(VIT, {"reconstruct": False})
    assert method.pictures({}, {"image": IMAGES}, RNGS) == {}


def test_loss_is_float32_under_bfloat16_compute():
    fields = {**COMMON, **SIZES[HYBRID], "compute_dtype": "bfloat16"}
    method = MRMAE.build(configs.load("mr_mae:mcmae_b16", fields))
    variables = {"params": params_of(HYBRID)}
    value, aux = jax.eval_shape(method.loss, variables, {"image": IMAGES}, RNGS, 0)
    assert {x.dtype for x in (value, *aux.metrics.values())} == {jnp.dtype("float32")}


def test_loss_is_a_pure_function_of_its_random_key():
    assert loss_of(HYBRID) == loss_of(HYBRID)
    call = compiled(HYBRID, "loss")
    variables = {"params": params_of(HYBRID)}
    losses = {
        float(call(variables, {"image": IMAGES}, {"mask": jax.random.key(i)}, 0)[0])
        for i in range(4)
    }
    assert len(losses) == 4


@pytest.mark.parametrize(
    ("variant", "encoder"), [("convmae_b16", 84.5 + 4.3), ("vit_b16", 85.65), ("mimic_only", 85.65)]
)
def test_parameter_counts_are_the_papers(variant, encoder):
    config = configs.load(f"mr_mae:{variant}", {"model.scan": True, "compute_dtype": "float32"})
    method = MRMAE.build(config)
    shapes = parameter_shapes(method)
    count = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in shapes.items()}
    assert count["encoder"] / 1e6 == pytest.approx(encoder, abs=0.1)
    parts = {
        "convmae_b16": {"encoder", "decoder"},
        "vit_b16": {"encoder", "decoder", "mimic_head", "teacher"},
        "mimic_only": {"encoder", "mimic_head", "teacher"},
    }
    assert set(shapes) == parts[variant]


@pytest.mark.parametrize("variant", ["vit_b16_dino", "mcmae_b16", "fastconvmae_b16", "tiny"])
def test_every_variant_is_a_method(variant):
    method = MRMAE.build(configs.load(f"mr_mae:{variant}", {"compute_dtype": "float32"}))
    assert method.views == (4 if variant == "fastconvmae_b16" else 1)
    assert (method.teacher is None) == (variant == "fastconvmae_b16")


def test_the_method_is_known_by_its_name_and_has_a_vit_encoder_or_none():
    assert method_class("mr_mae") is MRMAE
    assert build(VIT).encoder == build(VIT).model.encoder
    assert build(HYBRID).encoder is None


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        (VIT, {"encoder": "resnet"}, "'resnet'; known are vit, conv_vit"),
        (VIT, {"focus_p": "max"}, "'max'; known are attention, softmax"),
        (VIT, {"mimic_weight": 0.0, "reconstruct": False}, "leaves nothing to learn"),
        (VIT, {"mimic_weight": -1.0}, "nothing to learn; give a weight above 0"),
        (VIT, {"views": 3}, r"model\.views is 3, but each shows 4 of 16"),
        (VIT, {"views": 4, "mask_type": "attention"}, "must be 'random'"),
        (VIT, {"teacher_output": "projected", "teacher.outputs": 0}, "no projection"),
        (VIT, {"mask_type": "attention", "teacher.family": "siglip"}, "no class token"),
        (VIT, {"teacher.image_size": (32, 32)}, r"grid is 8 x 8 .* is 4 x 4; .* \(16, 16\)"),
        (HYBRID, {"patch_sizes": (2, 2, 3)}, "nearest size that fits is"),
        (HYBRID, {"widths": (4, 6)}, "3 stages"),
    ],
)
def test_what_does_not_fit_together_is_an_error_when_built(variant, changes, message):
    with pytest.raises(ValueError, match=message):
        build(variant, changes)


def test_scanned_and_unrolled_models_are_the_same_function():
    scanned = build(HYBRID, {"scan": True, "remat": "full"})
    saved = build(HYBRID).layout().save(params_of(HYBRID))
    params = scanned.layout().load(saved, parameter_shapes(scanned))
    value = jax.jit(scanned.loss)({"params": params}, {"image": IMAGES}, RNGS, 0)[0]
    assert float(value) == pytest.approx(loss_of(HYBRID)[0], rel=1e-5)
