"""How long a step takes on a chip, and how much its input costs the hosts.

Two figures, between which the truth should lie:

- at best: every matrix product runs at the peak of the chip or at the bandwidth of its memory,
  whichever is slower for it; the state is read and written once; all communication is hidden behind
  that. No step can be faster.
- expected: products and state reach a share of those rates, the `efficiency`, and no communication
  is hidden. That share is an assumption; `benchmarks/train_step.py` measures it on one chip.

Communication runs in rings: of an array of `b` bytes each of n devices sends `b (n - 1) / n` to
gather, scatter or exchange it, and twice that to reduce it everywhere. A group within a domain uses
its links; a larger one the network adapters of all its members in a domain.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from mim_jax.plan.chips import Chip
from mim_jax.plan.hlo import Collective
from mim_jax.plan.program import Program

EFFICIENCY = 0.7
"""Share of the roofline that products and optimizer are expected to reach."""

USABLE_MEMORY = 0.92
"""Share of a chip's memory for a program; the rest goes to the runtime and to fragmentation."""

IMAGES_PER_CORE = 727
"""Images that a core reads, decodes and crops in a second: `benchmarks/data_loading.py` on one core
of an AMD EPYC, for JPEG files of 375 x 500 pixels."""

EXAMPLES = {"tfds:imagenet2012": 1_281_167, "embedded": 4_000}
"""Training examples of sources that everybody has."""

_TIMES_SENT = {"all-reduce": 2.0}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All communication of one kind over the same axes.

    Attributes:
        kind: see `Collective`.
        axes: of the mesh.
        count: collectives a step, before the compiler joins some.
        bytes: of the arrays, a step.
        sent: bytes that one device sends, a step.
        seconds: at the bandwidth of the links.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: float
    sent: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """The answer.

    Attributes:
        program: what a device holds and does.
        chip: the device.
        devices: how many.
        compute_bound: seconds of products that the peak limits.
        memory_bound: seconds of products that the memory's bandwidth limits.
        state_seconds: of reading and writing state and gradients.
        traffic: communication, the longest first.
        largest: the collectives that take longest.
        efficiency: see the module.
        images_per_core: see `IMAGES_PER_CORE`.
        steps: of the whole training; 0 if unknown.
    """

    program: Program
    chip: Chip
    devices: int
    compute_bound: float
    memory_bound: float
    state_seconds: float
    traffic: tuple[Traffic, ...]
    largest: tuple[Collective, ...]
    efficiency: float
    images_per_core: float
    steps: int

    @property
    def rows(self) -> int:
        """Rows of the global batch."""
        return self.program.config.batch_size

    @property
    def hosts(self) -> int:
        """Hosts of the devices."""
        return math.ceil(self.devices / self.chip.host)

    @property
    def work_seconds(self) -> float:
        """What a device does by itself, at best."""
        return self.compute_bound + self.memory_bound + self.state_seconds

    @property
    def communication_seconds(self) -> float:
        """Of all collectives."""
        return sum(part.seconds for part in self.traffic)

    @property
    def best_seconds(self) -> float:
        """Of a step, at best."""
        return max(self.work_seconds, self.communication_seconds)

    @property
    def expected_seconds(self) -> float:
        """Of a step, as expected."""
        return self.work_seconds / self.efficiency + self.communication_seconds

    def utilization(self, seconds: float) -> float:
        """Model FLOPs utilization of a step of so many seconds."""
        return self.program.model_flops / seconds / (self.devices * self.chip.tflops * 1e12)

    def cores(self, seconds: float) -> float:
        """Cores that every host needs to feed a step of so many seconds."""
        return self.rows / seconds / self.hosts / self.images_per_core

    @property
    def memory_share(self) -> float:
        """Of the chip's memory, at the peak of a step."""
        return self.program.memory.total / (self.chip.memory * 2**30)

    @property
    def fits(self) -> bool:
        """Whether that is less than can be used."""
        return self.memory_share <= USABLE_MEMORY

    @property
    def limit(self) -> str:
        """What takes most of an expected step, or the input, if it takes longer than all of it."""
        if self.cores(self.expected_seconds) > self.chip.cores:
            return "input: a host has fewer cores than the images need"
        parts = {
            "compute: matrix products at the chip's peak": self.compute_bound / self.efficiency,
            "memory bandwidth: small matrix products": self.memory_bound / self.efficiency,
            "memory bandwidth: optimizer and state": self.state_seconds / self.efficiency,
            "communication": self.communication_seconds,
        }
        name = max(parts, key=lambda part: parts[part])
        if name == "communication":
            most = self.traffic[0]
            return f"communication, most of it {most.kind} over {' and '.join(most.axes)}"
        return name


def estimate(
    program: Program,
    chip: Chip,
    *,
    efficiency: float = EFFICIENCY,
    images_per_core: float = IMAGES_PER_CORE,
    examples: int = 0,
) -> Plan:
    """The plan of a program on a chip.

    Args:
        program: what a device holds and does.
        chip: the device.
        efficiency: see the module, in (0, 1].
        images_per_core: see `IMAGES_PER_CORE`.
        examples: of the training data, for the length of an epoch; 0 for those of `EXAMPLES`.

    Raises:
        ValueError: for a number out of range.
    """
    if not 0 < efficiency <= 1:
        raise ValueError(f"efficiency is {efficiency}; it must be above 0 and at most 1.")
    if images_per_core <= 0 or examples < 0:
        raise ValueError("images_per_core must be above 0, and examples 0 or more.")
    peak, bandwidth = chip.tflops * 1e12, chip.bandwidth * 1e9
    compute_bound = memory_bound = 0.0
    for product in program.work.products:
        at_peak = product.count * product.flops / peak
        of_memory = product.count * product.bytes / bandwidth
        if at_peak >= of_memory:
            compute_bound += at_peak
        else:
            memory_bound += of_memory
    memory = program.memory
    # All state is read, what is trained is written again, and gradients are written and read.
    moved = 2 * (memory.state + memory.gradients) - memory.frozen
    traffic = _traffic(program, chip)
    seconds = {item: _seconds(item, program.mesh, chip) for item in program.work.collectives}
    config = program.config
    known = examples or EXAMPLES.get(config.data.source, 0)
    return Plan(
        program=program,
        chip=chip,
        devices=math.prod(program.mesh.values()),
        compute_bound=compute_bound,
        memory_bound=memory_bound,
        state_seconds=moved / bandwidth,
        traffic=traffic,
        largest=tuple(sorted(seconds, key=lambda item: -seconds[item])[:3]),
        efficiency=efficiency,
        images_per_core=images_per_core,
        steps=config.steps or round(config.epochs * (known // config.batch_size)),
    )


def _traffic(program: Program, chip: Chip) -> tuple[Traffic, ...]:
    groups: dict[tuple[str, tuple[str, ...]], list[Collective]] = {}
    for item in program.work.collectives:
        if item.axes:
            groups.setdefault((item.kind, item.axes), []).append(item)
    found = [
        Traffic(
            kind,
            axes,
            count=sum(item.count for item in items),
            bytes=sum(item.count * item.bytes for item in items),
            sent=sum(_sent(item, program.mesh) for item in items),
            seconds=sum(_seconds(item, program.mesh, chip) for item in items),
        )
        for (kind, axes), items in groups.items()
    ]
    return tuple(sorted(found, key=lambda part: -part.seconds))


def _sent(item: Collective, mesh: Mapping[str, int]) -> float:
    """Bytes that one device sends a step."""
    if item.kind == "collective-permute":
        return float(item.count * item.bytes)
    size = math.prod(mesh[axis] for axis in item.axes)
    return item.count * item.bytes * _TIMES_SENT.get(item.kind, 1.0) * (size - 1) / size


def _seconds(item: Collective, mesh: Mapping[str, int], chip: Chip) -> float:
    return _sent(item, mesh) / (_rate(item.axes, mesh, chip) * 1e9) if item.axes else 0.0


def _rate(axes: Sequence[str], mesh: Mapping[str, int], chip: Chip) -> float:
    """GB/s that a device sends to its neighbour in the ring of a group."""
    strides = {axis: math.prod(list(mesh.values())[place + 1 :]) for place, axis in enumerate(mesh)}
    steps = [range(0, mesh[axis] * strides[axis], strides[axis]) for axis in axes]
    members = [sum(place) for place in itertools.product(*steps)]
    inside = sum(member < chip.domain for member in members)
    return chip.links if inside == len(members) else min(chip.links, chip.network * inside)
