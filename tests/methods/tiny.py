"""An MAE so small that a test takes a moment: 2 x 3 tokens of images that are not square."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mim_jax import config as configs
from mim_jax.methods.mae import MAE

SIZES = {
    "model.size": "",
    "model.width": 16,
    "model.depth": 2,
    "model.heads": 2,
    "model.patch_size": (4, 4),
    "model.decoder_width": 8,
    "model.decoder_depth": 2,
    "model.decoder_heads": 2,
    "model.mlp_ratio": 4.0,
    "model.mask_ratio": 0.5,
    "model.normalize_target": True,
    "data.image_size": (8, 12),
    "data.channels": 1,
    "data.mean": (0.5,),
    "data.std": (0.25,),
    "compute_dtype": "float32",
    "batch_size": 8,
}

TOKENS, KEPT = 6, 3


def tiny_config(changes: dict[str, Any] | None = None) -> ml_collections.ConfigDict:
    return configs.load("mae:tiny", {**SIZES, **(changes or {})})


def tiny_mae(changes: dict[str, Any] | None = None) -> MAE:
    return MAE.build(tiny_config(changes))


def images(batch: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, 8, 12, 1)).astype(np.float32)


@functools.lru_cache
def _params(seed: int) -> dict[str, Any]:
    method = tiny_mae()
    init = jax.jit(lambda key: method.init(key, {"image": jnp.zeros((1, 8, 12, 1))}))
    return jax.device_get(init(jax.random.key(seed)))["params"]


def tiny_params(seed: int = 0) -> dict[str, Any]:
    """Parameters as NumPy arrays, none of them zero, so that no mistake can hide behind zeros."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: p + 0.1 * random.normal(size=p.shape).astype(np.float32), _params(seed)
    )
