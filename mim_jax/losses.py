"""How far a prediction is off: pure functions, float32 results, means over global counts."""

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
    """Mean cross-entropy of `logits [batch, classes]` against integer `labels [batch]`."""
    log_probability = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(log_probability, labels[:, None], axis=1))


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
