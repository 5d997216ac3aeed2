"""Heads that look at all tokens: a transformer block (Locality Alignment), one query (CAE)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.models.transformer import LAYER_NORM_EPSILON, Transformer, layer_norm


class TransformerPool(nn.Module):
    """Learned positions, transformer blocks and a LayerNorm: the pooling head of MaskEmbed.

    Covert et al., 2025, "Locality Alignment": one block without biases of the projections of
    queries, keys and values, norms with epsilon 1e-5; see `pooling_blocks`.

    Attributes:
        transformer: the blocks; their epsilon and compute type are those of the whole head.
    """

    transformer: Transformer

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens `[batch, tokens, width]` to the same shape; their mean is the pooled one."""
        blocks = self.transformer
        positions = self.param("positions", nn.initializers.normal(0.02), tokens.shape[1:])
        tokens = tokens.astype(blocks.dtype) + positions.astype(blocks.dtype)
        return layer_norm("norm", blocks.dtype, blocks.epsilon)(blocks(tokens)[0])


def attention_heads(width: int) -> int:
    """One head for 64 channels, as ViTs of most sizes have; 1 where that does not divide."""
    return 1 if width % 64 else width // 64


def pooling_blocks(heads: int, depth: int = 1, **fields: Any) -> Transformer:
    """The blocks of a `TransformerPool` as published; more fields are those of `Transformer`."""
    # Without a parent, they belong to the pool even where another module makes both.
    fields = {"qkv_bias": "none", "epsilon": 1e-5, "parent": None, **fields}
    return Transformer(depth, heads, **fields)


class AttentivePool(nn.Module):
    """One learned query that attends to all tokens (CAE, the attentive probe of its code).

    No residual, no MLP, no positions. Query, keys and values have norms of their own, and biases
    but for the keys. The query starts at zero, so at first every token weighs the same.

    Attributes:
        heads: attention heads.
        dtype: compute type of matrix products.
    """

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens `[batch, tokens, width]` to `[batch, width]`.

        Raises:
            ValueError: if the heads do not divide the width.
        """
        width = tokens.shape[-1]
        if width % self.heads:
            raise ValueError(f"width {width} is not divisible by {self.heads} attention heads.")
        heads, zeros = (self.heads, width // self.heads), nn.initializers.zeros

        def projected(name: str, x: jax.Array) -> jax.Array:
            x = layer_norm(f"{name}_norm", self.dtype, LAYER_NORM_EPSILON)(x)
            small = nn.initializers.truncated_normal(0.02)
            dense = nn.DenseGeneral(
                heads, use_bias=False, kernel_init=small, dtype=self.dtype, name=name
            )
            x = dense(x)
            if name == "key":
                return x
            return x + self.param(f"{name}_bias", zeros, heads).astype(x.dtype)

        query = projected("query", self.param("token", zeros, (1, 1, width)))
        query = jnp.broadcast_to(query, (len(tokens), *query.shape[1:]))  # [B, 1, H, D / H]
        x = jax.nn.dot_product_attention(
            query, projected("key", tokens), projected("value", tokens)
        )
        return nn.DenseGeneral(
            width,
            axis=(-2, -1),
            kernel_init=nn.initializers.truncated_normal(0.02),
            dtype=self.dtype,
            name="out",
        )(x[:, 0])
