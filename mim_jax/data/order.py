"""The order of the data as a pure function of (seed, step), without a stored permutation."""

import functools
from collections.abc import Mapping, Sized
from typing import NamedTuple, Protocol

import numpy as np

_ROUNDS = 8
_MAX_SEED = 2**64
_WORD = 2**64 - 1
_STEP = 0x9E3779B97F4A7C15


class Rows(NamedTuple):
    """Where rows of a training batch come from.

    Attributes:
        indices: in the source, int64 `[n]`.
        epoch: with the position, it names the random numbers of a row.
        positions: int64 `[n]`.
        columns: what else the batch tells of each row, by name, each `[n, ...]`.
    """

    indices: np.ndarray
    epoch: int
    positions: np.ndarray
    columns: Mapping[str, np.ndarray]


class Order(Protocol):
    """Which examples make the batch of a step: a pure function of the step, without state."""

    def rows(self, step: int, first: int, stop: int) -> Rows:
        """Return rows `first` to `stop` of the global batch of a step, counted in examples."""
        ...

    def alike(self, index: int) -> range:
        """Return the examples of which one may stand for an unreadable example, with itself."""
        ...


class ShuffledOrder:
    """Every epoch is a new permutation of the whole source, see `batch_indices`."""

    def __init__(self, source: Sized, batch_size: int, seed: int) -> None:
        """Order a source.

        Args:
            source: only its length is asked for.
            batch_size: examples per step over all processes.
            seed: of the run.

        Raises:
            ValueError: a batch size below 1, or above the number of examples; a bad seed.
        """
        steps_per_epoch(len(source), batch_size)  # checks the sizes
        check_seed(seed)
        self._length = len(source)
        self._batch_size = batch_size
        self._seed = seed

    def rows(self, step: int, first: int, stop: int) -> Rows:
        """Return rows `first` to `stop` of the global batch of a step."""
        epoch, positions = epoch_and_positions(self._length, self._batch_size, step)
        positions = positions[first:stop]
        indices = permuted_indices(positions, self._length, self._seed, epoch)
        return Rows(indices, epoch, positions, {})

    def alike(self, index: int) -> range:
        """Return all examples of the source."""
        del index
        return range(self._length)


def steps_per_epoch(source_length: int, batch_size: int) -> int:
    """Return how many whole batches an epoch has; the last partial batch is dropped.

    Args:
        source_length: number of examples.
        batch_size: examples per step over all processes.

    Raises:
        ValueError: a batch size below 1, or above the number of examples.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if batch_size > source_length:
        raise ValueError(
            f"batch_size {batch_size} is larger than the data set ({source_length} examples), so "
            f"an epoch would have no step; set batch_size to at most {source_length}"
        )
    return source_length // batch_size


def batch_indices(source_length: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Return the source indices of the global batch of one step, int64 `[batch_size]`.

    Every epoch is a new permutation of the source; its `source_length % batch_size` last
    examples are dropped, other ones in each epoch. Costs O(batch_size) time and memory.

    Args:
        source_length: number of examples.
        batch_size: examples per step over all processes.
        seed: of the run, 0 <= seed < 2**64.
        step: of the run, counted from 0 over all epochs.
    """
    epoch, positions = epoch_and_positions(source_length, batch_size, step)
    return permuted_indices(positions, source_length, seed, epoch)


def epoch_and_positions(source_length: int, batch_size: int, step: int) -> tuple[int, np.ndarray]:
    """Return the epoch of a step and the positions of its rows in it, int64 `[batch_size]`."""
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}")
    epoch, step_in_epoch = divmod(step, steps_per_epoch(source_length, batch_size))
    return epoch, step_in_epoch * batch_size + np.arange(batch_size, dtype=np.int64)


def permuted_indices(
    positions: np.ndarray, source_length: int, seed: int, epoch: int
) -> np.ndarray:
    """Return where a pseudo-random permutation of `range(source_length)` sends `positions`.

    A balanced Feistel network permutes the next power of four; values beyond the end walk on
    along their cycle until they fall inside (at most 4 passes on average), which leaves a
    permutation of the range itself. It is written out here, and not taken from a library, so that
    an upgrade can never change the order of a run that is being continued.

    Reference: J. Black, P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002.

    Args:
        positions: int64 `[n]`, each in `range(source_length)`.
        source_length: number of examples.
        seed: of the run.
        epoch: counted from 0.

    Returns:
        int64 `[n]`, each in `range(source_length)`, distinct where the positions are.
    """
    check_seed(seed)
    half_bits = np.uint64(max(1, ((source_length - 1).bit_length() + 1) // 2))
    keys = _round_keys(seed, epoch)
    values = _feistel(np.asarray(positions).astype(np.uint64), half_bits, keys)
    outside = np.flatnonzero(values >= source_length)
    while outside.size:
        values[outside] = _feistel(values[outside], half_bits, keys)
        outside = outside[values[outside] >= source_length]
    return values.astype(np.int64)


def permuted_index(position: int, source_length: int, seed: int, epoch: int) -> int:
    """Return `permuted_indices` of one position; several times faster than an array of one."""
    half_bits = max(1, ((source_length - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    keys = _cached_keys(seed, epoch)
    value = position
    while True:
        left, right = value >> half_bits, value & mask
        for key in keys:
            mixed = right ^ key
            mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
            mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & _WORD
            left, right = right, left ^ ((mixed ^ (mixed >> 31)) & mask)
        value = (left << half_bits) | right
        if value < source_length:
            return value


def hashed(*numbers: int) -> int:
    """Return a number below 2**64 that is spread evenly, even where `numbers` are neighbours.

    Args:
        numbers: each below 2**64.
    """
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = _mixed((state ^ np.uint64(number)) + np.uint64(_STEP))
    return int(state[0])


def check_seed(seed: int) -> None:
    """Raise `ValueError` unless `0 <= seed < 2**64`."""
    if not 0 <= seed < _MAX_SEED:
        raise ValueError(f"seed must be between 0 and 2**64 - 1, got {seed}")


class RowGenerators:
    """Random generators by (seed, epoch, position), at about 1 microsecond each.

    Philox is a counter-based generator: the seed is its key, and every (epoch, position) owns a
    block of 2**64 counter values. Moving the counter is several times cheaper than making a
    generator, so one is reused: `at` gives the same object each time, valid until the next call.

    Reference: J. Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
    """

    def __init__(self, seed: int) -> None:
        check_seed(seed)
        self._bits = np.random.Philox(key=seed)
        self._state = self._bits.state
        self._generator = np.random.Generator(self._bits)

    def at(self, epoch: int, position: int) -> np.random.Generator:
        """Return the generator of one row, at the start of its stream."""
        self._state["state"]["counter"][:] = (0, position, epoch, 0)
        self._bits.state = self._state
        return self._generator


def _feistel(values: np.ndarray, half_bits: np.uint64, keys: np.ndarray) -> np.ndarray:
    """Return uint64 `[n]` values below `4**half_bits`, permuted by the rounds of `keys`."""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << half_bits) | right


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    """Return uint64 `[rounds]` keys; every bit of seed and epoch reaches every key."""
    state = _mixed(_mixed(np.array([seed], np.uint64)) ^ np.array([epoch], np.uint64))
    return _mixed(state + np.uint64(_STEP) * np.arange(1, _ROUNDS + 1, dtype=np.uint64))


@functools.lru_cache(maxsize=1024)
def _cached_keys(seed: int, epoch: int) -> tuple[int, ...]:
    check_seed(seed)
    return tuple(_round_keys(seed, epoch).tolist())


def _mixed(values: np.ndarray) -> np.ndarray:
    """Return the splitmix64 finalizer of uint64 `[n]` (arithmetic modulo 2**64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
