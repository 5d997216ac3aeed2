import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.data.transforms import RandomResizedCrop
from mim_jax.evaluation import labelled_data
from mim_jax.evaluation.linear_probe import (
    LinearProbe,
    lars_probe_accuracy,
    linear_accuracy,
    probe_optimizer,
)
from mim_jax.evaluation.probe import ProbeHead, probe_batch_size, train_probe
from mim_jax.methods.mae import MAE
from mim_jax.training.optimizer import warmup_cosine
from mim_jax.training.sharding import make_mesh, state_shardings
from mim_jax.training.state import split_trainable, state_from_variables
from mim_jax.training.step import make_train_step
from mim_jax.training.tree import flatten
from tests.evaluation.test_knn import clusters, random_data
from tests.evaluation.toy import Toy, toy_config, toy_variables

IMAGES = {"image": jnp.zeros((1, 28, 28, 1))}


def batch_of(size: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(size, 28, 28, 1)).astype(np.float32)
    return {"image": jnp.asarray(images), "label": jnp.asarray(rng.integers(10, size=size))}


def constant_rate(step):
    return jnp.float32(0.5)


def probe_step(probe, variables):
    """State and compiled step with a rate that moves the classifier from the first step on."""
    optimizer = probe_optimizer(constant_rate)
    state = state_from_variables(probe, optimizer, variables)
    step = make_train_step(
        probe, optimizer, {"default": constant_rate}, lambda batch, rng: batch, seed=0
    )
    return state, jax.jit(step)


def test_logistic_regression_separates_clusters():
    train, labels, queries, truth = clusters(0)
    train, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, queries))
    assert linear_accuracy(train, labels, queries, truth) == 1.0


def test_logistic_regression_on_random_labels_is_chance():
    train, labels, queries, truth = random_data(2, train=2000, test=1000)
    assert abs(linear_accuracy(train, labels, queries, truth) - 0.2) < 0.05


def test_logistic_regression_is_deterministic_and_blind_to_scale_and_constants():
    train, labels, queries, truth = random_data(0, train=300)
    first = linear_accuracy(train, labels, queries, truth)
    assert first == linear_accuracy(train, labels, queries, truth)
    widths = np.logspace(-3, 3, train.shape[1])

    def changed(features):
        return np.concatenate([features * widths + 5, np.full((len(features), 2), 7.0)], axis=1)

    assert abs(first - linear_accuracy(changed(train), labels, changed(queries), truth)) < 0.02


def test_logistic_regression_needs_two_classes():
    train, labels, queries, truth = random_data(0)
    with pytest.raises(ValueError, match="needs two classes"):
        linear_accuracy(train, np.zeros_like(labels), queries, truth)


def test_batch_norm_follows_pytorchs_convention():
    rng = np.random.default_rng(0)
    head = ProbeHead(3)
    features = rng.normal(2, 3, size=(6, 4)).astype(np.float32)
    variables = head.init(jax.random.key(0), features, train=True)
    linear = variables["params"]["linear"]
    mean, var = np.zeros(4), np.ones(4)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], var)
    for _ in range(3):
        features = rng.normal(2, 3, size=(6, 4)).astype(np.float32)
        logits, updated = head.apply(variables, features, train=True, mutable=["batch_stats"])
        variables = {**variables, **updated}
        deviation = np.sqrt(features.var(axis=0, ddof=0) + 1e-6)
        expected = (features - features.mean(axis=0)) / deviation @ linear["kernel"]
        np.testing.assert_allclose(logits, expected, atol=1e-5)
        mean = 0.9 * mean + 0.1 * features.mean(axis=0)
        var = 0.9 * var + 0.1 * features.var(axis=0, ddof=1)
        np.testing.assert_allclose(variables["batch_stats"]["mean"], mean, rtol=1e-5)
        np.testing.assert_allclose(variables["batch_stats"]["var"], var, rtol=1e-5)
    logits = head.apply(variables, features, train=False)
    expected = (features - mean) / np.sqrt(var + 1e-6) @ linear["kernel"]
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_classifier_starts_small_with_zero_bias():
    variables = ProbeHead(200).init(jax.random.key(0), jnp.ones((2, 300)), train=True)
    linear = variables["params"]["linear"]
    assert not np.any(linear["bias"])
    assert np.std(linear["kernel"]) == pytest.approx(0.01, rel=0.02)


def test_batch_norm_refuses_a_single_example():
    with pytest.raises(ValueError, match="needs 2 examples or more, got 1"):
        ProbeHead(3).apply(
            {"params": {}, "batch_stats": {"mean": jnp.zeros(4), "var": jnp.ones(4)}},
            jnp.ones((1, 4)),
            train=True,
            mutable=["batch_stats"],
        )


def mae_and_variables():
    config = configs.load("mae:tiny", {"compute_dtype": "float32", "model.depth": 1})
    method = MAE.build(config)
    return method, jax.jit(method.init)(jax.random.key(1), IMAGES)


@pytest.mark.parametrize("make", [mae_and_variables, lambda: (Toy(), toy_variables())])
def test_a_step_leaves_the_backbone_bit_identical_and_moves_the_classifier(make):
    method, backbone = make()
    probe = LinearProbe(method, 10)
    variables = probe.with_head(jax.random.key(0), backbone, IMAGES)
    state, step = probe_step(probe, variables)
    for i in range(3):
        state, metrics = step(state, batch_of(8, seed=i))
    before, after = flatten(backbone), flatten(state.variables)
    for path, leaf in before.items():
        collection, _, rest = path.partition("/")
        np.testing.assert_array_equal(after[f"{collection}/backbone/{rest}"], leaf)
    start = flatten(variables)
    for path in (p for p in start if "/head/" in p):
        assert np.any(np.asarray(start[path]) != np.asarray(after[path])), path
    assert set(start) == set(after)
    assert 0 <= metrics["top1"] <= 1 and metrics["skipped"] == 0


def test_only_the_classifier_has_gradient_and_optimizer_state():
    probe = LinearProbe(Toy(), 10)
    variables = probe.init(jax.random.key(0), IMAGES)
    trainable, fixed = split_trainable(probe, variables["params"])
    assert set(trainable) == {"head"} and set(fixed) == {"backbone"}
    state, _ = probe_step(probe, variables)
    momenta = [leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sorted(momenta) == sorted(leaf.shape for leaf in jax.tree.leaves(trainable))


@pytest.mark.parametrize("at_once", [1, 5, 8, 64])
def test_parts_of_a_batch_give_the_loss_of_the_whole(at_once):
    backbone, batch = toy_variables(), batch_of(23)
    whole = LinearProbe(Toy(), 10)
    parts = LinearProbe(Toy(), 10, examples_at_once=at_once)
    variables = whole.with_head(jax.random.key(0), backbone, IMAGES)
    expected, expected_aux = whole.loss(variables, batch, {}, jnp.int32(0))
    loss, aux = parts.loss(variables, batch, {}, jnp.int32(0))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(aux), jax.tree.leaves(expected_aux), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_probe_passes_the_features_of_its_method_on():
    probe, batch = LinearProbe(Toy(), 10), batch_of(5)
    variables = probe.with_head(jax.random.key(0), toy_variables(), IMAGES)
    ours, theirs = probe.features(variables, batch), Toy().features(toy_variables(), batch)
    np.testing.assert_array_equal(ours.pooled, theirs.pooled)
    assert set(probe.inputs) == {"image", "label"}
    probe.check(batch)


def test_build_reads_method_and_number_of_classes_from_the_config():
    probe = LinearProbe.build(toy_config(**{"evaluate.pool": "mean"}))
    assert isinstance(probe.method, MAE)
    assert (probe.num_classes, probe.pool, probe.examples_at_once) == (10, "mean", 64)


def test_recipe_learns_where_its_rate_suits_the_data_and_repeats_itself(caplog):
    config = toy_config(**{"evaluate.train_split": "train[:512]"})
    options = dict(batch_size=64, epochs=9, base_lr=40.0)
    with caplog.at_level(logging.INFO):
        accuracy = lars_probe_accuracy(Toy(), toy_variables(), config, **options)
    assert accuracy > 0.4
    assert "LinearProbe: step 70 of 72" in caplog.text
    assert accuracy == lars_probe_accuracy(Toy(), toy_variables(), config, **options)


def test_recipe_on_a_mesh_is_the_recipe_on_one_device():
    """Statistics of the batch norm are those of the global batch."""
    config = toy_config()
    mesh = make_mesh(configs.ml_collections.ConfigDict(dict(data=2, fsdp=4, tensor=1)))
    variables = toy_variables()
    on_mesh = jax.device_put(
        variables, state_shardings(variables, ((r".*", "fsdp:largest"),), mesh)
    )
    probe = LinearProbe.of(Toy(), config)
    options = dict(batch_size=128, epochs=2, peak_lr=lambda batch: 10.0, seed=3)
    one = flatten(train_probe(probe, variables, config, probe_optimizer, **options))
    many = flatten(train_probe(probe, on_mesh, config, probe_optimizer, **options))
    for path, leaf in one.items():
        np.testing.assert_allclose(many[path], leaf, rtol=1e-3, atol=1e-5, err_msg=path)
    assert many["params/backbone/projection"].sharding == on_mesh["params"]["projection"].sharding


def test_paper_recipe_is_the_default(monkeypatch):
    seen = {}

    def note(name, function):
        def noted(*args, **kwargs):
            seen[name] = (args, kwargs)
            return function(*args, **kwargs)

        monkeypatch.setattr(f"mim_jax.evaluation.probe.{name}", noted)

    note("warmup_cosine", warmup_cosine)
    note("random_crops", labelled_data.random_crops)
    config = toy_config(**{"evaluate.train_split": "train[:40]", "evaluate.test_split": "test[:9]"})
    lars_probe_accuracy(Toy(), toy_variables(), config)
    (peak,), schedule = seen["warmup_cosine"]
    assert peak == pytest.approx(0.1 * 40 / 256)  # the batch is capped to the data set
    assert schedule["warmup_epochs"] == pytest.approx(10)
    assert (schedule["epochs"], schedule["min_lr"], schedule["steps_per_epoch"]) == (90, 0, 1)
    assert seen["random_crops"][1]["num_steps"] == 90


def test_probe_crops_are_a_single_draw_of_8_to_100_percent(monkeypatch):
    crops = []

    def crop(*args, **kwargs):
        crops.append(RandomResizedCrop(*args, **kwargs))
        return crops[-1]

    monkeypatch.setattr(labelled_data, "RandomResizedCrop", crop)
    batches = labelled_data.random_crops(toy_config(), "train", batch_size=8, seed=0, num_steps=1)
    assert next(batches)["image"].shape == (8, 28, 28, 1)
    assert crops[0].single_draw and crops[0].area == (0.08, 1.0) and crops[0].size == (28, 28)


def test_batch_is_capped_to_the_data_and_divisible_by_the_devices():
    mesh = make_mesh(configs.ml_collections.ConfigDict(dict(data=8, fsdp=1, tensor=1)))
    assert probe_batch_size(16384, 300, None) == 300
    assert probe_batch_size(16384, 300, mesh) == 296
    assert probe_batch_size(64, 300, mesh) == 64
    with pytest.raises(ValueError, match="the data have 7 examples, and there are 8 devices"):
        probe_batch_size(16384, 7, mesh)


def test_features_that_are_not_finite_are_an_error():
    variables = jax.tree.map(lambda leaf: leaf * jnp.nan, toy_variables())
    with pytest.raises(ValueError, match="loss was not finite in 4 of 4 steps"):
        lars_probe_accuracy(Toy(), variables, toy_config(), batch_size=64, epochs=1)
