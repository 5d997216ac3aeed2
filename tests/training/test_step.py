"""What the one train step promises, on a toy method with one of everything."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.method import Ema
from mim_jax.training.optimizer import build_optimizer, warmup_cosine
from mim_jax.training.state import init_state, split_trainable
from mim_jax.training.step import make_gradient, make_train_step, stream_keys
from mim_jax.training.tree import flatten, map_with_path
from tests.training.toy import WIDTH, Toy

RATE = 0.1


def batch_of(rows=8, seed=0):
    return {"image": jax.random.normal(jax.random.key(seed), (rows, WIDTH))}


def setup(method=None, *, accumulate=1, seed=0, schedule=None, **optimizer_fields):
    method = method or Toy()
    config = configs.defaults().optimizer
    config.update({"weight_decay": 0.0, **optimizer_fields})
    schedule = schedule or (lambda step: jnp.asarray(RATE))
    schedules = {"default": schedule, "critic": lambda step: jnp.asarray(0.5)}
    optimizer = build_optimizer(config, method.groups, schedules)
    state = init_state(method, optimizer, jax.random.key(seed), batch_of())
    step = make_train_step(
        method, optimizer, schedules, lambda batch, rng: batch, seed=seed, accumulate=accumulate
    )
    return method, state, jax.jit(step)


def assert_same(a, b):
    for path, value in flatten(a).items():
        np.testing.assert_array_equal(value, flatten(b)[path], err_msg=path)


def test_loss_falls_and_every_term_is_reported():
    _, state, step = setup()
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch_of())
        losses.append(float(metrics["loss"]))
        np.testing.assert_allclose(metrics["loss"], metrics["match"] + metrics["critic"], rtol=1e-6)
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.step) == 20


def test_loss_computes_with_what_gather_makes_of_all_parameters():
    method, state, _ = setup()

    def doubled(params):
        return jax.tree.map(lambda leaf: 2 * leaf, params)

    def gradient_at(params, **options):
        gradient = make_gradient(method, lambda batch, rng: batch, seed=0, **options)
        return gradient(dataclasses.replace(state, params=params), batch_of())

    found, metrics, _ = gradient_at(state.params, gather=doubled)
    expected, expected_metrics, _ = gradient_at(doubled(state.params))
    assert_same(metrics, expected_metrics)
    assert_same(found, doubled(expected))  # the chain rule


def test_frozen_parameters_stay_bit_identical_and_have_no_optimizer_state():
    method, start, step = setup()
    state, _ = step(start, batch_of())
    assert_same(state.params["projection"], start.params["projection"])
    paths = []
    map_with_path(lambda path, leaf: paths.append(path), state.opt_state)
    assert not any("projection" in path or "teacher" in path for path in paths)
    assert any("student" in path for path in paths)
    trainable, fixed = split_trainable(method, state.params)
    assert set(trainable) == {"student", "critic"} and set(fixed) == {"teacher", "projection"}


def test_teacher_starts_as_a_copy_and_follows_by_its_momentum():
    _, start, step = setup()
    assert_same(start.params["teacher"], start.params["student"])
    state, _ = step(start, batch_of())
    for path, before in flatten(start.params["teacher"]).items():
        student = flatten(state.params["student"])[path]
        expected = 0.9 * before + 0.1 * student
        np.testing.assert_allclose(flatten(state.params["teacher"])[path], expected, rtol=1e-5)
        assert not np.array_equal(before, student)
    late, _ = step(start.replace(step=jnp.asarray(200)), batch_of())
    np.testing.assert_allclose(
        late.params["teacher"]["first"]["kernel"], start.params["teacher"]["first"]["kernel"]
    )


def test_mutable_collection_is_updated():
    _, start, step = setup()
    state, _ = step(start, batch_of())
    assert np.any(np.asarray(state.mutable["batch_stats"]["mean"]) != 0)


def test_each_group_has_its_own_rate():
    _, start, step = setup()
    state, metrics = step(start, batch_of())
    assert float(metrics["learning_rate"]) == pytest.approx(RATE)
    assert float(metrics["learning_rate_critic"]) == 0.5
    # Adam's first update has the size of the rate wherever the gradient is not tiny.
    for name, rate in (("student", RATE), ("critic", 0.5)):
        moved = [
            np.abs(np.asarray(a) - np.asarray(b)).max()
            for a, b in zip(
                jax.tree.leaves(state.params[name]), jax.tree.leaves(start.params[name])
            )
        ]
        np.testing.assert_allclose(max(moved), rate, rtol=1e-3)


@pytest.mark.parametrize("count", [2, 4])
def test_accumulated_gradient_is_that_of_the_whole_batch(count):
    _, start, whole = setup(b1=0.0)
    _, _, parts = setup(b1=0.0, accumulate=count)
    a, metrics_a = whole(start, batch_of(8))
    b, metrics_b = parts(start, batch_of(8))
    np.testing.assert_allclose(metrics_a["loss"], metrics_b["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics_a["grad_norm"], metrics_b["grad_norm"], rtol=1e-5)
    for path, value in flatten(a.params).items():
        np.testing.assert_allclose(flatten(b.params)[path], value, atol=1e-4, err_msg=path)


def test_accumulation_hands_mutable_collections_on():
    _, start, step = setup(accumulate=4)
    state, _ = step(start, batch_of(8))
    _, _, once = setup()
    first, _ = once(start, batch_of(8))
    # Four updates of a running mean move it further than one.
    moved = np.linalg.norm(state.mutable["batch_stats"]["mean"])
    assert moved > 2 * np.linalg.norm(first.mutable["batch_stats"]["mean"])


def test_clipping_bounds_the_gradient_and_reports_it_unclipped():
    # LARS with plain momentum on 1-D tensors shows the clipped gradient in its first update.
    _, start, step = setup(name="lars", clip_norm=1e-3, momentum=0.0)
    _, free, free_step = setup(name="lars", momentum=0.0)
    state, metrics = step(start, batch_of())
    free, free_metrics = free_step(free, batch_of())
    np.testing.assert_allclose(metrics["grad_norm"], free_metrics["grad_norm"], rtol=1e-6)
    bias = "student/first/bias"
    clipped = flatten(state.params)[bias] - flatten(start.params)[bias]
    unclipped = flatten(free.params)[bias] - flatten(start.params)[bias]
    np.testing.assert_allclose(
        clipped, unclipped * 1e-3 / metrics["grad_norm"], rtol=1e-4, atol=1e-9
    )


def test_non_finite_step_changes_nothing_but_the_counters():
    _, start, step = setup()
    state, _ = step(start, batch_of())
    bad = {"image": batch_of()["image"].at[3, 2].set(jnp.nan)}
    after, metrics = step(state, bad)
    assert not np.isfinite(metrics["loss"])
    assert_same(after.params, state.params)
    for a, b in zip(jax.tree.leaves(after.opt_state), jax.tree.leaves(state.opt_state)):
        np.testing.assert_array_equal(a, b)
    assert_same(after.mutable, state.mutable)
    assert int(after.step) == int(state.step) + 1
    assert (int(after.skipped), int(after.skipped_in_row)) == (1, 1)
    twice, _ = step(after, bad)
    assert (int(twice.skipped), int(twice.skipped_in_row)) == (2, 2)
    well, metrics = step(twice, batch_of())
    assert (int(well.skipped), int(well.skipped_in_row)) == (2, 0)
    assert float(metrics["skipped"]) == 2
    assert not np.array_equal(
        well.params["student"]["first"]["kernel"], state.params["student"]["first"]["kernel"]
    )


def test_rate_follows_the_step_and_not_the_updates():
    schedule = warmup_cosine(1.0, min_lr=0, warmup_epochs=5, epochs=10, steps_per_epoch=1)
    _, state, step = setup(schedule=schedule)
    bad = {"image": batch_of()["image"] * jnp.nan}
    rates = []
    for batch in (bad, bad, batch_of()):
        state, metrics = step(state, batch)
        rates.append(float(metrics["learning_rate"]))
    np.testing.assert_allclose(rates, [0, 0.2, 0.4], atol=1e-6)


def test_randomness_comes_from_seed_and_step_alone():
    method = Toy(noise=1.0)
    _, start, step = setup(method)
    losses = {}
    for number in (0, 1):
        state = start.replace(step=jnp.asarray(number))
        losses[number] = [float(step(state, batch_of())[1]["loss"]) for _ in range(2)]
        assert losses[number][0] == losses[number][1]
    assert losses[0][0] != losses[1][0]
    _, _, other = setup(method, seed=1)
    assert float(other(start, batch_of())[1]["loss"]) != losses[0][0]


def test_a_stream_does_not_depend_on_the_others():
    key = jax.random.key(0)
    alone, beside = stream_keys(key, ("mask",)), stream_keys(key, ("noise", "mask"))
    data = {name: jax.random.key_data(k).tolist() for name, k in beside.items()}
    assert jax.random.key_data(alone["mask"]).tolist() == data["mask"] != data["noise"]


def test_wrong_declarations_are_refused():
    @dataclasses.dataclass(frozen=True)
    class Unknown(Toy):
        frozen = ("nowhere/",)

    @dataclasses.dataclass(frozen=True)
    class Mismatch(Toy):
        ema = (Ema("student", "critic", 0.9),)

    @dataclasses.dataclass(frozen=True)
    class AllFrozen(Toy):
        frozen = ("",)

    with pytest.raises(ValueError, match="nowhere/"):
        setup(Unknown())
    with pytest.raises(ValueError, match="'critic' does not have the parameters of 'student'"):
        setup(Mismatch())
    with pytest.raises(ValueError, match="no parameter to train"):
        setup(AllFrozen())
