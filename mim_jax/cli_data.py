"""The verb `mim-jax data`: what a source holds, and shards of it."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags
from rich.console import Console

from mim_jax.cli_flags import HELP_FLAGS, HelpShown, parse_only, require, wide_console

if TYPE_CHECKING:
    from mim_jax.data.sources import Source


def data_verb(arguments: list[str]) -> int:
    """Runs `data inspect` or `data convert`, and returns the exit code."""
    kinds = {"inspect": _data_inspect, "convert": _data_convert}
    if arguments and arguments[0] in kinds:
        return kinds[arguments[0]](arguments[1:])
    if arguments and arguments[0] in HELP_FLAGS:
        print("mim-jax data\n")
        for kind in kinds.values():
            with contextlib.suppress(HelpShown):
                kind(["--help"])
            print()
        return 0
    given = f"not {arguments[0]!r}" if arguments else "such as 'mim-jax data inspect --source X'"
    raise ValueError(f"data needs one of {', '.join(kinds)}, {given}.")


def _data_inspect(arguments: list[str]) -> int:
    values = flags.FlagValues()
    _define_source(values)
    flags.DEFINE_integer(
        "channels", None, "For mean and deviation; by default as in most files.", flag_values=values
    )
    flags.DEFINE_integer("sample", 512, "Number of images to look at.", flag_values=values)
    flags.DEFINE_bool("all", False, "Look at every image, not at a sample.", flag_values=values)
    flags.DEFINE_string("output", None, "PNG for a sheet of images.", flag_values=values)
    flags.DEFINE_string(
        "schema", None, "JSON file for the schema, of a table only.", flag_values=values
    )
    parse_only(values, "data inspect", arguments)
    require(values, "data inspect", "source")
    from PIL import Image

    from mim_jax.data import open_source
    from mim_jax.data.inspection import facts_table, inspect_source, schema_table, source_sheet
    from mim_jax.data.table import TableSource
    from mim_jax.data.table_schema import write_schema

    source = open_source(values.source, values.split)
    if values.schema and not isinstance(source, TableSource):
        raise ValueError(f"--schema needs a table, such as table:FILE.csv; got {source.name}.")
    if getattr(source, "kind", "image") == "volume":
        return _inspect_volumes(source, None if values.all else values.sample, values.output)
    facts = inspect_source(source, None if values.all else values.sample, channels=values.channels)
    console = wide_console()
    console.print(source.name, soft_wrap=True, markup=False)
    console.print(facts_table(facts))
    if isinstance(source, TableSource):
        console.print(schema_table(source))
        if values.schema:
            write_schema(source.schema, Path(values.schema))
            console.print(f"schema: {values.schema}", soft_wrap=True, markup=False)
    if values.output:
        as_found = open_source(
            values.source, values.split, channels=facts.channels, bits=facts.bits
        )
        Image.fromarray(source_sheet(as_found)).save(values.output)
        console.print(f"picture: {values.output}", soft_wrap=True, markup=False)
    return 0


def _inspect_volumes(source: "Source", sample: int | None, output: str | None) -> int:
    from PIL import Image

    from mim_jax.data.volume_inspection import inspect_volumes, volume_facts_table, volume_sheet

    console = wide_console()
    console.print(source.name, soft_wrap=True, markup=False)
    console.print(volume_facts_table(inspect_volumes(source, sample)))
    if output:
        Image.fromarray(volume_sheet(source)).save(output)
        console.print(f"picture: {output}", soft_wrap=True, markup=False)
    return 0


def _data_convert(arguments: list[str]) -> int:
    values = flags.FlagValues()
    _define_source(values)
    flags.DEFINE_string("output", None, "Folder for the shards.", flag_values=values)
    flags.DEFINE_string(
        "output_split", None, "Name of the split there; by default as --split.", flag_values=values
    )
    flags.DEFINE_integer(
        "short_side", None, "Shrink larger images to so many pixels.", flag_values=values
    )
    flags.DEFINE_integer(
        "shards", None, "Number of files; by default one for 10,000 images.", flag_values=values
    )
    flags.DEFINE_integer("threads", None, "By default one per CPU core.", flag_values=values)
    parse_only(values, "data convert", arguments)
    require(values, "data convert", "source")
    require(values, "data convert", "output")
    from mim_jax.data import open_source
    from mim_jax.data.shard_writer import convert
    from mim_jax.data.splits import split_name_and_bounds

    console = Console()
    result = convert(
        open_source(values.source, values.split),
        Path(values.output),
        values.output_split or split_name_and_bounds(values.split)[0],
        short_side=values.short_side,
        shards=values.shards,
        threads=values.threads,
        console=console,
    )
    console.print(
        f"{result.examples:,} images in {result.shards} shards: --data {result.folder}",
        soft_wrap=True,
        markup=False,
    )
    if result.unreadable:
        console.print(f"{len(result.unreadable)} unreadable images left out, the first:")
        console.print(*result.unreadable[:10], sep="\n", soft_wrap=True, markup=False)
    return 0


def _define_source(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "source", None, "Data, such as folder:PATH, as in --config.data.source.", flag_values=values
    )
    flags.DEFINE_string("split", "train", "Split, such as train[:90%].", flag_values=values)
