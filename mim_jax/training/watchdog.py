"""A run that stands still says where: the stack traces of all threads, and what it was at."""

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TextIO

EXIT_STUCK = 70
"""Exit code of a run that ended itself because it stood still; starting it again goes on."""

SECONDS_LAST = 10
"""How much later process 0 leaves: JAX ends every process that loses it, with another code."""


class Watchdog:
    """Watches for signs of life, from a thread of its own; a context manager.

    After so many seconds without one, and again after as many more, it writes what the run was at
    and the stack traces of all threads to standard error. The run goes on. Only if a limit is set
    and reached does the process end, with `EXIT_STUCK`, so that its scheduler starts it again.

    A sign of life costs a fraction of a microsecond. Time is that of a monotonic clock: setting
    the machine's clock changes nothing.
    """

    def __init__(
        self,
        seconds: float,
        limit: float = 0,
        *,
        process: int = 0,
        processes: int = 1,
        output: TextIO | None = None,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        """Starts nothing yet.

        Args:
            seconds: without a sign of life until it speaks up; 0 for never.
            limit: seconds without a sign of life until it ends the process; 0 for never.
            process: number of this process, for the message.
            processes: how many there are.
            output: where to write; standard error by default.
            leave: ends the process with an exit code.
        """
        self._seconds = seconds
        self._limit = limit + SECONDS_LAST * (process == 0 and processes > 1) if limit else 0
        self._where = f"process {process} of {processes} ({socket.gethostname()}, {os.getpid()})"
        self._output = output
        self._leave = leave
        self._last_step: int | None = None
        self._at = ("starting", time.monotonic())
        self._may_leave = True
        self._over = False
        self._wake = threading.Event()  # there is something new to know
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds or self._limit:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def at(self, doing: str) -> None:
        """A sign of life: the run begins with something, such as "saving step 3"."""
        self._at = (doing, time.monotonic())

    def finished(self, step: int) -> None:
        """A sign of life: the devices have finished a step."""
        self._last_step = step
        self._at = (self._at[0], time.monotonic())

    @contextlib.contextmanager
    def patient(self, doing: str) -> Iterator[None]:
        """For what may take any time, such as evaluation: the limit does not end the process."""
        self._may_leave = False
        self.at(doing)
        try:
            yield
        finally:
            self.at("training")
            self._may_leave = True
            self._wake.set()

    def _watch(self) -> None:
        told = 0  # how often since the last sign of life
        seen = self._at
        while not self._over:
            now = self._at
            if now is not seen:
                told, seen = 0, now
            quiet = time.monotonic() - now[1]
            if self._limit and self._may_leave and quiet >= self._limit:
                self._tell(now[0], quiet, f"Over log.watchdog_exit_seconds: exit {EXIT_STUCK}.")
                self._leave(EXIT_STUCK)
                return
            if self._seconds and quiet >= self._seconds * (told + 1):
                told = int(quiet / self._seconds)
                self._tell(now[0], quiet, "The run is left alone.")
            due = [self._seconds * (told + 1)] if self._seconds else []
            due += [self._limit] if self._limit and self._may_leave else []
            self._wake.wait(max(min(due) - quiet, 0.01) if due else None)
            self._wake.clear()

    def _tell(self, doing: str, quiet: float, outcome: str) -> None:
        """Writes the message at once, so that those of several processes do not mix."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        step = "none" if self._last_step is None else self._last_step
        parts = [
            f"watchdog: {self._where} gives no sign of life for {quiet:.0f} s, while {doing} "
            f"(last step finished: {step}). {outcome}\n"
        ]
        for ident, frame in sys._current_frames().items():
            if ident != self._thread.ident:
                parts.append(f"Thread {names.get(ident, ident)}, most recent call last:\n")
                parts += traceback.format_stack(frame)
        output = self._output or sys.stderr
        with contextlib.suppress(OSError, ValueError):  # whoever read it may have gone
            output.write("".join(parts))
            output.flush()
