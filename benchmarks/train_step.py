"""How fast is the train step of a config, and how much memory does it need?

    python -m benchmarks.train_step --config mae:vit_b16 --config.batch_size=64 --steps 50

The step is the one that `mim-jax train` compiles: forward, backward, optimizer, guard against
non-finite values, all devices of the config's mesh. Its batch is random and stays on the devices,
so that only the step is timed. No weights are loaded, but those of a teacher tell its sizes, if its
path is set. Runs on CPU, GPU and TPU.
"""

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import measure
from mim_jax.training import sharding
from mim_jax.training.derived import complete_without_data
from mim_jax.training.experiment import Experiment
from mim_jax.training.flops import peak_flops_of
from mim_jax.training.state import TrainState

READINGS = 10
"""How often the clock is read; between two readings the host never waits for the devices."""


def synthetic_batch(experiment: Experiment, seed: int = 0) -> dict[str, jax.Array]:
    """Random images, and zeros for whatever else the method needs, laid out over the mesh."""
    rows = sharding.batch_sharding(experiment.mesh)
    random = np.random.default_rng(seed)
    batch = {name: np.asarray(array) for name, array in experiment.batch_shapes().items()}
    image = batch["image"]
    batch["image"] = random.integers(0, np.iinfo(image.dtype).max + 1, image.shape, image.dtype)
    return {name: jax.device_put(array, rows) for name, array in batch.items()}


def measure_step(experiment: Experiment, steps: int) -> dict[str, Any]:
    """Compiles and times the step of an experiment.

    Args:
        experiment: what is trained, and on which devices.
        steps: timed steps, at least 1; two more warm up.
    """
    config, shapes = experiment.config, experiment.batch_shapes()
    batch = synthetic_batch(experiment)
    state = experiment.initial_state(shapes)
    started = time.perf_counter()
    step = experiment.compiled_step(shapes)
    compile_seconds = time.perf_counter() - started
    state, _ = _run(step, state, batch, 2)
    readings = min(READINGS, steps)
    seconds = []
    for reading in range(readings):
        count = steps * (reading + 1) // readings - steps * reading // readings
        state, elapsed = _run(step, state, batch, count)
        seconds.append(elapsed / count)
    timing = measure.summary(seconds)
    devices = list(experiment.mesh.devices.flat)
    flops = experiment.flops_per_step(shapes)
    peak = peak_flops_of(devices[0], config.compute_dtype) * len(devices)
    return {
        "compute_dtype": config.compute_dtype,
        "batch_size": config.batch_size,
        "mesh": dict(experiment.mesh.shape),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "compile_seconds": compile_seconds,
        "steps": steps,
        "step_seconds": timing,
        "images_per_second": config.batch_size / timing["median"],
        "gflop_per_image": flops / config.batch_size / 1e9,
        "peak_tflops": peak / 1e12,
        "model_flops_utilization": flops / timing["median"] / peak,
        "memory_mib": {**_compiled_memory(step), **_peak_memory(devices)},
    }


def _run(
    step: jax.stages.Compiled, state: TrainState, batch: dict[str, jax.Array], count: int
) -> tuple[TrainState, float]:
    """The state after some steps, and the seconds they took."""
    started = time.perf_counter()
    for _ in range(count):
        state, _ = step(state, batch)
    jax.block_until_ready(state)
    return state, time.perf_counter() - started


def _compiled_memory(step: jax.stages.Compiled) -> dict[str, float]:
    """What the compiler plans for one device: state and batch, and temporary arrays beside them."""
    plan = step.memory_analysis()
    if plan is None:
        return {}
    return {
        "planned_state_and_batch": plan.argument_size_in_bytes / 2**20,
        "planned_temporary": plan.temp_size_in_bytes / 2**20,
    }


def _peak_memory(devices: Sequence[jax.Device]) -> dict[str, float]:
    """The most that was used: on accelerators of any one device, on CPU of the whole process."""
    stats = [device.memory_stats() or {} for device in devices]
    if all("peak_bytes_in_use" in entry for entry in stats):
        return {"peak_of_a_device": max(s["peak_bytes_in_use"] for s in stats) / 2**20}
    # macOS counts in bytes, Linux in KiB.
    unit = 1 if sys.platform == "darwin" else 2**10
    return {
        "peak_of_the_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures one config and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="Name, such as mae:vit_b16.")
    parser.add_argument("--steps", type=int, default=30, help="Timed steps.")
    parser.add_argument("--output", type=Path, help="By default results/train_step_CONFIG.json.")
    options, overrides = parser.parse_known_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}; it must be at least 1")
    config = complete_without_data(measure.config_with(options.config, overrides))
    report = measure.Report("train_step", arguments)
    figures = measure_step(Experiment.without_data(config), options.steps)
    name = Path(options.config).name.replace(".py", "").replace(":", "_")
    path = options.output or measure.RESULTS / f"train_step_{name}.json"
    return report.write(path, {"config": options.config, **figures})


if __name__ == "__main__":
    main()
