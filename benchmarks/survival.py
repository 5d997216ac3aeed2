"""What checkpoints cost a run, and how long a run takes to start and to resume.

    python -m benchmarks.survival                             # about four minutes on two cores

**Overhead.** One run saves a checkpoint every 2 x N steps (N = `--every`). The N steps that begin
with a save, with all that its threads do behind them, are compared with the N steps that follow.
Both kinds take turns in one run, so that what else the machine does slows both alike. The median of
the differences is what a checkpoint costs.

**Start.** Seconds from the start of the processes to the first line of the log that tells a step,
of a new run and of one that resumes, in one process and in two.
"""

import argparse
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure
from mim_jax import config as configs
from mim_jax.training.loop import train

MODEL = {
    "model.width": 128,
    "model.depth": 6,
    "model.heads": 4,
    "model.decoder_width": 64,
    "evaluate.protocols": (),
    "export.formats": (),
    "log.pictures_every_steps": 0,
    "log.tensorboard": False,
    "schedule.warmup_epochs": 0.0,
}

SECONDS_TO_START = 300


def overhead(folder: Path, windows: int, every: int, batch_size: int) -> dict[str, Any]:
    """Seconds of windows of steps that begin with a checkpoint, and of those that do not."""
    ends: list[float] = []
    changes = {
        **MODEL,
        "batch_size": batch_size,
        "steps": every * (2 * windows + 3),
        "log.every_steps": every,
        "checkpoint.every_steps": 2 * every,
        "checkpoint.keep": 2,
    }
    result = train(
        configs.load("mae:tiny", changes),
        folder,
        on_step=lambda _: ends.append(time.perf_counter()),
    )
    # on_step of a step comes before its save, so a window runs from one multiple to the next.
    marks = ends[every - 1 :: every]
    seconds = [after - before for before, after in itertools.pairwise(marks)]
    plain, saving = seconds[2::2], seconds[1::2]  # the first two are for warming up
    pairs = list(zip(saving[1:], plain))
    extra = [a - b for a, b in pairs]
    size = sum(
        file.stat().st_size
        for file in (folder / "checkpoints" / str(result.state.step)).rglob("*")
        if file.is_file()
    )
    return {
        "every": every,
        "checkpoint_mb": round(size / 1e6, 1),
        "step_seconds_without": measure.summary([s / every for s in plain]),
        "step_seconds_with": measure.summary([s / every for s in saving]),
        "with_over_without": measure.summary([a / b for a, b in pairs]),
        "seconds_of_a_checkpoint": measure.summary(extra),
    }


def seconds_to_step(run: Path, processes: int, steps: int) -> float:
    """Starts a run and returns when its first step is logged; the run goes on to its end."""
    settings = {
        **MODEL,
        "steps": steps,
        "log.every_steps": 1,
        "batch_size": 32,
        "data.split": "train[:160]",
    }
    command = [sys.executable, "-m", "mim_jax", "train", "--config=mae:tiny", f"--workdir={run}"]
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        command += [f"--coordinator=localhost:{port}", f"--num_processes={processes}"]
    before = _steps_logged(run)
    started = time.perf_counter()
    group = []
    for number in range(processes):
        own = [f"--process_id={number}"] if processes > 1 else []
        with open(run.with_name(f"{run.name}_{number}.log"), "ab") as log:
            group.append(
                subprocess.Popen(
                    [*command, *own],
                    env={**os.environ, "JAX_PLATFORMS": "cpu"},
                    stdout=log,
                    stderr=log,
                )
            )
    while _steps_logged(run) <= before:
        if time.perf_counter() - started > SECONDS_TO_START:
            raise TimeoutError(f"no step within {SECONDS_TO_START} s; see {run}_*.log")
        time.sleep(0.02)
    seconds = time.perf_counter() - started
    if any(process.wait() for process in group):
        raise RuntimeError(f"a process failed; see {run}_*.log")
    return seconds


def _steps_logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def main(arguments: Sequence[str]) -> None:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=10, help="of each kind")
    parser.add_argument("--every", type=int, default=25, help="steps of a window")
    parser.add_argument("--batch-size", type=int, default=384)
    parser.add_argument("--starts", type=int, default=1, help="of each kind")
    parser.add_argument("--output", type=Path, default=measure.RESULTS / "survival.json")
    options = parser.parse_args(arguments)
    report = measure.Report("survival", arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        starts: dict[str, list[float]] = {}
        for turn in range(options.starts):
            for processes in (1, 2):
                run = folder / f"run_{turn}_{processes}"
                words = "1 process" if processes == 1 else f"{processes} processes"
                new = seconds_to_step(run, processes, 10)
                starts.setdefault(f"new run, {words}", []).append(new)
                resumed = seconds_to_step(run, processes, 20)
                starts.setdefault(f"resumed run, {words}", []).append(resumed)
        cost = overhead(folder / "overhead", options.windows, options.every, options.batch_size)
    figures = {
        "overhead": cost,
        "seconds_to_first_step": {name: measure.summary(s) for name, s in starts.items()},
    }
    report.write(options.output, figures)
    for name, seconds in starts.items():
        print(f"{name}: {statistics.median(seconds):.1f} s to the first step")
    seconds, step = cost["seconds_of_a_checkpoint"], cost["step_seconds_without"]["median"]
    print(
        f"a checkpoint of {cost['checkpoint_mb']} MB costs {seconds['median']:.2f} s (median of "
        f"{seconds['count']} pairs): every 100 steps of {step:.2f} s, "
        f"{seconds['median'] / step:.1f} %"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
