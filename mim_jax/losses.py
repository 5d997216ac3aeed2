"""How far a prediction is off: pure functions, float32 results, means over global counts."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mim_jax.targets import unit_length


def squared_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared error over the last axis, in float32: `[..., values]` -> `[...]`."""
    difference = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.mean(difference**2, axis=-1)


def absolute_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean absolute error over the last axis, in float32: `[..., values]` -> `[...]`."""
    difference = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.mean(jnp.abs(difference), axis=-1)


def smooth_l1(prediction: jax.Array, target: jax.Array, beta: float = 1.0) -> jax.Array:
    """Mean smooth L1 error over the last axis, in float32: `[..., values]` -> `[...]`.

    `d^2 / (2 beta)` where `|d| < beta`, else `|d| - beta / 2` (Girshick, 2015, equation 3), which
    is Huber's loss divided by beta. MaskAlign takes twice that of beta 1, DMJD that of beta 2.
    """
    prediction, target = prediction.astype(jnp.float32), target.astype(jnp.float32)
    return jnp.mean(optax.huber_loss(prediction, target, delta=beta), axis=-1) / beta


def cosine_distance(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """One minus the cosine of the angle, in [0, 2], in float32: `[..., values]` -> `[...]`."""
    return 1 - jnp.sum(unit_length(prediction) * unit_length(target), axis=-1)


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Scalar mean of `values` where `mask` is 1; both `[batch, tokens]`.

    Divides by the number of selected values in the whole (global) batch, so the result does not
    depend on how the batch is spread over devices.
    """
    return jnp.sum(values * mask) / jnp.sum(mask)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of `logits [..., classes]` against integer `labels [...]`."""
    log_probability = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(log_probability, labels[..., None], axis=-1))


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean cross-entropy of `logits` against distributions `targets`, both `[batch, classes]`."""
    return jnp.mean(optax.softmax_cross_entropy(logits.astype(jnp.float32), targets))


def smoothed_targets(labels: jax.Array, num_classes: int, smoothing: float = 0.0) -> jax.Array:
    """One-hot targets float32 `[batch, classes]` of integer `labels [batch]`, smoothed.

    Every class gets `smoothing / num_classes`, and the true one `1 - smoothing` on top (Szegedy
    et al., 2016, section 7).
    """
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes, dtype=jnp.float32), smoothing)


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over examples and classes of the cross-entropy of each class by itself.

    For images of any number of classes: `logits` and `targets` (in [0, 1]) `[batch, classes]`.
    """
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets))


class Moments(NamedTuple):
    """Mean `[width]` and unbiased covariance `[width, width]` of some rows."""

    mean: jax.Array
    covariance: jax.Array


def moments(features: jax.Array, weights: jax.Array) -> Moments:
    """Moments of the rows of `features [rows, width]` whose weight is 1, of `weights [rows]`."""
    features, count = features.astype(jnp.float32), weights.sum()
    mean = weights @ features / jnp.maximum(count, 1)
    centred = (features - mean) * weights[:, None]
    return Moments(mean, centred.T @ centred / jnp.maximum(count - 1, 1))


def moment_distance(first: Moments, second: Moments) -> jax.Array:
    """`|m_a - m_b|^2 / D + |C_a - C_b|^2 / (4 D^2)`: CORAL (Sun and Saenko, 2016) with means."""
    width = len(first.mean)
    means = jnp.sum((first.mean - second.mean) ** 2) / width
    return means + jnp.sum((first.covariance - second.covariance) ** 2) / (4 * width**2)


def wasserstein_distance(
    first: Moments, second: Moments, *, diagonal: bool = False, epsilon: float = 1e-6
) -> jax.Array:
    """Squared 2-Wasserstein distance of two Gaussians; the first gets no gradient.

    `|m_a - m_b|^2 + Tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)` (Dowson and Landau, 1982).

    Args:
        first: of the fixed one.
        second: of the other.
        diagonal: take channels as independent.
        epsilon: added to the variances, as the covariance of a small batch is singular.
    """
    first = jax.lax.stop_gradient(first)
    means = jnp.sum((first.mean - second.mean) ** 2)
    if diagonal:
        deviations = [jnp.sqrt(jnp.diag(x.covariance) + epsilon) for x in (first, second)]
        return means + jnp.sum((deviations[0] - deviations[1]) ** 2)
    identity = epsilon * jnp.eye(len(first.mean))
    covariances = first.covariance + identity, second.covariance + identity
    overlap = _trace_of_root(*covariances)
    return means + jnp.trace(covariances[0]) + jnp.trace(covariances[1]) - 2 * overlap


def _root(covariance: jax.Array) -> jax.Array:
    values, vectors = jnp.linalg.eigh(covariance)
    return (vectors * jnp.sqrt(jnp.maximum(values, 0))) @ vectors.T


@jax.custom_jvp
def _trace_of_root(first: jax.Array, second: jax.Array) -> jax.Array:
    """`Tr (A^1/2 B A^1/2)^1/2`, the sum of the singular values of `A^1/2 B^1/2`."""
    return jnp.linalg.svd(_root(first) @ _root(second), compute_uv=False).sum()


@_trace_of_root.defjvp
def _trace_of_root_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # That of B alone. It is finite where those of eigenvectors, which may be any, are not.
    first, second = primals
    root = _root(first)
    left, values, _ = jnp.linalg.svd(root @ _root(second))
    inner = root @ left
    transport = (inner / jnp.maximum(values, 1e-12)) @ inner.T
    return values.sum(), 0.5 * jnp.sum(transport * tangents[1])


def mean_discrepancy(
    first: jax.Array, second: jax.Array, weights: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """Squared maximum mean discrepancy under a Gaussian kernel (Gretton et al., 2012, eq. 5).

    The kernel's squared width is the mean squared distance of two rows of all, without gradient.

    Args:
        first: `[rows, width]`.
        second: `[rows, width]`.
        weights: 1 for rows that count and 0 for others, `[rows]` each.
    """
    rows = jnp.concatenate([first, second]).astype(jnp.float32)
    counts = [jnp.maximum(weight.sum(), 1) for weight in weights]
    every = jnp.concatenate(weights)
    squares = jnp.sum((rows[:, None] - rows[None]) ** 2, axis=-1)
    pairs = every[:, None] * every[None]
    scale = jax.lax.stop_gradient((squares * pairs).sum() / jnp.maximum(pairs.sum(), 1))
    kernel = jnp.exp(-squares / jnp.maximum(2 * scale, 1e-12))
    signed = jnp.concatenate([weights[0] / counts[0], -weights[1] / counts[1]])
    return signed @ kernel @ signed


SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
"""Side of the Gaussian window in pixels, and its standard deviation (Wang et al., 2004)."""


def structural_similarity(first: jax.Array, second: jax.Array) -> jax.Array:
    """Mean structural similarity (SSIM) of images with values in [0, 1], in float32.

    Means and covariances are taken under a Gaussian window that lies wholly inside the image; the
    result is the mean over its places, channels and images (Wang et al., 2004).

    Args:
        first: `[batch, height, width, channels]`, no side shorter than the window.
        second: of the same shape.

    Raises:
        ValueError: if a side is shorter than the window.
    """
    if min(first.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(
            f"images of {first.shape[1]} x {first.shape[2]} pixels are smaller than the window of "
            f"SSIM, {SSIM_WINDOW} x {SSIM_WINDOW}; enlarge them or set the weight of SSIM to 0."
        )
    offsets = jnp.arange(SSIM_WINDOW, dtype=jnp.float32) - SSIM_WINDOW // 2
    window = jnp.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    window /= window.sum()

    def blurred(x: jax.Array) -> jax.Array:
        rows, columns = (side - SSIM_WINDOW + 1 for side in x.shape[1:3])
        x = sum(w * x[:, i : i + rows] for i, w in enumerate(window))
        return sum(w * x[:, :, i : i + columns] for i, w in enumerate(window))

    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    mean1, mean2 = blurred(first), blurred(second)
    var1, var2 = blurred(first**2) - mean1**2, blurred(second**2) - mean2**2
    covariance = blurred(first * second) - mean1 * mean2
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean1 * mean2 + c1) / (mean1**2 + mean2**2 + c1)
    return jnp.mean(luminance * (2 * covariance + c2) / (var1 + var2 + c2))


def dice_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """One minus Dice's coefficient of each class, its mean over classes and examples.

    Of probabilities p and one-hot labels y, `2 sum(p y) / (sum(p^2) + sum(y) + 1e-6)` with sums
    over the voxels of an example (Milletari et al., 2016, equation 2; background is a class).

    Args:
        logits: `[batch, *size, classes]`.
        labels: int `[batch, *size]`.
    """
    classes = logits.shape[-1]
    probability = jax.nn.softmax(logits.astype(jnp.float32)).reshape(len(logits), -1, classes)
    truth = jax.nn.one_hot(labels, classes, dtype=jnp.float32).reshape(probability.shape)
    common = jnp.sum(probability * truth, axis=1)  # [B, classes]
    total = jnp.sum(probability**2 + truth, axis=1)
    return jnp.mean(1 - 2 * common / (total + 1e-6))
