"""A process that reads data is killed while a run goes on."""

import multiprocessing
import os
import signal

import pytest

from mim_jax.training import loop
from tests.training.runs import losses_of, run

WORKERS = {"data.workers": 1, "steps": 60, "checkpoint.every_steps": 60, "log.every_steps": 10}


def test_a_killed_reader_is_replaced_and_no_batch_is_lost(tmp_path):
    killed = []

    def on_step(step):
        if step == 5 and not killed:
            killed.extend(child.pid for child in multiprocessing.active_children())
            for worker in killed:
                os.kill(worker, signal.SIGKILL)

    _, output = run(tmp_path / "killed", on_step=on_step, **WORKERS)
    assert killed
    assert "a process that reads data died" in output and "exit code -9" in output
    run(tmp_path / "whole", **{**WORKERS, "data.workers": 0})
    assert losses_of(tmp_path / "killed") == losses_of(tmp_path / "whole")


def test_readers_that_die_again_and_again_stop_the_run_with_what_to_do(tmp_path, monkeypatch):
    def dead(*_, **__):
        raise RuntimeError("Worker process was terminated unexpectedly with exit code -9.")
        yield

    monkeypatch.setattr(loop, "training_batches", dead)
    with pytest.raises(
        loop.TrainingStopped, match=r"4 times in a row at the batch of step 1.*fewer"
    ):
        run(tmp_path, steps=3)
