"""Whether exported weights compute what the run computes: one fixed batch through both."""

import functools
import importlib
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mim_jax.data.on_device import normalize
from mim_jax.method import Method
from mim_jax.methods.mae import MAE

IMAGES = 2
SEED = 0

TOLERANCE = 1e-4
"""Largest difference from another library's forward pass, relative to the largest value."""

Outputs = dict[str, np.ndarray]
"""`tokens` of whole images `[images, 1 + tokens, width]`, and where a model has them `logits`,
`prediction` of all patches, and `loss`."""


def in_float32(config: ml_collections.ConfigDict, method: type[Method]) -> Method:
    """The method of a config, with matrix products in float32 wherever it runs."""
    config = config.copy_and_resolve_references()
    config.compute_dtype = "float32"
    if "attention" in config.model:
        config.model.attention = ""  # cuDNN's takes half precision only
    return method.build(config)


def fixed_images(method: Method, config: ml_collections.ConfigDict) -> np.ndarray | None:
    """Normalized random images or volumes `[images, *size, channels]`; None if it takes none."""
    wanted = method.inputs.get("image")
    shape = [] if wanted is None else [size for size in wanted.shape if size is not None]
    if wanted is None or len(shape) not in (3, 4) or len(shape) != len(wanted.shape):
        return None
    kind: type = np.uint16 if config.data.get("bits", 8) == 16 else np.uint8
    random = np.random.default_rng(SEED)
    samples = random.integers(np.iinfo(kind).max, size=(IMAGES, *shape), dtype=kind, endpoint=True)
    return np.asarray(normalize(jnp.asarray(samples), config.data.mean, config.data.std))


def fixed_noise(method: Method) -> np.ndarray:
    """Noise for the masks of `fixed_images`, float32 `[images, tokens]`, without ties."""
    encoder = method.encoder
    assert encoder is not None
    tokens = encoder.grid[0] * encoder.grid[1]
    order = np.random.default_rng(SEED).permuted(np.tile(np.arange(tokens), (IMAGES, 1)), axis=1)
    return (order / tokens).astype(np.float32)


def feature_difference(
    method: Method, variables: Mapping[str, Any], again: Mapping[str, Any], images: np.ndarray
) -> float:
    """Largest relative difference of features, between two sets of variables."""
    with jax.default_matmul_precision("highest"):
        features = _compiled(method, "features")
        before, after = (features(v, {"image": images}) for v in (variables, again))
    return largest_difference(
        {"pooled": before.pooled, "tokens": before.tokens},
        {"pooled": after.pooled, "tokens": after.tokens},
    )


def outputs(
    method: Method, variables: Mapping[str, Any], images: np.ndarray, noise: np.ndarray
) -> Outputs:
    """What our code computes, for all that another library may compute as well.

    Args:
        method: with an encoder, in float32.
        variables: of the method.
        images: normalized.
        noise: chooses the patches that a masked autoencoder sees.
    """
    encoder = method.encoder
    assert encoder is not None
    params = variables["params"]
    with jax.default_matmul_precision("highest"):
        found = {"tokens": _compiled(encoder, "apply")({"params": params["encoder"]}, images)[0]}
        if "head" in params:
            pooled = _compiled(method, "features")(variables, {"image": images}).pooled
            found["logits"] = pooled @ params["head"]["kernel"] + params["head"]["bias"]
        if isinstance(method, MAE):
            output = _compiled(method, "reconstruct")(variables, images, noise)
            found["prediction"] = output.pred
            found["loss"] = method.reconstruction_loss(jnp.asarray(images), output)
    return {name: np.asarray(value) for name, value in found.items()}


@functools.lru_cache(maxsize=8)
def _compiled(owner: Any, name: str) -> Callable[..., Any]:
    """A compiled function of a method or module; kept, for exports to several formats."""
    return jax.jit(getattr(owner, name))


def largest_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """The largest absolute difference over the largest absolute value, the worst of all names.

    Raises:
        ValueError: if an output of theirs is not among ours, or has another shape.
    """
    worst = 0.0
    for name, other in theirs.items():
        shape = np.shape(ours[name]) if name in ours else "none"
        if shape != np.shape(other):
            raise ValueError(f"{name} has the shape {np.shape(other)}, but {shape} here.")
        scale = max(float(np.max(np.abs(ours[name]))), float(np.finfo(np.float32).tiny))
        difference = float(np.max(np.abs(ours[name] - other))) / scale
        worst = float(np.maximum(worst, difference))  # unlike `max`, keeps NaN
    return worst


def import_library(name: str) -> Any:
    """A library that only this check needs.

    Raises:
        ImportError: if it is not installed, or its installation is broken.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise
    except Exception as error:  # a PyTorch library built for another PyTorch raises many kinds
        raise ImportError(f"{name} is installed, but broken: {error}") from error


def library_version(name: str) -> str:
    """Name and version of an installed library."""
    return f"{name} {metadata.version(name)}"
