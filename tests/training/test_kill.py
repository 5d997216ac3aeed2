"""A run that is killed again and again at random moments ends as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np

from mim_jax.training.checkpoints import read_variables
from mim_jax.training.tree import flatten
from tests.training.runs import TINY, losses_of

KILLS = 10
STEPS = 400


def command(folder, cache):
    changes = {**TINY, "steps": STEPS, "log.every_steps": 10, "checkpoint.every_steps": 5}
    code = (
        "import sys, jax\n"
        f"jax.config.update('jax_compilation_cache_dir', {str(cache)!r})\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "from mim_jax import config\n"
        "from mim_jax.training.loop import train\n"
        f"train(config.load('mae:tiny', {changes!r}), {str(folder)!r})\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return dict(args=[sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL)


def steps_logged(folder):
    return max(losses_of(folder), default=0) if (folder / "metrics.jsonl").exists() else 0


def wait_for_progress(process, folder, more_than):
    """Waits until the run has logged a step above `more_than`, or has ended."""
    while process.poll() is None and steps_logged(folder) <= more_than:
        time.sleep(0.02)


def test_ten_kills_leave_no_trace(tmp_path):
    whole, killed, cache = (tmp_path / name for name in ("whole", "killed", "cache"))
    subprocess.run(**command(whole, cache), check=True, timeout=300)
    chance = random.Random(0)
    for _ in range(KILLS):
        process = subprocess.Popen(**command(killed, cache))
        # Half of the kills fall into start-up or restore, half somewhere in the steps.
        if chance.random() < 0.3:
            time.sleep(chance.uniform(0.5, 4))
        else:
            wait_for_progress(process, killed, steps_logged(killed))
            time.sleep(chance.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert steps_logged(killed) < STEPS, "the run finished before the kills were over"
    subprocess.run(**command(killed, cache), check=True, timeout=300)
    assert losses_of(killed) == losses_of(whole)
    expected = flatten(read_variables(whole)[0])
    for path, value in flatten(read_variables(killed)[0]).items():
        np.testing.assert_array_equal(value, expected[path], path)
