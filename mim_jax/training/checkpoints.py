"""Checkpoints of a run: Orbax, asynchronous, atomic, sharded.

A checkpoint has three items: `variables` (parameters and mutable collections, all that evaluation
needs), `progress` (step, optimizer state, counters) and `about` (config, method, versions). It can
be restored onto any mesh.
"""

import json
from pathlib import Path
from typing import Any

import absl.logging
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from mim_jax import config as configs
from mim_jax.training.state import TrainState
from mim_jax.training.tree import differences, flatten, unflatten
from mim_jax.training.versions import versions

FOLDER = "checkpoints"


def _manager(folder: Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
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
        self, run: Path, config: ml_collections.ConfigDict, *, read_only: bool = False
    ) -> None:
        """Opens the checkpoints below a run's folder, and creates it if it is not there.

        Leftovers of a save that was cut short are removed; they were never complete.

        Args:
            run: folder of the run.
            config: the run's config; `config.checkpoint` says what is kept.
            read_only: change nothing; the folder must be there, and a run may be writing to it.
        """
        settings = config.checkpoint
        self.folder = (run / FOLDER).absolute()
        self._config = config
        options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
        if not read_only:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(_preserved(settings)),
                enable_async_checkpointing=settings.asynchronous,
                cleanup_tmp_directories=True,
            )
        self._manager = _manager(self.folder, options)

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int, metrics: dict[str, float] | None = None) -> None:
        """Starts to write a checkpoint; returns before it is on disk if asynchronous."""
        if step in self._manager.all_steps():
            return
        about = {
            "method": self._config.method,
            "config": json.loads(configs.to_json(self._config)),
            "versions": versions(),
        }
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
        """Blocks until everything that was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for pending writes and releases the folder."""
        self._manager.close()


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


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of a run's complete checkpoints, in order; empty if there are none."""
    folder = (run / FOLDER).absolute()
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def read_variables(run: Path, step: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Variables of a run's checkpoint as NumPy arrays, and its `about` (method, config, versions).

    Args:
        run: folder of a run.
        step: which checkpoint; the newest by default.

    Raises:
        FileNotFoundError: if the folder holds no complete checkpoint, or not that one.
    """
    folder = (run / FOLDER).absolute()
    steps = checkpoint_steps(run)
    if not steps or (step is not None and step not in steps):
        wanted = "complete checkpoint" if step is None else f"checkpoint of step {step}"
        raise FileNotFoundError(f"{run} holds no {wanted}; it has steps {steps}.")
    step = steps[-1] if step is None else step
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
