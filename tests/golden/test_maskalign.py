"""MaskAlign against the official code: every loss, gradient, choice of patches and target."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.masking import random_masking, weighted_masking
from mim_jax.methods.maskalign import MaskAlign, aligned_layers, layer_weights
from mim_jax.models.positions import resize_positions
from mim_jax.models.transformer import ATTENTION, drop_path_scales
from mim_jax.models.vit import PatchEmbed
from mim_jax.targets import patchify
from mim_jax.training.tree import flatten, split
from tests.golden.cases import (
    Case,
    assert_close,
    assert_gradient_close,
    case_params,
    images_nhwc,
)
from tests.golden.test_mae import pair

cases = pytest.mark.parametrize("path", case_params("maskalign"))


def build(cfg: dict, **changes) -> MaskAlign:
    """The method from the arguments of the official constructor and of the teacher."""
    c, teacher = cfg["constructor"], cfg["teacher"]
    clip = "clip" if teacher["hidden_act"] == "quick_gelu" else "openclip"
    fields = {
        "model.size": "",
        "model.width": c["embed_dim"],
        "model.depth": c["depth"],
        "model.heads": c["num_heads"],
        "model.mlp_ratio": c["mlp_ratio"],
        "model.patch_size": pair(c["patch_size"]),
        "model.drop_path": c["drop_path_rate"],
        "model.mask_ratio": cfg["mask_ratio"],
        "model.mask_type": c["mask_type"],
        "model.fusion": c["fusion_type"],
        "model.head": c["head_type"],
        "model.target_norm": c["target_norm"],
        "model.loss": c["loss_type"],
        "model.loss_weights": c["loss_weights"],
        "model.teacher.family": clip if "CLIP" in teacher["kind"] else "dino",
        "model.teacher.width": teacher["hidden_size"],
        "model.teacher.depth": teacher["num_hidden_layers"],
        "model.teacher.heads": teacher["num_attention_heads"],
        "model.teacher.mlp_ratio": teacher["intermediate_size"] / teacher["hidden_size"],
        "model.teacher.patch_size": pair(teacher["patch_size"]),
        "model.teacher.image_size": pair(teacher["image_size"]),
        "model.teacher.epsilon": teacher["layer_norm_eps"],
        "data.image_size": pair(c["img_size"]),
        "data.channels": c.get("in_chans", 3),
        "compute_dtype": "float32",
    }
    return MaskAlign.build(configs.load("maskalign", {**fields, **changes}))


@functools.cache
def read(path) -> Case:
    return Case(path)


def load(method: MaskAlign, case: Case):
    images = jnp.asarray(images_nhwc(case["in/imgs"]))
    like = jax.eval_shape(lambda: method.init(jax.random.key(0), {"image": images}))["params"]
    return images, method.layout().load(case.group("param"), like)


@functools.cache
def seen_by_teacher(path):
    """Images, parameters, and what the teacher sees."""
    case = read(path)
    method = build(case.cfg)
    images, params = load(method, case)
    return images, params, jax.jit(method.seen)({"params": params}, images)


@cases
@pytest.mark.parametrize("changes", [{}, {"model.scan": True, "model.remat": "full"}])
def test_loss_choice_of_patches_and_all_gradients_match_with_replayed_draws(path, changes):
    case = read(path)
    method = build(case.cfg, **changes)
    images, params = load(method, case)
    trainable, fixed = split(params, method.frozen)
    exponential = jnp.asarray(case["draw/exponential"])
    noise = jnp.asarray(case["draw/drop_path_u"])

    def loss_of(trainable):
        variables = {"params": {**fixed, **trainable}}
        for part in set(fixed) & set(trainable):
            variables["params"][part] = {**fixed[part], **trainable[part]}
        seen = method.seen(variables, images)
        ids = method.focused(exponential, seen).keep_ids
        student = method.align(variables, images, ids, noise)
        layers = method.model.alignment.aligned
        loss, terms = method.objective(student, [method.target(seen, i, ids) for i in layers])
        return loss, (terms, ids)

    (loss, (terms, ids)), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(trainable)
    assert_close(loss, case["out/loss"], "loss")
    assert len(terms) == len(method.model.alignment.aligned)
    for name, value in terms.items():
        assert_close(value, case[f"out/{name}"], name)
    np.testing.assert_array_equal(ids, case["out/ids_keep"])
    zeros = jax.tree.map(np.zeros_like, params)
    ours = method.layout().save({**zeros, **_deep(zeros, jax.device_get(gradient))})
    golden = case.group("grad")
    without = {key for key in ours if key.startswith(method.teacher_key)}
    without |= {"pos_embed", *case.text("out/params_without_grad")}
    assert set(golden) == set(ours) - without
    for key, value in golden.items():
        assert_gradient_close(ours[key], value, key)


def _deep(below, above):
    """`below` with the leaves of `above` put over it."""
    if not isinstance(below, dict):
        return above
    return {k: _deep(v, above[k]) if k in above else v for k, v in below.items()}


@cases
def test_parameters_without_gradient_are_declared(path):
    case = read(path)
    method = build(case.cfg)
    _, params = load(method, case)
    _, fixed = split(params, method.frozen)
    keys = {rule.path: rule.key for rule in method.layout().rules}
    ours = {keys[name] for name in flatten(fixed) if not name.startswith("teacher/")}
    assert ours == set(case.text("out/params_without_grad"))
    gradient = case["grad/distill_weights"]
    assert sorted(np.flatnonzero(gradient.any(axis=1))) == list(method.model.alignment.aligned)


@cases
def test_teacher_sees_and_attends_as_the_reference(path):
    case = read(path)
    method = build(case.cfg)
    images, params, seen = seen_by_teacher(path)
    shown = method.teacher.inputs(images, method.mean, method.std)
    assert_close(shown, images_nhwc(case["out/teacher_input"]), "teacher input")
    teacher = method.teacher
    _, collected = teacher.apply(
        {"params": params["teacher"]},
        shown,
        mutable=[ATTENTION, "intermediates"],
        capture_intermediates=lambda module, name: module.name == "pre_norm",
    )
    hidden = case["out/teacher_hidden"]
    if teacher.encoder.pre_norm:
        embedded = collected["intermediates"]["encoder"]["pre_norm"]["__call__"][0]
        assert_close(embedded, hidden[0], "embeddings")
    assert len(seen.blocks) == len(hidden) - 1
    for i, block in enumerate(seen.blocks, 1):
        assert_close(block, hidden[i], f"layer {i}")
    last = f"blocks_{teacher.encoder.transformer.depth - 1}"
    weights = collected[ATTENTION]["encoder"]["transformer"][last]["attention"]["weights"]
    assert_close(weights, case["out/teacher_attention_last"], "attention")
    assert_close(seen.class_attention, case["out/importance"], "importance")


@cases
def test_patches_are_drawn_as_by_torch(path):
    case = read(path)
    method = build(case.cfg)
    _, _, seen = seen_by_teacher(path)
    exponential = jnp.asarray(case["draw/exponential"])
    everything = weighted_masking(exponential, seen.class_attention, method.tokens)
    np.testing.assert_array_equal(everything.keep_ids, case["out/ids_shuffle"])
    chosen = method.focused(exponential, seen)
    np.testing.assert_array_equal(chosen.keep_ids, case["out/ids_keep"])
    assert method.kept == case.cfg["len_keep"]
    random = random_masking(jnp.asarray(case["draw/random_noise"]), method.kept)
    np.testing.assert_array_equal(random.keep_ids, case["out/random_ids_keep"])


@cases
def test_aligned_pairs_and_the_losses_of_all_options_match(path):
    case = read(path)
    method = build(case.cfg, **{"model.loss_weights": "mean"})  # aligns all layers
    images, params, seen = seen_by_teacher(path)
    ids = jnp.asarray(case["out/ids_keep"])
    noise = jnp.asarray(case["draw/drop_path_u"])
    student = jax.jit(method.align)({"params": params}, images, ids, noise)
    assert_close(jnp.stack(student), case["out/student"], "student")
    teacher = [method.target(seen, i, ids) for i in range(len(student))]
    assert_close(jnp.stack(teacher), case["out/teacher"], "teacher")
    _, terms = method.objective(student, teacher)
    for i in range(len(student)):
        assert_close(terms[f"loss_layer{i}"], case[f"out/loss_layer{i}"], f"layer {i}")

    @jax.jit
    def losses_of(student, seen):
        found = {}
        for name in options:
            weights, error, norm = name.split("-")
            values = layer_weights(weights, len(student))
            variant = dataclasses.replace(method, weights=values, error=error, target_norm=norm)
            layers = aligned_layers(values)
            goals = [variant.target(seen, i, ids) for i in layers]
            found[name] = variant.objective([student[i] for i in layers], goals)[0]
        return found

    options = case.group("out/variant_loss")
    assert options
    ours = losses_of(student, seen)
    for name, value in options.items():
        assert_close(ours[name], value, name)


@cases
def test_random_masks_without_stochastic_depth_match(path):
    case = read(path)
    method = build(case.cfg, **{"model.mask_type": "random"})
    images, params, seen = seen_by_teacher(path)
    ids = random_masking(jnp.asarray(case["draw/random_noise"]), method.kept).keep_ids
    student = jax.jit(method.align)({"params": params}, images, ids)
    goals = [method.target(seen, i, ids) for i in method.model.alignment.aligned]
    loss, _ = method.objective(student, goals)
    assert_close(loss, case["out/random_loss_eval"], "loss")


@cases
def test_block_outputs_and_rates_of_stochastic_depth_match(path):
    case = read(path)
    method = build(case.cfg)
    images, params, _ = seen_by_teacher(path)
    encoder = method.encoder
    noise = jnp.asarray(case["draw/drop_path_u"])
    _, blocks = jax.jit(encoder.apply)(
        {"params": params["encoder"]}, images, jnp.asarray(case["out/ids_keep"]), noise
    )
    for i, block in enumerate(blocks):
        assert_close(block, case[f"out/act/blocks.{i}"], f"block {i}")
    embed = PatchEmbed(encoder.width, encoder.patch_size, encoder.channels)
    patches = patchify(images, encoder.patch_size)
    tokens = embed.apply({"params": params["encoder"]["patch_embed"]}, patches)
    # The official module runs before positions are added.
    assert_close(tokens, case["out/act/patch_embed"], "patch embedding")
    kept = drop_path_scales(jnp.full(noise.shape, 0.999), encoder.transformer.drop_path)
    rates = case["out/drop_path_rates"].astype(np.float32)
    assert_close(1 - 1 / kept[:, 0, 0, 0, 0], rates, "rates")


@cases
def test_resized_positions_and_images_for_patches_of_14_match(path):
    case = read(path)
    table, resized = case["in/large_pos"], case["out/large_pos_resized"]
    old, new = ((round(len(x) ** 0.5),) * 2 for x in (table, resized))
    assert_close(resize_positions(table, old, new), resized, "positions")
    method = build(case.cfg)
    images, golden = (
        images_nhwc(case[key]) for key in ("in/resize_imgs", "out/resize_imgs_bicubic")
    )
    encoder = method.teacher.encoder.clone(image_size=golden.shape[1:3])
    teacher = method.teacher.clone(encoder=encoder, mean=method.mean, std=method.std)
    assert_close(teacher.inputs(jnp.asarray(images), method.mean, method.std), golden, "images")


@cases
def test_official_checkpoint_round_trip_is_exact(path):
    case = read(path)
    for scan in (False, True):
        method = build(case.cfg, **{"model.scan": scan})
        _, params = load(method, case)
        saved, official = method.layout().save(params), case.group("param")
        assert set(saved) == set(official) - set(method.layout().left_out(official))
        for key, value in saved.items():
            loose = key == "pos_embed"  # a fixed table here, compared when it is read
            np.testing.assert_allclose(value, official[key], rtol=0, atol=1e-6 if loose else 0)
        again = flatten(method.layout().load(saved, params))
        for key, value in flatten(params).items():
            np.testing.assert_array_equal(again[key], value)


@cases
def test_a_model_of_other_sizes_takes_those_of_the_checkpoint(path):
    case = read(path)
    method = build(case.cfg)
    other = build(case.cfg, **{"model.width": 2 * method.encoder.width, "model.mlp_ratio": 1.5})
    known = {"heads": method.encoder.transformer.heads}
    sized = other.sized_like(case.group("param"), known)
    assert sized.model == method.model
