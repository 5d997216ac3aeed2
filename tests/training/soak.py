"""A run that is disturbed again and again, beside one that is not.

    python -m tests.training.soak --faults 200 --steps 3000            # always one process
    python -m tests.training.soak --faults 200 --steps 3000 --change   # other processes and devices

Each round starts the run where it stopped, lets one fault happen at a random moment, and sees that
all processes end. Faults: SIGKILL of one process, SIGTERM to one, SIGKILL while a checkpoint is
written, and a newest checkpoint of which a byte is changed, an end cut off or a file deleted. With
--change each round has another number of processes and devices, and another sharding. All of it
follows from --seed but for the moments, which depend on the machine.

It ends with the losses of all steps and the parameters beside those of a run on the last topology
that nothing disturbed. They must be the same bits if the topology never changed, else the same to
float32 round-off.
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

from mim_jax import config as configs
from mim_jax.training.checkpoints import FOLDER, checkpoint_steps, read_variables
from mim_jax.training.interruption import EXIT_INTERRUPTED
from mim_jax.training.processes import EXIT_FAILED
from mim_jax.training.tree import flatten
from tests.training.rounds import Rounds, Topology
from tests.training.runs import TINY, losses_of

FAULTS = ("kill", "terminate", "kill while saving", "flip", "cut", "delete")
DAMAGES = ("flip", "cut", "delete")

LAUNCHERS_PATIENCE = 5.0
"""Seconds after which the processes that one has left alone are ended; JAX itself takes 100."""

AFTER_SIGTERM = {0, EXIT_INTERRUPTED, -signal.SIGTERM, EXIT_FAILED, -signal.SIGKILL}
"""Before the first step, or after the last, SIGTERM ends a process as usual; the others fail, or
are ended."""

LOSS_TOLERANCE = 1e-3
"""Relative, of losses where the topology changed."""


TOPOLOGIES = (
    Topology(),
    Topology(devices=2),
    Topology(devices=4, strategy="fsdp"),
    Topology(processes=2),
    Topology(processes=2, devices=2, strategy="fsdp"),
)


class Soak:
    """One disturbed run.

    Attributes:
        counts: how often each fault really happened.
    """

    def __init__(self, folder: Path, steps: int, seed: int, change: bool) -> None:
        settings = {
            "steps": steps,
            "log.every_steps": 1,
            "checkpoint.every_steps": 5,
            "checkpoint.keep": 3,
            "log.watchdog_seconds": 60.0,  # what hangs shows itself in process_*.log
        }
        self.folder, self.steps = folder, steps
        self.rounds = Rounds(folder, {**TINY, **settings})
        self.chance = random.Random(seed)
        self.change = change
        self.counts: collections.Counter[str] = collections.Counter()
        self.run = folder / "disturbed"

    def round(self, topology: Topology) -> None:
        """Starts the run, and lets one fault happen."""
        fault = self.chance.choice(FAULTS)
        processes = self.rounds.start(self.run, topology)
        self._wait_for_moment(processes, fault == "kill while saving")
        if not any(process.is_alive() for process in processes):
            codes = [process.exitcode for process in processes]
            if any(codes):
                raise AssertionError(f"ended with {codes} without a fault; see process_*.log")
            return
        victim = self.chance.choice(processes)
        os.kill(victim.pid, signal.SIGTERM if fault == "terminate" else signal.SIGKILL)
        codes = self.rounds.ended(processes, LAUNCHERS_PATIENCE)
        if fault == "terminate" and not set(codes) <= AFTER_SIGTERM:
            raise AssertionError(f"ended with {codes} after SIGTERM")
        if fault in DAMAGES and not self._damage(fault):
            fault = "kill"
        self.counts[fault] += 1

    def _wait_for_moment(self, processes: Sequence[BaseProcess], saving: bool) -> None:
        """Sleeps until a random moment of start-up or of the steps, or the middle of a save."""
        logged, deadline = self._steps_logged(), time.monotonic() + 300
        if not saving and self.chance.random() < 0.2:
            time.sleep(self.chance.uniform(0.5, 6))
            return

        def reached() -> bool:
            if saving:
                return any((self.run / FOLDER).glob("*tmp*"))
            return self._steps_logged() > logged

        while not reached() and time.monotonic() < deadline:
            if not any(process.is_alive() for process in processes):
                return
            time.sleep(0.005)
        if not saving:
            time.sleep(self.chance.uniform(0, 0.5))

    def _steps_logged(self) -> int:
        return max(losses_of(self.run), default=0) if self._has_metrics() else 0

    def _has_metrics(self) -> bool:
        return (self.run / "metrics.jsonl").is_file()

    def _damage(self, kind: str) -> bool:
        """Damages a file of the newest checkpoint that has checksums, if an older one is left."""
        steps = checkpoint_steps(self.run)
        if len(steps) < 2:
            return False
        folder = self.run / FOLDER / str(steps[-1])
        sealed: dict[str, list[int]] = {}
        for path in folder.glob("checksums.*.json"):
            sealed |= json.loads(path.read_text())
        names = sorted(name for name, (size, _) in sealed.items() if size)
        if not names:
            return False
        path = folder / self.chance.choice(names)
        content = bytearray(path.read_bytes())
        if kind == "delete":
            path.unlink()
        elif kind == "cut":
            path.write_bytes(content[: len(content) // 2])
        else:
            content[self.chance.randrange(len(content))] ^= 1 << self.chance.randrange(8)
            path.write_bytes(content)
        return True

    def soak(self, faults: int) -> Topology:
        """Lets all faults happen and finishes; returns the last topology."""
        topology = TOPOLOGIES[0]
        while self.counts.total() < faults:
            if self.change:
                topology = self.chance.choice(TOPOLOGIES)
            self.round(topology)
            print(f"{self.counts.total()} faults, step {self._steps_logged()}", flush=True)
            if self._steps_logged() >= self.steps:
                raise AssertionError(f"the run ended after {self.counts.total()} faults; set steps")
        self.rounds.finish(self.run, topology)
        return topology

    def compare(self, topology: Topology) -> None:
        """Runs undisturbed on a topology, and compares losses and parameters.

        Raises:
            AssertionError: if they differ by more than they may.
        """
        whole = self.folder / "whole"
        self.rounds.finish(whole, topology)
        losses, expected_losses = losses_of(self.run), losses_of(whole)
        assert losses.keys() == expected_losses.keys()
        expected = flatten(read_variables(whole)[0])
        found = flatten(read_variables(self.run)[0])
        if not self.change:
            assert losses == expected_losses
            for path, value in found.items():
                np.testing.assert_array_equal(value, expected[path], path)
            return
        of_loss = max(abs(losses[s] / expected_losses[s] - 1) for s in losses)
        of_parameters = max(
            float(np.abs(value - expected[path]).max() / np.abs(expected[path]).max())
            for path, value in found.items()
        )
        print(f"largest relative difference: losses {of_loss:.1e}, parameters {of_parameters:.1e}")
        assert of_loss < LOSS_TOLERANCE


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the soak and prints what happened."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--change", action="store_true")
    parser.add_argument("--folder", type=Path, help="to be made; by default a temporary one")
    options = parser.parse_args(arguments)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="soak"))
    folder.mkdir(parents=True, exist_ok=True)
    configs.load("mae:tiny", TINY)  # a mistake there is said at once
    started = time.monotonic()
    soak = Soak(folder, options.steps, options.seed, options.change)
    topology = soak.soak(options.faults)
    soak.compare(topology)
    print(f"{dict(soak.counts)} in {time.monotonic() - started:.0f} s; the end is the same")
    if options.folder is None:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
