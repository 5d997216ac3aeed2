"""The train loop, the only one: reads batches, steps, logs, saves, evaluates, and resumes."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import jax
import ml_collections
import numpy as np
from rich.console import Console

from mim_jax import config as configs
from mim_jax.conversion.export import check_formats, export_variables
from mim_jax.data import Source
from mim_jax.data.configured import training_source
from mim_jax.evaluation.classification import draw_confusion
from mim_jax.evaluation.protocols import (
    check_labels,
    check_protocols,
    compare_with_baselines,
    evaluate,
)
from mim_jax.training.bottleneck import DataDoctor
from mim_jax.training.checkpoints import Checkpoints, SaveFailed, read_variables
from mim_jax.training.derived import as_text, check_domains, derive
from mim_jax.training.experiment import (
    Experiment,
    training_batches,
    training_rows,
)
from mim_jax.training.feed import DeviceBatch, DeviceFeed, HostBatch
from mim_jax.training.flops import peak_flops_of
from mim_jax.training.gallery import (
    PictureFunction,
    drawn,
    picture_batch,
    picture_function,
    picture_source,
)
from mim_jax.training.interruption import Interrupted, Interruption
from mim_jax.training.restore_progress import telling_progress
from mim_jax.training.run_folder import RunFolder
from mim_jax.training.run_log import RunLog
from mim_jax.training.sharding import batch_sharding
from mim_jax.training.state import TrainState
from mim_jax.training.stretch import first_state
from mim_jax.training.versions import versions
from mim_jax.training.watchdog import Watchdog

STEPS_LATE = 2
"""How many steps later metrics are fetched, so that the host never waits for the newest step."""

LAST_TRIES = 3
"""How often it is tried to write the last checkpoint of a run."""

SECONDS_BETWEEN_TRIES = 1.0

DEAD_WORKER = "Worker process was terminated"
"""What Grain says when a process that reads data ends by itself."""

MOST_DEATHS = 3
"""How often in a row, without a batch between, such processes are started again."""

Metrics = dict[str, jax.Array]

SUFFIX = ".safetensors"
"""Of exported weights that are one file; it needs no PyTorch."""


class TrainingStopped(RuntimeError):
    """A run cannot go on; the message says why and what to do."""


@dataclasses.dataclass
class Result:
    """What a run leaves behind in memory.

    Attributes:
        state: the final state.
        evaluation: scores by row ("trained", "untrained", "raw pixels") and protocol.
        picture: the newest picture file, or None.
        folder: everything else.
    """

    state: TrainState
    evaluation: dict[str, dict[str, float]]
    picture: Path | str | None
    folder: Path | str


def train(
    config: ml_collections.ConfigDict,
    folder: str | Path,
    *,
    devices: Sequence[jax.Device] | None = None,
    console: Console | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Result:
    """Trains, or goes on where an earlier call with the same folder stopped.

    Args:
        config: a complete config, see `mim_jax.config.load`.
        folder: of the run: config, versions, metrics, pictures and checkpoints; or its URL, see
            `mim_jax.training.run_folder`.
        devices: devices to use; all by default.
        console: where to print.
        on_step: called with the number of steps taken after each step was dispatched.

    Raises:
        ValueError: if anything in the config, the data or the folder does not fit together.
        TrainingStopped: if the loss stays non-finite, too many images are unreadable, or memory
            is short.
        Interrupted: after SIGTERM or SIGINT, once everything is saved.
    """
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(RunFolder(folder))
        folder = place.local
        config, settings = derive(config, folder, devices)
        watchdog = stack.enter_context(
            Watchdog(
                config.log.watchdog_seconds,
                config.log.watchdog_exit_seconds,
                process=jax.process_index(),
                processes=jax.process_count(),
            )
        )
        watchdog.at(f"opening {config.data.source}")
        source = training_source(config)
        check_domains(config, source)
        experiment = Experiment.build(config, training_rows(config, source), devices)
        check_protocols(config.evaluate.protocols, experiment.method)
        check_labels(config)
        check_formats(config.export.formats, experiment.method, config)
        config = experiment.config
        interruption = stack.enter_context(Interruption(experiment.mesh))
        checkpoints = Checkpoints(place.checkpoints, config)
        stack.callback(checkpoints.close)
        place.follow(checkpoints.steps)
        damaged = checkpoints.drop_damaged()
        first_step = checkpoints.latest_step() or 0
        log = stack.enter_context(
            RunLog(
                folder,
                total_steps=experiment.total_steps,
                first_step=first_step,
                is_main=jax.process_index() == 0,
                tensorboard=config.log.tensorboard,
                wandb=config.log.wandb,
                config=config.to_dict(),
                console=console,
            )
        )
        for text in damaged:
            log.warn(text)
        if settings:
            log.note(f"derived settings, each of which may be set:\n{as_text(settings)}")
        _write_about(folder, config, log)
        place.keep(strict=True)
        run = _Run(experiment, source, place, log, checkpoints, interruption, watchdog, on_step)
        try:
            return run.train(first_step)
        except jax.errors.JaxRuntimeError as error:
            raise _explained(error, config) from error


class _Run:
    """One call of `train`: what its parts share."""

    def __init__(
        self,
        experiment: Experiment,
        source: Source,
        place: RunFolder,
        log: RunLog,
        checkpoints: Checkpoints,
        interruption: Interruption,
        watchdog: Watchdog,
        on_step: Callable[[int], None] | None,
    ) -> None:
        self.experiment = experiment
        self.config = experiment.config
        self.source = source
        self.place = place
        self.folder = place.local
        self.log = log
        self.checkpoints = checkpoints
        self.interruption = interruption
        self.watchdog = watchdog
        self.on_step = on_step or (lambda step: None)
        self.pending: collections.deque[tuple[int, DeviceBatch, Metrics]] = collections.deque()
        self.meter: _Meter  # made before the first step
        self.doctor = DataDoctor(self.config)
        self.picture_path: Path | None = None
        self.failed_saves = 0
        self.rows_read = 0
        self.rows_unreadable = 0

    def train(self, first_step: int) -> Result:
        """Runs all remaining steps, then evaluates."""
        total = self.experiment.total_steps
        with contextlib.closing(self._host_batches(first_step)) as host_batches:
            self.watchdog.at(f"waiting for the batch of step {first_step + 1}")
            first_batch = next(host_batches)
            self.experiment.method.check(first_batch)
            state = self._state(first_step, first_batch)
            if first_step < total:
                state = self._steps(state, first_step, first_batch, host_batches)
                self._save_last(state, total)
        self.interruption.release()  # all is saved: from here on a signal may simply end the run
        with self.watchdog.patient("evaluating"):
            self._pictures(state, total)
            evaluation = self._final_evaluation(state, first_batch)
            self._export(total)
        picture = self.picture_path and self.place.public(self.picture_path)
        return Result(state, evaluation, picture, self.place.name)

    def _host_batches(self, first_step: int) -> Generator[HostBatch, None, None]:
        for batch in self._batches_despite_deaths(first_step):
            self._count_unreadable(batch.pop("unreadable"))
            self.doctor.made(batch.pop("seconds"))
            del batch["index"]
            yield batch

    def _batches_despite_deaths(
        self, first_step: int
    ) -> Generator[dict[str, np.ndarray], None, None]:
        """The batches; when a worker dies, new workers go on with the batch that is missing."""
        step, deaths = first_step, 0
        while True:  # a run that is finished asks for one more, to make its state by
            batches = training_batches(self.config, self.source, step, timed=True)
            try:
                with contextlib.closing(batches):
                    for batch in batches:
                        yield batch
                        step, deaths = step + 1, 0
                return
            except RuntimeError as error:
                if DEAD_WORKER not in str(error):
                    raise
                deaths += 1
                told = (
                    f"a process that reads data died ({error}). The system may have ended it for "
                    "lack of memory, or a library crashed on a file"
                )
                if deaths > MOST_DEATHS:
                    raise TrainingStopped(
                        f"{told}. It happened {deaths} times in a row at the batch of step "
                        f"{step + 1}. Set fewer data.workers, or 0 to see the error of a library."
                    ) from error
                self.log.warn(f"{told}; new ones go on with the batch of step {step + 1}.")

    def _count_unreadable(self, unreadable: np.ndarray) -> None:
        self.rows_read += len(unreadable)
        self.rows_unreadable += int(unreadable.sum())
        share = self.rows_unreadable / self.rows_read
        enough = self.rows_read >= min(1000, len(self.source))
        if enough and share > self.config.data.max_unreadable:
            raise TrainingStopped(
                f"{self.rows_unreadable} of {self.rows_read} images of {self.source.name} could "
                f"not be read ({share:.1%}; data.max_unreadable allows "
                f"{self.config.data.max_unreadable:.1%}). The warnings above name the files: mend "
                "or remove them, or raise the limit."
            )

    def _state(self, first_step: int, batch: HostBatch) -> TrainState:
        """The state of the newest checkpoint, or a new one."""
        if self.checkpoints.latest_step() is not None:
            self.watchdog.at(f"restoring the checkpoint of step {first_step}")
            folder = self.checkpoints.folder / str(first_step)
            with telling_progress(self.log.note, first_step, folder):
                state = self.checkpoints.restore(self.experiment.abstract_state(batch))
            self.log.note(f"resumed from step {first_step} of {self.experiment.total_steps}")
            return state
        self.watchdog.at("making the first state")
        state, notes = first_state(self.experiment, self.source, batch)
        for note in notes:
            self.log.note(note)
        return state

    def _steps(
        self,
        state: TrainState,
        first_step: int,
        first_batch: HostBatch,
        more_batches: Iterator[HostBatch],
    ) -> TrainState:
        experiment, config, total = self.experiment, self.config, self.experiment.total_steps
        self._announce(state, first_batch)
        started = time.perf_counter()
        with self.watchdog.patient("compiling the train step"):
            step_function = experiment.compiled_step(first_batch)
        self.log.note(f"compiled the train step in {time.perf_counter() - started:.1f} s")
        batches = itertools.chain([first_batch], more_batches)
        feed = DeviceFeed(batches, batch_sharding(experiment.mesh))
        self.meter = _Meter(config, experiment.flops_per_step(first_batch), experiment.mesh.size)
        metrics: dict[str, jax.Array] = {}
        for step in range(first_step + 1, total + 1):
            self.watchdog.at(f"waiting for the batch of step {step}")
            batch = next(feed)
            self.watchdog.at(f"computing step {step}")
            # Waiting counts only if the devices had nothing left to do by the time data came.
            idle = not metrics or metrics["loss"].is_ready()  # type: ignore[attr-defined]
            self.meter.waited(feed, idle)
            state, metrics = step_function(state, batch)
            self.pending.append((step, batch, metrics))
            if len(self.pending) > STEPS_LATE:
                self._record(*self.pending.popleft())
            self.on_step(step)
            if self.interruption.reached():
                self._leave(state, step)
            with self.meter.paused(), self.watchdog.patient("drawing or evaluating"):
                if self._due(step, config.log.pictures_every_steps) and step < total:
                    self._pictures(state, step)
                scores = self._scores(state, step) if step < total else None
            if scores or (step < total and self._due(step, config.checkpoint.every_steps)):
                self.save(state, step, scores)
        return state

    def _announce(self, state: TrainState, batch: HostBatch) -> None:
        config, mesh = self.config, self.experiment.mesh
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        self.log.note(
            f"{config.method}: {parameters / 1e6:.2f} M parameters, {len(self.source):,} images "
            f"of {self.source.name}, {self.experiment.total_steps:,} steps of "
            f"{config.batch_size} ({config.compute_dtype}) on {mesh.size} x "
            f"{mesh.devices.flat[0].device_kind} ({shape})"
        )

    @staticmethod
    def _due(step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def _record(self, step: int, batch: DeviceBatch, metrics: Metrics) -> None:
        """Fetches the metrics of a step that is done by now, shows and logs them."""
        self.meter.wait_for(batch)
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.watchdog.finished(step)
        meter = self.meter
        meter.steps += 1
        if values["skipped_in_row"]:
            self.log.warn(
                f"step {step}: loss {values['loss']:.4g} or gradient norm "
                f"{values['grad_norm']:.4g} is not finite; the update was skipped"
            )
        if values["skipped_in_row"] >= self.config.max_nonfinite:
            raise TrainingStopped(
                f"the loss or gradient was not finite in {self.config.max_nonfinite} steps in a "
                f"row, the last at step {step}. Lower optimizer.base_lr, set optimizer.clip_norm, "
                "or use compute_dtype=float32; the last checkpoint before this is step "
                f"{self.checkpoints.latest_step()}."
            )
        self.log.progress(
            step,
            loss=values["loss"],
            images_per_second=meter.images_per_second,
            data_wait=meter.data_wait,
        )
        total = self.experiment.total_steps
        if self._due(step, self.config.log.every_steps) or step == total:
            epoch = step / self.experiment.steps_per_epoch
            # The step's own values, not means: they are the same however the run was interrupted.
            own = {name: values[name] for name in sorted(values, key=lambda name: name != "loss")}
            advice = self.doctor.advice(meter.seconds, meter.waiting, meter.transfer)
            self.log.metrics(step, {"epoch": epoch, **own, **meter.read()})
            if advice:
                self.log.note(advice)

    def _record_all(self) -> None:
        while self.pending:
            self._record(*self.pending.popleft())

    def _leave(self, state: TrainState, step: int) -> None:
        """Saves and raises, after a signal."""
        self._save_last(state, step)
        raise Interrupted(
            f"{self.interruption.requested} at step {step}: everything is saved in "
            f"{self.place.name}; start the same command again to go on"
        )

    def _save_last(self, state: TrainState, step: int) -> None:
        """Saves, and returns when it is on disk.

        There is no later checkpoint to make up for it, so one that fails is tried again.

        Raises:
            SaveFailed: if it fails each time.
        """
        self.watchdog.at("writing the last checkpoint")
        for attempt in range(LAST_TRIES):
            if attempt:
                time.sleep(SECONDS_BETWEEN_TRIES)  # what is left of the failed one may still end
            failure = None
            try:
                self.save(state, step)
                self.checkpoints.wait()
            except SaveFailed as error:
                if jax.process_count() > 1:
                    raise
                failure = error
            newest = self.checkpoints.latest_step()
            if newest == step:
                return
        raise failure or SaveFailed(
            f"the checkpoint of step {step} could not be written, see the last warning; the last "
            f"one saved is step {newest}. Start the same command again to go on from it"
        )

    def save(self, state: TrainState, step: int, scores: dict[str, float] | None = None) -> None:
        """Starts to write a checkpoint, once everything up to its step is in the log."""
        self._record_all()
        self.place.keep()
        best = self.config.checkpoint.best_metric
        if best and scores is not None and best not in scores:
            raise ValueError(
                f"checkpoint.best_metric is {best!r}, but the evaluation gives {sorted(scores)}."
            )
        self.watchdog.at(f"saving the checkpoint of step {step}")
        try:
            self.checkpoints.save(state, step, scores)
        except SaveFailed as error:
            self.failed_saves += 1
            limit = self.config.checkpoint.max_failed
            if jax.process_count() > 1 or self.failed_saves >= limit:
                raise
            self.log.warn(
                f"{error} Training goes on, and tries again at the next checkpoint; it stops after "
                f"{limit} failures in a row (checkpoint.max_failed)."
            )
        else:
            self.failed_saves = 0

    def _pictures(self, state: TrainState, step: int) -> None:
        if not self.config.log.pictures_every_steps:
            return
        for name, picture in self._picture_function(state.variables).items():
            self.picture_path = self.log.picture(step, name, drawn(picture, self.config))

    @functools.cached_property
    def _picture_function(self) -> PictureFunction:
        batch = picture_batch(self.config, picture_source(self.config))
        return picture_function(self.experiment, batch)

    def _scores(self, state: TrainState, step: int) -> dict[str, float] | None:
        """Evaluation at the set interval, or None."""
        settings = self.config.evaluate
        every = round(settings.every_epochs * self.experiment.steps_per_epoch)
        if not settings.protocols or not self._due(step, every):
            return None
        self._record_all()
        scores = evaluate(self.experiment.method, state.variables, self.config)
        self.log.metrics(step, {f"eval/{name}": score for name, score in scores.items()})
        return scores

    def _final_evaluation(self, state: TrainState, batch: HostBatch) -> dict[str, dict[str, float]]:
        if not self.config.evaluate.protocols:
            return {}
        rows = compare_with_baselines(
            self.experiment.method,
            state.variables,
            self.config,
            untrained_variables=self.experiment.initial_state(batch).variables,
        )
        if "classification" in self.config.evaluate.protocols:
            picture = draw_confusion(self.experiment.method, state.variables, self.config)
            if picture is not None:
                self.picture_path = self.log.picture(
                    self.experiment.total_steps, "confusion", picture
                )
        if jax.process_index() == 0:
            (self.folder / "evaluation.json").write_text(json.dumps(rows, indent=2))
        return rows

    def _export(self, step: int) -> None:
        """Writes the weights of the last checkpoint in every format of `export.formats`."""
        if not self.config.export.formats or jax.process_index() != 0:
            return
        variables, _ = read_variables(self.place.checkpoints, step)
        for name in self.config.export.formats:
            output = self.folder / "export" / f"{name}{'' if name.startswith('hf-') else SUFFIX}"
            method = self.experiment.method
            # PyTorch stays out of training code, so the reader's own check is left to `convert`.
            notes = export_variables(
                method, self.config, variables, output, name, step=step, run_library=False
            )
            self.log.note(notes)


class _Meter:
    """Rates between two log lines."""

    def __init__(self, config: ml_collections.ConfigDict, flops: float, devices: int) -> None:
        self.batch_size = config.batch_size
        self.flops = flops
        self.peak = peak_flops_of(jax.devices()[0], config.compute_dtype) * devices
        self._feed_before = (0.0, 0.0)
        self._restart()

    def _restart(self) -> None:
        self.start = time.perf_counter()
        self.waiting = 0.0  # seconds in which the devices waited for a batch to be made
        self.transfer = 0.0  # and for one on its way to them
        self.steps = 0

    def waited(self, feed: DeviceFeed, idle: bool) -> None:
        """Adds what the feed has taken since the last call, if the devices were idle."""
        now = (feed.seconds_waited, feed.seconds_sending)
        if idle:
            self.waiting += now[0] - self._feed_before[0]
            self.transfer += now[1] - self._feed_before[1]
        self._feed_before = now

    def wait_for(self, batch: DeviceBatch) -> None:
        """Waits for the batch of the oldest step that is not done, before its metrics are awaited.

        All steps before it are done, so the devices have nothing to do until the batch is there.
        """
        started = time.perf_counter()
        jax.block_until_ready(batch)
        self.transfer += time.perf_counter() - started

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time that is spent inside."""
        started = time.perf_counter()
        yield
        self.start += time.perf_counter() - started

    @property
    def seconds(self) -> float:
        """Time since the last log line, pauses left out."""
        return max(time.perf_counter() - self.start, 1e-9)

    @property
    def images_per_second(self) -> float:
        """Images of the whole mesh in a second."""
        return self.steps * self.batch_size / self.seconds

    @property
    def data_wait(self) -> float:
        """Share of the time in which the devices waited for data, in [0, 1]."""
        return min(1.0, (self.waiting + self.transfer) / self.seconds)

    def read(self) -> dict[str, float]:
        """The rates; starts the next interval."""
        line = {
            "images_per_second": self.images_per_second,
            "model_flops_utilization": self.steps * self.flops / self.seconds / self.peak,
            "data_wait": self.data_wait,
        }
        self._restart()
        return line


def _write_about(folder: Path, config: ml_collections.ConfigDict, log: RunLog) -> None:
    """Writes config and versions, and says what differs from an earlier start of the run."""
    if jax.process_index() != 0:
        return
    path = folder / "config.json"
    if path.is_file():
        before = configs.leaves(configs.from_json(path.read_text()))
        for field, value in configs.leaves(config).items():
            if before.get(field) != value:
                log.warn(f"{field} was {before.get(field)!r} and is now {value!r}")
    for name, text in (
        ("config.json", configs.to_json(config)),
        ("versions.json", json.dumps(versions(), indent=2)),
    ):
        temporary = folder / f".{name}.tmp"
        temporary.write_text(text)
        os.replace(temporary, folder / name)


def _explained(error: Exception, config: ml_collections.ConfigDict) -> Exception:
    """An out-of-memory error with the settings that help; any other error as it is."""
    if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
        return error
    return TrainingStopped(
        f"out of memory: {str(error).splitlines()[0]}\n"
        f"Smaller with: accumulate (now {config.accumulate}) x 2, batch_size (now "
        f"{config.batch_size}), model.remat=full, compute_dtype=bfloat16 (now "
        f"{config.compute_dtype}), or mesh.fsdp with sharding.strategy=fsdp over several devices."
    )
