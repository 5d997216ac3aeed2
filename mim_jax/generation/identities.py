"""Vectors of people who do not exist, and variations of them (Vec2Face, Wu et al., ICLR 2025)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

SIGMAS, SHARES = (0.3, 0.5, 0.7), (0.4, 0.4, 0.2)
"""Noise on the vectors of a data set, and the share of rows that get it (official)."""

MAX_DRAWS = 200
"""Candidates drawn for each wanted vector before the search gives up."""


def sample_identities(
    rng: np.random.Generator,
    count: int,
    *,
    features: np.ndarray | None = None,
    size: int = 512,
    threshold: float = 0.3,
    components: int = 512,
) -> np.ndarray:
    """Vectors that are all unlike each other.

    A candidate is kept if its cosine with every vector kept before is below the threshold.

    Args:
        rng: source of randomness.
        count: number of vectors.
        features: mean vectors of real identities, `[identities, size]`. Candidates are normal in
            their principal components, with their mean and covariance. None draws candidates from
            the standard normal distribution, the authors' simpler alternative.
        size: of the vectors, without `features`.
        threshold: largest cosine, in (-1, 1].
        components: largest number of principal components.

    Returns:
        float32 `[count, size]`.

    Raises:
        ValueError: if `MAX_DRAWS * count` candidates do not give that many vectors, or fewer than
            two real identities are given.
    """
    if features is not None:
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(
                f"features has shape {features.shape}; principal components need mean vectors of "
                "two identities or more, [identities, size]."
            )
        mean = features.mean(axis=0)
        size = features.shape[1]
        _, scales, axes = np.linalg.svd(features - mean, full_matrices=False)
        # In the principal components the covariance is diagonal.
        deviations = scales[:components] / np.sqrt(len(features) - 1)
        axes = axes[:components]
    kept = np.empty((count, size), np.float64)  # at length one
    vectors = np.empty((count, size), np.float32)
    found = drawn = 0
    while found < count:
        if drawn >= MAX_DRAWS * count:
            raise ValueError(
                f"{drawn} candidates gave only {found} of {count} vectors whose cosines are below "
                f"{threshold}; raise the threshold or ask for fewer identities."
            )
        batch = min(max(256, count), 4096)
        drawn += batch
        if features is None:
            candidates = rng.standard_normal((batch, size))
        else:
            normal = rng.standard_normal((batch, len(deviations)))
            candidates = mean + (normal * deviations) @ axes
        units = candidates / np.linalg.norm(candidates, axis=1, keepdims=True)
        # Those too near to vectors of earlier batches go at once, the others one after another.
        near = (units @ kept[:found].T >= threshold).any(axis=1)
        candidates, units = candidates[~near], units[~near]
        first = found
        for candidate, unit in zip(candidates, units):
            if found < count and not (kept[first:found] @ unit >= threshold).any():
                kept[found], vectors[found] = unit, candidate
                found += 1
    return vectors


def separable(vectors: np.ndarray, threshold: float = 0.4) -> int:
    """How many vectors have no earlier one with a cosine above the threshold."""
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = np.tril(units @ units.T, -1)
    return int((cosines <= threshold).all(axis=1).sum())


def perturbed(vectors: jax.Array, noise: jax.Array) -> jax.Array:
    """Vectors with noise added, scaled back to the length that they had; both `[rows, size]`."""
    moved = vectors + noise
    norms = [jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (vectors, moved)]
    return moved * (norms[0] / norms[1])


def perturb(
    rng: jax.Array,
    vectors: jax.Array,
    sigmas: Sequence[float] = SIGMAS,
    shares: Sequence[float] = SHARES,
) -> jax.Array:
    """Variations of vectors: each row with noise of one of several strengths, its length kept.

    Which row gets which strength is drawn over all rows, so an identity that is repeated 50 times
    gets about its share of each.

    Args:
        rng: key.
        vectors: `[rows, size]`, each identity repeated as often as there shall be images of it.
        sigmas: standard deviations of the noise.
        shares: of the rows, in the same order; they add up to 1.

    Raises:
        ValueError: if the shares do not fit.
    """
    for_noise, for_order = jax.random.split(rng)
    rows = len(vectors)
    normal = jax.random.normal(for_noise, vectors.shape)
    order = jax.random.permutation(for_order, rows)
    return perturbed(vectors, ordered_noise(normal, sigmas, shares, order))


def ordered_noise(
    normal: jax.Array, sigmas: Sequence[float], shares: Sequence[float], order: jax.Array
) -> jax.Array:
    """Standard normal rows, scaled by strength one group after another, then put in an order.

    Args:
        normal: `[rows, size]`.
        sigmas: of each group.
        shares: of each group. `int(rows * share)` rows are in it, and the rest in the last one
            (the official code fails if there is a rest).
        order: int `[rows]`, a permutation: row r of the result is row `order[r]` of the groups.

    Raises:
        ValueError: if there are not as many shares as sigmas, or they do not add up to 1.
    """
    if len(sigmas) != len(shares) or abs(sum(shares) - 1) > 1e-6 or min(shares) < 0:
        raise ValueError(
            f"sigmas {tuple(sigmas)} and shares {tuple(shares)} must be equally many, and the "
            "shares add up to 1."
        )
    rows = len(normal)
    counts = [int(rows * share + 1e-9) for share in shares]
    counts[-1] += rows - sum(counts)
    scale = np.repeat(np.asarray(sigmas, np.float32), counts)
    return (normal * scale.astype(normal.dtype)[:, None])[order]
