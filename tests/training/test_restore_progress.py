"""A slow restore prints how far it is; a quick one prints nothing."""

import re
import time

import pytest

from mim_jax.training import restore_progress
from mim_jax.training.checkpoints import Checkpoints
from mim_jax.training.restore_progress import bytes_read, telling_progress
from tests.training.runs import run


class Stop(Exception):
    pass


def stop(step):
    if step == 5:
        raise Stop


def test_slow_restore_of_a_run_tells_time_and_bytes(tmp_path, monkeypatch):
    with pytest.raises(Stop):
        run(tmp_path, on_step=stop)
    restore = Checkpoints.restore

    def slowly(self, *arguments):
        state = restore(self, *arguments)
        time.sleep(1)
        return state

    monkeypatch.setattr(restore_progress, "SECONDS_BETWEEN", 0.3)
    monkeypatch.setattr(restore_progress, "GIGABYTE", 1.0)
    monkeypatch.setattr(Checkpoints, "restore", slowly)
    _, output = run(tmp_path)
    told = re.findall(
        r"restoring the checkpoint of step 3: \d+ s, (\d+)\.000 GB read of the (\d+)\.000 GB",
        output,
    )
    assert len(told) >= 2
    read, size = map(int, told[-1])
    # Of the whole: the model, the optimizer's state, and what describes them.
    assert size > 10_000 and read > size / 4
    assert output.index("restoring the checkpoint") < output.index("resumed from step 3 of 6")


def test_bytes_grow_with_what_is_read(tmp_path):
    if bytes_read() is None:
        pytest.skip("this system does not say how much a process has read")
    (tmp_path / "part").write_bytes(bytes(1_000_000))
    before = bytes_read()
    (tmp_path / "part").read_bytes()
    assert 1_000_000 <= bytes_read() - before < 1_100_000
    assert restore_progress.size_of(tmp_path) == 1_000_000
    assert restore_progress.size_of(tmp_path / "absent") == 0


def test_quick_restore_says_nothing_and_an_error_passes(tmp_path):
    said = []
    start = time.monotonic()
    with (
        pytest.raises(ValueError, match="another model"),
        telling_progress(said.append, 3, tmp_path),
    ):
        raise ValueError("another model")
    assert not said and time.monotonic() - start < 5


def test_time_alone_is_told_where_bytes_are_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(restore_progress, "SECONDS_BETWEEN", 0.1)
    monkeypatch.setattr(restore_progress, "bytes_read", lambda: None)
    said = []
    with telling_progress(said.append, 3, tmp_path):
        time.sleep(0.5)
    assert said and all(re.fullmatch(r"restoring the checkpoint of step 3: \d s", x) for x in said)
