"""Where the time of making a batch goes: reading, decoding, augmenting.

Sources and transforms mark what they do by `with stage("read"): ...`. Every thread has a clock of
its own, so a mark takes no lock, and less than a microsecond. Waiting counts as well, for a disk or
for Python's lock.
"""

import threading
import time
import types

import numpy as np

STAGES = ("read", "decode", "augment", "load", "other")
"""What a clock tells apart: bytes from a file, pixels from bytes, crops and augmentation, what a
source does outside of its own marks, and everything else."""


class StageClock:
    """Seconds of one thread in each stage, since the clock was made."""

    __slots__ = ("changed", "open", "seconds")

    def __init__(self) -> None:
        self.open = [STAGES.index("other")]  # stages around each other; the last one counts
        self.changed = time.perf_counter()
        self.seconds = [0.0] * len(STAGES)

    def go_on_with(self, stage: int) -> None:
        """Ends the stage that is open now, and begins one of `STAGES` in its place."""
        now = time.perf_counter()
        self.seconds[self.open[-1]] += now - self.changed
        self.changed = now
        self.open[-1] = stage

    def total(self) -> np.ndarray:
        """Seconds in each of `STAGES` until now, float64 `[len(STAGES)]`."""
        self.go_on_with(self.open[-1])
        return np.array(self.seconds)


class _Local(threading.local):
    def __init__(self) -> None:
        self.clock = StageClock()


_local = _Local()


def start_clock() -> StageClock:
    """A new clock for this thread, which `stage` uses from now on."""
    _local.clock = StageClock()
    return _local.clock


class stage:
    """Context manager that counts the time inside for one stage, and for none around it."""

    __slots__ = ("_index",)

    def __init__(self, name: str) -> None:
        """Chooses one of `STAGES`."""
        self._index = STAGES.index(name)

    def __enter__(self) -> None:
        clock, now = _local.clock, time.perf_counter()
        clock.seconds[clock.open[-1]] += now - clock.changed
        clock.changed = now
        clock.open.append(self._index)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        clock, now = _local.clock, time.perf_counter()
        clock.seconds[clock.open.pop()] += now - clock.changed
        clock.changed = now
