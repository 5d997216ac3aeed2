import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mim_jax.data.order import RowGenerators, batch_indices, permuted_indices, steps_per_epoch

SIZES = st.integers(1, 300)
SEEDS = st.integers(0, 2**64 - 1)

ORDER_OF_STEP_0 = [3786, 2348, 1755, 3651, 2679, 1050, 2390, 1106]
ORDER_OF_STEP_501 = [3844, 862, 1432, 2658, 2747, 2654, 972, 1445]


@settings(max_examples=60, deadline=None)
@given(length=SIZES, seed=SEEDS, epoch=st.integers(0, 10**6))
def test_each_epoch_is_a_permutation(length: int, seed: int, epoch: int) -> None:
    order = permuted_indices(np.arange(length), length, seed, epoch)
    np.testing.assert_array_equal(np.sort(order), np.arange(length))


@settings(max_examples=40, deadline=None)
@given(length=SIZES, seed=SEEDS, data=st.data())
def test_no_example_comes_twice_in_an_epoch(length: int, seed: int, data: st.DataObject) -> None:
    batch_size = data.draw(st.integers(1, length))
    steps = steps_per_epoch(length, batch_size)
    epoch = np.concatenate([batch_indices(length, batch_size, seed, s) for s in range(steps)])
    assert len(np.unique(epoch)) == len(epoch) == steps * batch_size
    assert epoch.dtype == np.int64
    assert epoch.min() >= 0 and epoch.max() < length


def test_epochs_and_seeds_differ() -> None:
    positions = np.arange(1000)
    orders = [permuted_indices(positions, 1000, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for i, first in enumerate(orders):
        for second in orders[i + 1 :]:
            assert (first == second).mean() < 0.02


def test_dropped_examples_differ_between_epochs() -> None:
    def dropped(epoch: int) -> set[int]:
        steps = range(3 * epoch, 3 * epoch + 3)
        return set(range(100)) - {int(i) for s in steps for i in batch_indices(100, 30, 5, s)}

    assert len(dropped(0)) == len(dropped(1)) == 10
    assert dropped(0) != dropped(1)


@pytest.mark.parametrize("length", [3, 10, 64, 100])
def test_every_place_is_equally_likely(length: int) -> None:
    epochs = 2000
    orders = np.stack([permuted_indices(np.arange(length), length, 3, e) for e in range(epochs)])
    counts = np.stack([np.bincount(orders[:, p], minlength=length) for p in range(length)])
    expected = epochs / length
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (length - 1) ** 2
    assert abs(chi_square - freedom) < 6 * np.sqrt(2 * freedom)


def test_order_never_changes_between_versions() -> None:
    """These values are part of the contract: a changed order breaks the continuing of a run."""
    assert batch_indices(4000, 8, 0, 0).tolist() == ORDER_OF_STEP_0
    assert batch_indices(4000, 8, 7, 501).tolist() == ORDER_OF_STEP_501


def test_order_of_a_huge_set_needs_no_table() -> None:
    indices = batch_indices(10**12, 4096, 1, 12345)
    assert len(np.unique(indices)) == 4096
    assert indices.max() > 10**11


def test_row_generator_depends_on_seed_epoch_and_position_alone() -> None:
    generators = RowGenerators(3)
    first = generators.at(2, 5).random(4)
    generators.at(0, 0).random(3)
    np.testing.assert_array_equal(generators.at(2, 5).random(4), first)
    np.testing.assert_array_equal(RowGenerators(3).at(2, 5).random(4), first)
    for other in (RowGenerators(4).at(2, 5), generators.at(3, 5), generators.at(2, 6)):
        assert not np.array_equal(other.random(4), first)


def test_neighbouring_rows_are_uncorrelated() -> None:
    generators = RowGenerators(0)
    draws = np.array([generators.at(0, position).random(2) for position in range(4000)])
    assert abs(draws.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.06


def test_batch_larger_than_the_set_is_an_error() -> None:
    assert steps_per_epoch(100, 30) == 3
    with pytest.raises(ValueError, match=r"batch_size 101 is larger than the data set \(100"):
        steps_per_epoch(100, 101)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        steps_per_epoch(100, 0)


def test_bad_seed_and_step_are_errors() -> None:
    with pytest.raises(ValueError, match=r"seed must be between 0 and 2\*\*64 - 1, got -1"):
        batch_indices(10, 2, -1, 0)
    with pytest.raises(ValueError, match="step must not be negative, got -3"):
        batch_indices(10, 2, 0, -3)
