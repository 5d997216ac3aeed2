"""Reads image towers of any known naming: files, folders of transformers, runs of ours."""

from pathlib import Path

import numpy as np

from mim_jax import config as configs
from mim_jax.method import method_class
from mim_jax.models.tower import Tower
from mim_jax.training.checkpoints import FOLDER, read_variables
from mim_jax.training.tree import flatten


def read_tower(path: str, *, projection: bool = True) -> tuple[Tower, dict[str, np.ndarray]]:
    """A tower of the sizes that weights have, and its parameters by path.

    Args:
        path: a file, a model folder, or the folder of a run.
        projection: read what lies behind the encoder too.

    Returns:
        The tower, its blocks not stacked, and its parameters: `encoder/...`, `projection/...`.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: if the weights are of no known kind; or missing, too many or wrongly shaped.
    """
    if (Path(path) / FOLDER).is_dir():
        variables, about = read_variables(Path(path))
        config = configs.resolve(configs.from_json(about["config"]), "cpu")
        encoder = method_class(about["method"]).build(config).encoder
        if encoder is None:
            raise ValueError(f"{path} is a run of {about['method']!r}, which has no ViT encoder.")
        params = {
            name: value
            for name, value in flatten(variables["params"]).items()
            if name.startswith("encoder/")
        }
        return Tower(encoder, mean=config.data.mean, std=config.data.std), params
    raise ValueError(f"{path} is no run of ours.")
