"""SIGTERM and SIGINT: finish the step, save, and leave with a code that says so."""

import collections
import signal
import threading
from types import FrameType, TracebackType

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

EXIT_INTERRUPTED = 75
"""Exit code of a run that was asked to stop and saved itself (EX_TEMPFAIL: run it again)."""


class Interrupted(Exception):
    """A run stopped on request after saving; starting the same command again goes on."""


class Interruption:
    """While active, the first SIGTERM or SIGINT only asks to stop; a second one acts as usual.

    Several processes leave after the same step, wherever and whenever the signals came.

    Attributes:
        requested: name of the signal that came, or None.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, mesh: Mesh) -> None:
        self.requested: str | None = None
        self._vote = _Vote(mesh) if jax.process_count() > 1 else None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Interruption":
        # Python lets only the main thread handle signals; elsewhere nothing is changed.
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._handle) for s in self.SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        self.release()

    def reached(self) -> bool:
        """Whether to save and leave now; to be asked after every step, in every process."""
        if self._vote is None:
            return self.requested is not None
        if not self._vote.cast(self.requested is not None):
            return False
        self.requested = self.requested or "a signal to another process"
        return True

    def release(self) -> None:
        """Signals act as usual again."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}


class _Vote:
    """Processes agree on a step to stop at: each casts a vote after every step.

    The devices count the votes, in the order of the steps, and the outcome is read two steps
    later. It is there by then, so that no process waits for another. (JAX's own
    `reached_preemption_sync_point` cannot be used: Orbax tells it other steps, from a thread.)
    """

    STEPS_LATE = 2

    def __init__(self, mesh: Mesh) -> None:
        devices = Mesh(mesh.devices.ravel(), "device")
        one_each = NamedSharding(devices, PartitionSpec("device"))
        mine = sum(device.process_index == jax.process_index() for device in mesh.devices.flat)
        self._ballots = {
            choice: jax.make_array_from_process_local_data(one_each, np.full(mine, choice))
            for choice in (False, True)
        }  # bool [devices]
        self._any = jax.jit(jax.numpy.any, out_shardings=NamedSharding(devices, PartitionSpec()))
        self._outcomes: collections.deque[jax.Array] = collections.deque()

    def cast(self, stop: bool) -> bool:
        """Votes, and returns whether any process voted to stop two steps ago."""
        self._outcomes.append(self._any(self._ballots[stop]))
        return len(self._outcomes) > self.STEPS_LATE and bool(self._outcomes.popleft())
