"""launch/slurm.sbatch on a real SLURM: two tasks start, are pre-empted, come back and finish.

apt-get install -y slurm-wlm munge                       # Debian and Ubuntu, as root
MIM_JAX_SLURM=1 python -m pytest -s tests/cluster        # some minutes
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.slurm import slurm, why_not
from tests.launch.scripts import LAUNCH
from tests.training.runs import TINY, losses_of

STEPS = 300
CHANGES = {**TINY, "steps": STEPS, "checkpoint.every_steps": 50}
SECONDS = 600
"""That a job may take; the time is that of two compilations."""

pytestmark = pytest.mark.skipif(
    os.environ.get("MIM_JAX_SLURM") != "1",
    reason="starts a real SLURM, as root, for minutes: set MIM_JAX_SLURM=1",
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment of SLURM's commands, with the package of this checkout."""
    if reason := why_not():
        pytest.fail(reason)
    with slurm() as environment:
        for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):
            environment.pop(name, None)
        yield {
            **environment,
            "MIM_JAX_VENV": sys.prefix,
            "PYTHONPATH": str(LAUNCH.parent),
            "JAX_PLATFORMS": "cpu",
            "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
        }


class Job:
    """A job of launch/slurm.sbatch with two tasks on one node without GPUs."""

    def __init__(self, cluster, folder: Path, *flags: str) -> None:
        self.cluster, self.folder = cluster, folder
        self.log = folder / "job.log"
        folder.mkdir()
        self.number = self.ask(
            "sbatch",
            "--parsable",
            "--nodes=1",
            "--ntasks-per-node=2",
            "--cpus-per-task=1",
            "--gpus-per-node=0",
            f"--chdir={folder}",
            f"--output={self.log}",
            str(LAUNCH / "slurm.sbatch"),
            *flags,
        ).strip()

    def ask(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.cluster, capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout

    def fields(self) -> dict[str, str]:
        shown = self.ask("scontrol", "show", "job", self.number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, condition) -> dict[str, str]:
        """The job's fields, once a condition on them holds."""
        deadline = time.monotonic() + SECONDS
        while not condition(fields := self.fields()):
            assert time.monotonic() < deadline, f"{fields}\n{self.output()}"
            assert fields["JobState"] not in ("FAILED", "CANCELLED", "NODE_FAIL"), self.output()
            time.sleep(0.5)
        return fields

    def finished(self) -> dict[str, str]:
        return self.wait(lambda fields: fields["JobState"] == "COMPLETED")


def train(cluster, folder):
    flags = [f"--config.{name}={value}" for name, value in CHANGES.items()]
    return Job(cluster, folder, "--config=mae:tiny", f"--workdir={folder / 'run'}", *flags)


def last_step(run):
    return max(losses_of(run), default=0) if (run / "metrics.jsonl").exists() else 0


def test_job_that_is_preempted_comes_back_and_ends_as_if_nothing_had_happened(cluster, tmp_path):
    whole = train(cluster, tmp_path / "whole")
    whole.finished()
    assert "2 processes on 1 host, 2 devices" in whole.output()

    job = train(cluster, tmp_path / "preempted")
    run = job.folder / "run"
    job.wait(lambda fields: last_step(run) > 60)
    assert job.fields()["Restarts"] == "0"
    job.ask("scontrol", "requeue", job.number)
    fields = job.finished()
    print(job.output())
    assert fields["Restarts"] == "1" and fields["ExitCode"] == "0:0"
    first, again = job.output().split("2 processes on 1 host, 2 devices")[1:]
    saved_at = max(
        int(line.split("at step ")[1].split(":")[0])
        for line in first.splitlines()
        if "everything is saved" in line
    )
    assert 60 < saved_at < STEPS
    assert f"resumed from step {saved_at} of {STEPS}" in again
    assert losses_of(run) == losses_of(whole.folder / "run")
    assert list(losses_of(run)) == list(range(1, STEPS + 1))


def test_shell_of_a_job_is_told_to_use_srun_and_may_train_alone(cluster, tmp_path):
    def in_shell(*flags):
        command = [str(Path(sys.prefix, "bin", "mim-jax")), "train", "--config=mae:tiny", *flags]
        return subprocess.run(
            ["salloc", "--quiet", "--ntasks=2", *command],
            env=cluster,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )

    told = in_shell("--distributed")
    assert told.returncode == 1
    assert "in a shell of SLURM job" in told.stderr and "Start them with srun" in told.stderr
    fields = {**TINY, "steps": 2, "schedule.warmup_epochs": 0.0}.items()
    alone = in_shell("--workdir=alone", *(f"--config.{name}={value}" for name, value in fields))
    assert alone.returncode == 0, alone.stdout + alone.stderr
    assert list(losses_of(tmp_path / "alone")) == [1, 2]
