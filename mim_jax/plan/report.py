"""A plan as tables and sentences."""

import math
from collections.abc import Iterator

from rich.table import Table

from mim_jax.plan.estimate import USABLE_MEMORY, Plan

SECONDS = (
    ("days", 86400.0),
    ("hours", 3600.0),
    ("minutes", 60.0),
    ("s", 1.0),
    ("ms", 1e-3),
    ("us", 1e-6),
)


def report(plan: Plan) -> list[Table | str]:
    """What `mim-jax plan` prints."""
    return [
        job_line(plan),
        memory_table(plan),
        verdict(plan),
        *(f"  - {line}" for line in advice(plan)),
        step_table(plan),
        traffic_table(plan),
        *largest_lines(plan),
        speed_table(plan),
        f"limited by {plan.limit}",
        "notes:",
        *(f"  - {line}" for line in notes(plan)),
    ]


def job_line(plan: Plan) -> str:
    """Devices, hosts and batch."""
    config, mesh = plan.program.config, plan.program.mesh
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.items())
    per_device = plan.rows // (mesh["data"] * mesh["fsdp"])
    micro = f" in {config.accumulate} micro-batches" if config.accumulate > 1 else ""
    return (
        f"{config.method} of {plan.program.parameters:,} parameters on {plan.devices:,} x "
        f"{plan.chip.name} ({plan.hosts:,} hosts of {plan.chip.host}), mesh {axes}, strategy "
        f"{config.sharding.strategy}; batch of {plan.rows:,}, {per_device:,} rows a device{micro}, "
        f"{config.compute_dtype}"
    )


def memory_table(plan: Plan) -> Table:
    """What one device holds."""
    memory, chip = plan.program.memory, plan.chip.memory * 2**30
    table = Table(title="memory of a device", show_footer=True)
    table.add_column("part", "at the peak of a step")
    table.add_column("size", _size(memory.total), justify="right")
    table.add_column(f"of {plan.chip.memory:g} GiB", f"{memory.total / chip:.1%}", justify="right")
    table.add_column("how known", "")
    exact, planned = "exact", f"planned by XLA for {memory.compiler}"
    parts = [
        ("trained parameters", memory.trained, exact),
        ("frozen parameters", memory.frozen, exact),
        ("parameters that follow by EMA", memory.ema, exact),
        ("optimizer state", memory.optimizer, exact),
        ("statistics", memory.other, exact),
        ("batch", memory.batch, exact),
        ("temporaries: activations, gradients", memory.temporaries, planned),
        ("  of which gradients, in the end", memory.gradients, "as parameters; in the above"),
    ]
    for name, size, how in parts:
        if size >= 2**10:  # not the counters
            table.add_row(name, _size(size), f"{size / chip:.1%}", how)
    return table


def verdict(plan: Plan) -> str:
    """Whether it fits."""
    share = f"{plan.memory_share:.0%} of the memory of {plan.chip.name}"
    if not plan.fits:
        return f"does NOT fit: it needs {share}; at most {USABLE_MEMORY:.0%} can be used"
    tight = " - tight, as temporaries are an estimate" if plan.memory_share > 0.75 else ""
    return f"fits: it needs {share}{tight}"


def advice(plan: Plan) -> Iterator[str]:
    """Fields of the config that would make it fit, or that do nothing as they are."""
    config, mesh, memory = plan.program.config, plan.program.mesh, plan.program.memory
    strategy = config.sharding.strategy
    if strategy == "replicated" and mesh["fsdp"] * mesh["tensor"] > 1:
        yield (
            "every device holds all parameters, in spite of the mesh: "
            "--config.sharding.strategy=fsdp, or fsdp+tensor"
        )
    if strategy == "fsdp" and mesh["tensor"] > 1:
        yield (
            "devices along tensor repeat the same work: --config.sharding.strategy=fsdp+tensor, "
            "or --mesh with tensor=1"
        )
    if plan.fits:
        return
    usable = USABLE_MEMORY * plan.chip.memory * 2**30
    fixed = memory.state + memory.gradients
    if strategy == "replicated" and fixed > 0.1 * usable:
        yield (
            f"state and gradients take {_size(fixed)}: --config.sharding.strategy=fsdp with "
            "--mesh fsdp=8 holds an eighth of them"
        )
    elif fixed > 0.3 * usable:
        yield (
            f"state and gradients take {_size(fixed)}: more devices along fsdp (now "
            f"{mesh['fsdp']}) hold less each"
        )
    activations = memory.temporaries - memory.gradients
    rows = plan.rows // (mesh["data"] * mesh["fsdp"])
    if activations > 0:
        # With a sum of gradients beside those of a micro-batch.
        room = max(usable - fixed - memory.gradients - memory.batch, 1)
        wanted = config.accumulate * activations / room
        fitting = [n for n in range(1, rows + 1) if rows % n == 0 and n > wanted]
        if fitting:
            yield f"activations of fewer rows at a time: --config.accumulate={fitting[0]}"
    if config.model.get("remat") == "none":
        yield "activations computed again in the backward pass: --config.model.remat=full"
    elif config.model.get("remat") == "dots":
        yield "less kept for the backward pass: --config.model.remat=full"
    yield f"a smaller batch, or more devices along data: --config.batch_size (now {plan.rows:,})"


def step_table(plan: Plan) -> Table:
    """Parts of the time of a step."""
    table = Table(title="time of a step", show_footer=True)
    table.add_column("part", "step")
    table.add_column("at best", _time(plan.best_seconds), justify="right")
    table.add_column("expected", _time(plan.expected_seconds), justify="right")
    table.add_column("how known", "at best: communication hidden; expected: none of it")
    share = f"at best / {plan.efficiency:g}"
    for name, seconds, how in (
        ("products that the peak limits", plan.compute_bound, "FLOPs of the program / peak"),
        ("products that memory limits", plan.memory_bound, "their bytes / bandwidth"),
        ("optimizer and state", plan.state_seconds, "read and written once / bandwidth"),
    ):
        table.add_row(name, _time(seconds), _time(seconds / plan.efficiency), f"{how}; {share}")
    communication = _time(plan.communication_seconds)
    table.add_row("communication", communication, communication, "rings at the links' bandwidth")
    return table


def traffic_table(plan: Plan) -> Table:
    """Collectives of a step by kind and axes."""
    table = Table(title="communication of a device in a step")
    for column in ("kind", "over"):
        table.add_column(column)
    for column in ("count", "MiB of arrays", "MiB sent", "time"):
        table.add_column(column, justify="right")
    for part in plan.traffic:
        table.add_row(
            part.kind,
            ", ".join(part.axes),
            f"{part.count:,}",
            f"{part.bytes / 2**20:,.1f}",
            f"{part.sent / 2**20:,.1f}",
            _time(part.seconds),
        )
    if not plan.traffic:
        table.add_row("none", "", "0", "0", "0", _time(0.0))
    return table


def largest_lines(plan: Plan) -> Iterator[str]:
    """The collectives that take longest."""
    for item in plan.largest:
        yield (
            f"  {item.kind} over {', '.join(item.axes)}: {item.shape} {item.count} x"
            + (f", {item.where}" if item.where else "")
        )


def speed_table(plan: Plan) -> Table:
    """Images per second, utilization, total time and host cores."""
    table = Table(title="speed")
    table.add_column("")
    for column in ("at best", "expected"):
        table.add_column(column, justify="right")
    both = (plan.best_seconds, plan.expected_seconds)
    flops = f"{plan.program.model_flops / 1e12:,.2f} TFLOP a step"
    table.add_row("images/s", *(f"{plan.rows / seconds:,.0f}" for seconds in both))
    table.add_row(f"MFU ({flops})", *(f"{plan.utilization(seconds):.1%}" for seconds in both))
    if plan.steps:
        total = f"{plan.steps:,} steps"
        table.add_row(f"the whole training, {total}", *(_time(plan.steps * s) for s in both))
    else:
        table.add_row("the whole training", *["give --examples or --config.steps"] * 2)
    table.add_row(
        f"cores a host needs ({plan.chip.cores} there)",
        *(f"{math.ceil(plan.cores(seconds)):,}" for seconds in both),
    )
    return table


def notes(plan: Plan) -> Iterator[str]:
    """Assumptions that this plan makes."""
    program, config = plan.program, plan.program.config
    if program.mesh["data"] > 2:
        yield (
            "compiled for data=2: with the same rows a device, its program does not depend on the "
            "size of data, but for what is gathered over data"
        )
    if program.grown:
        yield (
            f"{_size(program.grown)} of rows of other devices are gathered over data, and more "
            "with every device: this does not scale"
        )
    if config.model.get("scan"):
        yield (
            "with model.scan=True, which compiles quickly; without it a ViT-L needed a fifth less "
            "for temporaries. --noscan plans the config as it is"
        )
    if program.memory.compiler == "CPU":
        yield (
            "temporaries are those of XLA for CPU, an estimate: for TPUs it planned from 25 % less "
            "to 25 % more in five comparisons; GPUs may use other algorithms"
        )
    if program.repeated > 1.001:
        yield f"rematerialization computes {program.repeated:.2f} times the model's FLOPs"
    executed = program.work.flops * plan.devices / (program.model_flops * program.repeated)
    if executed > 1.02:
        yield f"devices repeat work of each other: {executed:.2f} times the FLOPs of one device"
    if program.work.unknown_loops:
        yield f"{program.work.unknown_loops} loops of unknown length count once"
    if config.compute_dtype == "float32":
        yield "the peak is that of bfloat16; products in float32 take several times longer"
    yield (
        f"expected: {plan.efficiency:.0%} of the roofline, an assumption; measure a chip with "
        "benchmarks/train_step.py and give --efficiency. Element-wise work counts as fused"
    )
    if plan.devices > plan.chip.domain:
        yield f"links join {plan.chip.domain} devices; beyond, {plan.chip.network:g} GB/s a device"
    yield (
        f"input: {plan.images_per_core:g} images a core and second, as one core of an AMD EPYC "
        "reads JPEG files of 375 x 500 pixels (benchmarks/data_loading.py); pictures of a camera "
        "take 13 times as long, augmentation comes on top: --images_per_core"
    )
    if len(config.data.image_size) != 2:
        yield "volumes take a core far longer than pictures: give --images_per_core"


def _size(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _time(seconds: float) -> str:
    unit, size = next((pair for pair in SECONDS if seconds >= pair[1]), SECONDS[-1])
    return f"{seconds / size:,.3g} {unit}"
