"""Tiny models of every kind that can be exported, with random parameters."""

import functools
import re
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from mim_jax import config as configs
from mim_jax.conversion.export import FORMATS
from mim_jax.conversion.formats import Model
from mim_jax.method import Method, method_class
from mim_jax.training.tree import flatten, unflatten
from tests.methods.tiny import SIZES, tiny_config

SQUARE = {
    "data.image_size": (12, 12),
    "data.channels": 3,
    "data.mean": (0.4, 0.5, 0.6),
    "data.std": (0.2, 0.3, 0.25),
}
"""Nine tokens of a square image in colour; `tests.methods.tiny` has six, in grey, not square."""

CLASSES = 5


def mae_config(changes: dict[str, Any] | None = None) -> ml_collections.ConfigDict:
    return tiny_config({**SQUARE, **(changes or {})})


def classifier_config(
    pool: str, changes: dict[str, Any] | None = None
) -> ml_collections.ConfigDict:
    fields = {k: v for k, v in SIZES.items() if not re.search("decoder|mask_ratio|target", k)}
    given = {"model.pool": pool, "model.num_classes": CLASSES, "model.labels": "single"}
    return configs.load("finetune:tiny", {**fields, **given, **SQUARE, **(changes or {})})


def build(config: ml_collections.ConfigDict) -> Method:
    return method_class(config.method).build(config)


def variables(method: Method, seed: int = 0) -> dict[str, Any]:
    """Random parameters, none of them zero or one, so that no mistake can hide behind those."""
    wanted = method.inputs["image"].shape
    batch = {"image": np.zeros((1, *wanted), np.float32)}
    shapes = flatten(jax.eval_shape(functools.partial(method.init, batch=batch), jax.random.key(0)))
    random = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        around = 1.0 if path.endswith("scale") else 0.0
        return random.normal(around, 0.3, shape).astype(np.float32)

    return unflatten({path: draw(path, leaf.shape) for path, leaf in shapes.items()})


def written(
    kind: str, config: ml_collections.ConfigDict, method: Method, given: dict, output: Path
) -> Path:
    """An output of a format, without the checks and the card of an export."""
    model = Model(method, config, flatten(given["params"]))
    table = FORMATS[kind].table(model)
    held = {rule.path: model.params[rule.path] for rule in table.rules}
    FORMATS[kind].write(output, table.save(unflatten(held)), model)
    return output
