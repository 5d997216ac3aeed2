"""Attention from one sequence to another, whose keys and values come from one projection."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.models.transformer import token_rows


class FusedCrossAttention(nn.Module):
    """Multi-head attention from tokens to a source, which gives keys and values.

    The kernel of the projection of the source is `[width, 2, heads, head_width]`, keys first;
    Xavier initialization sees it as the one matrix that it is in official codes.

    Attributes:
        heads: attention heads.
        dtype: compute type of matrix products.
        implementation: of `jax.nn.dot_product_attention`.
        source_bias: keys and values have a bias.
        kernel_init: of all kernels.
    """

    heads: int
    dtype: Any = jnp.float32
    implementation: Any = None
    source_bias: bool = True
    kernel_init: Callable[..., Any] = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, tokens: jax.Array, source: jax.Array) -> jax.Array:
        """Maps tokens `[batch, tokens, width]` to the same shape.

        Args:
            tokens: what attends.
            source: `[batch, source tokens, any width]`, what is attended to.

        Raises:
            ValueError: if the heads do not divide the width.
        """
        shape, width = tokens.shape, tokens.shape[-1]
        if width % self.heads:
            raise ValueError(f"width {width} is not divisible by {self.heads} attention heads.")
        heads = (self.heads, width // self.heads)
        options: dict[str, Any] = {"kernel_init": self.kernel_init, "dtype": self.dtype}

        def project(name: str, x: jax.Array, outputs: tuple[int, ...], bias: bool) -> jax.Array:
            layer = nn.DenseGeneral(outputs, use_bias=bias, name=name, **options)
            return layer(token_rows(x)).reshape(*x.shape[:-1], *outputs)

        query = project("query", tokens, heads, True)  # [B, T, H, D / H]
        key_value = project("key_value", source, (2, *heads), self.source_bias)  # [B, S, 2, ...]
        x = jax.nn.dot_product_attention(
            query, key_value[:, :, 0], key_value[:, :, 1], implementation=self.implementation
        )
        out = nn.DenseGeneral(width, axis=(-2, -1), name="out", **options)
        return out(x.reshape(-1, *heads)).reshape(shape)
