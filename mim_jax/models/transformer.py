"""Pre-norm transformer blocks (Dosovitskiy et al., 2021), as MAE and its descendants use them."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

LAYER_NORM_EPSILON = 1e-6
"""Epsilon of every LayerNorm in the MAE code; PyTorch's own default is 1e-5."""

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What the backward pass keeps: everything, block inputs only, or matrix products as well."""


def layer_norm(name: str, dtype: Any) -> nn.LayerNorm:
    """LayerNorm with float32 statistics, computed in two passes as PyTorch does."""
    return nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, use_fast_variance=False, dtype=dtype, name=name)


class Attention(nn.Module):
    """Multi-head self-attention with a fused query-key-value projection.

    The kernel of the projection is `[width, 3, heads, head_width]`, so that heads can be sharded;
    Xavier initialization sees it as the one matrix `[width, 3 * width]` that it is (MAE code).
    """

    heads: int
    dtype: Any = jnp.float32
    implementation: Literal["xla", "cudnn"] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, tokens, width]` to the same shape.

        Raises:
            ValueError: if the heads do not divide the width.
        """
        width = x.shape[-1]
        if width % self.heads:
            raise ValueError(f"width {width} is not divisible by {self.heads} attention heads.")
        xavier = nn.initializers.xavier_uniform()
        qkv = nn.DenseGeneral(
            (3, self.heads, width // self.heads), kernel_init=xavier, dtype=self.dtype, name="qkv"
        )(x)  # [B, T, 3, H, D / H]
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        # Scaled by head_width^-0.5; logits and softmax are float32 whatever the compute type.
        x = jax.nn.dot_product_attention(query, key, value, implementation=self.implementation)
        return nn.DenseGeneral(
            width, axis=(-2, -1), kernel_init=xavier, dtype=self.dtype, name="out"
        )(x)


class Mlp(nn.Module):
    """Two linear layers with exact (erf) GELU between them."""

    ratio: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., width]` to the same shape through `ratio * width` hidden units."""
        width = x.shape[-1]
        xavier = nn.initializers.xavier_uniform()
        x = nn.Dense(int(width * self.ratio), kernel_init=xavier, dtype=self.dtype, name="fc1")(x)
        x = nn.gelu(x, approximate=False)
        return nn.Dense(width, kernel_init=xavier, dtype=self.dtype, name="fc2")(x)


class Block(nn.Module):
    """`x + Attention(LN(x))`, then `x + Mlp(LN(x))`."""

    heads: int
    mlp_ratio: float = 4.0
    dtype: Any = jnp.float32
    attention: Literal["xla", "cudnn"] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, tokens, width]` to the same shape."""
        attention = Attention(self.heads, self.dtype, self.attention, name="attention")
        x = x + attention(layer_norm("norm1", self.dtype)(x))
        return x + Mlp(self.mlp_ratio, self.dtype, name="mlp")(layer_norm("norm2", self.dtype)(x))


class Transformer(nn.Module):
    """A stack of blocks.

    Attributes:
        depth: number of blocks.
        heads: attention heads of each block.
        mlp_ratio: hidden width of the MLP over the width.
        scan: compile one block and loop over it (`blocks/...` parameters with a leading axis of
            `depth`) instead of `depth` blocks (`blocks_0/...`): faster to compile when deep.
        remat: a name in `REMAT_POLICIES`; anything but "none" trades time for memory.
        dtype: compute type of matrix products.
        attention: implementation of `jax.nn.dot_product_attention`; None lets JAX choose.
    """

    depth: int
    heads: int
    mlp_ratio: float = 4.0
    scan: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32
    attention: Literal["xla", "cudnn"] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, list[jax.Array] | jax.Array]:
        """Maps `[batch, tokens, width]` to the same shape.

        Returns:
            The last output, and the outputs of all blocks: a list, or under `scan` one array
            `[depth, batch, tokens, width]`.

        Raises:
            ValueError: for an unknown name in `remat` or `attention`.
        """
        if self.attention not in (None, "xla", "cudnn"):
            raise ValueError(f"attention is {self.attention!r}; known are 'xla' and 'cudnn'.")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat is {self.remat!r}; known are {', '.join(REMAT_POLICIES)}.")
        block = Block
        if self.remat != "none":
            # Under scan, common subexpressions cannot leak out of the loop body.
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan)
        settings = dict(
            heads=self.heads, mlp_ratio=self.mlp_ratio, dtype=self.dtype, attention=self.attention
        )
        if self.scan:

            def body(module: nn.Module, carry: jax.Array) -> tuple[jax.Array, jax.Array]:
                carry = module(carry)
                return carry, carry

            loop = nn.scan(
                body, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth
            )
            return loop(block(**settings, name="blocks"), x)
        outputs = []
        for i in range(self.depth):
            x = block(**settings, name=f"blocks_{i}")(x)
            outputs.append(x)
        return x, outputs
