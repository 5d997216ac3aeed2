"""Checkpoints of a run: Orbax, asynchronous, atomic, sharded.

A checkpoint has three items: `variables` (parameters and mutable collections, all that evaluation
needs), `progress` (step, optimizer state, counters) and `about` (config, method, versions). It can
be restored onto any mesh. Once it is complete, a thread writes checksums of its files into it; at
`gs://` that is left to the store, which has checksums of its own.
"""

import contextlib
import json
import logging
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import absl.logging
import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from mim_jax import config as configs
from mim_jax import object_store
from mim_jax.training import checksums
from mim_jax.training.state import TrainState
from mim_jax.training.tree import differences, flatten, unflatten
from mim_jax.training.versions import versions

FOLDER = "checkpoints"

DAMAGED = "damaged_checkpoints"
"""Where damaged checkpoints of a run are put."""

COMMITTED = "commit_success.txt"
"""The file by which a checkpoint in an object store is complete, written last; Orbax's name."""

SECONDS_BETWEEN_LOOKS = 0.2
"""How often it is looked whether a checkpoint is complete."""


LONGEST_REASON = 300
"""Characters of an error of Orbax that are shown."""

_log = logging.getLogger(__name__)


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; those before it are as they were."""


def _manager(
    folder: Path | epath.Path, options: ocp.CheckpointManagerOptions
) -> ocp.CheckpointManager:
    handlers = {
        "variables": ocp.StandardCheckpointHandler(),
        "progress": ocp.StandardCheckpointHandler(),
        "about": ocp.JsonCheckpointHandler(),
    }
    # Orbax warns that a folder opened for reading is opened for reading.
    log = absl.logging.get_absl_logger()
    level = log.level
    try:
        if options.read_only:
            log.setLevel("ERROR")
        return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)
    finally:
        log.setLevel(level)


def _variables(state: TrainState) -> dict[str, Any]:
    return state.variables


def _progress(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "opt_state": state.opt_state,
        "skipped": state.skipped,
        "skipped_in_row": state.skipped_in_row,
    }


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self, run: Path | str, config: ml_collections.ConfigDict, *, read_only: bool = False
    ) -> None:
        """Opens the checkpoints below a run's folder, and creates it if it is not there.

        Leftovers of a save that was cut short are removed; they were never complete.

        Args:
            run: folder of the run, or its URL at gs://.
            config: the run's config; `config.checkpoint` says what is kept.
            read_only: change nothing; the folder must be there, and a run may be writing to it.
        """
        settings = config.checkpoint
        self._url = object_store.object_url(run)
        self.folder: Path | epath.Path = (Path(run) / FOLDER).absolute()
        if self._url:
            self.folder = epath.Path(self._url) / FOLDER
        self._config = config
        self._seals: list[_Seal] = []
        self._last_started: int | None = None
        # Those of the libraries of object stores are of many kinds.
        self._errors = (Exception,) if self._url else (OSError, ValueError)
        options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
        if not read_only:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(_preserved(settings)),
                enable_async_checkpointing=settings.asynchronous,
                cleanup_tmp_directories=True,
            )
        self._options = options
        self._manager = _manager(self.folder, options)

    def drop_damaged(self) -> list[str]:
        """Moves checkpoints whose files are not what was written out of the way, newest first.

        To be called by all processes. It stops at the first one that is whole (or was not sealed
        with checksums before its process ended).

        Returns:
            What was found, a text for each damaged checkpoint.

        Raises:
            ValueError: if there are checkpoints, but all of them are damaged.
        """
        notes: list[str] = []
        if self._url:
            return notes  # the store has checksums of its own
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            problems = self._damage(step)
            if not problems:
                break
            where = self._set_aside(step)
            more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
            notes.append(
                f"the checkpoint of step {step} is damaged: {problems[0]}{more}. It was moved to "
                f"{where}, and the one before it is used"
            )
        else:
            if steps:
                raise ValueError(
                    f"all checkpoints of {self.folder.parent} are damaged, steps {steps}; they "
                    f"were moved to {self.folder.parent / DAMAGED}. Bring back a copy of one, or "
                    "start anew in another --workdir."
                )
        return notes

    def _damage(self, step: int) -> list[str]:
        """What is wrong with the files of a step, as all processes see it together."""
        folder = Path(self.folder) / str(step)
        found = checksums.damage(folder, jax.process_index(), jax.process_count())
        if jax.process_count() == 1:
            return found
        anywhere = multihost_utils.process_allgather(np.array(len(found)))
        return found or ["another process found it so"] * int(np.any(anywhere))

    def _set_aside(self, step: int) -> Path:
        target = Path(self.folder).parent / DAMAGED / str(step)
        if jax.process_index() == 0:
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            shutil.move(self.folder / str(step), target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager.reload()
        return target

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are kept."""
        return list(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int, metrics: dict[str, float] | None = None) -> None:
        """Starts to write a checkpoint; returns before it is on disk if asynchronous.

        Raises:
            SaveFailed: if this one, or the one that was started before, could not be written; in
                the second case this one was started all the same.
        """
        if step in self._manager.all_steps():
            return
        failure = None
        try:
            self.wait()
        except SaveFailed as error:
            failure = error
        about = {
            "method": self._config.method,
            "config": json.loads(configs.to_json(self._config)),
            "versions": versions(),
        }
        self._last_started = step
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    variables=ocp.args.StandardSave(_variables(state)),
                    progress=ocp.args.StandardSave(_progress(state)),
                    about=ocp.args.JsonSave(about),
                ),
                metrics=metrics,
                force=True,
            )
        except self._errors as error:
            raise self._failed(error) from error
        if self._config.checkpoint.checksums and not self._url:
            self._seals.append(_Seal(Path(self.folder) / str(step)))
        if failure is not None:
            raise failure

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """The state of a step (the newest by default), laid out like `like`.

        Args:
            like: `jax.ShapeDtypeStruct` leaves with shardings.
            step: which checkpoint.

        Raises:
            ValueError: if it belongs to another method or model; lists what differs.
        """
        step = self._manager.latest_step() if step is None else step
        where = self.folder / str(step)
        written_by = self.about(step)["method"]
        if written_by != self._config.method:
            raise ValueError(
                f"{where} was written by method {written_by!r}, but the config asks for "
                f"{self._config.method!r}; choose another --workdir."
            )
        self._check_shapes(like, step)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                variables=ocp.args.StandardRestore(_variables(like)),
                progress=ocp.args.StandardRestore(_progress(like)),
            ),
        )
        variables = dict(restored["variables"])
        return TrainState(params=variables.pop("params"), mutable=variables, **restored["progress"])

    def about(self, step: int) -> dict[str, Any]:
        """What wrote the checkpoint of a step: `method`, `config` and `versions`."""
        item = ocp.args.Composite(about=ocp.args.JsonRestore())
        return self._manager.restore(step, args=item)["about"]

    def _check_shapes(self, like: TrainState, step: int) -> None:
        """Compares variables by path before Orbax reads them, for a message one can act on."""
        metadata = self._manager.item_metadata(step)["variables"]
        problems = differences(flatten(metadata), flatten(_variables(like)), "the checkpoint")
        if problems:
            raise ValueError(
                f"{self.folder / str(step)} holds another model:\n  " + "\n  ".join(problems) + "\n"
                "Use the config that wrote it, or another --workdir."
            )

    def wait(self) -> None:
        """Blocks until everything that was saved is on disk.

        Raises:
            SaveFailed: if the last checkpoint could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except self._errors as error:
            raise self._failed(error) from error
        self._end_seals()

    def _failed(self, error: Exception) -> SaveFailed:
        """Clears away what a failed save left, and says what happened."""
        step, before = self._last_started, self.latest_step()
        self._end_seals(failed=True)
        if jax.process_count() == 1:
            self._manager = _manager(self.folder, self._options)  # removes leftovers
        free = ""
        if not self._url:
            free = f" ({shutil.disk_usage(self.folder).free / 2**20:,.0f} MiB free)"
        kept = "none is saved yet" if before is None else f"the last one saved is step {before}"
        return SaveFailed(
            f"the checkpoint of step {step} could not be written to {self.folder}{free}; {kept}. "
            f"{_first_line(error)}"
        )

    def _end_seals(self, *, failed: bool = False) -> None:
        for pending in self._seals:
            pending.end(failed)
        self._seals = []

    def close(self) -> None:
        """Waits for pending writes and releases the folder."""
        self._manager.close()
        self._end_seals(failed=True)  # that is, if the last one did not become complete


class _Seal(threading.Thread):
    """Waits until a checkpoint is complete, then writes its checksums."""

    def __init__(self, folder: Path) -> None:
        super().__init__(name=f"checksums of {folder}", daemon=True)
        self._folder = folder
        self._failed = threading.Event()
        self.start()

    def run(self) -> None:
        """See the class."""
        while not self._folder.is_dir():
            if self._failed.wait(SECONDS_BETWEEN_LOOKS):
                return
        try:
            checksums.seal(self._folder, jax.process_index(), jax.process_count())
        except OSError as error:  # the disk is full, or the checkpoint was one too many
            _log.warning("no checksums in %s: %s", self._folder, error)

    def end(self, failed: bool) -> None:
        """Waits for the checksums of a checkpoint that is complete."""
        if failed:
            self._failed.set()
        self.join()


def _first_line(error: Exception) -> str:
    """What an error says, without the tail of one that goes on for pages."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text if len(text) < LONGEST_REASON else f"{text[:LONGEST_REASON]}..."


def _preserved(settings: ml_collections.ConfigDict) -> list[policies.PreservationPolicy]:
    """The newest, the periodic and the best checkpoints."""
    kept: list[policies.PreservationPolicy] = [policies.LatestN(max(1, settings.keep))]
    if settings.keep_every_steps > 0:
        kept.append(policies.EveryNSteps(settings.keep_every_steps))
    if settings.best_metric:
        kept.append(
            policies.BestN(
                get_metric_fn=lambda metrics: metrics[settings.best_metric],
                n=1,
                keep_checkpoints_without_metrics=False,
            )
        )
    return kept


def checkpoint_steps(run: Path | str) -> list[int]:
    """Steps of a run's complete checkpoints, in order; empty if there are none."""
    if url := object_store.object_url(run):
        return sorted(complete_checkpoints(object_store.files(url)))
    folder = (Path(run) / FOLDER).absolute()
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def is_run(path: Path | str) -> bool:
    """Whether a path is the folder of a run, here or in an object store."""
    if object_store.object_url(path):
        return bool(checkpoint_steps(path))
    return (Path(path) / FOLDER).is_dir()


def read_variables(
    run: Path | str, step: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Variables of a run's checkpoint as NumPy arrays, and its `about` (method, config, versions).

    Args:
        run: folder of a run, or its URL.
        step: which checkpoint; the newest by default.

    Raises:
        FileNotFoundError: if the folder holds no complete checkpoint, or not that one.
    """
    steps = checkpoint_steps(run)
    if not steps or (step is not None and step not in steps):
        wanted = "complete checkpoint" if step is None else f"checkpoint of step {step}"
        raise FileNotFoundError(f"{run} holds no {wanted}; it has steps {steps}.")
    step = steps[-1] if step is None else step
    if object_store.object_url(run):
        with local_run(run, lambda _: [step]) as copy:
            return read_variables(copy, step)
    folder = (Path(run) / FOLDER).absolute()
    if problems := checksums.damage(folder / str(step)):
        others = [other for other in steps if other != step]
        raise ValueError(
            f"the checkpoint of step {step} in {run} is damaged: {problems[0]}. Others are of "
            f"steps {others}."
        )
    with _manager(
        folder, ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
    ) as manager:
        shapes = dict(manager.item_metadata(step)["variables"])
        # NumPy targets, without memory of their own, make Orbax return whole NumPy arrays.
        like = {
            path: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
            for path, leaf in flatten(shapes).items()
        }
        restored = manager.restore(
            step,
            args=ocp.args.Composite(
                variables=ocp.args.StandardRestore(unflatten(like)),
                about=ocp.args.JsonRestore(),
            ),
        )
    return restored["variables"], restored["about"]


@contextlib.contextmanager
def local_run(run: Path | str, needed: Callable[[list[int]], Iterable[int]]) -> Iterator[Path]:
    """The folder of a run; of one in an object store, a copy for as long as the body runs.

    The copy has the files directly in the folder (config, metrics), and checkpoints.

    Args:
        run: folder of the run, or its URL.
        needed: of the steps of its checkpoints, those that are copied.
    """
    url = object_store.object_url(run)
    if url is None:
        yield Path(run)
        return
    names = object_store.files(url)
    complete = complete_checkpoints(names)
    wanted = [name for name in names if "/" not in name]
    for step in needed(sorted(complete)):
        wanted += [f"{FOLDER}/{step}/{name}" for name in complete[step]]
    with tempfile.TemporaryDirectory(prefix="mim_jax_run_") as folder:
        object_store.download(url, wanted, Path(folder))
        yield Path(folder)


def checkpoints_among(names: Iterable[str]) -> dict[int, set[str]]:
    """Of the objects of a run: those of each checkpoint, complete or not."""
    found: dict[int, set[str]] = {}
    for name in names:
        folder, _, rest = name.partition("/")
        step, _, part = rest.partition("/")
        if folder == FOLDER and step.isdigit() and part:
            found.setdefault(int(step), set()).add(part)
    return found


def complete_checkpoints(names: Iterable[str]) -> dict[int, set[str]]:
    """Of the objects of a run: those of each complete checkpoint."""
    found = checkpoints_among(names)
    return {step: parts for step, parts in found.items() if COMMITTED in parts}
