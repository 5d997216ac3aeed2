"""Runs in processes of their own, started quickly, to be disturbed by tests."""

import atexit
import dataclasses
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from mim_jax.training.interruption import EXIT_INTERRUPTED

SECONDS_TO_END = 120
"""Within it all processes must be gone after a fault, or they are taken to hang."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Where a round runs."""

    processes: int = 1
    devices: int = 1
    strategy: str = "replicated"

    @property
    def fields(self) -> dict[str, object]:
        """What it sets in the config."""
        total = self.processes * self.devices
        sharded = self.strategy != "replicated"
        return {
            "sharding.strategy": self.strategy,
            "mesh.data": 1 if sharded else total,
            "mesh.fsdp": total if sharded else 1,
        }


def free_port() -> int:
    """A port that no one listens on just now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def command(arguments: Sequence[str], settings: Mapping[str, str], log: Path) -> None:
    """What a process of a round does: `mim-jax` with arguments, JAX settings and a file to log in.

    It is forked from a server that has imported what it needs, but has not started JAX: imports
    are most of the time of a short life.
    """
    import jax

    from mim_jax import cli

    with open(log, "ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ["XLA_FLAGS"] = settings["xla_flags"]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", settings["cache"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    code = cli.main(arguments)
    atexit._run_exitfuncs()  # as at the end of any process but those of multiprocessing
    sys.stdout.flush()
    os._exit(code)


class Rounds:
    """Starts a run again and again."""

    def __init__(self, folder: Path, settings: Mapping[str, object]) -> None:
        """Prepares rounds.

        Args:
            folder: for logs of the processes and compiled programs.
            settings: config fields of the run, but for those of the topology.
        """
        self.folder, self.settings = folder, settings
        self.server = multiprocessing.get_context("forkserver")
        self.server.set_forkserver_preload(["mim_jax.cli", "mim_jax.training.loop", __name__])

    def start(self, run: Path, topology: Topology, **changes: object) -> list[BaseProcess]:
        """Starts the processes of a round; `changes` are more config fields."""
        settings = {**self.settings, **topology.fields, **changes}
        arguments = ["train", "--config=mae:tiny", f"--workdir={run}"]
        arguments += [f"--config.{name}={value}" for name, value in settings.items()]
        if topology.processes > 1:
            arguments += [f"--coordinator=localhost:{free_port()}"]
            arguments += [f"--num_processes={topology.processes}"]
        of_jax = {
            "cache": str(self.folder / "cache"),
            "xla_flags": f"--xla_force_host_platform_device_count={topology.devices}",
        }
        processes = []
        for number in range(topology.processes):
            own = [f"--process_id={number}"] if topology.processes > 1 else []
            log = self.folder / f"process_{number}.log"
            process = self.server.Process(target=command, args=([*arguments, *own], of_jax, log))
            process.start()
            processes.append(process)
        return processes

    def finish(self, run: Path, topology: Topology) -> None:
        """Runs to the end, undisturbed."""
        for process in self.start(run, topology):
            process.join(1800)
            if process.exitcode != 0:
                raise AssertionError(
                    f"ended with {process.exitcode}; see {self.folder}/process_*.log"
                )

    def ended(self, processes: Sequence[BaseProcess], patience: float | None = None) -> list[int]:
        """Waits until all are gone, and returns their codes.

        Args:
            processes: of a round.
            patience: seconds after which those that are left when others were killed are killed
                as well, as a launcher does it; by default they have to end by themselves.
        """
        if patience is not None:
            for process in processes:
                process.join(patience)
            if any(process.exitcode not in (0, None, EXIT_INTERRUPTED) for process in processes):
                for process in processes:
                    process.kill()
        deadline = time.monotonic() + SECONDS_TO_END
        for process in processes:
            process.join(max(0.1, deadline - time.monotonic()))
        hung = [process for process in processes if process.is_alive()]
        for process in hung:
            process.kill()
        if hung:
            raise AssertionError(f"a process still ran {SECONDS_TO_END} s after the fault")
        return [process.exitcode for process in processes]
