"""Features of a whole data set as host arrays: what the protocols compare."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mim_jax.data.on_device import normalize
from mim_jax.method import Batch, Features, Method, Variables
from mim_jax.training.sharding import batch_sharding

HostBatch = Mapping[str, np.ndarray]

POOLS = ("method", "mean")
"""The paper's own representation, and the mean of the patch tokens."""

TOKENS = "tokens"
"""In place of a pool: the patch tokens themselves, for probes that look at each."""


def extract_features(
    method: Method,
    variables: Variables,
    batches: Iterable[HostBatch],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    pool: str = "method",
) -> tuple[np.ndarray, np.ndarray | None]:
    """The features and labels of every valid example, in order.

    The forward pass is compiled once for a batch shape. Where the variables lie on a mesh, the
    rows of a batch are spread over its devices; every process must then give the whole batch,
    and gets the features of all rows.

    Args:
        method: whose `features` to take.
        variables: of the method, on any devices.
        batches: with `image` uint8 or uint16 `[batch, height, width, channels]`, and, where they
            exist, `label` int `[batch]` and `valid` bool `[batch]`: see `evaluation_batches`.
        mean: of each channel, for values in [0, 1].
        std: standard deviation of each channel, for values in [0, 1].
        pool: one of `POOLS`, or `TOKENS`.

    Returns:
        Features float32 `[examples, width]`, of `TOKENS` `[examples, tokens, width]`, and labels
        int32 `[examples]` (`[examples, classes]` of multi-label data) or None.

    Raises:
        ValueError: an unknown pool, images that are float already, no valid example, or a batch
            that the method does not accept.
    """
    mesh = mesh_of(variables)
    pool = pool if pool == TOKENS else check_pool(pool)
    forward = _forward(method, tuple(mean), tuple(std), pool, mesh)

    def features_of(batch: HostBatch) -> np.ndarray:
        check_unnormalized(batch["image"])
        inputs = {name: batch[name] for name in batch if name in {"image", *method.inputs}}
        features = forward(variables, place(inputs, mesh))
        return np.asarray(features)[: len(batch["image"])]

    return collect(batches, features_of)


def raw_pixels(batches: Iterable[HostBatch]) -> tuple[np.ndarray, np.ndarray | None]:
    """Flattened pixels in [0, 1] and labels: the baseline that any encoder must beat.

    Args:
        batches: as for `extract_features`.

    Returns:
        Pixels float32 `[examples, height * width * channels]`, and labels int32 `[examples]` or
        None.
    """

    def pixels_of(batch: HostBatch) -> np.ndarray:
        images = check_unnormalized(batch["image"])
        return images.reshape(len(images), -1).astype(np.float32) / np.iinfo(images.dtype).max

    return collect(batches, pixels_of)


def pooled(features: Features, pool: str) -> jax.Array:
    """One float32 vector for each image, `[batch, width]`, by one of `POOLS`."""
    if check_pool(pool) == "mean":
        return jnp.mean(features.tokens.astype(jnp.float32), axis=1)
    return features.pooled.astype(jnp.float32)


def all_tokens(features: Features) -> jax.Array:
    """The class token and the patches, float32 `[batch, 1 + tokens, width]`.

    In place of a class token stands what the method's paper evaluates, since `Features` do not
    hold one apart; where that is no vector of a token's width, there are the patches alone.
    """
    tokens = features.tokens.astype(jnp.float32)
    if features.pooled.shape[1:] != tokens.shape[2:]:
        return tokens
    return jnp.concatenate([features.pooled.astype(jnp.float32)[:, None], tokens], axis=1)


def check_pool(pool: str) -> str:
    """The pool itself; raises `ValueError` if there is no such pool."""
    if pool not in POOLS:
        raise ValueError(f"evaluate.pool is {pool!r}; known are {', '.join(POOLS)}.")
    return pool


def check_unnormalized(images: np.ndarray) -> np.ndarray:
    """The images themselves; raises `ValueError` if they were converted to float before."""
    if images.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"images are {images.dtype}; evaluation expects uint8 or uint16, since it normalizes "
            "them itself."
        )
    return images


def mesh_of(variables: Variables) -> Mesh | None:
    """The mesh that holds the variables, or None if they are on no mesh."""
    for leaf in jax.tree.leaves(variables):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
    return None


def row_shards(mesh: Mesh | None) -> int:
    """Number of parts into which the rows of a batch are cut."""
    if mesh is None:
        return 1
    return mesh.shape["data"] * mesh.shape["fsdp"]


def place(batch: HostBatch, mesh: Mesh | None) -> Any:
    """A host batch with its rows spread over a mesh, filled up with zeros where they must be.

    Every process gives the whole batch and moves only its rows to its devices. Without a mesh the
    batch is returned as it is.
    """
    if mesh is None:
        return dict(batch)
    rows = batch_sharding(mesh)

    def spread(array: np.ndarray) -> jax.Array:
        fill = -len(array) % row_shards(mesh)
        filled = np.pad(array, [(0, fill)] + [(0, 0)] * (array.ndim - 1)) if fill else array
        return jax.make_array_from_callback(filled.shape, rows, lambda index: filled[index])

    return {name: spread(np.asarray(array)) for name, array in batch.items()}


@functools.lru_cache(maxsize=8)
def _forward(
    method: Method, mean: tuple[float, ...], std: tuple[float, ...], pool: str, mesh: Mesh | None
) -> Callable[[Variables, Batch], jax.Array]:
    """The compiled forward pass; kept, so that a second split or evaluation compiles nothing."""

    def forward(variables: Variables, batch: Batch) -> jax.Array:
        batch = {**batch, "image": normalize(batch["image"], mean, std)}
        # What only the loss needs (captions, second views) may be absent here.
        if set(method.inputs) <= set(batch):
            method.check(batch)
        features = method.features(variables, batch)
        if pool == TOKENS:
            return features.tokens.astype(jnp.float32)
        return pooled(features, pool)

    # Replicated results can be read by every process.
    return jax.jit(forward, out_shardings=NamedSharding(mesh, PartitionSpec()) if mesh else None)


def collect(
    batches: Iterable[HostBatch], features_of: Callable[[HostBatch], np.ndarray]
) -> tuple[np.ndarray, np.ndarray | None]:
    """What `features_of` gives for the valid rows of all batches, and their labels int32 or None.

    Raises:
        ValueError: if no row of any batch is valid.
    """
    features: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for batch in batches:
        valid = np.asarray(batch.get("valid", np.ones(len(batch["image"]), bool)))
        features.append(features_of(batch)[valid])
        if "label" in batch:
            labels.append(np.asarray(batch["label"])[valid].astype(np.int32))
    if not sum(map(len, features)):
        raise ValueError("the batches hold no valid example, so there are no features.")
    return np.concatenate(features), np.concatenate(labels) if labels else None
