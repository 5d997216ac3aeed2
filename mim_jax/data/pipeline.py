"""Batches for training and evaluation, by Grain, as a pure function of (seed, step)."""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Generator, Mapping
from typing import Any

import grain
import numpy as np
from absl import flags

from mim_jax.data.decode import UnreadableImage
from mim_jax.data.one_copy import OneCopy
from mim_jax.data.order import (
    Order,
    RowGenerators,
    ShuffledOrder,
    batch_indices,
    steps_per_epoch,
)
from mim_jax.data.sources import Source
from mim_jax.data.stages import STAGES, start_clock

__all__ = ["batch_indices", "evaluation_batches", "steps_per_epoch", "train_batches"]

Batch = dict[str, np.ndarray]
Batches = Generator[Batch, None, None]
TrainTransform = Callable[[Any, np.random.Generator], np.ndarray | Mapping[str, np.ndarray]]
OrderOf = Callable[[Source, int, int], Order]
"""From source, examples in a batch and seed."""
EvaluationTransform = Callable[[Any], np.ndarray | Mapping[str, np.ndarray]]

# A source that has this many bad examples in a row is broken as a whole.
MAX_REPLACEMENTS = 100
# Past this many names another one tells nobody anything new; the rows are still marked.
_MAX_WARNINGS = 1000
_ENDLESS = 2**48
_MAX_DEFAULT_THREADS = 8
_LOAD, _AUGMENT, _OTHER = map(STAGES.index, ("load", "augment", "other"))

_log = logging.getLogger(__name__)


def train_batches(
    source: Source,
    transform: TrainTransform,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_steps: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    threads: int | None = None,
    prefetch: int | None = None,
    timed: bool = False,
    order: OrderOf = ShuffledOrder,
) -> Batches:
    """Return the training batches of this process, from `start_step` on.

    The global batch of step s is a pure function of (seed, s): every epoch is a new permutation
    of the source (the examples that do not fill a batch are dropped, other ones in each epoch),
    and the randomness of a row comes from (seed, epoch, position in the epoch). It does not
    depend on `workers`, `threads`, `process_count` or `start_step`, so a run continues exactly
    where it stopped, on any number of processes. Process p of P makes only the rows
    [p * B / P, (p + 1) * B / P) of a batch of B.

    An unreadable example is replaced by the next readable one of the source; a warning names it
    once per process, and the row is marked.

    Args:
        source: what to read; see `open_source`.
        transform: `(image, rng) -> image`, such as `RandomResizedCrop`, or several arrays by
            name, such as `CropWithTarget`; it may use no other randomness, and all its results
            must have one shape. With an attribute `whole_examples` that is true, it gets the
            example of the source in place of its image. With an attribute `views`, its arrays
            have so many views along a first axis, and each becomes a row of the batch.
        batch_size: rows per step over all processes, the views of an example counted singly.
        seed: of the run, 0 <= seed < 2**64.
        start_step: first step to give.
        num_steps: how many batches to give, counted from `start_step`; None for no end.
        process_index: number of this process.
        process_count: number of processes.
        workers: 0 reads in threads of this process, which is right for data in memory and often
            enough for images, since the decoders release Python's lock. Above 0, that many
            Grain worker processes are started (spawned: a script must guard its entry by
            `if __name__ == "__main__"`), each with `threads` threads. All of them share one copy
            of the source's index (`mim_jax.data.one_copy`). They hand batches over in shared
            memory, of which containers often have only 64 MB: start those with a larger
            `--shm-size`, for `workers * (2 * prefetch + 2) + 1` batches.
        threads: batches in the making at once, in each worker process; None for one per CPU core
            up to 8, or 1 with worker processes.
        prefetch: finished batches kept ready, in each worker process; None for `threads`, and at
            least 2. Each takes `local_batch * height * width * channels` bytes.
        timed: add the time that each batch took to make.
        order: which examples make the batch of a step, in place of a permutation of the source;
            see `mim_jax.data.domains.domain_order`.

    Returns:
        A generator of dictionaries; call its `close()` to stop the threads and worker processes
        before its end.
            image: uint8 or uint16 `[local_batch, height, width, channels]`, as the source gives.
            ...: what else the transform and the order give, such as `target_image`.
            label: int32 `[local_batch]`, or int8 `[local_batch, classes]` of several labels an
                image (0 or 1 each), only if the source is labelled.
            index: int64 `[local_batch]`, the index of the row in the source (for an unreadable
                example still its own, not that of its replacement).
            unreadable: bool `[local_batch]`, True where a replacement stands.
            seconds: float64 `[stages]`, only if `timed`: how long the thread that made the batch
                was in each of `mim_jax.data.stages.STAGES`.

    Raises:
        ValueError: a batch size below 1, above the number of examples, or not divisible by
            `process_count`; a bad seed, step, or process index.
        RuntimeError: (while reading) too many unreadable examples in a row.
    """
    batch_size = examples_per_batch(batch_size, transform)
    ordered = order(source, batch_size, seed)
    if start_step < 0 or (num_steps is not None and num_steps < 0):
        raise ValueError(
            f"start_step and num_steps must not be negative, got {start_step} and {num_steps}"
        )
    rows = _local_rows(batch_size, process_index, process_count)
    make_batch = functools.partial(
        _TrainRows(source, transform, ordered, seed, timed), first=rows.start, stop=rows.stop
    )
    stop_step = _ENDLESS if num_steps is None else start_step + num_steps
    steps = range(start_step, stop_step)
    return _closing(_read(make_batch, steps, workers, threads, prefetch))


def evaluation_batches(
    source: Source,
    transform: EvaluationTransform,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    limit: int | None = None,
    workers: int = 0,
    threads: int | None = None,
    prefetch: int | None = None,
) -> Batches:
    """Return every example of the source once, in order; all batches have the same shape.

    Args:
        source: what to read; see `open_source`.
        transform: `image -> image`, such as `EvaluationCrop`, or as for `train_batches`, without
            views.
        batch_size: rows per batch over all processes.
        process_index: number of this process, which makes rows [p * B / P, (p + 1) * B / P).
        process_count: number of processes.
        limit: read only so many examples from the beginning; None for all.
        workers: as for `train_batches`.
        threads: as for `train_batches`.
        prefetch: as for `train_batches`.

    Returns:
        A generator of dictionaries, as in `train_batches`, and
            valid: bool `[local_batch]`, False in the rows that fill up the last batch (there
                `index` and `label` are -1 and the image is black) and where an example was
                unreadable (its replacement would count another example twice).

    Raises:
        ValueError: an empty source, or a bad batch size, limit or process index.
        RuntimeError: (while reading) too many unreadable examples in a row.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, or None for all examples, got {limit}")
    if not len(source):
        raise ValueError(f"the source {source.name} has no examples to evaluate")
    total = len(source) if limit is None else min(limit, len(source))
    rows = _local_rows(batch_size, process_index, process_count)
    make_batch = functools.partial(
        _EvaluationRows(source, transform, batch_size, total), first=rows.start, stop=rows.stop
    )
    steps = range(-(-total // batch_size))
    return _closing(_read(make_batch, steps, workers, threads, prefetch))


@dataclasses.dataclass
class _TrainRows:
    """Makes rows of a training batch; picklable, and safe to call from several threads."""

    source: Source
    transform: TrainTransform
    order: Order
    seed: int
    timed: bool = False
    warned: set[int] = dataclasses.field(default_factory=set)

    def __call__(self, step: int, first: int, stop: int) -> Batch:
        """Return rows `first` to `stop` of the global batch of a step."""
        clock = start_clock()
        rows = self.order.rows(step, first, stop)
        generators = RowGenerators(self.seed)
        batch = _BatchBuffer(stop - first, views_of(self.transform), rows.columns)
        for row, (index, position) in enumerate(
            zip(rows.indices.tolist(), rows.positions.tolist(), strict=True)
        ):
            clock.go_on_with(_LOAD)
            alike = self.order.alike(index)
            element, unreadable = readable_element(self.source, index, self.warned, alike)
            clock.go_on_with(_AUGMENT)
            given = _given(self.transform, element)
            image = self.transform(given, generators.at(rows.epoch, position))
            batch.put(row, index, image, element.get("label"), unreadable)
        clock.go_on_with(_OTHER)
        arrays = batch.arrays()
        return {**arrays, "seconds": clock.total()} if self.timed else arrays


@dataclasses.dataclass
class _EvaluationRows:
    """Makes rows of an evaluation batch; picklable, and safe to call from several threads."""

    source: Source
    transform: EvaluationTransform
    batch_size: int
    total: int
    warned: set[int] = dataclasses.field(default_factory=set)

    def __call__(self, step: int, first: int, stop: int) -> Batch:
        """Return rows `first` to `stop` of the global batch of a step, and which are valid."""
        start = step * self.batch_size
        indices = range(min(start + first, self.total), min(start + stop, self.total))
        batch = _BatchBuffer(stop - first)
        # A process that has no example left in the last batch still needs the image's shape.
        for row, index in enumerate(indices or [self.total - 1]):
            element, unreadable = readable_element(self.source, index, self.warned)
            image = self.transform(_given(self.transform, element))
            batch.put(row, index, image, element.get("label"), unreadable)
        arrays = batch.arrays()
        padding = slice(len(indices), None)
        for key, array in arrays.items():
            array[padding] = {"label": -1, "index": -1}.get(key, 0)
        arrays["valid"] = (np.arange(stop - first) < len(indices)) & ~arrays["unreadable"]
        return arrays


class _BatchBuffer:
    """Collects rows into arrays that are allocated once the first image shows its shape."""

    def __init__(
        self, size: int, views: int | None = None, columns: Mapping[str, np.ndarray] | None = None
    ) -> None:
        self._columns = columns or {}
        self._images: dict[str, np.ndarray] = {}
        self._labels: np.ndarray | None = None
        self._size = size
        self._views = views
        self._indices = np.full(size, -1, np.int64)
        self._unreadable = np.zeros(size, bool)

    def put(
        self,
        row: int,
        index: int,
        image: np.ndarray | Mapping[str, np.ndarray],
        label: int | np.ndarray | None,
        unreadable: bool,
    ) -> None:
        images = image if isinstance(image, Mapping) else {"image": image}
        if not self._images:
            for name, given in images.items():
                self._images[name] = np.zeros((self._size, *given.shape), given.dtype)
            if label is not None:
                # Of several labels an example has 0 or 1 for each class; -1 marks an empty row.
                kind = np.int8 if np.ndim(label) else np.int32
                self._labels = np.full((self._size, *np.shape(label)), -1, kind)
        for name, given in images.items():
            rows = self._images[name]
            if given.shape != rows.shape[1:]:
                raise ValueError(
                    f"{name} of example {index} has shape {given.shape} after the transform, but "
                    f"the others of its batch have {rows.shape[1:]}; the transform must give one "
                    "shape"
                )
            if given.dtype != rows.dtype:
                raise ValueError(
                    f"example {index} is {given.dtype}, but the others of its batch are "
                    f"{rows.dtype}; open all sources with the same bits"
                )
            rows[row] = given
        if self._labels is not None:
            self._labels[row] = label
        self._indices[row] = index
        self._unreadable[row] = unreadable

    def arrays(self) -> Batch:
        arrays = {
            **self._images,
            **self._columns,
            "index": self._indices,
            "unreadable": self._unreadable,
        }
        if self._labels is not None:
            arrays["label"] = self._labels
        if self._views is None:
            return arrays
        return {
            name: array.reshape(-1, *array.shape[2:])
            if name in self._images
            else array.repeat(self._views, axis=0)
            for name, array in arrays.items()
        }


def views_of(transform: TrainTransform) -> int | None:
    """Return how many rows a transform makes of an example, None if it gives no such axis."""
    return getattr(transform, "views", None)


def examples_per_batch(batch_size: int, transform: TrainTransform) -> int:
    """Return how many examples give the rows of a batch.

    Raises:
        ValueError: the views of an example do not fit a whole number of times.
    """
    views = views_of(transform) or 1
    if batch_size % views:
        raise ValueError(
            f"batch_size {batch_size} is not divisible by the {views} views that are taken of an "
            f"example; the nearest that are: {batch_size - batch_size % views or views} and "
            f"{batch_size + -batch_size % views}"
        )
    return batch_size // views


def _given(transform: Any, element: dict[str, Any]) -> Any:
    """Return what a transform asks for: the example, or its image."""
    return element if getattr(transform, "whole_examples", False) else element["image"]


def readable_element(
    source: Source, index: int, warned: set[int] | None = None, alike: range | None = None
) -> tuple[dict[str, Any], bool]:
    """Return the example at `index`, or the next readable one, and whether it was replaced.

    The replacement is the first readable of `index + 1`, `index + 2`, ..., counted around the end
    of `alike`, so it is the same in every run.

    Args:
        source: what to read.
        index: the wanted example.
        warned: indices for which a warning was logged before; new ones are added.
        alike: the examples among which to look, `index` among them; None for the whole source.

    Raises:
        RuntimeError: 100 examples in a row, or all of them, are unreadable; names the first.
    """
    first_error: UnreadableImage | None = None
    alike = range(len(source)) if alike is None else alike
    tries = min(MAX_REPLACEMENTS + 1, len(alike))
    for offset in range(tries):
        candidate = alike[(index - alike.start + offset) % len(alike)]
        try:
            return source[candidate], offset > 0
        except UnreadableImage as error:
            first_error = first_error or error
            if warned is not None and candidate not in warned and len(warned) < _MAX_WARNINGS:
                warned.add(candidate)
                _log.warning("unreadable image, replaced by the next one: %s", error)
    raise RuntimeError(
        f"{tries} examples in a row of {source.name} are unreadable, from index {index} on "
        f"(the first: {first_error}); check the path and the files"
    ) from first_error


def _local_rows(batch_size: int, process_index: int, process_count: int) -> range:
    """Return the rows of the global batch that a process makes."""
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index must be in range({process_count}), the number of processes, "
            f"got {process_index}"
        )
    if batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} is not divisible by the number of processes "
            f"({process_count}); the nearest that are: "
            f"{batch_size - batch_size % process_count or process_count} and "
            f"{batch_size + -batch_size % process_count}"
        )
    local = batch_size // process_count
    return range(process_index * local, (process_index + 1) * local)


def _read(
    make_batch: Callable[[int], Batch],
    steps: range,
    workers: int,
    threads: int | None,
    prefetch: int | None,
) -> grain.DatasetIterator:
    """Return Grain's iterator over `make_batch(step)`.

    One Grain element is a whole batch, not one example. Grain's own work for an element (index
    shuffle, a dictionary per stage, a task in a thread pool) is longer than a crop of a small
    image, and is paid once per batch this way: 256 crops at 28 x 28 take 3 ms on one core,
    against 9 ms with one element per example.
    """
    if workers < 0:
        raise ValueError(f"workers must not be negative, got {workers}")
    if threads is None:
        threads = reading_threads(workers)
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if prefetch is None:
        prefetch = max(2, threads)
    if prefetch < 1:
        raise ValueError(f"prefetch must be at least 1, got {prefetch}")
    # Each worker process would hold its own copy of the source's index twice: with its pickle.
    given = OneCopy(make_batch) if workers else make_batch
    batches = grain.MapDataset.range(steps.start, steps.stop).map(given)
    reading = batches.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    )
    if workers:
        if not flags.FLAGS.is_parsed():
            # Grain reads absl flags when it starts processes; outside absl's `app.run` (notebooks,
            # tests) nobody has parsed them, and their defaults are meant.
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
        reading = reading.mp_prefetch(options, worker_init_fn=_prepare_worker)
    return iter(reading)


def reading_threads(workers: int) -> int:
    """Return how many threads make batches, in each worker process if there are any."""
    return 1 if workers else min(os.cpu_count() or 1, _MAX_DEFAULT_THREADS)


def _prepare_worker(worker_index: int, worker_count: int) -> None:
    """Keep OpenCV to one thread in a worker process: the processes already share the cores."""
    del worker_index, worker_count
    try:
        import cv2
    except ImportError:
        return
    cv2.setNumThreads(0)


def _closing(batches: grain.DatasetIterator) -> Batches:
    """Yield the batches; stop their threads and processes when the generator is closed."""
    try:
        yield from batches
    finally:
        batches.close()
