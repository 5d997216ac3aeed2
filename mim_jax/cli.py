"""The command line: `mim-jax VERB --config NAME [--config.FIELD=VALUE ...]`.

Each verb is a thin call into a library function that a notebook can call as well.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from mim_jax import __version__, cli_generate
from mim_jax import config as configs

USAGE = """\
mim-jax: masked image modelling in JAX and Flax

  mim-jax train    --config mae:tiny [--workdir DIR]   train, or go on where a run stopped
  mim-jax evaluate --run DIR --protocol knn,linear     score the features of a run
  mim-jax visualize --run DIR --output DIR             pictures of what the model makes of images
  mim-jax generate --run DIR --output DIR2 --identities 100   a data set of generated faces
  mim-jax replay   --run DIR --step 1200               what happened in one step of a run
  mim-jax verify   --config mae:tiny                   does it train here as it should?
  mim-jax inspect  --config mae:vit_l16                parameters, sharding, bytes, FLOPs
  mim-jax convert  --run DIR --output mae.pth          official checkpoint from a run
  mim-jax convert  --run DIR --output DIR2 --format hf-mae   for transformers; timm, hf-vit, ...
  mim-jax convert  --config mae:vit_b16 --input mae.pth --output DIR   and back, from any of them
  mim-jax data inspect --source folder:images          counts, sizes, channels, mean, a picture
  mim-jax data convert --source folder:images --output DIR   to shards for fast reading

Any field of the config is a flag: --config.batch_size=64 --config.data.source=folder:images
`mim-jax VERB --help` lists the flags of a verb. MIM_JAX_TRACEBACK=1 shows the trace of an error.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 for an error, 75 if told to stop."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    verb, arguments = arguments[0], [_with_underscores(a) for a in arguments[1:]]
    if verb not in VERBS:
        return _fail(f"unknown command {verb!r}; known are {', '.join(VERBS)}.")
    try:
        return VERBS[verb](arguments)
    except _HelpShown:
        return 0
    except flags.Error as error:
        return _fail(str(error))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("MIM_JAX_TRACEBACK"):
            raise
        return _fail(str(error) or type(error).__name__)


class _HelpShown(Exception):
    """The user asked for the flags of a verb, and has seen them."""


def _with_underscores(argument: str) -> str:
    """A flag whose name may be written with dashes, `--init-from=x`, as absl knows it."""
    if not argument.startswith("--"):
        return argument
    name, separator, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{separator}{value}"


def _fail(message: str) -> int:
    """Prints an error as one message, and returns the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return 1


def _train(arguments: list[str]) -> int:
    values = flags.FlagValues()
    _define_config(values, arguments)
    flags.DEFINE_string(
        "workdir", None, "Folder of the run; by default runs/CONFIG.", flag_values=values
    )
    flags.DEFINE_string(
        "init_from",
        None,
        "Weights to start from: short for --config.init_from.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "distributed",
        False,
        "One of several processes; JAX finds the others on TPU pods, SLURM, Open MPI, Kubernetes.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, where JAX cannot find it.", flag_values=values
    )
    flags.DEFINE_integer("num_processes", None, "With --coordinator.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "With --coordinator.", flag_values=values)
    flags.DEFINE_string(
        "data", None, "Data to train on: short for --config.data.source.", flag_values=values
    )
    config = _parse(values, "train", arguments)
    assert config is not None
    if values.init_from:
        config.init_from = values.init_from
    if values.data:
        config.data.source = values.data
    folder = Path(values.workdir or _default_workdir(values.config_name))
    _start_jax()
    if values.distributed or values.coordinator:
        import jax

        jax.distributed.initialize(values.coordinator, values.num_processes, values.process_id)
        # JAX would only take note of SIGTERM; until the loop listens, it shall end the process.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    from mim_jax.training.interruption import EXIT_INTERRUPTED, Interrupted
    from mim_jax.training.loop import train

    console = Console()
    try:
        result = train(config, folder, console=console)
    except Interrupted as stop:
        console.print(str(stop), soft_wrap=True)
        return EXIT_INTERRUPTED
    if result.evaluation:
        console.print(score_table(result.evaluation))
    if result.picture:
        console.print(f"picture:     {result.picture}", soft_wrap=True)
    console.print(f"checkpoint:  {result.folder}/checkpoints", soft_wrap=True)
    return 0


def _default_workdir(config_name: str) -> Path:
    """`runs/mae-tiny` for `mae:tiny`, and for `some/folder/mae.py:tiny`."""
    path, variant = configs.find(config_name)
    return Path("runs") / "-".join(filter(None, (path.stem, variant)))


def _evaluate(arguments: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("run", None, "Folder of a run.", flag_values=values)
    flags.DEFINE_integer("step", None, "Checkpoint; the newest by default.", flag_values=values)
    flags.DEFINE_list(
        "protocol",
        None,
        "By default those of the run's config. knn (weighted, cosine, k = 20), linear (logistic "
        "regression by L-BFGS on features), linear_lars (the paper's recipe: augmentation, batch "
        "norm, LARS), classification (a fine-tuned model's predictions, with a confusion matrix).",
        flag_values=values,
    )
    flags.DEFINE_string("data", None, "Labelled data in place of the run's.", flag_values=values)
    flags.DEFINE_enum("pool", None, ["method", "mean"], "Representation.", flag_values=values)
    flags.DEFINE_bool("baselines", True, "Score baselines as well.", flag_values=values)
    _parse_only(values, "evaluate", arguments)
    _require(values, "evaluate", "run")
    _start_jax()
    from mim_jax.evaluation.run import evaluate_run

    rows = evaluate_run(
        Path(values.run),
        step=values.step,
        protocols=values.protocol,
        data=values.data,
        pool=values.pool,
        baselines=values.baselines,
    )
    Console().print(score_table(rows))
    return 0


def _inspect(arguments: list[str]) -> int:
    values = flags.FlagValues()
    _define_config(values, arguments)
    flags.DEFINE_integer(
        "devices", None, "Simulate so many CPU devices to see another mesh.", flag_values=values
    )
    config = _parse(values, "inspect", arguments)
    if values.devices:
        count = f"--xla_force_host_platform_device_count={values.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}"
        os.environ["JAX_PLATFORMS"] = "cpu"
    _start_jax()
    from mim_jax.training.inspection import inspection

    # In a file or a pipe there is no width to keep to, and paths are best read in one piece.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(*inspection(config), sep="\n")
    return 0


def _visualize(arguments: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("run", None, "Folder of a run.", flag_values=values)
    flags.DEFINE_integer("step", None, "Checkpoint; the newest by default.", flag_values=values)
    flags.DEFINE_string("output", None, "Folder for the pictures.", flag_values=values)
    flags.DEFINE_string("data", None, "Data in place of the run's.", flag_values=values)
    flags.DEFINE_string("split", None, "Of the data, such as test[:10%].", flag_values=values)
    flags.DEFINE_integer("rows", 8, "Examples to show.", lower_bound=1, flag_values=values)
    _parse_only(values, "visualize", arguments)
    _require(values, "visualize", "run")
    _require(values, "visualize", "output")
    _start_jax()
    from mim_jax.training.gallery import visualize

    files = visualize(
        Path(values.run),
        Path(values.output),
        step=values.step,
        data=values.data,
        split=values.split,
        rows=values.rows,
    )
    for file in files:
        print(f"picture: {file}")
    return 0


def _generate(arguments: list[str]) -> int:
    values = flags.FlagValues()
    cli_generate.define_flags(values)
    _parse_only(values, "generate", arguments)
    for name in ("run", "output", "identities"):
        _require(values, "generate", name)
    _start_jax()
    cli_generate.generate(values)
    return 0


def _convert(arguments: list[str]) -> int:
    values = flags.FlagValues()
    if any(a.startswith("--config") for a in arguments):
        _define_config(values, arguments)
    flags.DEFINE_string("run", None, "Folder of a run to export.", flag_values=values)
    flags.DEFINE_integer("step", None, "Checkpoint; the newest by default.", flag_values=values)
    flags.DEFINE_string(
        "input",
        None,
        "Weights to import: an official or timm file, or a folder of transformers.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "output",
        None,
        "File (.pth, .safetensors) or folder to export to, or folder of a new run.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "format",
        "official",
        "What --run is written as: official or timm (a file), hf-mae, hf-vit or hf-classifier (a "
        "folder). What --input holds is recognized.",
        flag_values=values,
    )
    config = _parse(values, "convert", arguments)
    _require(values, "convert", "output")
    if bool(values.run) == bool(values.input):
        raise ValueError("convert needs either --run (to export) or --input (to import).")
    _start_jax()
    from mim_jax.conversion import official

    if values.run:
        note = official.export_run(
            Path(values.run), Path(values.output), values.format, step=values.step
        )
    elif config is None:
        raise ValueError("convert --input needs --config, the model that the file holds.")
    else:
        note = official.import_checkpoint(config, Path(values.input), Path(values.output))
    print(note)
    return 0


def _data(arguments: list[str]) -> int:
    kinds = {"inspect": _data_inspect, "convert": _data_convert}
    if arguments and arguments[0] in kinds:
        return kinds[arguments[0]](arguments[1:])
    if arguments and arguments[0] in HELP_FLAGS:
        print("mim-jax data\n")
        for kind in kinds.values():
            with contextlib.suppress(_HelpShown):
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
    _parse_only(values, "data inspect", arguments)
    _require(values, "data inspect", "source")
    from PIL import Image

    from mim_jax.data import open_source
    from mim_jax.data.inspection import facts_table, inspect_source, schema_table, source_sheet
    from mim_jax.data.table import TableSource
    from mim_jax.data.table_schema import write_schema

    source = open_source(values.source, values.split)
    if values.schema and not isinstance(source, TableSource):
        raise ValueError(f"--schema needs a table, such as table:FILE.csv; got {source.name}.")
    facts = inspect_source(source, None if values.all else values.sample, channels=values.channels)
    # In a file or a pipe there is no width to keep to, and paths are best read in one piece.
    console = Console(width=None if sys.stdout.isatty() else 160)
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
    _parse_only(values, "data convert", arguments)
    _require(values, "data convert", "source")
    _require(values, "data convert", "output")
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


def _replay(arguments: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("run", None, "Folder of a run.", flag_values=values)
    flags.DEFINE_integer(
        "step",
        None,
        "Which step, as in the log: the first is 1.",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_string(
        "output", None, "PNG file for its batch; by default in RUN/pictures.", flag_values=values
    )
    flags.DEFINE_bool(
        "modules", False, "Show how large the output of every module is.", flag_values=values
    )
    _parse_only(values, "replay", arguments)
    _require(values, "replay", "run")
    _require(values, "replay", "step")
    _start_jax()
    from mim_jax.training.replay import replay, report

    console = Console()
    found = replay(
        values.run,
        values.step,
        output=values.output,
        modules=values.modules,
        console=console,
    )
    for part in report(found):
        console.print(part, soft_wrap=isinstance(part, str))
    return 0


def _verify(arguments: list[str]) -> int:
    values = flags.FlagValues()
    _define_config(values, arguments)
    config = _parse(values, "verify", arguments)
    assert config is not None
    _start_jax()
    from mim_jax.training.verify import explanation, verdict_table, verify

    console = Console()
    points = verify(config, console=console)
    console.print(verdict_table(points))
    before = configs.leaves(configs.load(values.config_name))
    changed = [field for field, value in configs.leaves(config).items() if before[field] != value]
    console.print(explanation(points, config, changed), soft_wrap=True)
    return 0 if all(point.agrees for point in points) else 1


HELP_FLAGS = {"--help", "-h"}

HIDDEN_FLAGS = ("config", "config_name", "help", "flagfile", "undefok")

VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "evaluate": _evaluate,
    "inspect": _inspect,
    "generate": _generate,
    "convert": _convert,
    "visualize": _visualize,
    "replay": _replay,
    "verify": _verify,
    "data": _data,
}


def score_table(rows: dict[str, dict[str, float]]) -> Table:
    """Scores in per cent, a row for each encoder and a column for each score; losses as they are.

    The single score of a protocol is its top-1 accuracy. Of several, the protocol is named only
    where two have scores of the same name.
    """
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    table = Table(title="scores, %")
    table.add_column("features")
    short = [name.rpartition("/")[2] for name in names]
    for name, score in zip(names, short, strict=True):
        table.add_column(score if short.count(score) == 1 else name, justify="right")
    for title, row in rows.items():
        shown = {
            n: f"{x:.3f}" if n.endswith("entropy") else f"{100 * x:.1f}" for n, x in row.items()
        }
        table.add_row(title, *(shown.get(name, "-") for name in names))
    return table


def _define_config(values: flags.FlagValues, arguments: list[str]) -> None:
    """Takes `--config NAME` out of the arguments, and makes every field a flag.

    An override that comes again replaces the earlier one; absl would join two tuples.

    Raises:
        ValueError: if it is missing, or an override names an unknown field.
    """
    name = None
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            name = arguments[i + 1]
            del arguments[i : i + 2]
            break
        if argument.startswith("--config="):
            name = argument.partition("=")[2]
            del arguments[i]
            break
    if not HELP_FLAGS.isdisjoint(arguments):
        name = name or "mae:tiny"
    if name is None:
        known = ", ".join(configs.known_configs())
        raise ValueError(f"--config is missing; known configs are {known}, such as mae:tiny.")
    config = configs.load(name)
    for argument in arguments:
        if argument.startswith("--config."):
            configs.check_field(config, _override_field(argument))
    arguments[:] = _without_repeats(arguments)
    flags.DEFINE_string("config_name", name, "As given by --config.", flag_values=values)
    config_flags.DEFINE_config_dict(
        "config", config, "Fields of the config.", flag_values=values, sys_argv=["", *arguments]
    )


def _override_field(argument: str) -> str:
    """`data.flip` for `--config.data.flip=no`."""
    return argument.removeprefix("--config.").partition("=")[0]


def _without_repeats(arguments: list[str]) -> list[str]:
    """The arguments, with only the last override of each field."""
    groups: list[list[str]] = []  # a flag, and its value if that is a word of its own
    for argument in arguments:
        if argument.startswith("--") or not groups:
            groups.append([argument])
        else:
            groups[-1].append(argument)
    last = {_override_field(group[0]): group for group in groups}
    return [
        word
        for group in groups
        if not group[0].startswith("--config.") or last[_override_field(group[0])] is group
        for word in group
    ]


def _parse_only(values: flags.FlagValues, verb: str, arguments: list[str]) -> None:
    flags.DEFINE_bool("help", False, "Show the flags.", short_name="h", flag_values=values)
    rest = values([f"mim-jax {verb}", *arguments])[1:]
    if values.help:
        print(_help(values, verb))
        raise _HelpShown
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}; flags begin with --.")


def _parse(
    values: flags.FlagValues, verb: str, arguments: list[str]
) -> ml_collections.ConfigDict | None:
    """The config with all overrides, or None if the command has none.

    Raises:
        ValueError: if a value does not have the type of its field.
    """
    _parse_only(values, verb, arguments)
    if "config" not in values:
        return None
    config = configs.load(values.config_name)
    # absl checks numbers, but takes any word for a tuple.
    configs.override(config, configs.leaves(values.config))
    return config


def _help(values: flags.FlagValues, verb: str) -> str:
    """The flags of a verb, and the fields of its config with their values."""
    lines = [f"mim-jax {verb}", ""]
    for name in sorted(values):
        flag = values[name]
        if name == flag.name and name not in HIDDEN_FLAGS:
            lines.append(f"  --{name}: {flag.help} Default: {flag.default}")
    if "config" in values:
        lines += ["  --config: Name of a config, or path of a config file, with :VARIANT.", ""]
        lines += [f"  Fields, as set by {values.config_name}:"]
        lines += [
            f"    --config.{field}={value!r}"
            for field, value in configs.leaves(values.config).items()
        ]
    return "\n".join(lines)


def _require(values: flags.FlagValues, verb: str, name: str) -> None:
    if not values[name].value:
        raise ValueError(f"{verb} needs --{name}.")


def _start_jax() -> None:
    """Keeps compiled programs between runs, unless the user chose a place already."""
    import jax
    from absl import logging

    logging.set_verbosity(logging.ERROR)  # Orbax warns of its own defaults

    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(home) / "mim_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
