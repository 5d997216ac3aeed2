"""Whether a config trains here as it did where its reference losses were measured."""

import contextlib
import dataclasses
from collections.abc import Collection, Sequence

import jax
import ml_collections
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mim_jax.data import Source
from mim_jax.data.configured import training_source
from mim_jax.data.decode import choose_backend
from mim_jax.training.experiment import (
    Experiment,
    training_batches,
    training_rows,
)
from mim_jax.training.stretch import first_state, take_steps, without_host_entries
from mim_jax.training.versions import versions


@dataclasses.dataclass(frozen=True)
class Point:
    """The loss of one step.

    Attributes:
        step: number of steps taken.
        expected: by the config's reference.
        measured: here.
        band: largest relative difference that counts as the same.
    """

    step: int
    expected: float
    measured: float
    band: float

    @property
    def difference(self) -> float:
        """Relative to the expected loss."""
        return self.measured / self.expected - 1

    @property
    def agrees(self) -> bool:
        """Whether the difference is within the band; a loss that is not finite never is."""
        return abs(self.difference) <= self.band


def verify(
    config: ml_collections.ConfigDict,
    *,
    devices: Sequence[jax.Device] | None = None,
    console: Console | None = None,
) -> list[Point]:
    """Trains up to the last step of the config's reference; nothing is written.

    The type "auto" means float32 here, on every device, with matrix products in full precision:
    what differs by more than the band then differs by more than round-off.

    Args:
        config: a complete config with a `reference`.
        devices: devices to use; all by default.
        console: where to show progress.

    Raises:
        ValueError: if the config has no reference, or it does not fit the run.
    """
    expected = _reference(config)
    config = config.copy_and_resolve_references()
    config.compute_dtype = _compute_dtype(config)
    source = training_source(config)
    experiment = Experiment.build(config, training_rows(config, source), devices)
    last_step = max(expected)
    if last_step > experiment.total_steps:
        raise ValueError(
            f"the reference goes to step {last_step}, but the run ends at step "
            f"{experiment.total_steps}; leave epochs, steps, batch_size and data as they are."
        )
    with jax.default_matmul_precision("highest"):
        losses = _losses(experiment, source, expected, console)
    return [Point(step, loss, losses[step], band) for step, (loss, band) in expected.items()]


def _losses(
    experiment: Experiment, source: Source, wanted: Collection[int], console: Console | None
) -> dict[int, float]:
    """Losses of the wanted steps of a new run."""
    with contextlib.closing(training_batches(experiment.config, source, 0, 1)) as batches:
        state, _ = first_state(experiment, source, without_host_entries(next(batches)))
    steps = track(
        take_steps(experiment, source, state, max(wanted)),
        f"training {max(wanted)} of {experiment.total_steps} steps",
        max(wanted),
        console=console,
        transient=True,
    )
    losses = {step: metrics["loss"] for step, (_, metrics) in enumerate(steps, 1) if step in wanted}
    return {step: float(loss) for step, loss in losses.items()}


def _reference(config: ml_collections.ConfigDict) -> dict[int, tuple[float, float]]:
    """Expected loss and band by step."""
    reference = config.reference
    if not reference.steps:
        raise ValueError(
            f"the config of {config.method} carries no reference losses to verify by; "
            "mae:tiny does. Your own go into config.reference: steps, loss, band."
        )
    lengths = {name: len(reference[name]) for name in ("steps", "loss", "band")}
    if len(set(lengths.values())) > 1 or min(reference.steps) < 1:
        raise ValueError(
            "config.reference needs as many losses and bands as steps, and steps from 1 on; got "
            f"steps={reference.steps}, loss={reference.loss}, band={reference.band}."
        )
    return dict(zip(reference.steps, zip(reference.loss, reference.band)))


def explanation(
    points: Sequence[Point], config: ml_collections.ConfigDict, changed: Sequence[str] = ()
) -> str:
    """The verdict in words and, where losses differ, what may be the reason.

    Args:
        points: from `verify`.
        config: the config that it got.
        changed: fields that are not as in the config's file.
    """
    if all(point.agrees for point in points):
        return f"{config.method} trains here as it should: all losses agree."
    lines = ["The losses differ from the reference."]
    if not points[0].agrees and points[0].step == 1:
        lines.append("They do so from the first step on, which no update has touched yet: other")
        lines[-1] += " data, initial values, random numbers, or an error in the forward pass."
    elif points[0].step == 1:
        lines.append("The first step agrees, so data and forward pass do: look at the updates.")
    reasons = {
        "fields changed": ", ".join(changed) or "none",
        "compute type": f"{_compute_dtype(config)}; the reference has float32",
        "images": f"{config.data.source}, resized by {choose_backend(config.data.backend)}; "
        "the reference has opencv",
        "device": jax.devices()[0].device_kind,
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    return "\n".join([*lines, *(f"  {name}: {value}" for name, value in reasons.items())])


def _compute_dtype(config: ml_collections.ConfigDict) -> str:
    """Float32 unless the config wants something else: lower precision soon goes ways of its own."""
    return "float32" if config.compute_dtype == "auto" else config.compute_dtype


def verdict_table(points: Sequence[Point]) -> Table:
    """Expected and measured losses, a row for each step."""
    table = Table(title="loss; difference and band relative to it")
    for column in ("step", "expected", "measured", "difference", "band", "verdict"):
        table.add_column(column, justify="right")
    for point in points:
        table.add_row(
            str(point.step),
            f"{point.expected:.5f}",
            f"{point.measured:.5f}",
            f"{point.difference:+.1e}",
            f"{point.band:.1e}",
            "agrees" if point.agrees else "[red]differs",
        )
    return table
