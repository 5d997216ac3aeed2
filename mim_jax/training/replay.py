"""Any step of a run again, on one device and in float32, to see what happened in it.

A step is a function of (state, seed, step), and its batch one of (seed, step). So the nearest
checkpoint before it, and the steps in between, give back its state; nothing else has to be stored.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mim_jax import config as configs
from mim_jax import object_store
from mim_jax.data import Source
from mim_jax.data.configured import training_source
from mim_jax.data.decode import UnreadableImage
from mim_jax.data.on_device import denormalize
from mim_jax.data.records import record_of
from mim_jax.method import Batch
from mim_jax.training.activations import Activation, activations
from mim_jax.training.checkpoints import Checkpoints, checkpoint_steps, local_run
from mim_jax.training.contact_sheet import contact_sheet
from mim_jax.training.experiment import (
    Experiment,
    training_batches,
    training_rows,
)
from mim_jax.training.feed import HostBatch
from mim_jax.training.run_log import read_metrics
from mim_jax.training.state import TrainState
from mim_jax.training.step import micro_batches, step_key, stream_keys
from mim_jax.training.stretch import first_state, take_steps, without_host_entries
from mim_jax.training.tree import flatten

ROUND_OFF = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}
"""Relative difference of a loss that the run's compute type explains, against float32 on one
device. The first allows for TensorFloat-32, in which GPUs multiply float32 matrices by default."""

WITHOUT_EFFECT = ("mesh", "sharding", "checkpoint", "log", "evaluate", "export", "data.workers")
"""Beginnings of fields that change nothing in what a step computes."""

MOST_PATHS = 5
"""Paths in a message; there may be hundreds."""

MicroBatch = tuple[Batch, Mapping[str, jax.Array]]
"""What a method's loss gets: a batch, and a key for each of its streams."""


@dataclasses.dataclass(frozen=True)
class Replay:
    """What a step of a run turned out to be.

    Attributes:
        step: number of steps taken, this one included.
        start: number of steps taken where the replay began.
        logged: the run's metrics of the step, empty if it logged none.
        metrics: replayed: `loss`, those of the method, `grad_norm`.
        compute_dtype: in which the run computed.
        first_difference: first step before this one whose logged loss did not come out, or None.
        parameters: paths of parameters that are not finite before the step.
        gradients: paths of parameters whose gradient is not finite.
        modules: outputs of the forward pass in the order of execution, a list for each
            micro-batch; empty unless they were asked for or something is not finite.
        sheet: picture of the batch.
        notes: what else the user should know.
    """

    step: int
    start: int
    logged: dict[str, float]
    metrics: dict[str, float]
    compute_dtype: str
    first_difference: int | None
    parameters: list[str]
    gradients: list[str]
    modules: list[list[Activation]]
    sheet: Path
    notes: list[str]

    @property
    def agrees(self) -> bool | None:
        """Whether the logged loss came out, up to round-off; None if none was logged."""
        if "loss" not in self.logged:
            return None
        return _agree(self.logged["loss"], self.metrics["loss"], self.compute_dtype)

    @property
    def first_module(self) -> str | None:
        """Path of the first module whose output is not finite."""
        for micro_batch in self.modules:
            for activation in micro_batch:
                if not activation.finite:
                    return activation.module
        return None


def replay(
    run: str | Path,
    step: int,
    *,
    output: str | Path | None = None,
    modules: bool = False,
    console: Console | None = None,
) -> Replay:
    """Takes a step of a run again, and draws its batch.

    Args:
        run: folder of a run, or its URL, which may be in progress: nothing in it is changed.
        step: number of steps taken, as in the run's log; the first step is 1.
        output: PNG file to write; by default `batch_STEP.png` among the run's pictures.
        modules: look at every module's output, even if loss and gradient are finite.
        console: where to show progress.

    Raises:
        FileNotFoundError: the run, its data or the weights that it began with are not there.
        ValueError: it has no such step, or its checkpoint does not fit its config.
    """
    if object_store.object_url(run):
        if output is None:
            raise ValueError(f"{run} is in an object store: name the --output of the picture.")
        with local_run(run, lambda steps: _around(steps, step)) as copy:
            return replay(copy, step, output=output, modules=modules, console=console)
    run = Path(run)
    config, notes = _config_of_step(run, step)
    source = training_source(config)
    experiment = _on_one_device(config, training_rows(config, source))
    logged = {line["step"]: line for line in read_metrics(run) if "loss" in line}
    if not 1 <= step <= experiment.total_steps:
        raise ValueError(
            f"{run} has no step {step}; it has steps 1 to {experiment.total_steps}, and the last "
            f"in its log is {max(logged, default=0)}."
        )

    def differs(taken: int, loss: jax.Array) -> bool:
        expected = logged.get(taken)
        if expected is None:
            return False
        return not _agree(expected["loss"], float(loss), config.compute_dtype)

    with contextlib.closing(training_batches(config, source, step - 1, 1)) as batches:
        host_batch = next(batches)
    batch = without_host_entries(host_batch)
    with jax.default_matmul_precision("highest"):
        state = _state_of_checkpoint(run, experiment, source, batch, step)
        start = int(state.step)
        state, first_difference = _taken_before(step, state, experiment, source, differs, console)
        metrics, gradients = _gradient(experiment, state, batch)
        micro_batches = _prepared(experiment, batch, step)
        outputs = []
        if modules or not (math.isfinite(metrics["loss"]) and not gradients):
            outputs = _outputs(experiment, state, micro_batches)
    return Replay(
        step=step,
        start=start,
        logged=logged.get(step, {}),
        metrics=metrics,
        compute_dtype=config.compute_dtype,
        first_difference=first_difference,
        parameters=_not_finite(state.params),
        gradients=gradients,
        modules=outputs,
        sheet=_write_sheet(
            Path(output or run / "pictures" / f"batch_{step:08d}.png"),
            _images(config, micro_batches),
            _captions(source, host_batch),
        ),
        notes=notes,
    )


def _around(steps: list[int], step: int) -> list[int]:
    """Of the steps of checkpoints, the last before a step and the first from it on."""
    before = [saved for saved in steps if saved < step]
    return before[-1:] + [saved for saved in steps if saved >= step][:1]


def _config_of_step(run: Path, step: int) -> tuple[ml_collections.ConfigDict, list[str]]:
    """The config by which a run took a step, and a note if the run's file says otherwise by now."""
    path = run / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run} is no folder of a run: it has no config.json.")
    try:
        newest = configs.from_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} does not fit this version of mim_jax: {error}") from error
    later = [taken for taken in checkpoint_steps(run) if taken >= step]
    if not later:
        return newest, []
    with contextlib.closing(Checkpoints(run, newest, read_only=True)) as checkpoints:
        config = configs.from_json(checkpoints.about(later[0])["config"])
    now = configs.leaves(newest)
    notes = [
        f"{field} was {value!r} at step {step}, as replayed here; {path} now has {now.get(field)!r}"
        for field, value in configs.leaves(config).items()
        if value != now.get(field) and not field.startswith(WITHOUT_EFFECT)
    ]
    return config, notes


def _on_one_device(config: ml_collections.ConfigDict, examples: int) -> Experiment:
    config = config.copy_and_resolve_references()
    config.update(compute_dtype="float32", mesh=dict(data=1, fsdp=1, tensor=1))
    return Experiment.build(config, examples, jax.devices()[:1])


def _state_of_checkpoint(
    run: Path, experiment: Experiment, source: Source, batch: HostBatch, step: int
) -> TrainState:
    """The state of the newest checkpoint before a step, or that of a new run."""
    earlier = [taken for taken in checkpoint_steps(run) if taken < step]
    if not earlier:
        return first_state(experiment, source, batch)[0]
    with contextlib.closing(Checkpoints(run, experiment.config, read_only=True)) as checkpoints:
        return checkpoints.restore(experiment.abstract_state(batch), earlier[-1])


def _taken_before(
    step: int,
    state: TrainState,
    experiment: Experiment,
    source: Source,
    differs: Callable[[int, jax.Array], bool],
    console: Console | None,
) -> tuple[TrainState, int | None]:
    """Takes the steps before `step`; gives the state, and the first step whose loss differs."""
    start, first_difference = int(state.step), None
    count = step - 1 - start
    steps = track(
        take_steps(experiment, source, state, step - 1),
        f"taking {count} steps from step {start} on",
        count,
        console=console,
        transient=True,
        disable=count == 0,
    )
    for taken, (newest, metrics) in enumerate(steps, start + 1):
        state = newest
        if first_difference is None and differs(taken, metrics["loss"]):
            first_difference = taken
    return state, first_difference


def _gradient(
    experiment: Experiment, state: TrainState, batch: HostBatch
) -> tuple[dict[str, float], list[str]]:
    """Metrics of a step, and paths of parameters whose gradient is not finite."""
    gradient, metrics, _ = jax.jit(experiment.gradient())(state, batch)
    metrics = {**metrics, "grad_norm": optax.tree.norm(gradient)}
    return {name: float(value) for name, value in metrics.items()}, _not_finite(gradient)


def _not_finite(tree: Any) -> list[str]:
    """Paths of arrays that hold a NaN or an infinity."""
    return [path for path, array in flatten(tree).items() if not jnp.isfinite(array).all()]


def _prepared(experiment: Experiment, batch: HostBatch, step: int) -> list[MicroBatch]:
    """What the loss gets in a step, for each micro-batch: flipped, normalized, with its keys."""
    count = experiment.config.accumulate
    stacked = micro_batches(jax.tree.map(jnp.asarray, dict(batch)), count)
    found: list[MicroBatch] = []
    for i in range(count):
        rng = jax.random.fold_in(step_key(experiment.config.seed, jnp.int32(step - 1)), i)
        micro = {name: array[i] for name, array in stacked.items()}
        prepared = experiment.prepare(micro, stream_keys(rng, ("prepare",))["prepare"])
        found.append((prepared, stream_keys(rng, experiment.method.streams)))
    return found


def _outputs(
    experiment: Experiment, state: TrainState, batches: list[MicroBatch]
) -> list[list[Activation]]:
    """Outputs of all modules, for each micro-batch."""
    loss = experiment.method.loss
    return [activations(loss, state.variables, *micro, state.step) for micro in batches]


def _images(config: ml_collections.ConfigDict, batches: list[MicroBatch]) -> np.ndarray:
    """The images of a step in the order of its batch, uint8 `[batch, height, width, channels]`."""
    images = jnp.stack([batch["image"] for batch, _ in batches], axis=1)  # [B / n, n, H, W, C]
    images = images.reshape(-1, *images.shape[2:])
    if images.ndim == 5:  # of volumes, the plane in the middle, with the front at the top
        images = images[:, :, :, images.shape[3] // 2].swapaxes(1, 2)[:, ::-1]
    return np.asarray(denormalize(images, config.data.mean, config.data.std))


def _captions(source: Source, batch: HostBatch) -> list[list[str]]:
    """For each row its index in the source and, where they are known, label and file."""
    captions = []
    for row, index in enumerate(batch["index"].tolist()):
        lines = [f"{index} replaced" if batch["unreadable"][row] else f"{index}"]
        if "label" in batch:
            lines.append(_label(source, batch["label"][row]))
        lines.append(_file_name(source, index))
        captions.append([line for line in lines if line])
    return captions


def _file_name(source: Source, index: int) -> str:
    """Name of an example's file, empty where there is none."""
    try:
        record = record_of(source, index)
    except UnreadableImage as error:
        return str(error)
    return "" if record is None else record.get("name", "")


def _label(source: Source, label: np.ndarray) -> str:
    """Names of the classes of a row, or their numbers: of one label, or of a 0/1 vector."""
    classes = np.flatnonzero(label) if label.ndim else [int(label)]
    return ", ".join(source.class_names[c] if source.class_names else str(c) for c in classes)


def _write_sheet(path: Path, images: np.ndarray, captions: list[list[str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(contact_sheet(images, captions)).save(path)
    return path


def _agree(logged: float, replayed: float, compute_dtype: str) -> bool:
    """Whether two losses are the same up to round-off, or both not finite."""
    if not math.isfinite(logged) or not math.isfinite(replayed):
        return math.isfinite(logged) == math.isfinite(replayed)
    return abs(replayed - logged) <= ROUND_OFF[compute_dtype] * abs(logged)


def report(found: Replay) -> list[str | Table]:
    """What a person reads of a replay: verdicts, and tables of metrics and of modules."""
    metrics = Table(title=f"step {found.step}", title_justify="left")
    for column in ("metric", "logged", "replayed"):
        metrics.add_column(column, justify="left" if column == "metric" else "right")
    for name, value in found.metrics.items():
        logged = f"{found.logged[name]:.7g}" if name in found.logged else "-"
        metrics.add_row(name, logged, f"{value:.7g}")
    parts: list[str | Table] = [*found.notes, metrics, *_verdict(found), *_not_finite_lines(found)]
    if found.modules:
        parts.append(_module_table(found.modules))
    return [*parts, f"batch: {found.sheet}"]


def _verdict(found: Replay) -> list[str]:
    """Whether the logged loss came out, and where the run went another way if it did not."""
    if found.agrees is None:
        return ["the run did not log this step, so there is no loss to compare with"]
    logged, loss = found.logged["loss"], found.metrics["loss"]
    allowed = f"{found.compute_dtype} round-off ({ROUND_OFF[found.compute_dtype]:.0e} of the loss)"
    difference = f"logged {logged:.7g}, replayed {loss:.7g}, difference {loss - logged:.2g}"
    if found.agrees:
        return [f"the loss is that of the run, within {allowed}: {difference}"]
    lines = [f"the loss is not that of the run, by more than {allowed}: {difference}"]
    if math.isfinite(loss) and not math.isfinite(logged):
        lines.append(f"finite in float32: in the run, {found.compute_dtype} overflowed")
    if found.first_difference:
        lines.append(f"the first logged loss that does not come out is at {found.first_difference}")
    lines.append(
        "what may differ from the run: the data (files added, removed or replaced), the weights "
        "of init_from, a config changed in between, or library versions (versions.json)"
    )
    return lines


def _not_finite_lines(found: Replay) -> list[str]:
    """What is not finite, from the cause to the effect."""
    lines = []
    if found.parameters:
        lines.append(f"parameters that are not finite: {_shortened(found.parameters)}")
    if found.first_module:
        lines.append(f"first module whose output is not finite: {found.first_module}")
    elif not math.isfinite(found.metrics["loss"]):
        lines.append("all modules' outputs are finite, but the loss computed from them is not")
    if found.gradients:
        lines.append(f"gradients that are not finite: {_shortened(found.gradients)}")
    return lines or ["loss and gradients are finite"]


def _shortened(paths: list[str]) -> str:
    more = len(paths) - MOST_PATHS
    return ", ".join(paths[:MOST_PATHS]) + (f" and {more} more" if more > 0 else "")


def _module_table(micro_batches: list[list[Activation]]) -> Table:
    """The greatest absolute value of each module's output, over all micro-batches."""
    table = Table(title="modules in the order of execution", title_justify="left")
    table.add_column("module", overflow="fold")
    table.add_column("largest |output|", justify="right")
    for calls in zip(*micro_batches, strict=True):
        # NaN is not comparable, and tells more than infinity.
        largest = max((call.largest for call in calls), key=lambda x: (math.isnan(x), x))
        table.add_row(calls[0].module, f"{largest:.4g}")
    return table
