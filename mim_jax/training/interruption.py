"""SIGTERM and SIGINT: finish the step, save, and leave with a code that says so."""

import signal
import threading
from types import FrameType, TracebackType

EXIT_INTERRUPTED = 75
"""Exit code of a run that was asked to stop and saved itself (EX_TEMPFAIL: run it again)."""


class Interrupted(Exception):
    """A run stopped on request after saving; starting the same command again goes on."""


class Interruption:
    """While active, the first SIGTERM or SIGINT only sets `requested`; a second one acts as usual.

    Attributes:
        requested: name of the signal that came, or None.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested: str | None = None
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

    def release(self) -> None:
        """Signals act as usual again."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}
