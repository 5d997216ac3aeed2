"""The program of one device: the train step of a config, compiled for a mesh that is not there.

It is compiled for simulated CPU devices, without any array. Of the axis `data` two are enough:
with the same rows per device, every device runs the same program however many there are. What a
device gathers over `data` is scaled to the true size.
"""

import dataclasses
import difflib
import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections

from mim_jax.plan.hlo import Work, read_work
from mim_jax.training import sharding
from mim_jax.training.derived import OPEN, SIZE_FIELDS, complete_without_data, open_fields
from mim_jax.training.experiment import Experiment
from mim_jax.training.flops import count_flops
from mim_jax.training.inspection import parameter_kinds
from mim_jax.training.sharding import bytes_per_device
from mim_jax.training.state import TrainState
from mim_jax.training.tree import flatten

TPU_TOPOLOGIES = {"v5e": 2, "v5p": 3, "v6e": 2}
"""Axes of the torus of TPUs that libtpu compiles for. It sees two devices in a chip of v4."""

_TOLD_OTHERWISE = ("model.", "optimizer.", "evaluate.", "data.split")
_NEEDED = {
    *(field for field in OPEN if not field.startswith(_TOLD_OTHERWISE)),
    *SIZE_FIELDS,
    "model.patch_size",
}
"""Open fields without which there is no step; of others methods themselves say so."""

_TEXT_AFTER = "spmd-partitioning"


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that one device holds.

    Attributes:
        trained: parameters with a gradient.
        frozen: parameters without.
        ema: parameters that follow others.
        optimizer: state of the optimizer.
        other: mutable collections and counters.
        batch: its rows of the batch.
        gradients: of the trained parameters; part of the temporaries.
        temporaries: everything that lives during a step only.
        compiler: for what device the temporaries were planned.
    """

    trained: int
    frozen: int
    ema: int
    optimizer: int
    other: int
    batch: int
    gradients: int
    temporaries: int
    compiler: str

    @property
    def state(self) -> int:
        """Everything that lives from step to step."""
        return self.trained + self.frozen + self.ema + self.optimizer + self.other

    @property
    def total(self) -> int:
        """At the peak of a step."""
        return self.state + self.batch + self.temporaries


@dataclasses.dataclass(frozen=True)
class Program:
    """What one device of the whole mesh holds and does.

    Attributes:
        config: the whole job, as it was compiled but for the size of `data`.
        mesh: devices along each axis of the whole job.
        memory: of one device.
        work: of one device in a step.
        model_flops: of the whole job in a step, without what is computed twice.
        repeated: operations with rematerialization over those without, at least 1.
        grown: bytes of the largest array that grows with `data`, beyond what was compiled.
        parameters: how many the model has.
    """

    config: ml_collections.ConfigDict
    mesh: Mapping[str, int]
    memory: Memory
    work: Work
    model_flops: float
    repeated: float
    grown: int
    parameters: int


def mesh_sizes(text: str, default: Mapping[str, int]) -> dict[str, int]:
    """Devices along each axis.

    Args:
        text: such as `data=64,fsdp=8`.
        default: of axes that the text leaves out, `config.mesh`; -1 stands for one device.

    Raises:
        ValueError: for an unknown axis, with the nearest known one, or a bad number.
    """
    sizes = {axis: max(int(size), 1) for axis, size in default.items()}
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in sizes:
            near = difflib.get_close_matches(axis, sizes, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"--mesh has no axis {axis!r}; known are {', '.join(sizes)}.{hint}")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"--mesh {part!r} needs a whole number above 0, such as {axis}=8.")
        sizes[axis] = int(size)
    return sizes


def simulated(mesh: Mapping[str, int]) -> dict[str, int]:
    """The smallest mesh whose devices run the same program."""
    return {axis: min(size, 2) if axis == "data" else size for axis, size in mesh.items()}


def planned_config(
    config: ml_collections.ConfigDict, mesh: Mapping[str, int], *, scan: bool = True
) -> ml_collections.ConfigDict:
    """A copy of a config as it would run on the whole mesh of accelerators.

    Raises:
        ValueError: if it leaves fields open, or its batch does not fit the mesh.
    """
    config = complete_without_data(config)
    missing = [field for field in open_fields(config) if field in _NEEDED]
    if missing:
        raise ValueError(
            f"the config leaves open what only the data or devices tell: set {', '.join(missing)}."
        )
    config.mesh.update(dict(mesh))
    sharding.check_batch_size(
        config.batch_size,
        config.accumulate,
        jax.sharding.AbstractMesh(tuple(mesh.values()), tuple(mesh)),
    )
    if config.compute_dtype == "auto":
        config.compute_dtype = "bfloat16"
    model = config.model
    if scan and model.get("scan") is False:
        model.scan = True
    if model.get("attention") == "cudnn":
        model.attention = "xla"
    return config


def compile_program(
    config: ml_collections.ConfigDict, mesh: Mapping[str, int], *, tpu: str | None = None
) -> Program:
    """Compiles the step and reads what it holds and does.

    Args:
        config: see `planned_config`.
        mesh: devices along each axis.
        tpu: compile for a TPU of this name as well, which tells the temporaries exactly.

    Raises:
        ValueError: for anything in the config that does not fit together, or too few devices.
        ImportError: if libtpu is needed and not installed.
    """
    small = simulated(mesh)
    count = math.prod(small.values())
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"a plan for this mesh needs {count} simulated devices, but there are {len(devices)}; "
            f"set XLA_FLAGS=--xla_force_host_platform_device_count={count} before JAX starts."
        )
    reduced = _with_mesh(config, mesh, small)
    experiment = Experiment.without_data(reduced, devices[:count])
    shapes = experiment.batch_shapes()
    compiled, text = compile_with_text(experiment.lowered_step(shapes))
    temporaries, compiler = _temporaries(compiled), "CPU"
    if tpu is not None:
        temporaries, compiler = _tpu_temporaries(config, mesh, tpu), f"TPU {tpu}"
    flops = experiment.flops_per_step(shapes)
    state = experiment.abstract_state(shapes)
    executed = count_flops(experiment.train_step(), state, experiment.global_batch(shapes))
    work, grown = _at_scale(read_work(text, small), mesh["data"] // small["data"])
    return Program(
        config=config,
        mesh=dict(mesh),
        memory=memory_of(experiment, state, temporaries + grown, compiler),
        work=work,
        model_flops=flops * config.batch_size / reduced.batch_size,
        repeated=executed / flops,
        grown=grown,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    )


def _with_mesh(
    config: ml_collections.ConfigDict, mesh: Mapping[str, int], small: Mapping[str, int]
) -> ml_collections.ConfigDict:
    """The config on a mesh with fewer devices along `data`, and the same rows on each."""
    reduced = config.copy_and_resolve_references()
    reduced.mesh.update(dict(small))
    reduced.batch_size = config.batch_size // mesh["data"] * small["data"]
    return reduced


def _at_scale(work: Work, times: int) -> tuple[Work, int]:
    """The work where `data` has so many times the devices, and the bytes that an array grows by."""
    scaled = tuple(
        dataclasses.replace(item, bytes=item.bytes * times)
        if item.kind == "all-gather" and "data" in item.axes
        else item
        for item in work.collectives
    )
    growth = (new.bytes - old.bytes for new, old in zip(scaled, work.collectives))
    return dataclasses.replace(work, collectives=scaled), max(growth, default=0)


def compile_with_text(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """A compiled program, and its text after partitioning.

    XLA writes that text to a folder, but not if the program comes from JAX's cache. So nothing
    that is compiled here, without optimization of its machine code, gets into the cache.
    """
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        with tempfile.TemporaryDirectory() as folder:
            options: dict[str, Any] = {
                "xla_backend_optimization_level": 0,
                "xla_dump_to": folder,
                "xla_dump_hlo_pass_re": f"^{_TEXT_AFTER}$",
            }
            compiled = lowered.compile(options)
            (path,) = Path(folder).glob(f"*.after_{_TEXT_AFTER}.*.txt")
            return compiled, path.read_text()
    finally:
        jax.config.update(name, before)


def _temporaries(compiled: jax.stages.Compiled) -> int:
    """Bytes beside the inputs: program, temporary arrays, and outputs in no input's place."""
    plan = compiled.memory_analysis()
    assert plan is not None
    return (
        plan.generated_code_size_in_bytes
        + plan.temp_size_in_bytes
        + plan.output_size_in_bytes
        - plan.alias_size_in_bytes
    )


def memory_of(
    experiment: Experiment, state: TrainState, temporaries: int = 0, compiler: str = ""
) -> Memory:
    """What a device holds of a state (or of its shapes) and of a batch, beside temporaries."""
    kinds = parameter_kinds(experiment, state)
    held = {"trained": 0, "frozen": 0, "EMA": 0}
    for path, leaf in flatten(state.params).items():
        held[kinds[path]] += bytes_per_device(leaf, leaf.sharding)
    rows = sharding.batch_sharding(experiment.mesh)
    batch = experiment.global_batch(experiment.batch_shapes())
    others = (state.mutable, state.step, state.skipped, state.skipped_in_row)
    return Memory(
        trained=held["trained"],
        frozen=held["frozen"],
        ema=held["EMA"],
        optimizer=_held(state.opt_state),
        other=_held(others),
        batch=sum(bytes_per_device(leaf, rows) for leaf in batch.values()),
        gradients=held["trained"],
        temporaries=temporaries,
        compiler=compiler,
    )


def _held(tree: Any) -> int:
    return sum(bytes_per_device(leaf, leaf.sharding) for leaf in jax.tree.leaves(tree))


def topology_of(tpu: str, count: int) -> str:
    """The most cubic topology of TPUs with so many chips, such as `v5e:2x4`.

    Raises:
        ValueError: if libtpu has none.
    """
    axes = TPU_TOPOLOGIES.get(tpu)
    if axes is None:
        known = ", ".join(TPU_TOPOLOGIES)
        raise ValueError(f"no step is compiled for {tpu!r} itself; that works for {known}.")
    exponent = count.bit_length() - 1
    if count != 2**exponent or count < 4:
        raise ValueError(
            f"libtpu has no topology of {count} chips, only of powers of two from 4 on; leave out "
            "--compile_for_tpu."
        )
    sizes = [2 ** ((exponent + axis) // axes) for axis in range(axes)]
    return f"{tpu}:{'x'.join(map(str, sizes))}"


def _tpu_temporaries(config: ml_collections.ConfigDict, mesh: Mapping[str, int], tpu: str) -> int:
    """Bytes of temporaries of a step that is compiled for TPUs, by libtpu on this machine.

    A step that does not fit cannot be compiled, but the compiler says what it needs.
    """
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask
    small = simulated(mesh)
    while math.prod(small.values()) < 4 and mesh["data"] % (2 * small["data"]) == 0:
        small["data"] *= 2
    name = topology_of(tpu, math.prod(small.values()))
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ImportError(
            f"cannot compile for {name}; it needs libtpu: pip install 'mim-jax[tpu]'. ({error})"
        ) from error
    experiment = Experiment.without_data(_with_mesh(config, mesh, small), devices)
    try:
        compiled = experiment.lowered_step(experiment.batch_shapes()).compile()
    except RuntimeError as error:
        needed = re.search(r"HLO temporaries \(([\d.]+)([KMG])\)", str(error))
        if needed is None:
            raise
        return int(float(needed[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[needed[2]])
    return _temporaries(compiled)
