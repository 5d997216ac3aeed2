"""The verb `mim-jax plan`: its flags, and the simulated devices that it needs."""

import math
import os

import ml_collections
from absl import flags

from mim_jax.cli_flags import wide_console


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the verb."""
    flags.DEFINE_string(
        "chip",
        None,
        "a100-40g, a100-80g, h100, h200, v4, v5e, v5p or v6e, perhaps with other figures: "
        "h100,memory=94 (see mim_jax/plan/chips.py).",
        flag_values=values,
    )
    flags.DEFINE_string(
        "mesh",
        "",
        "Devices along each axis, such as data=64,fsdp=8,tensor=4; by default config.mesh.",
        flag_values=values,
    )
    flags.DEFINE_float(
        "efficiency",
        0.7,
        "Share of peak and bandwidth that is expected; benchmarks/train_step.py measures it.",
        flag_values=values,
    )
    flags.DEFINE_float(
        "images_per_core",
        727.0,
        "Images that one core of a host decodes and crops in a second; by default those of "
        "benchmarks/data_loading.py for JPEG files of 375 x 500 pixels.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "examples", 0, "Of the training data, for the length of an epoch.", flag_values=values
    )
    flags.DEFINE_bool(
        "scan", True, "Compile with model.scan=True, which is quicker.", flag_values=values
    )
    flags.DEFINE_bool(
        "compile_for_tpu",
        False,
        "Compile for the TPU itself, too (v5e, v5p, v6e), which tells its use of memory: takes "
        "minutes, and needs libtpu.",
        flag_values=values,
    )


def plan(values: flags.FlagValues, config: ml_collections.ConfigDict) -> None:
    """Makes the plan and prints it."""
    from mim_jax.plan.chips import chip_of
    from mim_jax.plan.estimate import estimate
    from mim_jax.plan.program import compile_program, mesh_sizes, planned_config, simulated
    from mim_jax.plan.report import report

    chip = chip_of(values.chip)
    mesh = mesh_sizes(values.mesh, config.mesh)
    # JAX is imported, but has not looked for devices yet.
    count = math.prod(simulated(mesh).values())
    flag = f"--xla_force_host_platform_device_count={count}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    program = compile_program(
        planned_config(config, mesh, scan=values.scan),
        mesh,
        tpu=chip.name.partition(",")[0] if values.compile_for_tpu else None,
    )
    found = estimate(
        program,
        chip,
        efficiency=values.efficiency,
        images_per_core=values.images_per_core,
        examples=values.examples,
    )
    console = wide_console()
    for part in report(found):
        console.print(part, soft_wrap=isinstance(part, str), markup=False, highlight=False)
