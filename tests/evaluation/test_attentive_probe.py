import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.evaluation import attentive_probe
from mim_jax.evaluation.attentive_probe import (
    AttentiveHead,
    AttentiveProbe,
    attentive_probe_accuracy,
    probe_optimizer,
)
from mim_jax.evaluation.features import all_tokens
from mim_jax.method import Features
from mim_jax.training.state import state_from_variables
from mim_jax.training.step import make_train_step
from mim_jax.training.tree import flatten
from tests.evaluation.toy import Toy, toy_config, toy_variables

IMAGES = {"image": jnp.zeros((1, 28, 28, 1))}


@dataclasses.dataclass(frozen=True)
class WithClassToken(Toy):
    """A toy whose representation is as wide as a token."""

    def features(self, variables, batch):
        features = super().features(variables, batch)
        return dataclasses.replace(features, pooled=features.tokens.max(axis=1))


@functools.cache
def head_variables():
    return AttentiveHead(5, 2).init(jax.random.key(0), tokens(), train=True)


def tokens(batch: int = 6) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(batch, 9, 8)).astype(np.float32)


def test_at_first_every_token_weighs_the_same():
    pooled = functools.partial(AttentiveHead(5, 2).apply, head_variables(), train=False)
    shuffled = tokens()[:, ::-1]
    np.testing.assert_allclose(pooled(tokens()), pooled(shuffled), atol=1e-6)
    assert not np.any(head_variables()["params"]["pool"]["token"])


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="width 8 is not divisible by 3 attention heads"):
        AttentiveHead(5, 3).init(jax.random.key(0), tokens(), train=True)


@pytest.mark.parametrize(("width", "heads"), [(16, 1), (64, 1), (128, 2), (100, 1)])
def test_by_default_there_is_a_head_for_64_channels(width, heads):
    shapes = jax.eval_shape(
        lambda: AttentiveHead(5).init(jax.random.key(0), jnp.zeros((2, 3, width)), train=True)
    )
    assert shapes["params"]["pool"]["query_bias"].shape == (heads, width // heads)


def test_the_class_token_is_seen_before_the_patches():
    patches = jnp.asarray(tokens())
    features = Features(patches[:, 0] + 1, patches, (3, 3))
    seen = all_tokens(features)
    np.testing.assert_array_equal(seen[:, 0], features.pooled)
    np.testing.assert_array_equal(seen[:, 1:], patches)
    wider = dataclasses.replace(features, pooled=jnp.zeros((6, 20)))
    np.testing.assert_array_equal(all_tokens(wider), patches)


@pytest.mark.parametrize("method", [Toy(), WithClassToken()])
def test_a_step_moves_query_and_classifier_and_leaves_the_backbone(method):
    probe = AttentiveProbe(method, 10)
    start = probe.with_head(jax.random.key(0), toy_variables(), IMAGES)

    def rate(step):
        return jnp.float32(0.1)

    state = state_from_variables(probe, probe_optimizer(rate), start)
    step = jax.jit(
        make_train_step(probe, probe_optimizer(rate), {"default": rate}, lambda b, r: b, seed=0)
    )
    random = np.random.default_rng(1)
    batch = {
        "image": jnp.asarray(random.normal(size=(16, 28, 28, 1)), jnp.float32),
        "label": jnp.asarray(random.integers(10, size=16)),
    }
    for _ in range(3):
        state, metrics = step(state, batch)
    before, after = flatten(start), flatten(state.variables)
    for path, value in before.items():
        same = np.array_equal(after[path], value)
        assert same == ("/backbone/" in path), path
    assert metrics["skipped"] == 0


def test_optimizer_is_sgd_with_nesterov_s_momentum():
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    theirs = torch.optim.SGD([weight], lr=0.1, momentum=0.9, nesterov=True)
    optimizer = probe_optimizer(lambda step: jnp.float32(0.1))
    params = {"w": jnp.array([1.0, -2.0])}
    state = optimizer.init(params)
    for i in range(4):
        gradient = np.array([1.0 + i, 0.5 * i], np.float32)
        weight.grad = torch.tensor(gradient)
        theirs.step()
        updates, state = optimizer.update({"w": gradient}, state, params, step=jnp.int32(i))
        params = {"w": params["w"] + updates["w"]}
        np.testing.assert_allclose(params["w"], weight.detach().numpy(), rtol=1e-6)


def test_the_probe_learns_on_few_images_and_repeats_itself():
    config = toy_config(**{"evaluate.train_split": "train[:512]"})
    accuracy = attentive_probe_accuracy(Toy(), toy_variables(), config, lr=2.0)
    assert accuracy > 0.3  # of tokens without places; chance is 0.1
    assert accuracy == attentive_probe_accuracy(Toy(), toy_variables(), config, lr=2.0)


@pytest.mark.parametrize(("examples", "batch"), [(300, 64), (3000, 93), (1_281_167, 8192)])
def test_small_data_get_smaller_batches_and_the_paper_s_data_the_paper_s(
    monkeypatch, examples, batch
):
    seen = {}
    monkeypatch.setattr(
        attentive_probe, "labelled_source", lambda config, split: (range(examples), 10)
    )
    monkeypatch.setattr(attentive_probe, "train_probe", lambda *_, **given: seen.update(given))
    monkeypatch.setattr(attentive_probe, "probe_accuracy", lambda *_: 0.5)
    assert attentive_probe_accuracy(Toy(), toy_variables(), toy_config()) == 0.5
    assert (seen["batch_size"], seen["epochs"]) == (batch, 90)
    np.testing.assert_allclose(seen["peak_lr"](batch), 0.4 * np.sqrt(batch / 8192))
