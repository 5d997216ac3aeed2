"""What the benchmarks share: timing in alternation, facts about the machine, one JSON file each.

A ratio between two things is worth something only if both were timed in the same run, in turns:
what else the machine does then slows both alike, and medians pass over what hits only one.
"""

import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags

from mim_jax import config as configs
from mim_jax.training.versions import versions

RESULTS = Path(__file__).resolve().parent / "results"

SETTINGS = ("XLA_FLAGS", "JAX_PLATFORMS", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_NUM_THREADS")
"""Environment variables that change speed; a report has those that are set."""


def config_with(name: str, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """The config of a name, changed by arguments such as `--config.batch_size=64`.

    Raises:
        ValueError: for an unknown config or field, a value of another type, or an argument that
            is no field of the config.
    """
    config = configs.load(name)
    for argument in overrides:
        if not argument.startswith("--config."):
            raise ValueError(f"unexpected argument {argument!r}; see --help.")
        configs.check_field(config, argument.removeprefix("--config.").partition("=")[0])
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["", *overrides])
    values(["", *overrides])
    # absl checks numbers, but takes any word for a tuple.
    checked = configs.load(name)
    configs.override(checked, configs.leaves(values.config))
    return checked


def alternate(
    runs: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of every call: each function once a round, in turns, after `warmup` rounds.

    A function must return only when its work is done.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(warmup + rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles, extremes and number of measured values."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return {
        "median": median,
        "quartiles": [low, high],
        "range": [min(values), max(values)],
        "count": len(values),
    }


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory, load, and the devices JAX sees."""
    device = jax.devices()[0]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "environment": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        # Well above 0 before the run: the machine had other work, too.
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    """The processor's name as the system tells it."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


class Report:
    """The JSON file of one benchmark: what was run, on what, and the figures."""

    def __init__(self, script: str, arguments: Sequence[str] | None = None) -> None:
        """Notes the command, the date and the state of the machine before the work begins.

        Args:
            script: name of the module below `benchmarks`.
            arguments: of the command line; those of this process by default.
        """
        words = sys.argv[1:] if arguments is None else arguments
        self.about = {
            "command": " ".join(["python", "-m", f"benchmarks.{script}", *words]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": versions(),
        }

    def write(self, path: Path, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the file, prints it, and returns its content."""
        content = {**self.about, **figures}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
        print(json.dumps(content, indent=2))
        return content
