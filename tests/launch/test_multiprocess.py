"""launch/multiprocess.py: a real run of two processes; signals, crashes, devices by stand-ins."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.launch.scripts import load, multiprocess, program
from tests.training.runs import TINY, losses_of, run

CHANGES = {"steps": 60, "checkpoint.every_steps": 1000}

STAND_IN = """
import os, signal, sys, time
behaviour, process = sys.argv[2], int(sys.argv[-1].removeprefix("--process-id="))

def saved(number, frame):
    print("saved", flush=True)
    sys.exit(75)

for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN if behaviour == "deaf" else saved)
print("process", process, *sys.argv[3:5], flush=True)
print("devices", os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("XLA_FLAGS"), flush=True)
open(f"ready_{process}", "w").close()
if behaviour == "one fails" and process == 1:
    sys.exit("no such folder")
if behaviour == "one is killed" and process == 1:
    os.kill(os.getpid(), signal.SIGKILL)
while behaviour != "ends":
    time.sleep(0.05)
"""


@pytest.fixture
def stand_in(tmp_path):
    """A package `mim_jax` in the working directory, so that it is the one that is started."""
    (tmp_path / "mim_jax").mkdir()
    (tmp_path / "mim_jax" / "__init__.py").touch()
    (tmp_path / "mim_jax" / "__main__.py").write_text(STAND_IN)
    return tmp_path


def output_of(process):
    output, _ = process.communicate(timeout=120)
    return output


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, "ended too early"
        time.sleep(0.02)


def log_of(folder, process=1):
    path = folder / "runs" / "logs" / f"process_{process}.log"
    return path.read_text() if path.exists() else ""


def checkpoints(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def test_two_processes_stopped_by_a_signal_to_one_have_the_loss_curve_of_one(tmp_path):
    launcher, two, one = load("multiprocess"), tmp_path / "two", tmp_path / "one"
    fields = {**TINY, **CHANGES}.items()
    flags = ["--config=mae:tiny", *(f"--config.{name}={value}" for name, value in fields)]
    flags.append(f"--workdir={two}")
    group = launcher.ProcessGroup(tmp_path / "logs")
    group.start(flags, launcher.process_environments(2, 1))
    metrics = two / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 2, group.processes[0])
    group.processes[1].send_signal(signal.SIGTERM)
    assert group.wait() == 75, "both have saved themselves"
    stopped_at = max(losses_of(two))
    assert checkpoints(two) == [stopped_at] and stopped_at < 60

    process = multiprocess("--processes=2", "--devices-per-process=1", *flags, cwd=tmp_path)
    output = output_of(process)
    assert process.returncode == 0, output
    assert f"resumed from step {stopped_at}" in output and "step 60/60" in output
    assert "2 processes on 1 host, 2 devices" in output
    assert "step" not in log_of(tmp_path), "only process 0 prints"
    assert "devices" not in log_of(tmp_path) and "checkpoint" not in log_of(tmp_path)

    run(one, **CHANGES)
    expected, ours = losses_of(one), losses_of(two)
    assert list(ours) == list(expected) == list(range(1, 61))
    for step, loss in expected.items():
        assert ours[step] == pytest.approx(loss, rel=2e-5), step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_passed_on_and_the_exit_code_says_saved(stand_in, number):
    process = multiprocess("--processes=3", "runs", cwd=stand_in)
    wait_for(lambda: len(list(stand_in.glob("ready_*"))) == 3, process)
    process.send_signal(number)
    output = output_of(process)
    assert process.returncode == 75, output
    assert all("saved" in text for text in (output, log_of(stand_in), log_of(stand_in, 2)))


def test_second_signal_ends_processes_that_do_not_listen(stand_in):
    process = multiprocess("--processes=2", "deaf", cwd=stand_in)
    wait_for(lambda: len(list(stand_in.glob("ready_*"))) == 2, process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output_of(process)
    assert process.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    "behaviour, code, message",
    [
        ("one fails", 1, "process 1 ended with exit code 1"),
        ("one is killed", 128 + signal.SIGKILL, "process 1 was ended by signal 9"),
    ],
)
def test_crash_of_one_ends_all_and_shows_its_log(
    stand_in, monkeypatch, capfd, behaviour, code, message
):
    launcher = load("multiprocess")
    monkeypatch.setattr(launcher, "SECONDS_TO_FOLLOW", 0.2)
    monkeypatch.chdir(stand_in)
    group = launcher.ProcessGroup(Path("logs"))
    group.start([behaviour], [dict(os.environ)] * 3)
    assert group.wait() == code
    assert all(process.poll() is not None for process in group.processes)
    error = capfd.readouterr().err
    assert f"error: {message}; the others were ended too." in error
    assert "The end of logs/process_1.log:\n  process 1" in error
    assert ("no such folder" in error) == (behaviour == "one fails")


def test_processes_get_one_coordinator_and_simulated_devices(stand_in):
    process = multiprocess(
        "--processes=2", "--devices-per-process=4", "ends", cwd=stand_in, XLA_FLAGS="--xla_foo"
    )
    output = output_of(process)
    assert process.returncode == 0
    assert "process 0 --coordinator=localhost:" in output and "--num-processes=2" in output
    devices = "devices None --xla_foo --xla_force_host_platform_device_count=4"
    assert devices in output and devices in log_of(stand_in)
    coordinator = output.split("process 0 ")[1].split()[0]
    assert f"process 1 {coordinator} --num-processes=2" in log_of(stand_in)


def test_gpus_are_split_in_order(stand_in, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    output = output_of(
        multiprocess("--processes=2", "ends", cwd=stand_in, CUDA_VISIBLE_DEVICES="4,5,6,7")
    )
    assert "devices 4,5 " in output and "devices 6,7 " in log_of(stand_in)


def test_all_gpus_of_the_machine_are_found(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    launcher = load("multiprocess")
    program(tmp_path, "nvidia-smi", "#!/bin/sh\necho 'GPU 0: A'; echo 'GPU 1: A'; echo 'GPU 2: A'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    shares = launcher.process_environments(3, None)
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["0", "1", "2"]
    with pytest.raises(ValueError, match="3 GPUs cannot be split evenly among 2 processes"):
        launcher.process_environments(2, None)
    monkeypatch.setenv("PATH", "")
    assert launcher.visible_gpus() == []
    assert launcher.process_environments(1, None)[0]["JAX_PLATFORMS"] == "cpu"
