"""What a run tells its user: metrics, pictures, progress and notes; everything but checkpoints.

folder/metrics.jsonl          one JSON object a line: step, time, and every metric
folder/tensorboard/           the same, and the pictures, for TensorBoard
folder/pictures/NAME_STEP.png
folder/wandb/                 only if Weights & Biases was asked for
"""

import collections
import contextlib
import io
import itertools
import json
import math
import os
import re
import socket
import struct
import time
import types
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

METRICS_FILE = "metrics.jsonl"
LABELS = {
    "images_per_second": "images/s",
    "data_wait": "data wait",
    "model_flops_utilization": "MFU",
}
SHARES = ("data_wait", "model_flops_utilization")
UNKNOWN = "-"


class RunLog:
    """Writes metrics, pictures and progress of one run; a context manager.

    Every line and event reaches the operating system before the call returns, so a killed process
    loses nothing. A run that continues from `first_step` first removes what its killed
    predecessor logged after that step, so that no step appears twice.

    On a terminal a progress bar shows, and metrics go to the files only. Elsewhere (batch systems,
    notebooks, pipes) there is no bar, and every call of `metrics` prints one plain line.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        first_step: int = 0,
        is_main: bool = True,
        tensorboard: bool = True,
        wandb: bool = False,
        config: Mapping[str, Any] | None = None,
        console: Console | None = None,
    ):
        """Opens the files.

        Args:
            folder: of the run; made if it does not exist.
            total_steps: the step at which the run ends.
            first_step: number of steps already taken, by the checkpoint that the run starts from.
            is_main: False on all processes but one: these write and print nothing.
            tensorboard: write TensorBoard event files.
            wandb: send metrics and pictures to Weights & Biases.
            config: the run's settings, shown by Weights & Biases.
            console: where to print; standard output by default.

        Raises:
            ModuleNotFoundError: `wandb` was asked for and is not installed.
            OSError: a file cannot be written.
            ValueError: `metrics.jsonl` has a damaged line before its last.
        """
        self._is_main = is_main
        self._open = contextlib.ExitStack()  # everything to close, last opened first
        if not is_main:
            return
        self._folder = Path(folder)
        self._total_steps = total_steps
        self._console = console or Console()
        self._pace = Pace(first_step, total_steps)
        self._widths: dict[str, int] = {}
        self._bar: Progress | None = None
        self._events: EventFile | None = None
        self._wandb: Any = None
        with contextlib.ExitStack() as opened:
            module = _import_wandb() if wandb else None
            with _clear_write_errors(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / METRICS_FILE
            drop_later_lines(path, first_step)
            self._metrics = opened.enter_context(_opened_to_append(path))
            if tensorboard:
                self._events = EventFile(self._folder / "tensorboard", first_step)
                opened.callback(self._events.close)
            if module is not None:
                self._wandb = WandbRun(module, self._folder, config or {})
                opened.push(self._wandb.finish)
            if self._console.is_terminal and not self._console.is_dumb_terminal:
                self._bar, self._task = _progress_bar(self._console, first_step, total_steps)
                opened.enter_context(self._bar)
            self._open = opened.pop_all()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Logs scalars, in the given order.

        Args:
            step: number of steps taken.
            values: numbers by name; NaN and infinities are allowed. `images_per_second` is
                printed as "images/s"; `data_wait` and `model_flops_utilization` (shares, 0 to
                1) in per cent.

        Raises:
            OSError: the file system refuses; the message names the file and the mend.
            ValueError: a metric is called `step` or `time`.
        """
        if not self._is_main:
            return
        step, values = int(step), {name: float(value) for name, value in values.items()}
        _append_whole(self._metrics, metrics_line(step, time.time(), values))
        if self._events:
            self._events.scalars(step, values)
        if self._wandb:
            self._wandb.scalars(step, values)
        self._pace.mark(step)
        if self._bar is None:
            self._print(Text(self._plain_line(step, values)))

    def progress(
        self, step: int, *, loss: float | None, images_per_second: float, data_wait: float
    ) -> None:
        """Moves the progress bar; cheap enough for every step, and silent without a terminal.

        Args:
            step: number of steps taken.
            loss: the latest known, or None.
            images_per_second: of all devices together.
            data_wait: share of time that the devices waited for data, 0 to 1.
        """
        if not self._is_main:
            return
        self._pace.mark(step)
        if self._bar is None:
            return
        self._bar.update(
            self._task,
            completed=step,
            loss=UNKNOWN if loss is None else shown_number(loss),
            rate=shown_number(images_per_second),
            wait=shown_share(data_wait),
            eta=shown_time(self._pace.seconds_left(step)),
        )

    def picture(self, step: int, name: str, image: np.ndarray) -> Path | None:
        """Saves a picture.

        Args:
            step: number of steps taken.
            name: what it shows; characters that do not suit a file name become "_" there.
            image: uint8 `[height, width, 3]`.

        Returns:
            The PNG file, or None on processes that write nothing.

        Raises:
            OSError: the file system refuses; the message names the file and the mend.
            ValueError: another type or shape.
        """
        if not self._is_main:
            return None
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"picture {name!r} is {image.dtype} {list(image.shape)}; "
                "expected uint8 [height, width, 3]."
            )
        step, png = int(step), _png(image)
        file_name = re.sub(r"[^\w.-]", "_", name)
        path = self._folder / "pictures" / f"{file_name}_{step:08d}.png"
        _replace_file(path, png)
        if self._events:
            self._events.picture(step, name, png, image.shape[0], image.shape[1])
        if self._wandb:
            self._wandb.picture(step, name, image)
        return path

    def note(self, text: str) -> None:
        """Prints a line to the user, above the progress bar if there is one."""
        if self._is_main:
            self._print(Text(text))

    def warn(self, text: str) -> None:
        """Prints a line that the user should not miss."""
        if self._is_main:
            self._print(Text(f"warning: {text}", style="yellow"))

    def close(self) -> None:
        """Ends the bar and closes the files; a second call does nothing."""
        self._open.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error: Any) -> None:
        # Passed on, because Weights & Biases marks a run that ends by an error as failed.
        self._open.__exit__(*error)

    def _print(self, text: Text) -> None:
        # soft_wrap: a log line is one line, however narrow rich believes a file to be.
        self._console.print(text, soft_wrap=True)

    def _plain_line(self, step: int, values: Mapping[str, float]) -> str:
        """Columns keep the greatest width they have had, so that lines stay aligned."""
        width = len(str(self._total_steps))
        fields = [f"step {step:>{width}}/{self._total_steps}"]
        for name, value in values.items():
            text = shown_share(value) if name in SHARES else shown_number(value)
            self._widths[name] = max(len(text), self._widths.get(name, 0))
            fields.append(f"{LABELS.get(name, name)} {text:<{self._widths[name]}}")
        fields.append(f"ETA {shown_time(self._pace.seconds_left(step))}")
        return "  ".join(fields)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """All logged metrics of a run, in the order of the file.

    Args:
        folder: of the run, which may be in progress: a half-written last line is left out.

    Returns:
        One dictionary a line: `step` (int), `time` (seconds since 1970) and the metrics, where
        "nan", "inf" and "-inf" are floats again.

    Raises:
        FileNotFoundError: there is no `metrics.jsonl`.
        ValueError: a line before the last is damaged; the message names it.
    """
    path = Path(folder) / METRICS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {METRICS_FILE} in {folder}; is this the folder of a run?")
    return [record for _, record in _whole_lines(path)]


def metrics_line(step: int, seconds: float, values: Mapping[str, float]) -> bytes:
    """A line of `metrics.jsonl`, with its end.

    JSON knows no NaN and no infinity: these become the strings "nan", "inf" and "-inf", which
    Python's `float`, pandas and R read back. (null could not tell them apart.)

    Raises:
        ValueError: a metric is called `step` or `time`.
    """
    taken = {"step", "time"} & set(values)
    if taken:
        raise ValueError(f"a metric cannot be called {taken.pop()!r}; every line has that already.")
    finite = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
    record = {"step": step, "time": round(seconds, 3), **finite}
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def drop_later_lines(path: Path, last_step: int) -> None:
    """Removes lines of `metrics.jsonl` after a step, and a half-written last line.

    The file is replaced at once or not at all, and only if there is something to remove.

    Raises:
        OSError: the new file cannot be written.
        ValueError: a line before the last is damaged.
    """
    if not path.exists():
        return
    kept = b"".join(line for line, record in _whole_lines(path) if record["step"] <= last_step)
    if len(kept) != path.stat().st_size:
        _replace_file(path, kept)


def shown_number(value: float) -> str:
    """Four significant digits; whole numbers and numbers from 1000 on without a fraction."""
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if 1000 <= size < 1e8 or (value == round(value) and size < 1000):
        return f"{value:.0f}"
    if 1e-3 <= size < 1000:
        return f"{value:#.4g}".rstrip(".")  # 999.96 is "1000." before
    return f"{value:.3e}"


def shown_share(value: float) -> str:
    """A share of 0 to 1 in per cent."""
    return f"{100 * value:.1f} %"


def shown_time(seconds: float | None) -> str:
    """Hours, minutes and seconds, as in 1:02:03."""
    if seconds is None:
        return UNKNOWN
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class Pace:
    """How fast the run goes, by its last minutes: compilation and past pauses are forgotten."""

    seconds_between_marks = 10
    number_of_marks = 30

    def __init__(
        self, first_step: int, total_steps: int, clock: Callable[[], float] = time.monotonic
    ):
        """Starts the clock at `first_step`, which is the first mark."""
        self._total_steps = total_steps
        self._clock = clock
        self._marks = collections.deque([(first_step, clock())], self.number_of_marks)

    def mark(self, step: int) -> None:
        """Notes the time of a step."""
        last_step, last_time = self._marks[-1]
        now = self._clock()
        is_first = len(self._marks) == 1
        if step > last_step and (is_first or now - last_time >= self.seconds_between_marks):
            self._marks.append((step, now))

    def seconds_left(self, step: int) -> float | None:
        """Estimated time to the last step; None while there is nothing to estimate it from."""
        # The oldest mark stands before compilation: used only as long as there is no other.
        later = itertools.islice(self._marks, 1, None)
        start, then = next((mark for mark in later if mark[0] < step), self._marks[0])
        if step <= start:
            return None
        return (self._clock() - then) / (step - start) * max(self._total_steps - step, 0)


class EventFile:
    """A TensorBoard event file, in the record format of TensorFlow.

    Written here, without tensorboardX's `SummaryWriter`: its writing thread dies when the disk is
    full, and the train loop would then wait for it forever.
    """

    def __init__(self, folder: Path, first_step: int):
        """Starts a new file in `folder`, which makes TensorBoard forget steps after `first_step`.

        Raises:
            OSError: the file cannot be written.
        """
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import masked_crc32c

        self._event: Any = event_pb2.Event
        self._summary: Any = summary_pb2.Summary
        self._checksum = masked_crc32c
        # TensorBoard reads the files of a folder in the order of their names.
        origin = f"{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        with _clear_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._file = _opened_to_append(folder / f"events.out.tfevents.{origin}")
        self._write(file_version="brain.Event:2")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=first_step + 1, session_log=start)  # this step and later ones are purged

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds numbers by name."""
        entries = [self._summary.Value(tag=name, simple_value=v) for name, v in values.items()]
        self._write(step=step, summary=self._summary(value=entries))

    def picture(self, step: int, name: str, png: bytes, height: int, width: int) -> None:
        """Adds an RGB picture, encoded as PNG."""
        image = self._summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=png
        )
        entry = self._summary.Value(tag=name, image=image)
        self._write(step=step, summary=self._summary(value=[entry]))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, **fields: Any) -> None:
        data = self._event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        checksums = [struct.pack("<I", self._checksum(part)) for part in (length, data)]
        _append_whole(self._file, length + checksums[0] + data + checksums[1])


class WandbRun:
    """A run of Weights & Biases; started again in the same folder, it is the same run there."""

    def __init__(self, module: Any, folder: Path, config: Mapping[str, Any]):
        """Starts or continues the run.

        Args:
            module: the `wandb` package.
            folder: of the run; its name is the run's name, and it keeps the run's identity.
            config: the run's settings.
        """
        identity = folder / "wandb_run_id.txt"
        if not identity.is_file():
            _replace_file(identity, uuid.uuid4().hex[:12].encode())
        self._module = module
        self._run = module.init(
            project=os.environ.get("WANDB_PROJECT", "mim-jax"),
            name=folder.resolve().name,
            id=identity.read_text().strip(),
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )
        # Its own step counter drops whatever comes late or again after a resume; an axis does not.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds numbers by name."""
        self._run.log({"step": step, **values})

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Adds a picture, uint8 `[height, width, 3]`."""
        self._run.log({"step": step, name: self._module.Image(image)})

    def finish(self, *error: Any) -> None:
        """Ends the run, as failed if an exception is on its way."""
        self._run.finish(exit_code=1 if any(error) else 0)


def _import_wandb() -> types.ModuleType:
    try:
        import wandb
    except ImportError as error:
        raise ModuleNotFoundError(
            'Weights & Biases is asked for but not installed: pip install "mim-jax[wandb]"'
        ) from error
    return wandb


def _progress_bar(console: Console, first_step: int, total_steps: int) -> tuple[Progress, TaskID]:
    bar = Progress(
        TextColumn("{task.completed}/{task.total}"),
        BarColumn(bar_width=None),
        TextColumn("[dim]loss[/] {task.fields[loss]}"),
        TextColumn("{task.fields[rate]} [dim]images/s[/]"),
        TextColumn("[dim]data wait[/] {task.fields[wait]}"),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("[dim]ETA[/] {task.fields[eta]}"),
        console=console,
        expand=True,
        refresh_per_second=4,
    )
    blank: dict[str, Any] = dict.fromkeys(("loss", "rate", "wait", "eta"), UNKNOWN)
    task = bar.add_task("", total=total_steps, completed=first_step, **blank)
    return bar, task


def _whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines of `metrics.jsonl` as they are, and what they say; without a half-written last one."""
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            record = {name: float(value) for name, value in json.loads(line).items()}
            record["step"] = int(record["step"])
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            if number == len(lines):
                return
            raise ValueError(
                f"line {number} of {path} is damaged; remove the line, or move the file away."
            ) from error
        if line.endswith(b"\n"):
            yield line, record


def _opened_to_append(path: Path) -> io.FileIO:
    with _clear_write_errors(path):
        return open(path, "ab", buffering=0)


def _append_whole(file: io.FileIO, data: bytes) -> None:
    """In one call of the operating system, so that a kill leaves all of it or nothing."""
    with _clear_write_errors(Path(os.fsdecode(file.name))):
        written = file.write(data)
        if written != len(data):
            raise OSError(f"only {written} of {len(data)} bytes fit")


def _replace_file(path: Path, data: bytes) -> None:
    """Writes a file at once: a reader sees the old one or the whole new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with _clear_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextlib.contextmanager
def _clear_write_errors(path: Path) -> Iterator[None]:
    """A run that cannot log is of no use: it stops, and says how to go on."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        message = (
            f"cannot write {path}: {reason}. Free space on this disk or choose another folder, "
            "then start the same command again; it continues from the last checkpoint."
        )
        if error.errno is None:
            raise OSError(message) from error
        raise OSError(error.errno, message) from error


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format="PNG")
    return buffer.getvalue()
