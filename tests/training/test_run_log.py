import io
import json
import math
import os
import struct
import subprocess
import sys
import textwrap
import types

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mim_jax.training import run_log
from mim_jax.training.run_log import Pace, RunLog, read_metrics

PICTURE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def file_console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def printed(console: Console) -> str:
    return console.file.getvalue()


@pytest.fixture
def terminal(monkeypatch) -> Console:
    monkeypatch.setenv("TERM", "xterm")
    return Console(file=io.StringIO(), force_terminal=True, width=120)


def open_log(folder, **options) -> RunLog:
    return RunLog(folder, **{"total_steps": 1000, "console": file_console(), **options})


def events(folder) -> list:
    """TensorBoard events of all files, read as TensorFlow's record format describes them."""
    from tensorboardX.proto import event_pb2

    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_metrics_are_lines_with_step_time_and_every_value(tmp_path):
    with open_log(tmp_path / "new" / "run") as log:
        log.metrics(10, {"loss": np.float32(0.5), "accuracy": 1})
        log.metrics(20, {"loss": 0.25})
        lines = (tmp_path / "new" / "run" / "metrics.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert first.pop("time") <= second.pop("time")
    assert first == {"step": 10, "loss": 0.5, "accuracy": 1.0}
    assert second == {"step": 20, "loss": 0.25}


def test_non_finite_values_are_valid_json_and_come_back_as_floats(tmp_path):
    with open_log(tmp_path) as log:
        log.metrics(1, {"a": float("nan"), "b": float("inf"), "c": -float("inf")})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["a"]) and record["b"] == math.inf and record["c"] == -math.inf


def test_resuming_drops_later_lines_and_keeps_earlier_ones_as_they_were(tmp_path):
    with open_log(tmp_path) as log:
        for step in (10, 20, 30):
            log.metrics(step, {"loss": step})
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    with open_log(tmp_path, first_step=20) as log:
        log.metrics(30, {"loss": -1})
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:2] == before[:2]
    assert [(record["step"], record["loss"]) for record in read_metrics(tmp_path)] == [
        (10, 10),
        (20, 20),
        (30, -1),
    ]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("cut", [1, 2, 12])
def test_a_half_written_last_line_is_tolerated_and_dropped_on_resuming(tmp_path, cut):
    with open_log(tmp_path) as log:
        log.metrics(10, {"loss": 1})
        log.metrics(20, {"loss": 2})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert [record["step"] for record in read_metrics(tmp_path)] == [10]
    with open_log(tmp_path, first_step=20) as log:
        log.metrics(30, {"loss": 3})
    assert [record["step"] for record in read_metrics(tmp_path)] == [10, 30]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*metrics\.jsonl is damaged"):
        read_metrics(tmp_path)
    with pytest.raises(ValueError, match="line 2"):
        open_log(tmp_path)


def test_reading_a_folder_without_metrics_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder of a run"):
        read_metrics(tmp_path)


def test_a_killed_process_leaves_every_line_and_event(tmp_path):
    script = f"""
        import os, signal, pathlib
        from mim_jax.training.run_log import RunLog
        log = RunLog(pathlib.Path({str(tmp_path)!r}), total_steps=9)
        log.metrics(7, {{"loss": 0.5}})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert [record["step"] for record in read_metrics(tmp_path)] == [7]
    assert events(tmp_path)[-1].step == 7


@pytest.mark.parametrize("name", ["step", "time"])
def test_a_metric_cannot_take_the_name_of_a_fixed_field(tmp_path, name):
    with open_log(tmp_path) as log, pytest.raises(ValueError, match=f"cannot be called '{name}'"):
        log.metrics(1, {name: 1.0})


def test_other_processes_write_and_print_nothing(tmp_path):
    console = file_console()
    folder = tmp_path / "run"
    with open_log(folder, is_main=False, console=console, wandb=True) as log:
        log.metrics(1, {"loss": 1})
        log.progress(1, loss=1, images_per_second=1, data_wait=0)
        assert log.picture(1, "a", PICTURE) is None
        log.note("note")
        log.warn("warning")
        log.close()
    assert not folder.exists()
    assert printed(console) == ""


def test_without_a_terminal_every_metrics_call_prints_one_plain_line(tmp_path):
    console = file_console()
    with open_log(tmp_path, console=console) as log:
        values = {"loss": 0.73123, "images_per_second": 812.0, "data_wait": 0.004}
        log.metrics(120, {**values, "learning_rate": 1.5e-4, "with [brackets]": 12345.6})
        log.progress(121, loss=0.7, images_per_second=800, data_wait=0)
    (line,) = printed(console).splitlines()
    assert line.startswith("step  120/1000  loss 0.7312  ")
    fields = line.split("  ")
    assert {"images/s 812", "data wait 0.4 %", "learning_rate 1.500e-04"} <= set(fields)
    assert "with [brackets] 12346" in fields
    assert fields[-1].startswith("ETA 0:00:0")


def test_plain_lines_are_aligned(tmp_path):
    console = file_console()
    with open_log(tmp_path, console=console) as log:
        for step, loss in ((1, 10.0), (100, 0.0012345), (1000, 2.5)):
            log.metrics(step, {"first": 1.2345e-5, "loss": loss, "last": 1.0})
    lines = printed(console).splitlines()
    assert len({line.index("loss") for line in lines}) == 1
    assert len({line.index("last") for line in lines[1:]}) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.73123, "0.7312"),
        (0.7, "0.7000"),
        (12.345, "12.35"),
        (999.96, "1000"),
        (0.0, "0"),
        (812.0, "812"),
        (12345.6, "12346"),
        (1.5e-4, "1.500e-04"),
        (-0.25, "-0.2500"),
        (3e12, "3.000e+12"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_numbers_are_shown_with_four_significant_digits(value, text):
    assert run_log.shown_number(value) == text


def test_a_terminal_shows_the_bar_and_no_metrics_lines(tmp_path, terminal):
    with open_log(tmp_path, console=terminal) as log:
        log.progress(120, loss=0.73123, images_per_second=812, data_wait=0.004)
        log.metrics(120, {"grad_norm": 3.0})
    text = "".join(part.partition("m")[2] or part for part in printed(terminal).split("\x1b["))
    for field in ("120/1000", "loss 0.7312", "812 images/s", "data wait 0.4 %", "ETA 0:00:0"):
        assert field in text
    assert "━" in text and "0:00:00" in text
    assert "grad_norm" not in text


def test_notes_and_warnings_are_whole_lines_beside_the_bar(tmp_path, terminal):
    with open_log(tmp_path, console=terminal) as log:
        log.note("saved [a] checkpoint")
        log.warn("three images were skipped")
    lines = printed(terminal).splitlines()
    assert any(line.endswith("saved [a] checkpoint") for line in lines)
    assert any("warning: three images were skipped" in line for line in lines)


def test_notes_are_never_wrapped_in_a_file(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=False, width=20)
    with open_log(tmp_path, console=console) as log:
        log.note("word " * 50)
        log.warn("word " * 50)
    assert len(printed(console).splitlines()) == 2


def test_tensorboard_has_scalars_and_pictures(tmp_path):
    with open_log(tmp_path) as log:
        log.metrics(10, {"loss": 0.5, "grad/norm": 2.0})
        log.picture(10, "reconstruction", PICTURE)
    *_, scalars, picture = events(tmp_path)
    assert scalars.step == picture.step == 10
    assert {value.tag: value.simple_value for value in scalars.summary.value} == {
        "loss": 0.5,
        "grad/norm": 2.0,
    }
    (value,) = picture.summary.value
    assert (value.tag, value.image.height, value.image.width) == ("reconstruction", 20, 30)
    stored = Image.open(io.BytesIO(value.image.encoded_image_string))
    np.testing.assert_array_equal(np.asarray(stored), PICTURE)


def test_tensorboard_purges_the_steps_that_are_taken_again(tmp_path):
    from tensorboardX.proto.event_pb2 import SessionLog

    for first_step in (0, 20):
        with open_log(tmp_path, first_step=first_step) as log:
            log.metrics(30, {"loss": 1})
    starts = [event for event in events(tmp_path) if event.HasField("session_log")]
    assert [event.session_log.status for event in starts] == [SessionLog.START] * 2
    assert [event.step for event in starts] == [1, 21]  # TensorBoard drops these and later ones


def test_tensorboard_records_are_framed_as_tensorboardx_frames_them(tmp_path):
    from tensorboardX import RecordWriter

    with open_log(tmp_path) as log:
        log.metrics(10, {"loss": 0.5})
    expected = RecordWriter(str(tmp_path / "expected"))
    for event in events(tmp_path):
        expected.write(event.SerializeToString())
    expected.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert path.read_bytes() == (tmp_path / "expected").read_bytes()


def test_tensorboard_can_be_left_out(tmp_path):
    with open_log(tmp_path, tensorboard=False) as log:
        log.metrics(10, {"loss": 0.5})
        log.picture(10, "a", PICTURE)
    assert not (tmp_path / "tensorboard").exists()


def test_pictures_are_png_files_named_by_step(tmp_path):
    with open_log(tmp_path) as log:
        path = log.picture(120, "reconstruction", PICTURE)
        other = log.picture(120, "../a b", PICTURE[:, ::-1])
    assert path == tmp_path / "pictures" / "reconstruction_00000120.png"
    assert other == tmp_path / "pictures" / ".._a_b_00000120.png"
    np.testing.assert_array_equal(np.asarray(Image.open(path)), PICTURE)
    np.testing.assert_array_equal(np.asarray(Image.open(other)), PICTURE[:, ::-1])


@pytest.mark.parametrize("image", [PICTURE[..., :1], PICTURE[..., 0], PICTURE / 255])
def test_a_picture_of_another_type_or_shape_is_an_error(tmp_path, image):
    with open_log(tmp_path) as log, pytest.raises(ValueError, match=r"expected uint8"):
        log.picture(1, "a", image)


def test_weights_and_biases_missing_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "mim-jax\[wandb\]"'):
        open_log(tmp_path / "run", wandb=True)
    assert not (tmp_path / "run").exists()


class FakeWandb(types.ModuleType):
    """Notes what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.exit_codes = [], [], []

    def init(self, **options):
        self.started.append(options)
        return self

    def define_metric(self, name, step_metric=None):
        pass

    def log(self, values):
        self.logged.append(values)

    def Image(self, image):
        return ("image", image.shape)

    def finish(self, exit_code):
        self.exit_codes.append(exit_code)


def test_weights_and_biases_gets_metrics_pictures_and_config(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with open_log(tmp_path, wandb=True, config={"seed": 1}) as log:
        log.metrics(10, {"loss": 0.5})
        log.picture(10, "a", PICTURE)
    assert fake.started[0]["config"] == {"seed": 1}
    assert fake.logged == [{"step": 10, "loss": 0.5}, {"step": 10, "a": ("image", PICTURE.shape)}]
    assert fake.exit_codes == [0]


def test_weights_and_biases_continues_the_same_run_and_learns_of_failure(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(RuntimeError), open_log(tmp_path, wandb=True):
        raise RuntimeError
    open_log(tmp_path, wandb=True, first_step=10).close()
    first, second = fake.started
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert fake.exit_codes == [1, 0]


def test_a_full_disk_is_one_clear_error_that_names_the_file(tmp_path):
    resource = pytest.importorskip("resource")
    log = open_log(tmp_path, tensorboard=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*metrics\.jsonl: .*start the same"):
            for step in range(10):
                log.metrics(step, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1]


def test_a_folder_that_is_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*run: .*choose another folder"):
        open_log(tmp_path / "run")


def test_closing_twice_does_nothing(tmp_path, terminal):
    log = open_log(tmp_path, console=terminal)
    log.close()
    size = len(printed(terminal))
    log.close()
    assert len(printed(terminal)) == size


def test_no_file_is_left_open_when_opening_fails(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    before = set(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
    with pytest.raises(OSError, match="tensorboard"):
        open_log(tmp_path)
    if before is not None:
        assert set(os.listdir("/proc/self/fd")) == before


def test_the_estimate_of_time_left_forgets_compilation_and_follows_the_pace():
    now = 0.0
    pace = Pace(100, 1100, clock=lambda: now)
    assert pace.seconds_left(100) is None
    now = 60.0  # the first step compiles
    pace.mark(101)
    assert pace.seconds_left(101) == 60 * 999
    for step in range(102, 301):
        now += 2
        pace.mark(step)
    assert pace.seconds_left(300) == pytest.approx(2 * 800)
    for step in range(301, 601):
        now += 10
        pace.mark(step)
    assert pace.seconds_left(600) == pytest.approx(10 * 500)


def test_times_are_hours_minutes_and_seconds():
    assert [run_log.shown_time(seconds) for seconds in (None, 0, 59.6, 3723, 360000)] == [
        "-",
        "0:00:00",
        "0:01:00",
        "1:02:03",
        "100:00:00",
    ]
