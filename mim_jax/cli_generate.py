"""The verb `mim-jax generate`: its flags, and what it prints."""

from pathlib import Path

from absl import flags
from rich.console import Console

# Those of `mim_jax.generation.dataset`, which takes JAX to import.
FORMATS, SUFFIXES = ("folder", "array_record"), ("png", "jpg")


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the verb."""
    flags.DEFINE_string("run", None, "Folder of a run of vec2face.", flag_values=values)
    flags.DEFINE_string("output", None, "Folder for the data set.", flag_values=values)
    flags.DEFINE_integer("step", None, "Checkpoint; the newest by default.", flag_values=values)
    flags.DEFINE_integer("identities", None, "Number of people.", flag_values=values)
    flags.DEFINE_integer("images_per_identity", 50, "Images of each.", flag_values=values)
    flags.DEFINE_enum(
        "format", "folder", FORMATS, "A folder for each person, or shards.", flag_values=values
    )
    flags.DEFINE_enum("suffix", "png", SUFFIXES, "Of images in folders.", flag_values=values)
    flags.DEFINE_float(
        "threshold", 0.3, "Largest cosine of the vectors of two people.", flag_values=values
    )
    flags.DEFINE_string(
        "known",
        "",
        "Labelled data of real people, whom new ones are drawn like and compared with: by default "
        "those that the run was trained on; none to draw from a normal distribution.",
        flag_values=values,
    )
    flags.DEFINE_integer("seed", 0, "Of everything random.", flag_values=values)


def generate(values: flags.FlagValues) -> None:
    """Generates the data set, and says where it is."""
    from mim_jax.generation import run
    from mim_jax.generation.dataset import Plan

    plan = Plan(
        identities=values.identities,
        images_per_identity=values.images_per_identity,
        seed=values.seed,
        threshold=values.threshold,
        format=values.format,
        suffix=values.suffix,
    )
    console = Console()
    nearest = run.generate_run(
        Path(values.run),
        Path(values.output),
        plan,
        step=values.step,
        known=values.known,
        console=console,
    )
    images = plan.identities * plan.images_per_identity
    console.print(
        f"{images:,} images of {plan.identities:,} people: --data {values.format}:{values.output}",
        soft_wrap=True,
        markup=False,
    )
    if nearest is not None:
        console.print(f"largest cosine to a known person: {nearest:.3f}")
