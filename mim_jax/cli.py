"""The command line: `mim-jax VERB --config NAME [--config.FIELD=VALUE ...]`.

Each verb is a thin call into a library function that a notebook can call as well.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.table import Table

from mim_jax import __version__, cli_generate, cli_plan
from mim_jax import config as configs
from mim_jax.cli_data import data_verb
from mim_jax.cli_flags import (
    HelpShown,
    define_config,
    parse,
    parse_only,
    require,
    wide_console,
    with_underscores,
)

USAGE = """\
mim-jax: masked image modelling in JAX and Flax

  mim-jax train    --config mae:tiny [--workdir DIR]   train, or go on where a run stopped
  mim-jax evaluate --run DIR --protocol knn,linear     score the features of a run
  mim-jax visualize --run DIR --output DIR             pictures of what the model makes of images
  mim-jax generate --run DIR --output DIR2 --identities 100   a data set of generated faces
  mim-jax replay   --run DIR --step 1200               what happened in one step of a run
  mim-jax verify   --config mae:tiny                   does it train here as it should?
  mim-jax inspect  --config mae:vit_l16                parameters, sharding, bytes, FLOPs
  mim-jax plan     --config mae:vit_l16 --chip v5p --mesh data=64,fsdp=8   does it fit, how fast?
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
    verb, arguments = arguments[0], [with_underscores(a) for a in arguments[1:]]
    if verb not in VERBS:
        return _fail(f"unknown command {verb!r}; known are {', '.join(VERBS)}.")
    try:
        return VERBS[verb](arguments)
    except HelpShown:
        return 0
    except flags.Error as error:
        return _fail(str(error))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("MIM_JAX_TRACEBACK"):
            raise
        return _fail(str(error) or type(error).__name__)


def _fail(message: str) -> int:
    """Prints an error as one message, and returns the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return 1


def _train(arguments: list[str]) -> int:
    values = flags.FlagValues()
    define_config(values, arguments)
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder of the run, or its URL at gs:// or s3://; by default runs/CONFIG.",
        flag_values=values,
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
    flags.DEFINE_integer(
        "start_timeout",
        300,
        "Seconds to wait until all processes have come.",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_string(
        "data", None, "Data to train on: short for --config.data.source.", flag_values=values
    )
    config = parse(values, "train", arguments)
    assert config is not None
    if values.init_from:
        config.init_from = values.init_from
    if values.data:
        config.data.source = values.data
    folder = Path(values.workdir or _default_workdir(values.config_name))
    _start_jax()
    console = Console()
    is_main = True
    if values.distributed or values.coordinator:
        from mim_jax.training.processes import start_processes

        started = start_processes(
            values.coordinator,
            values.num_processes,
            values.process_id,
            timeout=values.start_timeout,
        )
        is_main = started is not None
        if started:
            table, warnings = started
            console.print(table)
            for warning in warnings:
                console.print(f"[yellow]warning: {warning}[/]", soft_wrap=True)
    from mim_jax.training.interruption import EXIT_INTERRUPTED, Interrupted
    from mim_jax.training.loop import train
    from mim_jax.training.processes import leaving_at_once

    try:
        with leaving_at_once():
            result = train(config, folder, console=console)
    except Interrupted as stop:
        if is_main:
            console.print(str(stop), soft_wrap=True)
        return EXIT_INTERRUPTED
    if not is_main:
        return 0
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
    flags.DEFINE_string("run", None, "Folder of a run, or its URL.", flag_values=values)
    flags.DEFINE_integer("step", None, "Checkpoint; the newest by default.", flag_values=values)
    flags.DEFINE_list(
        "protocol",
        None,
        "By default those of the run's config. Of features: knn, linear (logistic regression), "
        "linear_lars (MAE's recipe), attentive (CAE's), patch_local and patch_global; of what a "
        "method says itself: classification (with a confusion matrix), dice (volumes), "
        "verification (faces), detection (forgeries, by domain).",
        flag_values=values,
    )
    flags.DEFINE_string("data", None, "Labelled data in place of the run's.", flag_values=values)
    flags.DEFINE_enum("pool", None, ["method", "mean"], "Representation.", flag_values=values)
    flags.DEFINE_bool("baselines", True, "Score baselines as well.", flag_values=values)
    parse_only(values, "evaluate", arguments)
    require(values, "evaluate", "run")
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
    define_config(values, arguments)
    flags.DEFINE_integer(
        "devices", None, "Simulate so many CPU devices to see another mesh.", flag_values=values
    )
    config = parse(values, "inspect", arguments)
    if values.devices:
        count = f"--xla_force_host_platform_device_count={values.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}"
        os.environ["JAX_PLATFORMS"] = "cpu"
    _start_jax()
    from mim_jax.training.inspection import inspection

    console = wide_console()
    console.print(*inspection(config), sep="\n")
    return 0


def _plan(arguments: list[str]) -> int:
    values = flags.FlagValues()
    define_config(values, arguments)
    cli_plan.define_flags(values)
    config = parse(values, "plan", arguments)
    assert config is not None
    require(values, "plan", "chip")
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the tables show what XLA would warn of
    _start_jax()
    cli_plan.plan(values, config)
    return 0


def _visualize(arguments: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("run", None, "Folder of a run, or its URL.", flag_values=values)
    flags.DEFINE_integer("step", None, "Checkpoint; the newest by default.", flag_values=values)
    flags.DEFINE_string("output", None, "Folder for the pictures.", flag_values=values)
    flags.DEFINE_string("data", None, "Data in place of the run's.", flag_values=values)
    flags.DEFINE_string("split", None, "Of the data, such as test[:10%].", flag_values=values)
    flags.DEFINE_integer("rows", 8, "Examples to show.", lower_bound=1, flag_values=values)
    parse_only(values, "visualize", arguments)
    require(values, "visualize", "run")
    require(values, "visualize", "output")
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
    parse_only(values, "generate", arguments)
    for name in ("run", "output", "identities"):
        require(values, "generate", name)
    _start_jax()
    cli_generate.generate(values)
    return 0


def _convert(arguments: list[str]) -> int:
    values = flags.FlagValues()
    if any(a.startswith("--config") for a in arguments):
        define_config(values, arguments)
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
        "What --run is written as: official, timm or monai-vit (a file), hf-mae, hf-vit or "
        "hf-classifier (a folder). What --input holds is recognized.",
        flag_values=values,
    )
    config = parse(values, "convert", arguments)
    require(values, "convert", "output")
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


def _replay(arguments: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("run", None, "Folder of a run, or its URL.", flag_values=values)
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
    parse_only(values, "replay", arguments)
    require(values, "replay", "run")
    require(values, "replay", "step")
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
    define_config(values, arguments)
    config = parse(values, "verify", arguments)
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


WIDEST_TABLE = 80
"""Characters; terminals have room for them."""

VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "evaluate": _evaluate,
    "inspect": _inspect,
    "plan": _plan,
    "generate": _generate,
    "convert": _convert,
    "visualize": _visualize,
    "replay": _replay,
    "verify": _verify,
    "data": data_verb,
}


def score_table(rows: dict[str, dict[str, float]]) -> Table:
    """Scores in per cent, a row for each encoder and a column for each score; losses as they are.

    Where titles side by side would be wider than `WIDEST_TABLE`, scores are rows instead.
    The single score of a protocol is its top-1 accuracy. Of several, the protocol is named only
    where two have scores of the same name.
    """
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    short = [name.rpartition("/")[2] for name in names]
    titles = [
        score if short.count(score) == 1 else name for name, score in zip(names, short, strict=True)
    ]
    grid = [["features", *titles]]
    for title, row in rows.items():
        shown = {
            n: f"{x:.3f}" if n.endswith("entropy") else f"{100 * x:.1f}" for n, x in row.items()
        }
        grid.append([title, *(shown.get(name, "-") for name in names)])
    if sum(len(title) + len(" | ") for title in grid[0]) > WIDEST_TABLE:
        grid = [list(column) for column in zip(*grid, strict=True)]
        grid[0][0] = "score"
    table = Table(title="scores, %")
    for number, title in enumerate(grid[0]):
        table.add_column(title, justify="right" if number else "left")
    for cells in grid[1:]:
        table.add_row(*cells)
    return table


def _start_jax() -> None:
    """Keeps compiled programs between runs, unless the user chose a place already."""
    import jax
    from absl import logging

    logging.set_verbosity(logging.ERROR)  # Orbax warns of its own defaults

    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(home) / "mim_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
