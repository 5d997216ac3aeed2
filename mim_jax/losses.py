"""How far a prediction is off: pure functions, float32 results, means over global counts."""

import jax
import jax.numpy as jnp


def squared_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared error over the last axis, in float32: `[..., values]` -> `[...]`."""
    difference = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.mean(difference**2, axis=-1)


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
