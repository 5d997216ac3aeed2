"""A run that loses processes goes on with others: other numbers, devices, strategies, workers."""

import os
import re
import signal
import time

import numpy as np
import pytest
from PIL import Image

from mim_jax.training.checkpoints import checkpoint_steps, read_variables
from mim_jax.training.interruption import EXIT_INTERRUPTED
from mim_jax.training.loop import TrainingStopped
from mim_jax.training.processes import EXIT_FAILED
from mim_jax.training.tree import flatten
from tests.training.rounds import Rounds, Topology
from tests.training.runs import TINY, losses_of, run

STEPS = 60
SETTINGS = {**TINY, "steps": STEPS, "checkpoint.every_steps": 5}

SECONDS_TO_NOTICE = 110
"""Within it a process notices that another is gone: at once if its connection broke, else when
JAX misses the heartbeats of the other, and ends it."""


def wait_for_steps(folder, number, processes):
    """Waits until so many more steps are logged; returns the newest."""
    path = folder / "metrics.jsonl"
    logged = lambda: max(losses_of(folder), default=0) if path.exists() else 0  # noqa: E731
    before = logged()
    while logged() < before + number:
        assert all(process.is_alive() for process in processes), "ended too early"
        time.sleep(0.01)
    return logged()


def test_run_goes_on_whoever_is_killed_and_whatever_comes_after(tmp_path):
    folder, rounds = tmp_path / "run", Rounds(tmp_path, SETTINGS)

    processes = rounds.start(folder, Topology(processes=2, devices=2, strategy="fsdp"))
    wait_for_steps(folder, 12, processes)
    processes[1].kill()
    killed = time.monotonic()
    assert rounds.ended(processes)[1] == -signal.SIGKILL
    assert time.monotonic() - killed < SECONDS_TO_NOTICE
    told = {
        EXIT_FAILED: "Another process of this run has probably ended",
        -signal.SIGABRT: "the JAX distributed service detected fatal errors",
    }
    assert told[processes[0].exitcode] in log_of(tmp_path, 0)
    saved = checkpoint_steps(folder)[-1]
    assert saved >= 5

    processes = rounds.start(folder, Topology(devices=4), **{"data.workers": 1})
    wait_for_steps(folder, 3, processes)
    os.kill(processes[0].pid, signal.SIGTERM)
    assert rounds.ended(processes) == [EXIT_INTERRUPTED]
    log = log_of(tmp_path, 0)
    assert f"resumed from step {saved} of" in log
    (stopped,) = map(int, re.findall(r"at step (\d+): everything is saved", log))
    assert stopped == checkpoint_steps(folder)[-1]

    processes = rounds.start(folder, Topology(processes=2), **{"data.workers": 2})
    wait_for_steps(folder, 3, processes)
    for process in processes:
        os.kill(process.pid, signal.SIGTERM)
    assert rounds.ended(processes) == [EXIT_INTERRUPTED] * 2

    rounds.finish(folder, Topology(devices=2, strategy="fsdp"))
    run(tmp_path / "whole", **{"steps": STEPS, "checkpoint.every_steps": 1000})
    ours, expected = losses_of(folder), losses_of(tmp_path / "whole")
    assert list(ours) == list(expected) == list(range(1, STEPS + 1))
    for step, loss in expected.items():
        assert ours[step] == pytest.approx(loss, rel=1e-4), step


def test_files_that_vanish_or_lose_their_end_while_a_run_reads_them_are_replaced_and_told(
    tmp_path, caplog
):
    images = tmp_path / "images"
    images.mkdir()
    for number, image in enumerate(np.random.default_rng(0).integers(0, 256, (64, 28, 28))):
        Image.fromarray(image.astype(np.uint8)).save(images / f"{number:02}.png")
    files = sorted(images.iterdir())

    def harm(step):
        if step == 2:
            files[0].unlink()
            files[1].write_bytes(files[1].read_bytes()[:100])

    changes = {"data.source": f"folder:{images}", "data.split": "train", "batch_size": 8}
    changes |= {"steps": 32, "data.max_unreadable": 0.5, "checkpoint.every_steps": 100}
    run(tmp_path / "run", on_step=harm, **changes)
    assert f"{files[0]}: No such file" in caplog.text
    assert f"{files[1]}: image file is truncated" in caplog.text
    assert max(losses_of(tmp_path / "run")) == 32
    with pytest.raises(TrainingStopped, match=r"could not be read.*max_unreadable"):
        run(tmp_path / "strict", **{**changes, "data.max_unreadable": 0.0})


def test_a_clock_that_jumps_costs_a_checkpoint_at_most(tmp_path, monkeypatch):
    """Orbax measures its time limits by the clock: a save may seem to last for years."""
    run(tmp_path / "whole")
    clock, jump = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: clock() + jump[0])

    def set_clock(step):
        jump[0] = {2: -1e6, 4: 1e8}.get(step, jump[0])

    run(tmp_path / "jumping", on_step=set_clock)
    assert losses_of(tmp_path / "jumping") == losses_of(tmp_path / "whole")
    expected = flatten(read_variables(tmp_path / "whole", 6)[0])
    for path, value in flatten(read_variables(tmp_path / "jumping", 6)[0]).items():
        np.testing.assert_array_equal(value, expected[path], path)


def log_of(folder, process):
    return (folder / f"process_{process}.log").read_text()
