"""Two real processes over `jax.distributed` train as one."""

import os
import socket
import subprocess
import sys

import pytest

from tests.training.runs import TINY, losses_of


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(folder, *flags):
    fields = [
        f"--config.{name}={value}" for name, value in TINY.items() if name != "log.every_steps"
    ]
    command = [sys.executable, "-m", "mim_jax", "train", "--config", "mae:tiny", *fields]
    command += ["--config.log.every_steps=1", f"--workdir={folder}", *flags]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finished(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def test_two_processes_give_the_losses_of_one(tmp_path):
    finished(start(tmp_path / "one"))
    flags = (f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2")
    pair = [start(tmp_path / "two", *flags, f"--process_id={i}") for i in range(2)]
    outputs = [finished(process) for process in pair]
    expected, ours = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert set(ours) == set(expected)
    for step, loss in expected.items():
        assert ours[step] == pytest.approx(loss, rel=2e-5), step
    assert "step 6/6" in outputs[0] and "step" not in outputs[1], "only process 0 prints"
