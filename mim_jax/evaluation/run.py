"""Scores a finished or running run from its folder."""

from collections.abc import Sequence
from pathlib import Path

from mim_jax import config as configs
from mim_jax.evaluation.protocols import compare_with_baselines, evaluate
from mim_jax.training.checkpoints import read_variables
from mim_jax.training.experiment import Experiment, image_shapes


def evaluate_run(
    run: Path,
    *,
    step: int | None = None,
    protocols: Sequence[str] = ("knn", "linear"),
    data: str | None = None,
    pool: str | None = None,
    baselines: bool = True,
) -> dict[str, dict[str, float]]:
    """Accuracies of a run's checkpoint, by row and protocol.

    Args:
        run: folder of the run.
        step: which checkpoint; the newest by default.
        protocols: see `mim_jax.evaluation.protocols`.
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
    experiment = Experiment.on_one_device(config)
    if not baselines:
        return {"trained": evaluate(experiment.method, variables, config, protocols)}
    untrained = experiment.initial_state(image_shapes(experiment.config)).variables
    return compare_with_baselines(
        experiment.method, variables, config, protocols, untrained_variables=untrained
    )
