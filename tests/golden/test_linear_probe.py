"""MAE's linear-probe head and LARS against the official code, step by step."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from mim_jax.evaluation.probe import ProbeHead
from mim_jax.losses import cross_entropy
from mim_jax.training.optimizer import lars
from tests.golden.cases import Case, assert_close, assert_gradient_close, case_params

probes = pytest.mark.parametrize("path", case_params("mae", "linprobe"))


@functools.cache
def read(path) -> Case:
    return Case(path)


def build(cfg: dict) -> ProbeHead:
    batch_norm = cfg["bn"]
    assert not batch_norm["affine"]
    return ProbeHead(cfg["classes"], momentum=1 - batch_norm["momentum"], epsilon=batch_norm["eps"])


def initial_variables(case: Case) -> dict:
    official = case.group("param")
    linear = {
        "kernel": jnp.asarray(official["1.weight"].T),
        "bias": jnp.asarray(official["1.bias"]),
    }
    statistics = {
        "mean": jnp.asarray(official["0.running_mean"]),
        "var": jnp.asarray(official["0.running_var"]),
    }
    return {"params": {"linear": linear}, "batch_stats": statistics}


def optimizer_of(cfg: dict) -> optax.GradientTransformation:
    names = ("weight_decay", "momentum", "trust_coefficient")
    settings = ml_collections.ConfigDict({"decay_all": False, **{n: cfg[n] for n in names}})
    return lars(settings, lambda step: jnp.float32(cfg["lr"]))


def loss_of(params, head: ProbeHead, batch_stats, features, labels):
    logits, updated = head.apply(
        {"params": params, "batch_stats": batch_stats},
        features,
        train=True,
        mutable=["batch_stats"],
    )
    return cross_entropy(logits, labels), (logits, updated["batch_stats"])


def steps(case: Case):
    """Loss, logits, gradient, parameters and statistics, after each step."""
    head, optimizer = build(case.cfg), optimizer_of(case.cfg)
    variables = initial_variables(case)
    params, statistics = variables["params"], variables["batch_stats"]
    state = optimizer.init(params)
    value_and_grad = jax.jit(jax.value_and_grad(loss_of, has_aux=True), static_argnames="head")
    for i in range(case.cfg["steps"]):
        features = jnp.asarray(case["in/features"][i])
        labels = jnp.asarray(case["in/labels"][i].astype(np.int32))
        (loss, (logits, statistics)), gradient = value_and_grad(
            params, head, statistics, features, labels
        )
        updates, state = optimizer.update(gradient, state, params, step=jnp.int32(i))
        params = optax.apply_updates(params, updates)
        yield loss, logits, gradient["linear"], params, statistics


@probes
def test_initial_variables_have_the_official_shapes(path):
    case = read(path)
    ours = build(case.cfg).init(jax.random.key(0), jnp.asarray(case["in/features"][0]), train=True)
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, initial_variables(case))


@probes
def test_gradient_of_the_first_step_matches(path):
    case = read(path)
    _, _, gradient, _, _ = next(steps(case))
    assert_gradient_close(gradient["kernel"].T, case["grad/1.weight"], "weight")
    assert_gradient_close(gradient["bias"], case["grad/1.bias"], "bias")


@probes
def test_every_step_matches(path):
    case = read(path)
    for i, (loss, logits, _, params, _) in enumerate(steps(case)):
        assert_close(loss, case["out/loss"][i], f"loss of step {i}")
        assert_close(logits, case["out/train_logits"][i], f"logits of step {i}")
        linear = params["linear"]
        assert_close(linear["kernel"].T, case["out/weight_after"][i], f"weight after step {i}")
        assert_close(linear["bias"], case["out/bias_after"][i], f"bias after step {i}")


@probes
def test_running_statistics_and_evaluation_match(path):
    case = read(path)
    *_, (_, _, _, params, statistics) = steps(case)
    assert_close(statistics["mean"], case["out/running_mean_after"], "running mean")
    assert_close(statistics["var"], case["out/running_var_after"], "running variance")
    logits = build(case.cfg).apply(
        {"params": params, "batch_stats": statistics}, case["in/features"][0], train=False
    )
    assert_close(logits, case["out/eval_logits"], "evaluation logits")
