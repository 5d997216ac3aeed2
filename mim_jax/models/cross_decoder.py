"""The decoder of Hi-End-MAE (Tang et al., 2025): it attends to several levels of the encoder."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.masking import gather_tokens
from mim_jax.models.cross_attention import FusedCrossAttention
from mim_jax.models.positions import resize_positions, sincos_positions
from mim_jax.models.transformer import (
    REMAT_POLICIES,
    Attention,
    Mlp,
    Transformer,
    layer_norm,
)


class CrossBlock(nn.Module):
    """Self-attention, attention to a level, and MLP, each on normalized tokens and added to them.

    Attributes:
        settings: `heads`, `mlp_ratio`, `epsilon`, `attention` and `dtype` are read.
    """

    settings: Transformer

    @nn.compact
    def __call__(self, x: jax.Array, level: jax.Array) -> jax.Array:
        """Maps tokens `[batch, tokens, width]` to the same shape.

        Args:
            x: tokens.
            level: `[batch, visible, width]`, not normalized.
        """
        blocks = self.settings
        shared = (blocks.heads, blocks.dtype, blocks.attention)

        def norm(name: str, x: jax.Array) -> jax.Array:
            return layer_norm(name, blocks.dtype, blocks.epsilon)(x)

        x = x + Attention(*shared, name="self_attention")(norm("norm0", x))
        x = x + FusedCrossAttention(*shared, name="cross_attention")(norm("norm1", x), level)
        mlp = Mlp(blocks.mlp_ratio, blocks.dtype, blocks.activation, name="mlp")
        return x + mlp(norm("norm2", x))


class Decoded(NamedTuple):
    """What the decoder computes; tokens are in drawn order.

    Attributes:
        levels: what is attended to, `[batch, 1 + visible, width]` each, the shallowest first.
        tokens: input of the first block, `[batch, 1 + tokens, width]`.
        pred: `[batch, 1 + tokens, outputs]`, class token first.
    """

    levels: list[jax.Array]
    tokens: jax.Array
    pred: jax.Array


class HierarchicalDecoder(nn.Module):
    """Predicts `outputs` values for every patch from visible tokens of several encoder levels.

    First come the blocks of `transformer` on all tokens, then a `CrossBlock` for each level, the
    deepest level first. Without levels it is the plain decoder of a masked autoencoder.

    Attributes:
        grid: patches along every axis.
        outputs: values predicted for each patch.
        width: token width.
        transformer: the first blocks; their settings are those of the whole decoder.
        position_grid: as for `ViT`.
    """

    grid: tuple[int, ...]
    outputs: int
    width: int
    transformer: Transformer
    position_grid: tuple[int, ...] | None = None

    def position_table(self) -> np.ndarray:
        """The fixed table of the patches, float32 `[tokens, width]`."""
        source = self.position_grid or self.grid
        return resize_positions(sincos_positions(source, self.width), source, self.grid)

    @nn.compact
    def __call__(self, latent: jax.Array, levels: Sequence[jax.Array], order: jax.Array) -> Decoded:
        """Decodes the whole image.

        Args:
            latent: encoder output `[batch, 1 + visible, encoder width]`, class token first.
            levels: outputs of encoder blocks, like `latent` but not normalized, the shallowest
                first.
            order: int32 `[batch, tokens]`, positions of all tokens in drawn order, the visible
                ones first.
        """
        blocks = self.transformer
        dtype = blocks.dtype
        block = CrossBlock
        if blocks.remat != "none":
            block = nn.remat(CrossBlock, policy=REMAT_POLICIES[blocks.remat])
        tokens = self._embedded("embed", latent)
        keys = [self._embedded(f"embed_level_{i}", level) for i, level in enumerate(levels)]
        mask_token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.width))
        masked = (len(order), 1 + order.shape[1] - tokens.shape[1], self.width)
        fillers = jnp.broadcast_to(mask_token.astype(dtype), masked)
        table = jnp.asarray(self.position_table(), dtype)
        positions = gather_tokens(jnp.broadcast_to(table, (len(order), *table.shape)), order)
        places = jnp.pad(positions, ((0, 0), (1, 0), (0, 0)))  # the class token has none
        tokens = jnp.concatenate([tokens, fillers], axis=1) + places
        x, _ = blocks(tokens)
        for i, level in enumerate(reversed(keys)):
            x = block(blocks, name=f"cross_blocks_{i}")(x, level)
        x = layer_norm("norm", dtype, blocks.epsilon)(x)
        xavier = nn.initializers.xavier_uniform()
        pred = nn.Dense(self.outputs, kernel_init=xavier, dtype=dtype, name="pred")(x)
        return Decoded(keys, tokens, pred)

    def _embedded(self, name: str, tokens: jax.Array) -> jax.Array:
        """Tokens of the encoder in the width of the decoder."""
        bound = 1 / math.sqrt(tokens.shape[-1])

        def uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)  # PyTorch's default

        return nn.Dense(
            self.width,
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=uniform,
            dtype=self.transformer.dtype,
            name=name,
        )(tokens)
