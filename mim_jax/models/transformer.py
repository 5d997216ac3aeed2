"""Pre-norm transformer blocks (Dosovitskiy et al., 2021), as MAE and its descendants use them."""

import re
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

LAYER_NORM_EPSILON = 1e-6
"""Epsilon of every LayerNorm in the MAE code; PyTorch's own default is 1e-5."""

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What the backward pass keeps: everything, block inputs only, or matrix products as well."""


def layer_norm(name: str | None, dtype: Any) -> nn.LayerNorm:
    """LayerNorm with float32 statistics, computed in two passes as PyTorch does."""
    return nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, use_fast_variance=False, dtype=dtype, name=name)


def token_rows(x: jax.Array) -> jax.Array:
    """`[..., width]` as the rows of one matrix, which is how linear layers should see tokens.

    The result is the same either way. But if matrix products take `[batch, tokens, width]`, XLA
    for CPU folds the sum of all later blocks' gradients into the gradient of every weight, and so
    computes it again and again, a sixth of the time of a ViT-S step.
    """
    return x.reshape(-1, x.shape[-1])


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
        shape, width = x.shape, x.shape[-1]
        if width % self.heads:
            raise ValueError(f"width {width} is not divisible by {self.heads} attention heads.")
        heads = (self.heads, width // self.heads)
        xavier = nn.initializers.xavier_uniform()
        qkv = nn.DenseGeneral((3, *heads), kernel_init=xavier, dtype=self.dtype, name="qkv")(
            token_rows(x)
        ).reshape(*shape[:-1], 3, *heads)  # [B, T, 3, H, D / H]
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        # Scaled by head_width^-0.5; logits and softmax are float32 whatever the compute type.
        x = jax.nn.dot_product_attention(query, key, value, implementation=self.implementation)
        return nn.DenseGeneral(
            width, axis=(-2, -1), kernel_init=xavier, dtype=self.dtype, name="out"
        )(x.reshape(-1, *heads)).reshape(shape)


class Mlp(nn.Module):
    """Two linear layers with exact (erf) GELU between them."""

    ratio: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., width]` to the same shape through `ratio * width` hidden units."""
        shape, width = x.shape, x.shape[-1]
        xavier = nn.initializers.xavier_uniform()
        x = token_rows(x)
        x = nn.Dense(int(width * self.ratio), kernel_init=xavier, dtype=self.dtype, name="fc1")(x)
        x = nn.gelu(x, approximate=False)
        return nn.Dense(width, kernel_init=xavier, dtype=self.dtype, name="fc2")(x).reshape(shape)


class Block(nn.Module):
    """`x + Attention(LN(x))`, then `x + Mlp(LN(x))`."""

    heads: int
    mlp_ratio: float = 4.0
    dtype: Any = jnp.float32
    attention: Literal["xla", "cudnn"] | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, branch_scales: tuple[jax.Array, jax.Array] | None = None
    ) -> jax.Array:
        """Maps `[batch, tokens, width]` to the same shape.

        Args:
            x: tokens.
            branch_scales: factors on both branches, each broadcast against `x`; see `drop_path`.
        """
        attention = Attention(self.heads, self.dtype, self.attention, name="attention")
        branch = attention(layer_norm("norm1", self.dtype)(x))
        x = x + (branch if branch_scales is None else branch * branch_scales[0])
        mlp = Mlp(self.mlp_ratio, self.dtype, name="mlp")
        branch = mlp(layer_norm("norm2", self.dtype)(x))
        return x + (branch if branch_scales is None else branch * branch_scales[1])


def drop_path_scales(noise: jax.Array, rate: float) -> jax.Array:
    """Factors that switch whole branches off (stochastic depth, Huang et al., 2016).

    The rate of a block grows linearly from 0 to `rate`. A branch of a sample is kept where
    `floor(1 - rate + noise)` is 1, and divided by `1 - rate` then (timm's `DropPath`).

    Args:
        noise: uniform in [0, 1), `[depth, 2, batch]`; the second axis is attention, MLP.
        rate: of the last block, in [0, 1).

    Returns:
        `[depth, 2, batch, 1, 1]`, float32.
    """
    keep = 1 - jnp.linspace(0, rate, noise.shape[0])[:, None, None]
    return (jnp.floor(keep + noise) / keep)[..., None, None]


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
        drop_path: rate of stochastic depth in the last block, in [0, 1); see `drop_path_scales`.
    """

    depth: int
    heads: int
    mlp_ratio: float = 4.0
    scan: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32
    attention: Literal["xla", "cudnn"] | None = None
    drop_path: float = 0.0

    @nn.compact
    def __call__(
        self, x: jax.Array, drop_path_noise: jax.Array | None = None
    ) -> tuple[jax.Array, list[jax.Array] | jax.Array]:
        """Maps `[batch, tokens, width]` to the same shape.

        Args:
            x: tokens.
            drop_path_noise: uniform in [0, 1), `[depth, 2, batch]`; None keeps every branch.

        Returns:
            The last output, and the outputs of all blocks: a list, or under `scan` one array
            `[depth, batch, tokens, width]`.

        Raises:
            ValueError: for an unknown name in `remat` or `attention`, or a bad `drop_path`.
        """
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path is {self.drop_path}; it must be in [0, 1).")
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
        scales = None
        if drop_path_noise is not None and self.drop_path:
            scales = drop_path_scales(drop_path_noise, self.drop_path).astype(x.dtype)
        if self.scan:

            def body(
                module: nn.Module, carry: jax.Array, scale: jax.Array | None
            ) -> tuple[jax.Array, jax.Array]:
                carry = module(carry, None if scale is None else (scale[0], scale[1]))
                return carry, carry

            loop = nn.scan(
                body, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth
            )
            return loop(block(**settings, name="blocks"), x, scales)
        outputs = []
        for i in range(self.depth):
            scale = None if scales is None else (scales[i, 0], scales[i, 1])
            x = block(**settings, name=f"blocks_{i}")(x, scale)
            outputs.append(x)
        return x, outputs


def restacked(
    name: str, given: Mapping[str, np.ndarray], donor: Transformer, receiver: Transformer
) -> np.ndarray | None:
    """A parameter below a `Transformer`'s owner, whether or not both run their blocks by `scan`.

    Args:
        name: path such as `transformer/blocks_3/mlp/fc1/kernel`, or `transformer/blocks/...`.
        given: the donor's parameters by path.
        donor: the blocks that have them.
        receiver: the blocks that get them.

    Returns:
        The array, or None if the donor lacks it.
    """
    single = re.fullmatch(r"(.*/blocks)_(\d+)/(.*)", name)
    if donor.scan and single:
        stack = given.get(f"{single[1]}/{single[3]}")
        index = int(single[2])
        return None if stack is None or index >= len(stack) else stack[index]
    if receiver.scan and not donor.scan and "/blocks/" in name:
        parts = [given.get(name.replace("/blocks/", f"/blocks_{i}/")) for i in range(donor.depth)]
        return None if any(part is None for part in parts) else np.stack(parts)  # type: ignore[arg-type]
    return given.get(name)
