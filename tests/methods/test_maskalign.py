import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.conversion.files import write_state_dict
from mim_jax.conversion.initial import read_donor
from mim_jax.masking import gather_tokens, random_masking, weighted_masking
from mim_jax.method import method_class, parameter_shapes
from mim_jax.methods.finetune import FineTune
from mim_jax.methods.mae import MAE
from mim_jax.methods.maskalign import (
    ERRORS,
    MaskAlign,
    layer_weights,
    sampling_metrics,
)
from mim_jax.models.tower import Seen
from mim_jax.targets import batch_normalized, whiten
from mim_jax.training.experiment import Experiment
from mim_jax.training.optimizer import is_decayed
from mim_jax.training.state import split_trainable, state_from_variables
from mim_jax.training.tree import flatten, split, unflatten

SIDE, TOKENS, KEPT, BATCH, DEPTH, WIDTH = 4, 16, 4, 2, 3, 16

STUDENT = {
    "model.size": "",
    "model.width": WIDTH,
    "model.depth": DEPTH,
    "model.heads": 2,
    "model.patch_size": (SIDE, SIDE),
    "data.image_size": (16, 16),
    "data.channels": 3,
    "data.mean": (0.5, 0.4, 0.3),
    "data.std": (0.2, 0.3, 0.25),
    "compute_dtype": "float32",
    "batch_size": 8,
}
COMMON = {
    **STUDENT,
    "model.mask_ratio": 0.7,
    "model.drop_path": 0.2,
    "model.loss_weights": "top2",
    "model.teacher.width": 12,
    "model.teacher.depth": DEPTH,
    "model.teacher.heads": 2,
    "model.teacher.patch_size": (SIDE, SIDE),
    "model.teacher.image_size": (16, 16),
}


def config_of(changes: dict | None = None):
    return configs.load("maskalign", {**COMMON, **(changes or {})})


def build(**changes) -> MaskAlign:
    return MaskAlign.build(config_of({f"model.{k}": v for k, v in changes.items()}))


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


IMAGES = draw(BATCH, 16, 16, 3)
IDS = random_masking(jnp.asarray(np.random.default_rng(0).random((BATCH, TOKENS))), KEPT).keep_ids


def rngs(mask: int = 0, drop_path: int = 0) -> dict:
    return {"mask": jax.random.key(mask), "drop_path": jax.random.key(drop_path)}


@functools.cache
def params_of(**changes) -> dict:
    """None of them zero, so that no mistake can hide behind zeros."""

    def value(path: str, shape: tuple[int, ...]) -> np.ndarray:
        fan_in = {"kernel": shape[0], "weights": DEPTH}.get(path.rpartition("/")[2], 25)
        return draw(*shape, seed=len(path)) / fan_in**0.5 + path.endswith("scale")

    shapes = flatten(parameter_shapes(build(**changes)))
    return unflatten({path: value(path, leaf.shape) for path, leaf in shapes.items()})


@functools.cache
def compiled(name: str, **changes):
    return jax.jit(getattr(build(**changes), name))


def loss_of(params=None, images=IMAGES, rngs=rngs(), **changes):  # noqa: B008
    variables = {"params": params or params_of(**changes)}
    loss, aux = compiled("loss", **changes)(variables, {"image": images}, rngs, 0)
    return float(loss), {name: float(value) for name, value in aux.metrics.items()}


def align(images=IMAGES, ids=IDS, params=None, **changes):
    variables = {"params": params or params_of(**changes)}
    return np.stack(compiled("align", **changes)(variables, images, ids))


@functools.cache
def seen_by_teacher() -> Seen:
    return compiled("seen")({"params": params_of()}, IMAGES)


def test_student_never_sees_hidden_patches():
    visible = np.zeros((BATCH, TOKENS))
    np.put_along_axis(visible, np.asarray(IDS), 1, axis=1)
    pixels = visible.reshape(BATCH, 4, 4).repeat(SIDE, 1).repeat(SIDE, 2)[..., None]
    other = np.where(pixels == 1, IMAGES, 100 * draw(*IMAGES.shape, seed=2))
    np.testing.assert_array_equal(align(other), align())
    assert np.any(align(np.where(pixels == 1, other + 1, IMAGES)) != align())


def test_targets_of_a_patch_are_the_same_whatever_else_is_visible():
    method, everything = build(), jnp.tile(jnp.arange(TOKENS), (BATCH, 1))
    whole = method.target(seen_by_teacher(), 1, everything)
    some = method.target(seen_by_teacher(), 1, IDS)
    np.testing.assert_array_equal(some[:, 0], whole[:, 0])
    np.testing.assert_allclose(some[:, 1:], gather_tokens(whole[:, 1:], IDS), atol=1e-6)


def test_targets_are_outputs_of_blocks_without_the_teachers_final_norm():
    seen = seen_by_teacher()
    for layer in range(DEPTH):
        target = build(target_norm="none").target(seen, layer, IDS)
        np.testing.assert_array_equal(target[:, 0], seen.blocks[layer][:, 0])
    assert np.any(np.abs(target[:, 0] - seen.tokens[:, 0]) > 0.1)


def test_statistics_of_bn_are_those_of_all_tokens():
    seen = seen_by_teacher()
    whole = batch_normalized(seen.blocks[2])
    target = build(target_norm="bn").target(seen, 2, IDS)
    np.testing.assert_allclose(target[:, 1:], gather_tokens(whole[:, 1:], IDS), atol=1e-6)
    target = build().target(seen, 2, IDS)
    np.testing.assert_allclose(target[:, 0], whiten(seen.blocks[2][:, 0]), atol=1e-6)


def test_no_gradient_reaches_the_teacher_and_what_is_declared_frozen_and_all_reaches_the_rest():
    method = build()

    def loss(params):
        return method.loss({"params": params}, {"image": IMAGES}, rngs(), 0)[0]

    gradient = jax.jit(jax.grad(loss))(params_of())
    trained, fixed = split(gradient, method.frozen)
    assert {name.split("/")[0] for name in flatten(fixed)} == {"teacher", "encoder", "alignment"}
    for name, value in flatten(fixed).items():
        assert not np.any(value), name
    for name, value in flatten(trained).items():
        assert np.any(value), name
    assert set(gradient["alignment"]) - set(trained["alignment"]) == {"adaptor_0"}
    # Rows of W at layers without loss get zeros, every column gets something.
    nonzero = np.asarray(gradient["alignment"]["weights"]) != 0
    np.testing.assert_array_equal(nonzero.all(axis=1), [False, True, True])
    assert not nonzero[0].any()


def test_loss_does_not_depend_on_the_order_of_visible_patches():
    method, seen = build(), seen_by_teacher()
    order = jnp.asarray([2, 0, 3, 1])

    def loss(ids):
        student = align(ids=ids)
        return method.objective(student, [method.target(seen, i, ids) for i in (1, 2)])[0]

    assert float(loss(IDS[:, order])) == pytest.approx(float(loss(IDS)), rel=1e-5)


def test_a_student_that_is_its_teacher_has_no_loss_on_whole_images():
    fields = dict(target_norm="none", loss_weights="mean")
    fields |= {"teacher.family": "mae", "teacher.width": WIDTH, "teacher.mean": (0.5, 0.4, 0.3)}
    fields |= {"teacher.std": (0.2, 0.3, 0.25)}
    method, params = build(**fields), unflatten(flatten(params_of(**fields)))
    params["encoder"] = params["teacher"]["encoder"]
    for i in range(DEPTH):
        one = {"kernel": np.eye(WIDTH, dtype=np.float32), "bias": np.zeros(WIDTH, np.float32)}
        params["alignment"][f"adaptor_{i}"] = {"out": one}
    everything = jnp.tile(jnp.arange(TOKENS), (BATCH, 1))

    @jax.jit
    def loss(weights):
        aligned = {"params": {**params, "alignment": {**params["alignment"], "weights": weights}}}
        seen = method.seen(aligned, IMAGES)
        goals = [method.target(seen, i, everything) for i in range(DEPTH)]
        return method.objective(method.align(aligned, IMAGES, everything), goals)[0]

    identity = np.eye(DEPTH, dtype=np.float32)
    assert float(loss(identity)) < 1e-9
    assert float(loss(identity + np.float32(0.01))) > 1e-6


def experiment_of(**changes) -> Experiment:
    """With a rate of 0.1 and strong decay."""
    optimizer = {"optimizer.lr": 0.1, "optimizer.weight_decay": 0.5, "schedule.warmup_epochs": 0.0}
    fields = {**optimizer, **{f"model.{k}": v for k, v in changes.items()}}
    return Experiment.on_one_device(config_of(fields))


def test_a_step_leaves_what_gets_no_gradient_untouched_by_decay():
    experiment = experiment_of()
    variables = {"params": params_of()}
    state = state_from_variables(experiment.method, experiment.optimizer, variables)
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    after, metrics = jax.jit(experiment.train_step())(state, {"image": images})
    assert int(metrics["skipped"]) == 0
    old, new = flatten(params_of()), flatten(jax.device_get(after.params))
    still = {name for name in old if np.array_equal(old[name], new[name])}
    expected = r"teacher/|encoder/norm/|alignment/adaptor_0/"
    assert still == {name for name in old if re.match(expected, name)}
    moved = new["alignment/weights"] - old["alignment/weights"]
    np.testing.assert_array_equal(moved[0], 0)  # no loss, no decay
    np.testing.assert_allclose(np.abs(moved[1:]), 0.1, rtol=1e-3)  # Adam's step, no decay
    momenta = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state.opt_state)}
    assert not [name for name in momenta if "teacher" in name or "adaptor_0" in name]
    assert any("adaptor_1" in name for name in momenta)


@pytest.mark.parametrize("scan", [False, True])
def test_blocks_above_the_last_aligned_layer_are_not_decayed_where_layers_are_not_mixed(scan):
    changes = dict(fusion="simple", loss_weights="mid1", scan=scan)
    experiment, params = experiment_of(**changes), params_of(**changes)
    trainable, fixed = split_trainable(experiment.method, params)
    state = experiment.optimizer.init(trainable)
    zeros = jax.tree.map(np.zeros_like, trainable)  # decay alone would move them
    updates, _ = experiment.optimizer.update(zeros, state, trainable, step=jnp.int32(0))
    kernel = "mlp/fc1/kernel"
    blocks = flatten(updates["encoder"]["transformer"])
    if scan:
        moved = np.any(np.asarray(blocks[f"blocks/{kernel}"]) != 0, axis=(1, 2))
    else:
        moved = [np.any(blocks.get(f"blocks_{i}/{kernel}", 0)) for i in range(DEPTH)]
        assert "blocks_2" in fixed["encoder"]["transformer"]
    np.testing.assert_array_equal(moved, [True, True, False])


def test_mixing_weights_are_not_decayed_and_other_parameters_as_by_the_official_rule():
    method = build()
    official = method.layout().save(params_of())
    for rule in method.layout().rules:
        value = flatten(params_of())[rule.path]
        key = rule.key
        expected = official[key].ndim > 1 and not key.endswith(".bias") and key != "distill_weights"
        if not rule.path.startswith("teacher/"):
            assert is_decayed(rule.path, value, method.no_decay) == expected, key


def test_the_first_patch_is_drawn_in_proportion_to_attention_and_every_draw_is_a_permutation():
    draws, tokens = 10_000, 6
    attention = np.array([0.02, 0.3, 0.1, 0.05, 0.2, 0.03], np.float32)
    exponential = jax.random.exponential(jax.random.key(3), (draws, tokens))
    order = weighted_masking(exponential, jnp.tile(attention, (draws, 1)), tokens).keep_ids
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(tokens), (draws, 1)))
    shares = attention / attention.sum()
    counts = np.bincount(np.asarray(order)[:, 0], minlength=tokens)
    chi_square = ((counts - draws * shares) ** 2 / (draws * shares)).sum()
    assert chi_square < 20.5  # the quantile 0.999 with 5 degrees of freedom
    # Given the first, the second is drawn in proportion among the rest.
    second = np.asarray(order)[np.asarray(order)[:, 0] == 1, 1]
    rest = np.where(np.arange(tokens) == 1, 0, attention)
    expected = len(second) * np.delete(rest / rest.sum(), 1)
    counts = np.delete(np.bincount(second, minlength=tokens), 1)
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # 4 degrees of freedom


def test_a_mask_is_drawn_by_what_the_teachers_class_token_attends_to():
    method, seen = build(), seen_by_teacher()
    spot = np.full((BATCH, TOKENS), 1e-6, np.float32)
    spot[:, [3, 5, 8, 13]] = 0.2
    chosen = method.choose(jax.random.key(0), seen._replace(class_attention=jnp.asarray(spot)))
    np.testing.assert_array_equal(np.sort(chosen.keep_ids, axis=1), [[3, 5, 8, 13]] * BATCH)
    uniform = build(mask_type="random").choose(jax.random.key(0), seen)
    assert np.any(np.sort(uniform.keep_ids, axis=1) != [[3, 5, 8, 13]] * BATCH)
    assert chosen.keep_ids.shape == uniform.keep_ids.shape == (BATCH, KEPT)


def test_metrics_are_the_layers_losses_and_how_sharply_the_teacher_attends():
    loss, terms = loss_of()
    assert set(terms) == {"loss_layer1", "loss_layer2", "mask_entropy", "kept_weight"}
    assert loss == pytest.approx((terms["loss_layer1"] + terms["loss_layer2"]) / 2, rel=1e-5)
    assert 0 < terms["mask_entropy"] <= math.log(TOKENS) + 1e-5
    random = build(mask_type="random").loss
    _, aux = jax.eval_shape(random, {"params": params_of()}, {"image": IMAGES}, rngs(), 0)
    assert set(aux.metrics) == {"loss_layer1", "loss_layer2"}
    weights = jnp.asarray([[0.1, 0.1, 0.1, 0.1], [0.4, 0.0, 0.0, 0.0]])
    terms = sampling_metrics(weights, jnp.asarray([[0, 1], [0, 1]]))
    assert float(terms["mask_entropy"]) == pytest.approx(math.log(4) / 2)
    assert float(terms["kept_weight"]) == pytest.approx((0.1 + 0.2) / 2)


def test_stochastic_depth_and_masks_are_fresh_with_every_key():
    assert loss_of()[0] == loss_of()[0]
    assert len({loss_of(rngs=rngs(drop_path=key))[0] for key in range(4)}) > 1
    assert len({loss_of(rngs=rngs(mask=key))[0] for key in range(4)}) > 1


def test_smooth_l1_is_l2_where_the_difference_is_below_one():
    small, zero = jnp.asarray(draw(5, 7).clip(-0.99, 0.99)), jnp.zeros((5, 7))
    np.testing.assert_allclose(ERRORS["smoothl1"](small, zero), ERRORS["l2"](small, zero))
    assert float(ERRORS["smoothl1"](jnp.asarray([3.0]), jnp.zeros(1))) == pytest.approx(5.0)


def test_weights_of_layers_are_those_of_the_official_code():
    assert layer_weights("mean", 4) == (0.25,) * 4
    assert layer_weights("out", 4) == (0, 0, 0, 1)
    assert layer_weights("linear_decay", 4) == (0, 1 / 6, 2 / 6, 3 / 6)
    assert sum(layer_weights("linear_decay", 12)) == pytest.approx(1)
    assert layer_weights("top2", 4) == (0, 0, 0.5, 0.5)
    assert layer_weights("mid1", 4) == (0, 1, 0, 0)


@pytest.mark.parametrize("name", ["top0", "top5", "mid4", "last", "top", "5"])
def test_unknown_weights_of_layers_are_refused(name):
    with pytest.raises(ValueError, match=f"loss_weights is '{name}'.* 4 layers"):
        layer_weights(name, 4)


BLOCKS = [draw(BATCH, 1 + KEPT, WIDTH, seed=i) for i in range(DEPTH)]


@pytest.mark.parametrize("stacked", [False, True])
def test_mixing_contracts_over_the_layers_of_the_student(stacked):
    alignment = build(fusion="sum", loss_weights="top2").model.alignment
    params = params_of(fusion="sum")["alignment"]
    ours = alignment.apply({"params": params}, jnp.stack(BLOCKS) if stacked else BLOCKS)
    assert len(ours) == 2
    for i, tokens in zip((1, 2), ours):
        mixed = sum(params["weights"][i, j] * BLOCKS[j] for j in range(DEPTH))
        adaptor = params[f"adaptor_{i}"]["out"]
        expected = mixed @ adaptor["kernel"] + adaptor["bias"]
        np.testing.assert_allclose(tokens, expected, atol=1e-4)


def test_alignment_starts_near_identity_or_from_the_mean_and_adaptors_as_in_the_official_code():
    def start(**changes) -> dict:
        alignment = build(**changes).model.alignment
        return alignment.init(jax.random.key(0), BLOCKS)["params"]

    linear = start()
    np.testing.assert_allclose(linear["weights"], np.eye(DEPTH) + 0.01, atol=1e-7)
    assert set(linear) == {"weights", *(f"adaptor_{i}" for i in range(DEPTH))}
    kernel, bound = linear["adaptor_0"]["out"]["kernel"], math.sqrt(6 / (WIDTH + 12))
    assert 0.8 * bound < np.abs(kernel).max() <= bound
    assert not linear["adaptor_0"]["out"]["bias"].any()
    mean = start(**{"fusion": "sum", "teacher.depth": 2})
    np.testing.assert_allclose(mean["weights"], np.full((2, 3), 1 / 3))
    assert "weights" not in start(fusion="simple")


def test_scanned_and_unrolled_students_are_the_same_function():
    unrolled, scanned = build(), build(scan=True, remat="full")
    state = unrolled.layout().save(params_of())
    params = scanned.layout().load(state, parameter_shapes(scanned))
    assert loss_of(params, scan=True, remat="full")[0] == pytest.approx(loss_of()[0], rel=1e-5)


def test_loss_and_weights_of_sampling_are_float32_under_bfloat16_compute():
    method = MaskAlign.build(config_of({"compute_dtype": "bfloat16"}))
    variables = {"params": params_of()}
    seen = jax.eval_shape(method.seen, variables, IMAGES)
    assert seen.class_attention.dtype == jnp.float32
    assert seen.blocks[0].dtype == jnp.bfloat16
    assert jax.eval_shape(lambda: method.target(seen_by_teacher(), 1, IDS)).dtype == jnp.float32
    loss, _ = jax.eval_shape(method.loss, variables, {"image": IMAGES}, rngs(), 0)
    assert loss.dtype == jnp.float32


def test_only_the_last_layers_attention_probabilities_are_computed():
    method, variables = build(), {"params": params_of()}

    def flops(read) -> float:
        run = jax.jit(lambda images: read(method.seen(variables, images)))
        return run.lower(IMAGES).compile().cost_analysis()["flops"]

    tokens, heads = 1 + TOKENS, 2
    logits = 2 * BATCH * tokens * tokens * 12
    one_layer = logits + 10 * BATCH * heads * tokens * tokens  # and the softmax
    extra = flops(lambda seen: (seen.blocks, seen.class_attention)) - flops(lambda s: s.blocks)
    assert 0 < extra < 1.5 * one_layer


@pytest.mark.parametrize("head", ["linear", "norm_linear", "mlp", "mlp2"])
@pytest.mark.parametrize("fusion", ["simple", "sum"])
def test_every_kind_of_alignment_has_official_names_and_an_exact_round_trip(head, fusion):
    method, params = build(head=head, fusion=fusion), params_of(head=head, fusion=fusion)
    state = method.layout().save(params)
    heads = {key.removeprefix("distill_heads.2") for key in state if "distill_heads.2" in key}
    names = {
        "linear": [""],
        "norm_linear": [".0", ".1"],
        "mlp": [".0", ".2"],
        "mlp2": [".0", ".1", ".2"],
    }
    assert heads == {f"{name}.{kind}" for name in names[head] for kind in ("weight", "bias")}
    assert ("distill_weights" in state) == (fusion == "sum")
    again = flatten(method.layout().load(state, params))
    for key, value in flatten(params).items():
        np.testing.assert_array_equal(again[key], value)
    adaptor = params["alignment"]["adaptor_2"]
    ours = method.model.alignment.apply({"params": params["alignment"]}, BLOCKS)[-1]
    x = BLOCKS[2]
    if fusion == "sum":
        x = sum(params["alignment"]["weights"][2, j] * BLOCKS[j] for j in range(DEPTH))
    if head.startswith("mlp"):
        x = x @ adaptor["hidden"]["kernel"] + adaptor["hidden"]["bias"]
    if head in ("norm_linear", "mlp2"):
        x = whiten(x, 1e-6) * adaptor["norm"]["scale"] + adaptor["norm"]["bias"]
    if head == "mlp":
        x = jax.nn.gelu(x, approximate=False)
    expected = x @ adaptor["out"]["kernel"] + adaptor["out"]["bias"]
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_files_of_both_namings_of_clip_and_without_teacher_are_read(tmp_path):
    method, params = build(), params_of()
    state = method.layout().save(params)
    level = "clip_model.vision_model."
    assert state[f"{level}embeddings.class_embedding"].shape == (12,)
    state[f"{level}embeddings.position_ids"] = np.arange(1 + TOKENS)[None]
    flat = {key.replace(level, "clip_model."): value for key, value in state.items()}
    bare = {key: value for key, value in state.items() if not key.startswith("clip_model.")}
    for i, given in enumerate((state, flat, bare)):
        path = tmp_path / f"{i}.safetensors"
        write_state_dict(path, given)
        donor = read_donor(str(path), method)
        for key, value in flatten({"params": params}).items():
            if not (given is bare and key.startswith("params/teacher/")):
                np.testing.assert_array_equal(donor.variables[key], value)
        assert all("teacher" not in key for key in donor.variables) == (given is bare)


def test_a_dino_teacher_is_named_as_by_its_library():
    changes = {"teacher.family": "dino"}
    state = build(**changes).layout().save(params_of(**changes))
    start = "dino_model."
    names = {key.removeprefix(start) for key in state if key.startswith(start)}
    assert "embeddings.patch_embeddings.projection.bias" in names
    assert "encoder.layer.2.attention.attention.query.weight" in names
    assert "layernorm.weight" in names
    assert not [key for key in state if key.startswith("clip_model.")]
    assert state[f"{start}embeddings.position_embeddings"].shape == (1, 1 + TOKENS, 12)


def test_a_dino_teacher_sees_images_as_they_are_and_clip_its_own_statistics():
    changes = {"teacher.family": "dino"}
    imagenet = {"data.mean": (0.485, 0.456, 0.406), "data.std": (0.229, 0.224, 0.225)}
    fields = {**imagenet, **{f"model.{k}": v for k, v in changes.items()}}
    dino, clip = (MaskAlign.build(config_of(x)) for x in (fields, imagenet))
    images = jnp.asarray(IMAGES)
    np.testing.assert_array_equal(dino.teacher.inputs(images, dino.mean, dino.std), images)
    shares = images * np.array(imagenet["data.std"]) + np.array(imagenet["data.mean"])
    mean, std = np.array((0.48145466, 0.4578275, 0.40821073)), (0.26862954, 0.26130258, 0.27577711)
    shown = clip.teacher.inputs(images, clip.mean, clip.std)
    np.testing.assert_allclose(shown, (shares - mean) / np.array(std), atol=1e-5)


def test_the_encoder_of_another_method_is_adopted_and_a_classifier_reads_the_training_file():
    method = build()
    mae = MAE.build(configs.load("mae", STUDENT))
    given = {"encoder/cls_token": draw(1, 1, WIDTH), "alignment/weights": draw(3, 3)}
    np.testing.assert_array_equal(
        method.adopt("encoder/cls_token", given, mae), given["encoder/cls_token"]
    )
    assert method.adopt("alignment/weights", given, mae) is None
    np.testing.assert_array_equal(
        method.adopt("alignment/weights", given, method), given["alignment/weights"]
    )
    classifier = FineTune.build(
        configs.load("finetune", {**STUDENT, "model.num_classes": 3, "model.labels": "single"})
    )
    state = method.layout().save(params_of())
    read = classifier.layout().load(state, parameter_shapes(classifier))
    expected = flatten(params_of()["encoder"])
    for name, value in flatten(read["encoder"]).items():
        if name != "positions":  # learned there, and a fixed table here
            np.testing.assert_array_equal(value, expected[name])
    table = method.encoder.position_table()
    np.testing.assert_allclose(read["encoder"]["positions"], table, atol=1e-6)


def test_features_are_those_of_an_mae_with_the_same_encoder():
    mae = MAE.build(configs.load("mae", STUDENT))
    variables = {"params": {"encoder": params_of()["encoder"]}}
    ours = compiled("features")({"params": params_of()}, {"image": IMAGES})
    theirs = jax.jit(mae.features)(variables, {"image": IMAGES})
    np.testing.assert_allclose(ours.pooled, theirs.pooled, atol=1e-6)
    np.testing.assert_allclose(ours.tokens, theirs.tokens, atol=1e-6)
    assert ours.grid == (4, 4)


def test_pictures_show_attention_and_visible_patches():
    call = compiled("pictures")
    picture = call({"params": params_of()}, {"image": IMAGES}, rngs())["attention"]
    assert list(picture.columns) == ["image", "attention", "visible"]
    shares = np.asarray(picture.columns["attention"]) * (0.2, 0.3, 0.25) + (0.5, 0.4, 0.3)
    weights = np.asarray(seen_by_teacher().class_attention).reshape(BATCH, 4, 4)
    expected = (weights / weights.max(axis=(1, 2), keepdims=True)).repeat(SIDE, 1).repeat(SIDE, 2)
    np.testing.assert_allclose(shares, np.repeat(expected[..., None], 3, -1), atol=1e-5)
    shown = np.asarray(picture.columns["visible"])
    assert np.mean(np.any(shown != 0, axis=-1)) == pytest.approx(KEPT / TOKENS)


@pytest.mark.parametrize(
    ("variant", "alignment", "kept"),
    [("vit_b16", 7.09, 58), ("vit_l16", 25.19, 58), ("vit_l16_from_b16", 9.45, 58)],
)
def test_published_variants_have_the_published_sizes(variant, alignment, kept):
    method = MaskAlign.build(
        configs.load(f"maskalign:{variant}", {"model.scan": True, "compute_dtype": "float32"})
    )
    assert method.kept == kept
    layers = method.model.alignment.teacher_layers
    assert method.weights == layer_weights("top5", layers)
    images = jnp.zeros((1, 224, 224, 3))
    ids = jnp.zeros((1, kept), jnp.int32)
    shapes = jax.eval_shape(method.model.init, jax.random.key(0), images, ids)["params"]
    count = sum(x.size for x in jax.tree.leaves(shapes["alignment"]))
    assert count / 1e6 == pytest.approx(alignment, abs=0.005)


def test_a_teacher_with_patches_of_14_sees_images_of_its_own_size():
    method = MaskAlign.build(configs.load("maskalign:vit_l16", {"compute_dtype": "float32"}))
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    shown = jax.eval_shape(lambda x: method.teacher.inputs(x, method.mean, method.std), images)
    assert shown.shape == (2, 196, 196, 3)
    assert method.teacher.encoder.grid == method.encoder.grid == (14, 14)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.fusion": "mean"}, "model.fusion is 'mean'; known are simple, linear, sum"),
        ({"model.head": "mlp3"}, "model.head is 'mlp3'"),
        ({"model.target_norm": "w"}, "model.target_norm is 'w'"),
        ({"model.mask_type": "block"}, "model.mask_type is 'block'; known are attention, random"),
        ({"model.loss": "cosine"}, "model.loss is 'cosine'"),
        ({"model.loss_weights": "top4"}, "loss_weights is 'top4'"),
        ({"model.teacher.depth": 2}, "student has 3 and the teacher 2; take 'sum'"),
        ({"model.teacher.image_size": (24, 24)}, r"grid is 6 x 6 .* is 4 x 4; .* \(16, 16\)"),
        ({"model.teacher.family": "siglip"}, "'siglip' has no class token"),
        ({"model.mask_ratio": 0.99}, "leaves none of 16 tokens"),
    ],
)
def test_what_does_not_fit_together_is_an_error_when_built(changes, message):
    with pytest.raises(ValueError, match=message):
        MaskAlign.build(config_of(changes))


def test_the_method_is_known_by_its_name_and_names_its_teacher():
    assert method_class("maskalign") is MaskAlign
    (part,) = build(**{"teacher.path": "somewhere"}).pretrained
    assert (part.target, part.path, part.field) == ("teacher", "somewhere", "model.teacher.path")
    assert part.module == build().teacher
    assert "projection" not in params_of()["teacher"]
