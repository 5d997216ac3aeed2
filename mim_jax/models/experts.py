"""Experts beside an MLP, and norms that a domain sets (GM-DF, Lai et al., 2025, equations 1 to 5).

Both take a condition: the learned embedding of the domain that an image comes from.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.models.transformer import ACTIVATIONS, LAYER_NORM_EPSILON, token_rows

GATES = ("none", "domain")
"""Experts count alike, or as an `ExpertGate` weighs them."""


class DomainNorm(nn.Module):
    """LayerNorm whose scale and shift a linear map of the domain changes (equation 2).

    `(y - mean) / sqrt(variance + epsilon) * (scale + W_scale c) + (bias + W_bias c)`, over
    channels. Without the two maps it is a `LayerNorm` of the same parameters.

    Attributes:
        epsilon: added to the variance.
        scale: initial scale.
        deviation: of the initial maps, which are normal; 0 makes it a LayerNorm at the start.
        dtype: of the result. Statistics are float32.
    """

    epsilon: float = LAYER_NORM_EPSILON
    scale: float = 1.0
    deviation: float = 0.02
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """Maps `[batch, tokens, width]` to the same shape.

        Args:
            x: tokens.
            condition: `[batch, domain width]`.
        """
        width, condition = x.shape[-1], condition.astype(jnp.float32)

        def of_domain(name: str, initial: float) -> jax.Array:
            start = self.param(name, nn.initializers.constant(initial), (width,))
            normal = nn.initializers.normal(self.deviation) if self.deviation else nn.zeros_init()
            linear = nn.Dense(width, use_bias=False, kernel_init=normal, name=f"{name}_of_domain")
            return (start + linear(condition))[:, None]  # [B, 1, D]

        x = x.astype(jnp.float32)
        mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
        normal = (x - mean) / jnp.sqrt(variance + self.epsilon)
        return (normal * of_domain("scale", self.scale) + of_domain("bias", 0.0)).astype(self.dtype)


class Expert(nn.Module):
    """Two linear layers with an exact GELU between them.

    Attributes:
        hidden: width between the layers.
        zero_start: the second layer starts at zero.
        dtype: compute type.
    """

    hidden: int
    zero_start: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[rows, width]` to the same shape."""
        xavier = nn.initializers.xavier_uniform()
        last = nn.initializers.zeros if self.zero_start else xavier
        hidden = nn.Dense(self.hidden, kernel_init=xavier, dtype=self.dtype, name="fc1")(x)
        hidden = ACTIVATIONS["gelu"](hidden)
        return nn.Dense(x.shape[-1], kernel_init=last, dtype=self.dtype, name="fc2")(hidden)


class ExpertGate(nn.Module):
    """How much each expert counts in a domain: figure 2's weights alpha, with mean 1.

    Attributes:
        experts: N.
    """

    experts: int

    @nn.compact
    def __call__(self, condition: jax.Array) -> jax.Array:
        """`N softmax(W2 gelu(W1 c))`, float32 `[batch, N]`, of conditions `[batch, width]`.

        W2 starts at zero, so that all experts count alike.
        """
        condition = condition.astype(jnp.float32)
        hidden = ACTIVATIONS["gelu"](nn.Dense(condition.shape[-1], name="fc1")(condition))
        logits = nn.Dense(self.experts, kernel_init=nn.initializers.zeros, name="fc2")(hidden)
        return self.experts * jax.nn.softmax(logits)


class Experts(nn.Module):
    """Several experts, put together by attention of their outputs to each other (eqs. 1, 4, 5).

    For every token the N outputs are queries, keys and values at once, and the result is the mean
    of the N rows. The parameters of all experts are stacked: `fc1/kernel` is `[N, width, hidden]`.

    Attributes:
        count: N.
        hidden: width between the two layers of an expert.
        gate: one of `GATES`.
        zero_start: experts give zero at the start.
        dtype: compute type; attention is float32.
    """

    count: int
    hidden: int
    gate: str = "none"
    zero_start: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the experts add, `[batch, tokens, width]`, and their attention.

        Args:
            x: `[batch, tokens, width]`.
            condition: `[batch, domain width]`, read by the gate only.

        Returns:
            The sum, and float32 `[batch, tokens, N, N]`, each row of which adds up to 1.
        """
        stacked = nn.vmap(
            Expert,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=self.count,
        )
        outputs = stacked(self.hidden, self.zero_start, self.dtype, name="experts")(token_rows(x))
        outputs = outputs.reshape(self.count, *x.shape)  # [N, B, T, D]
        if self.gate == "domain":
            shares = ExpertGate(self.count, name="gate")(condition).T[:, :, None, None]
            outputs = outputs * shares.astype(outputs.dtype)
        scores = jnp.einsum("nbtd,mbtd->btnm", outputs, outputs, preferred_element_type=jnp.float32)
        attention = jax.nn.softmax(scores * x.shape[-1] ** -0.5, axis=-1)
        # The mean of the rows of a product is the product of the mean row.
        share = attention.mean(axis=2).astype(outputs.dtype)  # [B, T, N]
        return jnp.einsum("btn,nbtd->btd", share, outputs), attention
