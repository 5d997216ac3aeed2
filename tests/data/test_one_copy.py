import functools
import gc
import multiprocessing
import os
import pathlib
import pickle
from typing import Any

import cloudpickle
import numpy as np
import pytest

from mim_jax.data.one_copy import OneCopy
from mim_jax.data.pipeline import train_batches
from mim_jax.data.sources import ArraySource

on_linux = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory without a name")


def value(array: np.ndarray, small: np.ndarray, index: int) -> int:
    return int(array[index]) + int(small[0])


def function_over(size: int) -> OneCopy[int]:
    return OneCopy(functools.partial(value, np.arange(size), np.ones(1, np.int64)))


@on_linux
def test_a_pickle_is_as_long_for_ten_million_entries_as_for_ten_thousand() -> None:
    sizes = [len(cloudpickle.dumps(function_over(size))) for size in (10_000, 10_000_000)]
    assert sizes[0] == pytest.approx(sizes[1], abs=50)
    assert sizes[1] < 3000


def test_what_is_unpickled_gives_the_same_values() -> None:
    function = function_over(100_000)
    again = pickle.loads(cloudpickle.dumps(function))
    for index in (0, 1, 4711, 99_999):
        assert again(index) == function(index) == index + 1


def test_what_holds_no_large_array_is_pickled_as_it_is() -> None:
    function = function_over(3)
    pickled = cloudpickle.dumps(function)
    del function
    gc.collect()
    assert pickle.loads(pickled)(2) == 3


def memories() -> int:
    """The number of open files that are memory of functions."""
    links = pathlib.Path("/proc/self/fd").iterdir()
    return sum("mim_jax arrays" in os.path.realpath(link) for link in links)


@on_linux
def test_the_memory_is_returned_with_the_function() -> None:
    before = memories()
    function = function_over(100_000)
    pickled = cloudpickle.dumps(function)
    assert cloudpickle.dumps(function) == pickled
    assert memories() == before + 1
    again = pickle.loads(pickled)
    del function
    gc.collect()
    assert again(7) == 8  # what is mapped already stays
    del again
    gc.collect()
    assert memories() == before


def test_arrays_can_be_changed_without_others_seeing_it() -> None:
    array = np.zeros(100_000, np.int64)
    function = OneCopy(functools.partial(np.add, array, 0))
    pickled = cloudpickle.dumps(function)
    first, second = pickle.loads(pickled), pickle.loads(pickled)
    first._function.args[0][:] = 5
    assert first().sum() == 500_000
    assert second().sum() == function().sum() == 0


def shared_pages(pipe: Any, function: OneCopy[int]) -> None:
    """Send the bytes of the function's memory that this process shares with others."""
    function(0)
    array = function._function.args[0]  # type: ignore[attr-defined]
    total = int(array.sum())
    maps = pathlib.Path("/proc/self/smaps").read_text()
    _, _, mapping = maps.partition("mim_jax arrays")
    fields = dict(line.split(":")[:2] for line in mapping.splitlines()[1:20] if ":" in line)
    private = sum(int(fields[f"Private_{kind}"].split()[0]) for kind in ("Clean", "Dirty"))
    pipe.send((total, private * 1024, int(fields["Rss"].split()[0]) * 1024))


@on_linux
def test_a_process_that_reads_all_entries_has_no_copy_of_them() -> None:
    function = function_over(1_000_000)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    other = pickle.loads(cloudpickle.dumps(function))  # holds the same pages meanwhile
    other._function.args[0].sum()
    process = context.Process(target=shared_pages, args=(theirs, function))
    process.start()
    assert ours.poll(60)
    total, private, resident = ours.recv()
    process.join(60)
    assert total == 1_000_000 * 999_999 // 2
    assert resident >= 8_000_000
    assert private < 100_000


def negative(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    del rng
    return 255 - image


def test_worker_processes_give_the_batches_of_threads() -> None:
    images = np.random.default_rng(0).integers(0, 256, (600, 12, 12, 1), np.uint8)  # above 64 KiB
    source = ArraySource("noise", images, np.arange(600) % 7)

    def batches(workers: int) -> list[dict[str, np.ndarray]]:
        made = train_batches(
            source, negative, batch_size=8, seed=1, num_steps=2, workers=workers, prefetch=1
        )
        return list(made)

    for own, theirs in zip(batches(0), batches(1), strict=True):
        assert own.keys() == theirs.keys()
        for key in own:
            np.testing.assert_array_equal(own[key], theirs[key])
