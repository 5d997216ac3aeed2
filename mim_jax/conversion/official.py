"""Between a run of ours and weights of others, both ways."""

import contextlib
from pathlib import Path

import jax
import ml_collections

from mim_jax import config as configs
from mim_jax.conversion.export import export_variables
from mim_jax.conversion.initial import initialize_from
from mim_jax.conversion.pretrained import load_pretrained
from mim_jax.method import method_class
from mim_jax.training.checkpoints import Checkpoints, checkpoint_steps, read_variables
from mim_jax.training.derived import complete_from_weights
from mim_jax.training.experiment import Experiment
from mim_jax.training.run_folder import RunFolder


def export_run(run: Path, output: Path, format: str = "official", step: int | None = None) -> str:
    """Writes a run's weights for others, see `mim_jax.conversion.export`.

    Args:
        run: folder of the run.
        output: a file, or a folder for the formats of transformers.
        format: a name in `mim_jax.conversion.export.FORMATS`.
        step: which checkpoint; the newest by default.

    Returns:
        Notes on what was written, what was left out and what was checked.

    Raises:
        FileNotFoundError: if the folder holds no complete checkpoint, or not that one.
        ValueError: if the format is unknown or cannot hold the model, or the output is of an
            unknown kind.
    """
    if step is None:
        step = max(checkpoint_steps(run), default=None)
    variables, about = read_variables(run, step)
    config = configs.resolve(configs.from_json(about["config"]), "cpu")
    method = method_class(about["method"]).build(config)
    return export_variables(method, config, variables, output, format, step=step)


def import_checkpoint(config: ml_collections.ConfigDict, source: Path, run: Path) -> str:
    """Makes a run whose checkpoint of step 0 holds the weights of a file or a model folder.

    Towers that the method starts from, such as a teacher, are read from their own paths, if the
    config has them, as a run that trains would do.

    Args:
        config: a complete config whose model is that of the file.
        source: a `.safetensors` or `.pth` file, or a folder of transformers.
        run: folder of the new run; must not hold checkpoints yet.

    Returns:
        Notes on what was read.

    Raises:
        FileNotFoundError: if there is no such file, or nothing at the path of a tower.
        ValueError: if the file or a tower does not fit the model, or the run exists already.
    """
    config = complete_from_weights(config, str(source))
    experiment = Experiment.on_one_device(config)
    state = experiment.initial_state(experiment.batch_shapes())
    state, notes = load_pretrained(experiment.method, state, required=False)
    state, more = initialize_from(str(source), experiment.method, state)
    config = configs.resolve(config, jax.default_backend())
    # Opened last, since it creates the folder: a file that does not fit leaves nothing behind.
    with RunFolder(run) as place:
        with contextlib.closing(Checkpoints(place.checkpoints, config)) as checkpoints:
            if checkpoints.latest_step() is not None:
                raise ValueError(f"{run} holds checkpoints already; choose another --output.")
            checkpoints.save(state, 0)
            checkpoints.wait()
        (place.local / "config.json").write_text(configs.to_json(config))
    return "\n".join([*notes, *more, f"wrote the run {place.name}"])
