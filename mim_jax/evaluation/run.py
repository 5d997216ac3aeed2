"""Scores a finished or running run from its folder."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mim_jax import config as configs
from mim_jax import object_store
from mim_jax.evaluation.classification import draw_confusion
from mim_jax.evaluation.protocols import check_protocols, compare_with_baselines, evaluate
from mim_jax.training.checkpoints import read_variables
from mim_jax.training.experiment import Experiment


def evaluate_run(
    run: Path | str,
    *,
    step: int | None = None,
    protocols: Sequence[str] | None = None,
    data: str | None = None,
    pool: str | None = None,
    baselines: bool = True,
) -> dict[str, dict[str, float]]:
    """Scores of a run's checkpoint, by row and protocol.

    The protocol "classification" also draws `pictures/confusion.png` in the run's folder.

    Args:
        run: folder of the run, or its URL.
        step: which checkpoint; the newest by default.
        protocols: see `mim_jax.evaluation.protocols`; None takes those of the run's config, or
            else k-NN and the linear probe.
        data: labelled source in place of the run's.
        pool: representation in place of the run's.
        baselines: score the untrained encoder and raw pixels as well.

    Raises:
        FileNotFoundError: if the folder holds no such checkpoint.
        ValueError: for an unknown protocol, or data without labels.
    """
    variables, about = read_variables(run, step)
    config = configs.from_json(about["config"])
    if data:
        config.evaluate.source = data
    if pool:
        config.evaluate.pool = pool
    protocols = check_protocols(protocols or config.evaluate.protocols or ("knn", "linear"))
    experiment = Experiment.on_one_device(config)
    if "classification" in protocols:
        picture = draw_confusion(experiment.method, variables, config)
        if picture is not None:
            _write_png(picture, run)
    if not baselines:
        return {"trained": evaluate(experiment.method, variables, config, protocols)}
    untrained = experiment.initial_state(experiment.batch_shapes()).variables
    return compare_with_baselines(
        experiment.method, variables, config, protocols, untrained_variables=untrained
    )


def _write_png(picture: np.ndarray, run: Path | str) -> None:
    """Draws `pictures/confusion.png` of a run."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    if url := object_store.object_url(run):
        object_store.write(f"{url}/pictures/confusion.png", buffer.getvalue())
        return
    folder = Path(run) / "pictures"
    folder.mkdir(exist_ok=True)
    (folder / "confusion.png").write_bytes(buffer.getvalue())
