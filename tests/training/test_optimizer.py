"""Learning rates, decay groups, AdamW and LARS."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mim_jax import config as configs
from mim_jax.method import Group
from mim_jax.training.optimizer import (
    build_optimizer,
    build_schedules,
    group_of,
    is_decayed,
    lars,
    peak_rate,
    warmup_cosine,
)


def test_schedule_is_zero_then_peak_then_minimum():
    rate = warmup_cosine(2.0, min_lr=0.5, warmup_epochs=4, epochs=20, steps_per_epoch=10)
    np.testing.assert_allclose([rate(0), rate(20), rate(40)], [0, 1, 2], atol=1e-6)
    np.testing.assert_allclose(rate(120), 0.5 + 1.5 / 2, atol=1e-6)
    np.testing.assert_allclose([rate(200), rate(300)], [0.5, 0.5], atol=1e-6)


def test_schedule_without_warmup_starts_at_the_peak():
    rate = warmup_cosine(2.0, min_lr=0.0, warmup_epochs=0, epochs=2, steps_per_epoch=10)
    np.testing.assert_allclose(rate(0), 2.0)


def test_schedule_by_epoch_keeps_its_rate_within_an_epoch():
    rate = warmup_cosine(
        2.0, min_lr=0.0, warmup_epochs=5, epochs=15, steps_per_epoch=7, by_epoch=True
    )
    epochs = np.array([float(rate(7 * epoch)) for epoch in range(16)])
    np.testing.assert_allclose(epochs[:6], [0, 0.5, 1, 1.5, 2, 2], atol=1e-6)
    share = np.arange(11) / 10
    np.testing.assert_allclose(epochs[5:], 1 + np.cos(np.pi * share), atol=1e-6)
    within = [[float(rate(7 * epoch + step)) for step in range(7)] for epoch in range(15)]
    np.testing.assert_array_equal(within, epochs[:15, None].repeat(7, axis=1))


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match=r"schedule.warmup_epochs is 40, but the run has 10"):
        warmup_cosine(1.0, min_lr=0, warmup_epochs=40, epochs=10, steps_per_epoch=5)


def test_rate_scales_with_the_batch_unless_given():
    config = configs.defaults().optimizer
    config.base_lr = 1e-3
    assert peak_rate(config, 1024) == pytest.approx(4e-3)
    config.lr = 0.3
    assert peak_rate(config, 1024) == 0.3


def test_decay_spares_biases_scales_and_vectors_however_they_are_split_or_stacked():
    def decayed(path, *shape):
        return is_decayed(path, np.zeros(shape))

    assert decayed("encoder/cls_token", 1, 1, 8)
    assert decayed("encoder/transformer/blocks/attention/qkv/kernel", 2, 8, 3, 2, 4)
    assert not decayed("encoder/transformer/blocks_0/attention/qkv/bias", 3, 2, 4)
    assert not decayed("encoder/transformer/blocks_0/attention/query_bias", 2, 4)
    assert not decayed("encoder/transformer/blocks/norm1/scale", 2, 8)
    assert not decayed("anything", 8)


def test_decay_of_all_spares_only_what_the_method_names():
    def decayed(path, *shape):
        return is_decayed(path, np.zeros(shape), (r"cls_token$",), decay_all=True)

    assert decayed("encoder/transformer/blocks_0/attention/qkv/bias", 3, 2, 4)
    assert decayed("encoder/norm/scale", 8)
    assert decayed("kernel", 8, 8)
    assert not decayed("encoder/cls_token", 1, 1, 8)


@pytest.mark.parametrize("decay_all", [False, True])
@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_the_config_chooses_whether_biases_shrink_without_a_gradient(name, decay_all):
    config = configs.defaults().optimizer
    config.update(dict(name=name, weight_decay=0.5, decay_all=decay_all, momentum=0.0))
    config.trust_coefficient = 1.0
    optimizer = build_optimizer(config, (), {"default": lambda step: 0.1})
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.full(2, 3.0)}
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params, step=0
    )
    assert np.all(updates["kernel"] < 0)
    # Decay alone: w <- w - rate * decay * w, and no trust ratio for a bias.
    np.testing.assert_allclose(updates["bias"], -0.1 * 0.5 * 3.0 if decay_all else 0.0, rtol=1e-6)


def test_lars_is_the_formula_also_when_the_rate_changes():
    config = configs.defaults().optimizer
    config.update(dict(weight_decay=0.1, momentum=0.9, trust_coefficient=0.01))
    rates = [0.1, 0.5, 0.2]
    transform = optax.with_extra_args_support(lars(config, lambda step: jnp.asarray(rates)[step]))
    generator = np.random.default_rng(0)
    params = {"kernel": generator.normal(size=(4, 3)), "bias": generator.normal(size=3)}
    expected = {name: value.copy() for name, value in params.items()}
    momentum = {name: np.zeros_like(value) for name, value in params.items()}
    ours = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    state = transform.init(ours)
    for i, rate in enumerate(rates):
        gradient = {name: generator.normal(size=value.shape) for name, value in params.items()}
        updates, state = transform.update(
            {name: jnp.asarray(g, jnp.float32) for name, g in gradient.items()},
            state,
            ours,
            step=i,
        )
        ours = optax.apply_updates(ours, updates)
        for name, value in expected.items():
            g = gradient[name]
            if value.ndim > 1:
                g = g + 0.1 * value
                g = g * 0.01 * np.linalg.norm(value) / np.linalg.norm(g)
            momentum[name] = 0.9 * momentum[name] + g
            expected[name] = value - rate * momentum[name]
            np.testing.assert_allclose(ours[name], expected[name], rtol=1e-4, atol=1e-6)


def test_adam_adds_the_decay_to_the_gradient():
    torch = pytest.importorskip("torch")
    config = configs.defaults().optimizer
    config.update(name="adam", weight_decay=0.1, decay_all=True, b2=0.999)
    params = {"kernel": jnp.array([[0.5, -2.0]]), "bias": jnp.array([1.0])}
    optimizer = build_optimizer(config, (), {"default": lambda step: 0.01})
    state = optimizer.init(params)
    theirs = {name: torch.nn.Parameter(torch.tensor(np.array(p))) for name, p in params.items()}
    reference = torch.optim.Adam(theirs.values(), lr=0.01, weight_decay=0.1)
    for step in range(3):
        gradients = {name: jnp.sin(p * (step + 1)) for name, p in params.items()}
        for name, p in theirs.items():
            p.grad = torch.tensor(np.array(gradients[name]))
        reference.step()
        updates, state = optimizer.update(gradients, state, params, step=step)
        params = optax.apply_updates(params, updates)
        for name, p in theirs.items():
            np.testing.assert_allclose(params[name], p.detach().numpy(), rtol=1e-6)


@pytest.mark.parametrize("own", [{"clip_norm": 2.0}, {"clip_norm": 1.0, "clip_alone": True}])
def test_a_group_may_be_clipped_by_its_own_norm_and_keep_its_rate(own):
    config = configs.defaults()
    config.optimizer.update(name="lars", lr=1.0, clip_norm=1.0, weight_decay=0.0, momentum=0.0)
    config.schedule.warmup_epochs = 1.0
    settings = {**own, "constant_rate": True, "lr": 0.5}
    groups = (Group("critic", "^critic", settings),)
    schedules = build_schedules(config, groups, steps_per_epoch=4, steps=12)
    assert [float(schedules["critic"](step)) for step in (0, 5, 11)] == [0.5, 0.5, 0.5]
    optimizer = build_optimizer(config.optimizer, groups, schedules)
    params = {"critic": {"bias": jnp.zeros(2)}, "rest": {"bias": jnp.zeros(2)}}
    gradients = {
        "critic": {"bias": jnp.array([30.0, 40.0])},
        "rest": {"bias": jnp.array([3.0, 4.0])},
    }
    updates, _ = optimizer.update(gradients, optimizer.init(params), params, step=4)
    step = -0.5 * own["clip_norm"] * np.array([0.6, 0.8])
    np.testing.assert_allclose(updates["critic"]["bias"], step, rtol=1e-6)
    np.testing.assert_allclose(updates["rest"]["bias"], [-0.6, -0.8], rtol=1e-6)


def test_groups_of_one_norm_are_clipped_together():
    config = configs.defaults()
    config.optimizer.update(name="lars", lr=1.0, clip_norm=1.0, weight_decay=0.0, momentum=0.0)
    config.schedule.warmup_epochs = 1.0
    groups = (Group("critic", "^critic", {"lr": 2.0}),)
    schedules = build_schedules(config, groups, steps_per_epoch=4, steps=12)
    optimizer = build_optimizer(config.optimizer, groups, schedules)
    params = {"critic": {"bias": jnp.zeros(1)}, "rest": {"bias": jnp.zeros(1)}}
    gradients = {"critic": {"bias": jnp.array([30.0])}, "rest": {"bias": jnp.array([40.0])}}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params, step=4)
    np.testing.assert_allclose(updates["critic"]["bias"], [-1.2], rtol=1e-6)
    np.testing.assert_allclose(updates["rest"]["bias"], [-0.8], rtol=1e-6)


def test_first_matching_group_wins():
    groups = (Group("heads", r"head"), Group("rest", r".*"))
    assert group_of("model/head/kernel", groups) == "heads"
    assert group_of("model/body/kernel", groups) == "rest"
    assert group_of("model/body/kernel", groups[:1]) == "default"


def test_settings_of_a_group_are_the_methods_then_the_users():
    config = configs.load("mae:tiny")
    config.unlock()
    config.optimizer.groups = {"heads": {"lr": 0.7}}
    groups = (Group("heads", "head", {"lr": 0.1, "b2": 0.5}),)
    schedules = build_schedules(config, groups, steps_per_epoch=10, steps=100)
    assert float(schedules["heads"](20)) == pytest.approx(0.7)
    assert float(schedules["default"](20)) == pytest.approx(
        config.optimizer.base_lr * config.batch_size / 256
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "sgd", "optimizer.name is 'sgd'; known are adamw, adam, lars"),
        ("groups", {"nobody": {}}, r"sets \['nobody'\], but the method's groups are \['default'\]"),
    ],
)
def test_unknown_optimizer_or_group_is_refused(field, value, message):
    config = configs.defaults().optimizer
    config[field] = value
    with pytest.raises(ValueError, match=message):
        build_optimizer(config, (), {"default": lambda step: 0.1})
