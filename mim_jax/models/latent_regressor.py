"""From visible to masked latents, and from latents to targets (CAE, Chen et al., 2023)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.models.transformer import (
    REMAT_POLICIES,
    LayerScale,
    Mlp,
    Transformer,
    drop_path_scales,
    layer_norm,
    token_rows,
)

SMALL = nn.initializers.truncated_normal(0.02, lower=-1.0, upper=1.0)
"""Normal of deviation 0.02, cut off at one deviation: tokens and patch embedding of CAE."""


class CrossAttention(nn.Module):
    """Multi-head attention from one sequence to another; the key has no bias.

    Attributes:
        heads: attention heads.
        head_width: width of a head; None divides the width by the heads.
        dtype: compute type of matrix products.
        implementation: of `jax.nn.dot_product_attention`.
    """

    heads: int
    head_width: int | None = None
    dtype: Any = jnp.float32
    implementation: Any = None

    @nn.compact
    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """Maps queries `[batch, queries, width]` to the same shape.

        Args:
            query: what attends.
            key: `[batch, tokens, width]`, what is attended to.
            value: `[batch, tokens, width]`, what is passed on.

        Raises:
            ValueError: if the heads do not divide the width.
        """
        shape, width = query.shape, query.shape[-1]
        if self.head_width is None and width % self.heads:
            raise ValueError(f"width {width} is not divisible by {self.heads} attention heads.")
        heads = (self.heads, self.head_width or width // self.heads)
        xavier = nn.initializers.xavier_uniform()

        def project(name: str, x: jax.Array) -> jax.Array:
            projection = nn.DenseGeneral(
                heads, use_bias=False, kernel_init=xavier, dtype=self.dtype, name=name
            )
            projected = projection(token_rows(x)).reshape(*x.shape[:-1], *heads)
            if name == "key":
                return projected
            bias = self.param(f"{name}_bias", nn.initializers.zeros, heads)
            return projected + bias.astype(projected.dtype)

        x = jax.nn.dot_product_attention(
            project("query", query),
            project("key", key),
            project("value", value),
            implementation=self.implementation,
        )
        out = nn.DenseGeneral(
            width, axis=(-2, -1), kernel_init=xavier, dtype=self.dtype, name="out"
        )
        return out(x.reshape(-1, *heads)).reshape(shape)


class RegressorBlock(nn.Module):
    """The masked tokens attend to visible and masked ones, then an MLP on the normalized result.

    Attributes:
        settings: `heads`, `head_width`, `mlp_ratio`, `layer_scale`, `epsilon`, `attention` and
            `dtype` are read.
    """

    settings: Transformer

    @nn.compact
    def __call__(
        self,
        state: jax.Array,
        visible: jax.Array,
        masked_positions: jax.Array,
        visible_positions: jax.Array,
        branch_scales: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """The next state of the masked tokens, `[batch, masked, width]`.

        Args:
            state: `[batch, masked, width]`.
            visible: latents `[batch, visible, width]`.
            masked_positions: like `state`; queries and keys get positions, values do not.
            visible_positions: like `visible`.
            branch_scales: factors on both branches, see `drop_path_scales`.
        """
        blocks = self.settings

        def norm(name: str, x: jax.Array) -> jax.Array:
            return layer_norm(name, blocks.dtype, blocks.epsilon)(x)

        def scaled(branch: jax.Array, which: int) -> jax.Array:
            if blocks.layer_scale is not None:
                branch = LayerScale(blocks.layer_scale, name=f"layer_scale{which + 1}")(branch)
            return branch if branch_scales is None else branch * branch_scales[which]

        tokens = jnp.concatenate([visible, state], axis=1)
        positions = jnp.concatenate([visible_positions, masked_positions], axis=1)
        attention = CrossAttention(
            blocks.heads, blocks.head_width, blocks.dtype, blocks.attention, name="attention"
        )
        branch = attention(
            norm("query_norm", state + masked_positions),
            norm("key_norm", tokens + positions),
            norm("value_norm", tokens),
        )
        # What the MLP adds to is the normalized sum, not the sum.
        state = norm("norm", state + scaled(branch, 0))
        mlp = Mlp(blocks.mlp_ratio, blocks.dtype, blocks.activation, name="mlp")
        return state + scaled(mlp(state), 1)


class LatentRegressor(nn.Module):
    """Blocks that turn mask tokens into latents of the masked patches; a LayerNorm at the end.

    Attributes:
        width: of all tokens.
        settings: what the blocks are like; see `RegressorBlock`. `depth`, `drop_path` and `remat`
            are read as well; there is no `scan`.
        final_norm: apply the LayerNorm. Without it its parameters exist all the same (CAE v2).
    """

    width: int
    settings: Transformer
    final_norm: bool = True

    @nn.compact
    def __call__(
        self,
        visible: jax.Array,
        masked_positions: jax.Array,
        visible_positions: jax.Array,
        drop_path_noise: jax.Array | None = None,
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Predicts latents.

        Args:
            visible: latents `[batch, visible, width]`, without class token.
            masked_positions: `[batch, masked, width]`.
            visible_positions: `[batch, visible, width]`.
            drop_path_noise: uniform in [0, 1), `[depth, 2, batch]`; None keeps every branch.

        Returns:
            Predicted latents `[batch, masked, width]`, and the states after all blocks.
        """
        blocks = self.settings
        block = RegressorBlock
        if blocks.remat != "none":
            block = nn.remat(RegressorBlock, policy=REMAT_POLICIES[blocks.remat])
        mask_token = self.param("mask_token", SMALL, (1, 1, self.width))
        state = jnp.broadcast_to(mask_token, masked_positions.shape).astype(visible.dtype)
        scales = None
        if drop_path_noise is not None and blocks.drop_path:
            scales = drop_path_scales(drop_path_noise, blocks.drop_path).astype(visible.dtype)
        states = []
        for i in range(blocks.depth):
            scale = None if scales is None else (scales[i, 0], scales[i, 1])
            state = block(blocks, name=f"blocks_{i}")(
                state, visible, masked_positions, visible_positions, scale
            )
            states.append(state)
        normalized = layer_norm("norm", blocks.dtype, blocks.epsilon)(state)
        return normalized if self.final_norm else state, states


class LatentDecoder(nn.Module):
    """Predicts targets from latents alone: blocks, a LayerNorm and a linear layer.

    Attributes:
        outputs: values predicted for each token.
        transformer: the blocks; of depth 0, tokens do not see each other (CAE v2).
    """

    outputs: int
    transformer: Transformer

    @nn.compact
    def __call__(self, tokens: jax.Array, drop_path_noise: jax.Array | None = None) -> jax.Array:
        """Maps `[batch, tokens, width]` to `[batch, tokens, outputs]`."""
        blocks = self.transformer
        if blocks.depth:
            tokens, _ = blocks(tokens, drop_path_noise)
        tokens = layer_norm("norm", blocks.dtype, blocks.epsilon)(tokens)
        xavier = nn.initializers.xavier_uniform()
        return nn.Dense(self.outputs, kernel_init=xavier, dtype=blocks.dtype, name="head")(tokens)
