import logging
import multiprocessing
import pathlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mim_jax.data import (
    EvaluationCrop,
    RandomResizedCrop,
    evaluation_batches,
    open_source,
    steps_per_epoch,
    train_batches,
)
from mim_jax.data.decode import UnreadableImage
from mim_jax.data.pipeline import Batch, Batches, batch_indices, readable_element
from mim_jax.data.sources import ArraySource
from mim_jax.data.transforms import CropWithTarget
from tests.data.images import write_images

CROP = RandomResizedCrop((12, 10))
CENTRE = EvaluationCrop((12, 10))


def numbered_source(length: int, labelled: bool = True) -> ArraySource:
    """Return random images whose label is their index."""
    images = np.random.default_rng(0).integers(0, 256, (length, 14, 14, 1), dtype=np.uint8)
    return ArraySource("numbered", images, np.arange(length) if labelled else None)


class SourceWithHoles:
    """Image i is filled with the value i; some cannot be read."""

    name = "holes"
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None

    def __init__(self, length: int, bad: set[int]) -> None:
        self.length = length
        self.bad = bad

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.bad:
            raise UnreadableImage(f"image_{index}.jpg: broken")
        return {"image": np.full((8, 8, 1), index, np.uint8)}


def collect(batches: Batches) -> list[Batch]:
    collected = [{key: np.array(value) for key, value in batch.items()} for batch in batches]
    batches.close()
    return collected


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_batch_has_the_promised_arrays() -> None:
    (batch,) = collect(train_batches(numbered_source(20), CROP, batch_size=6, seed=0, num_steps=1))
    shapes = {key: (value.shape, value.dtype) for key, value in batch.items()}
    assert shapes == {
        "image": ((6, 12, 10, 1), np.uint8),
        "label": ((6,), np.int32),
        "index": ((6,), np.int64),
        "unreadable": ((6,), np.bool_),
    }
    np.testing.assert_array_equal(batch["label"], batch["index"])
    np.testing.assert_array_equal(batch["index"], batch_indices(20, 6, 0, 0))
    assert not batch["unreadable"].any()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_second_rendering_is_one_more_entry_and_changes_no_other(workers: int) -> None:
    options = {"batch_size": 6, "seed": 3, "num_steps": 4}
    source = open_source("embedded", "test")
    plain = collect(train_batches(source, CROP, **options))
    twice = collect(train_batches(source, CropWithTarget(CROP, (6, 5)), workers=workers, **options))
    for batch in twice:
        target = batch.pop("target_image")
        assert target.shape == (6, 6, 5, 1) and target.dtype == np.uint8
        # The same picture, smaller: the mean of its pixels is nearly that of the first.
        means = [x.mean(axis=(1, 2, 3)) for x in (target.astype(float), batch["image"])]
        assert np.corrcoef(means)[0, 1] > 0.99
    assert_same(twice, plain)


class TwoCorners:
    """Two views of an example, and its label once more; no random numbers."""

    whole_examples = True
    views = 2

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        image = example["image"]
        return {
            "image": np.stack([image[:4, :4], image[-4:, -4:]]),
            "again": np.full((2, 3), example["label"], np.float32),
        }


def test_whole_examples_give_rows_for_each_of_their_views() -> None:
    source = numbered_source(20)
    two, one = (
        collect(train_batches(source, TwoCorners(), batch_size=8, seed=3, num_steps=2, **share))
        for share in ({}, {"process_index": 1, "process_count": 2})
    )
    for batch in two:
        np.testing.assert_array_equal(batch["index"][::2], batch["index"][1::2])
        np.testing.assert_array_equal(batch["label"], batch["index"])
        np.testing.assert_array_equal(batch["again"], batch["label"][:, None].repeat(3, axis=1))
        for row, index in enumerate(batch["index"]):
            image = source[index]["image"]
            expected = image[-4:, -4:] if row % 2 else image[:4, :4]
            np.testing.assert_array_equal(batch["image"][row], expected)
    for whole, part in zip(two, one, strict=True):
        for name, array in part.items():
            np.testing.assert_array_equal(array, whole[name][4:])


def test_views_that_do_not_fill_a_batch_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"batch_size 7 .* the nearest that are: 6 and 8"):
        train_batches(numbered_source(20), TwoCorners(), batch_size=7, seed=0)


def test_unlabelled_source_gives_no_label() -> None:
    source = numbered_source(20, labelled=False)
    (batch,) = collect(train_batches(source, CROP, batch_size=6, seed=0, num_steps=1))
    assert set(batch) == {"image", "index", "unreadable"}


@settings(max_examples=15, deadline=None)
@given(start=st.integers(0, 12), threads=st.integers(1, 4), seed=st.integers(0, 2**64 - 1))
def test_batch_is_the_same_for_any_start_and_number_of_threads(
    start: int, threads: int, seed: int
) -> None:
    options = {"batch_size": 7, "seed": seed}
    source = numbered_source(30)
    whole = collect(train_batches(source, CROP, num_steps=14, threads=1, prefetch=1, **options))
    rest = collect(
        train_batches(
            source, CROP, start_step=start, num_steps=14 - start, threads=threads, **options
        )
    )
    assert_same(rest, whole[start:])


@settings(max_examples=10, deadline=None)
@given(process_count=st.sampled_from([1, 2, 3, 4, 6, 12]), seed=st.integers(0, 1000))
def test_batch_is_the_same_for_any_number_of_processes(process_count: int, seed: int) -> None:
    options = {"batch_size": 12, "seed": seed, "num_steps": 4}
    source = numbered_source(30)
    whole = collect(train_batches(source, CROP, **options))
    parts = [
        collect(
            train_batches(source, CROP, process_index=p, process_count=process_count, **options)
        )
        for p in range(process_count)
    ]
    joined = [
        {key: np.concatenate([part[key] for part in step]) for key in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


def test_batch_is_the_same_with_worker_processes() -> None:
    options = {"batch_size": 16, "seed": 3, "start_step": 5, "num_steps": 7}
    source = open_source("embedded", "test")
    here = collect(train_batches(source, CROP, **options))
    there = collect(train_batches(source, CROP, workers=2, **options))
    assert_same(there, here)
    assert not multiprocessing.active_children()


def test_closing_stops_the_worker_processes() -> None:
    batches = train_batches(numbered_source(30), CROP, batch_size=8, seed=0, workers=1)
    next(batches)
    assert multiprocessing.active_children()
    batches.close()
    assert not multiprocessing.active_children()


def test_epochs_and_seeds_give_other_crops_of_the_same_example() -> None:
    source = numbered_source(4)

    def images(seed: int) -> list[np.ndarray]:
        batches = collect(train_batches(source, CROP, batch_size=4, seed=seed, num_steps=2))
        return [batch["image"][np.argsort(batch["index"])] for batch in batches]

    pictures = [*images(0), *images(1)]
    for i, first in enumerate(pictures):
        for second in pictures[i + 1 :]:
            for a, b in zip(first, second, strict=True):
                assert not np.array_equal(a, b)


def test_without_an_end_the_batches_go_on_over_epochs() -> None:
    source = numbered_source(10)
    steps = steps_per_epoch(10, 4)
    batches = train_batches(source, CROP, batch_size=4, seed=0, start_step=1_000_000)
    for step in range(1_000_000, 1_000_000 + 3 * steps):
        np.testing.assert_array_equal(next(batches)["index"], batch_indices(10, 4, 0, step))
    batches.close()


def test_unreadable_example_is_replaced_marked_and_named_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = SourceWithHoles(10, bad={3, 4, 9})
    with caplog.at_level(logging.WARNING):
        batches = collect(
            train_batches(source, EvaluationCrop((8, 8), 1.0), batch_size=10, seed=0, num_steps=3)
        )
    for batch in batches:
        shown = dict(zip(batch["index"].tolist(), batch["image"][:, 0, 0, 0].tolist(), strict=True))
        assert shown == {0: 0, 1: 1, 2: 2, 3: 5, 4: 5, 5: 5, 6: 6, 7: 7, 8: 8, 9: 0}
        assert set(batch["index"][batch["unreadable"]].tolist()) == {3, 4, 9}
    for bad in (3, 4, 9):
        assert sum(f"image_{bad}.jpg: broken" in r.message for r in caplog.records) == 1


def test_bad_files_of_a_folder_are_replaced_in_worker_processes_too(
    tmp_path: pathlib.Path,
) -> None:
    write_images(tmp_path, 12)
    (tmp_path / "005.png").write_bytes(b"broken")
    source = open_source(str(tmp_path))
    options = {"batch_size": 6, "seed": 1, "num_steps": 4}
    here = collect(train_batches(source, CROP, **options))
    assert sum(int(batch["unreadable"].sum()) for batch in here) == 2
    assert_same(collect(train_batches(source, CROP, workers=1, **options)), here)


def test_source_that_cannot_be_read_at_all_is_an_error() -> None:
    with pytest.raises(
        RuntimeError, match="101 examples in a row of holes are unreadable"
    ) as error:
        readable_element(SourceWithHoles(1000, set(range(1000))), 7)
    assert "from index 7 on (the first: image_7.jpg: broken)" in str(error.value)
    with pytest.raises(RuntimeError, match="5 examples in a row"):
        readable_element(SourceWithHoles(5, set(range(5))), 0)
    element, replaced = readable_element(SourceWithHoles(1000, set(range(100))), 0)
    assert replaced and element["image"][0, 0, 0] == 100


def test_transform_that_gives_several_shapes_is_an_error(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path, 4)
    batches = train_batches(
        open_source(str(tmp_path)), lambda image, rng: image, batch_size=4, seed=0, num_steps=1
    )
    with pytest.raises(ValueError, match="after the transform, but the others of its batch have"):
        next(batches)


@settings(max_examples=15, deadline=None)
@given(
    length=st.integers(1, 30),
    process_count=st.sampled_from([1, 2, 4]),
    limit=st.none() | st.integers(1, 40),
)
def test_evaluation_gives_every_example_once_in_order(
    length: int, process_count: int, limit: int | None
) -> None:
    source = numbered_source(length)
    parts = [
        collect(
            evaluation_batches(
                source, CENTRE, batch_size=8, process_index=p, process_count=process_count,
                limit=limit,
            )
        )
        for p in range(process_count)
    ]  # fmt: skip
    steps = list(zip(*parts, strict=True))
    for step in steps:
        assert {batch["image"].shape for batch in step} == {(8 // process_count, 12, 10, 1)}
    batches = [batch for step in steps for batch in step]
    valid = np.concatenate([batch["valid"] for batch in batches])
    expected = list(range(min(length, limit or length)))
    for key in ("index", "label"):
        values = np.concatenate([batch[key] for batch in batches])
        assert values[valid].tolist() == expected
        assert (values[~valid] == -1).all()
    images = np.concatenate([batch["image"] for batch in batches])
    assert not images[~valid].any()
    for index in expected[:3]:
        np.testing.assert_array_equal(images[valid][index], CENTRE(source[index]["image"]))


def test_unreadable_examples_are_not_counted_in_evaluation() -> None:
    source = SourceWithHoles(5, bad={1})
    (batch,) = collect(evaluation_batches(source, EvaluationCrop((8, 8), 1.0), batch_size=8))
    assert batch["valid"].tolist() == [True, False, True, True, True, False, False, False]
    assert batch["unreadable"].tolist() == [False, True] + [False] * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 31}, r"batch_size 31 is larger than the data set \(30 examples\)"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        (
            {"batch_size": 10, "process_count": 4},
            r"batch_size 10 is not divisible by the number of processes \(4\).*: 8 and 12",
        ),
        ({"process_index": 2, "process_count": 2}, r"process_index must be in range\(2\)"),
        ({"start_step": -1}, "start_step and num_steps must not be negative"),
        ({"seed": -1}, "seed must be between 0"),
        ({"workers": -1}, "workers must not be negative"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"prefetch": 0}, "prefetch must be at least 1"),
    ],
)
def test_bad_options_are_errors_before_reading(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_batches(numbered_source(30), CROP, **{"batch_size": 8, "seed": 0, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"limit": 0}, "limit must be at least 1, or None"),
        ({"process_count": 3}, "not divisible by the number of processes"),
    ],
)
def test_bad_evaluation_options_are_errors(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluation_batches(numbered_source(30), CENTRE, **{"batch_size": 8, **options})


def test_empty_source_cannot_be_evaluated() -> None:
    with pytest.raises(ValueError, match="the source numbered has no examples to evaluate"):
        evaluation_batches(numbered_source(0, labelled=False), CENTRE, batch_size=8)
