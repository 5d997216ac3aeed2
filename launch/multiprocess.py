#!/usr/bin/env python3
"""Trains in several processes on this machine, which find each other over `jax.distributed`.

    python launch/multiprocess.py --processes 4 --config mae:vit_b16 --workdir runs/mine
    python launch/multiprocess.py --processes 2 --devices-per-process 4 --config mae:tiny

Expects the Python it is started with to have mim_jax; `python3 launch/start.py python
launch/multiprocess.py ...` sees to that. Flags that are not listed here go to `mim-jax train`.

GPUs (those in CUDA_VISIBLE_DEVICES, or all) are split evenly among the processes, in order. With
--devices-per-process, or on a machine without GPUs, every process has so many simulated CPU
devices: for trying out a mesh before it costs anything.

Process 0 prints here, the others into LOGS/process_1.log and so on. SIGTERM and Ctrl-C are passed
on, and all processes save after the same step. If one fails, the others are ended.

Exit code: 0; 75 if the run was asked to stop and saved itself (start it again to go on); else that
of the process that failed first, or 128 + N if signal N ended it.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

EXIT_INTERRUPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT)

SECONDS_TO_FOLLOW = 10
"""How long the others may take to end by themselves, and say why, once a process has failed."""

LINES_SHOWN = 15
"""Of the log of a process that failed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Starts the processes and returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, required=True, metavar="N")
    parser.add_argument("--devices-per-process", type=int, metavar="D")
    parser.add_argument("--logs", type=Path, default=Path("runs/logs"), metavar="FOLDER")
    own, train_flags = parser.parse_known_args(arguments)
    if own.processes < 1:
        parser.error(f"--processes is {own.processes}; it must be at least 1")
    try:
        environments = process_environments(own.processes, own.devices_per_process)
    except ValueError as error:
        parser.error(str(error))
    group = ProcessGroup(own.logs)
    for number in SIGNALS:
        signal.signal(number, group.forward)
    group.start(train_flags, environments)
    return group.wait()


def process_environments(count: int, simulated_devices: int | None) -> list[dict[str, str]]:
    """The environment of each process, with its share of the devices.

    Raises:
        ValueError: if the GPUs cannot be split evenly.
    """
    # In an interactive batch job JAX would take the devices from the job's variables.
    base = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_"))}
    gpus = [] if simulated_devices else visible_gpus()
    if not gpus:
        flags = f"--xla_force_host_platform_device_count={simulated_devices or 1}"
        flags = f"{base.get('XLA_FLAGS', '')} {flags}".strip()
        return [{**base, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}] * count
    if len(gpus) % count:
        raise ValueError(
            f"{len(gpus)} GPUs cannot be split evenly among {count} processes; choose another "
            "--processes, or set CUDA_VISIBLE_DEVICES"
        )
    share = len(gpus) // count
    return [
        {**base, "CUDA_VISIBLE_DEVICES": ",".join(gpus[i * share : (i + 1) * share])}
        for i in range(count)
    ]


def visible_gpus() -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES; empty on a machine without GPUs, or if JAX may use none."""
    if os.environ.get("JAX_PLATFORMS", "cuda") not in ("cuda", "gpu"):
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    try:
        listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    except FileNotFoundError:
        return []
    gpus = [line for line in listing.stdout.splitlines() if line.startswith("GPU ")]
    return [str(i) for i in range(len(gpus))]


class ProcessGroup:
    """The processes of one run.

    Attributes:
        processes: those started, by their number.
        stopping: whether a signal was passed on.
    """

    def __init__(self, logs: Path) -> None:
        """Starts nothing yet; `logs` is where all but process 0 print."""
        self.logs = logs
        self.processes: list[subprocess.Popen[bytes]] = []
        self.stopping = False

    def start(self, train_flags: Sequence[str], environments: Sequence[dict[str, str]]) -> None:
        """Starts one process for each environment."""
        self.logs.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "mim_jax", "train", *train_flags]
        command += [
            f"--coordinator=localhost:{free_port()}",
            f"--num-processes={len(environments)}",
        ]
        for i, environment in enumerate(environments):
            if self.stopping:
                break
            with contextlib.ExitStack() as files:
                log = files.enter_context(open(self._log(i), "w")) if i else None
                # Ctrl-C in a terminal is to reach this process only, which passes it on once.
                process = subprocess.Popen(
                    [*command, f"--process-id={i}"],
                    env=environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self.processes.append(process)

    def _log(self, i: int) -> Path:
        return self.logs / f"process_{i}.log"

    def forward(self, number: int, frame: FrameType | None) -> None:
        """Passes a signal on; a second one ends all at once."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL if self.stopping else number)
        self.stopping = True

    def wait(self) -> int:
        """Waits for all processes and returns the exit code; ends all if one fails."""
        while self._running():
            for i, process in enumerate(self.processes):
                if process.poll() not in (None, 0, EXIT_INTERRUPTED):
                    self._end_others()
                    self._explain(i)
                    return exit_code(process.returncode)
            time.sleep(0.1)
        codes = {process.returncode for process in self.processes}
        failed = codes - {0, EXIT_INTERRUPTED}
        return exit_code(failed.pop() if failed else max(codes))

    def _running(self) -> list[subprocess.Popen[bytes]]:
        return [process for process in self.processes if process.poll() is None]

    def _end_others(self) -> None:
        deadline = time.monotonic() + SECONDS_TO_FOLLOW
        while self._running() and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in self._running():
            process.kill()
            process.wait()

    def _explain(self, i: int) -> None:
        code = self.processes[i].returncode
        how = f"ended with exit code {code}" if code > 0 else f"was ended by signal {-code}"
        print(f"error: process {i} {how}; the others were ended too.", file=sys.stderr)
        if i:
            lines = self._log(i).read_text(errors="replace").splitlines()[-LINES_SHOWN:]
            print(f"The end of {self._log(i)}:", *lines, sep="\n  ", file=sys.stderr)


def exit_code(returncode: int) -> int:
    """What a shell would give: 128 + N for a process that signal N ended."""
    return returncode if returncode >= 0 else 128 - returncode


def free_port() -> int:
    """A port that no one listens on just now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
