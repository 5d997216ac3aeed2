"""Tables as tokens, their fusion with an image, and predictions of their cells (TIP, 2024)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.models.cross_attention import FusedCrossAttention
from mim_jax.models.transformer import (
    REMAT_POLICIES,
    Attention,
    Mlp,
    Transformer,
    layer_norm,
    token_rows,
)

EPSILON = 1e-5
"""Of every LayerNorm in this file: PyTorch's own default."""

BLOCKED = -1e9
"""Added to the attention logits of keys that nobody may see."""

small_normal = nn.initializers.normal(0.02)


def column_offsets(categories: tuple[int, ...]) -> np.ndarray:
    """Where the values of each categorical column begin among those of all, int32 `[columns]`."""
    return np.concatenate([[0], np.cumsum(categories)[:-1]]).astype(np.int32)[: len(categories)]


def column_codes(table: jax.Array, categories: tuple[int, ...]) -> jax.Array:
    """Numbers of categorical cells among the values of all columns, int32 `[batch, columns]`.

    What a missing cell holds may be anything, so codes are cut to those that a column has.

    Args:
        table: `[batch, columns]`, categorical columns first, as 0-based codes.
        categories: number of values of each categorical column.
    """
    given = table[:, : len(categories)]
    # NaN, which marks a missing value in many tables, is no integer.
    codes = jnp.where(jnp.isnan(given), 0, given).astype(jnp.int32)
    counts = jnp.asarray(categories, jnp.int32)
    return jnp.clip(codes, 0, counts - 1) + column_offsets(categories)


def hidden_keys(hidden: jax.Array, dtype: Any) -> jax.Array:
    """What to add to attention logits so that hidden cells are seen by themselves alone.

    The class token, which comes first, is always seen. In half precision the term is the lowest
    finite number rather than infinite, where the softmax of a row would not be a number.

    Args:
        hidden: bool `[batch, columns]`.
        dtype: that the attention computes in.

    Returns:
        `[batch, 1, 1 + columns, 1 + columns]` of queries and keys.
    """
    blocked = jnp.pad(hidden, ((0, 0), (1, 0)))[:, None, None, :]
    itself = jnp.eye(blocked.shape[-1], dtype=bool)
    low = max(BLOCKED, float(jnp.finfo(dtype).min))
    return jnp.where(blocked & ~itself, low, 0.0)


class TableEncoder(nn.Module):
    """A token for every cell behind a class token, and transformer blocks (section 3.2).

    Attributes:
        categories: number of values of each categorical column; these columns come first.
        continuous: number of continuous columns.
        width: token width.
        transformer: the blocks; their compute type is that of the whole encoder.
    """

    categories: tuple[int, ...]
    continuous: int
    width: int
    transformer: Transformer

    @property
    def columns(self) -> int:
        """Number of columns."""
        return len(self.categories) + self.continuous

    @nn.compact
    def __call__(self, table: jax.Array, hidden: jax.Array) -> jax.Array:
        """Tokens `[batch, 1 + columns, width]`, class token first; there is no final norm.

        Args:
            table: float32 `[batch, columns]`: codes, then standardized numbers.
            hidden: bool `[batch, columns]`, cells that are missing or masked. A learned vector
                stands for what they hold, and no other token attends to them.

        Raises:
            ValueError: if the table has another number of columns.
        """
        if table.shape[1] != self.columns:
            raise ValueError(
                f"the table has {table.shape[1]} columns; the model has {len(self.categories)} "
                f"categorical and {self.continuous} continuous ones: set model.categories and "
                "model.continuous to those of the data, or to () and 0."
            )
        dtype = self.transformer.dtype
        shape = (1, 1, self.width)
        cells = []
        if self.categories:
            values = nn.Embed(
                sum(self.categories), self.width, embedding_init=small_normal, name="values"
            )
            cells.append(values(column_codes(table, self.categories)))
        if self.continuous:
            hidden_numbers = hidden[:, len(self.categories) :]
            # Not even NaN in a hidden cell may reach the gradient.
            numbers = jnp.where(hidden_numbers, 0.0, table[:, len(self.categories) :])
            number = nn.Dense(self.width, kernel_init=small_normal, name="number")
            cells.append(number(numbers[..., None]))
        mask_token = self.param("mask_token", small_normal, shape)
        cls_token = self.param("cls_token", small_normal, shape)
        embedded = jnp.where(hidden[..., None], mask_token, jnp.concatenate(cells, axis=1))
        first = jnp.broadcast_to(cls_token, (len(table), *shape[1:]))
        tokens = jnp.concatenate([first, embedded], axis=1)
        tokens += self.param("columns_table", small_normal, (1 + self.columns, self.width))
        tokens = layer_norm("norm", dtype, EPSILON)(tokens)
        return self.transformer(tokens, attention_bias=hidden_keys(hidden, dtype))[0]


class FusionBlock(nn.Module):
    """Self-attention among table tokens, attention to the image, and an MLP, each on its norm.

    Attributes:
        settings: `heads`, `mlp_ratio`, `dtype`, `attention` and `activation` are read.
    """

    settings: Transformer

    @nn.compact
    def __call__(self, x: jax.Array, image: jax.Array) -> jax.Array:
        """Maps table tokens `[batch, tokens, width]` to the same shape.

        Args:
            x: table tokens.
            image: `[batch, image tokens, width]`, normalized once for all blocks.
        """
        blocks = self.settings

        def norm(name: str) -> nn.LayerNorm:
            return layer_norm(name, blocks.dtype, blocks.epsilon)

        attention = Attention(
            blocks.heads, blocks.dtype, blocks.attention, blocks.qkv_bias, name="attention"
        )
        x = x + attention(norm("norm1")(x))
        image_attention = FusedCrossAttention(
            blocks.heads,
            blocks.dtype,
            blocks.attention,
            source_bias=False,
            kernel_init=small_normal,
            name="image_attention",
        )
        x = x + image_attention(norm("cross_norm")(x), image)
        mlp = Mlp(blocks.mlp_ratio, blocks.dtype, blocks.activation, name="mlp")
        return x + mlp(norm("norm2")(x))


class FusionEncoder(nn.Module):
    """The multimodal interaction module: table tokens look at the image (section 3.2).

    No cell is hidden here: what stands for a masked cell is seen, and must be filled in.

    Attributes:
        width: of the table tokens.
        settings: what the blocks are like; see `FusionBlock`. `depth`, `epsilon`, `qkv_bias` and
            `remat` are read as well; there is no `scan`.
    """

    width: int
    settings: Transformer

    @nn.compact
    def __call__(self, table: jax.Array, image: jax.Array) -> jax.Array:
        """Normalized tokens `[batch, 1 + columns, width]`.

        Args:
            table: output of a `TableEncoder`.
            image: `[batch, image tokens, image width]`.
        """
        blocks = self.settings
        project = nn.Dense(
            self.width, kernel_init=small_normal, dtype=blocks.dtype, name="image_project"
        )
        image = project(token_rows(image)).reshape(*image.shape[:-1], self.width)
        image = layer_norm("image_norm", blocks.dtype, blocks.epsilon)(image)
        block = FusionBlock
        if blocks.remat != "none":
            block = nn.remat(FusionBlock, policy=REMAT_POLICIES[blocks.remat])
        x = table
        for i in range(blocks.depth):
            x = block(blocks, name=f"blocks_{i}")(x, image)
        return layer_norm("norm", blocks.dtype, blocks.epsilon)(x)


class CellPredictor(nn.Module):
    """What cells hold: a distribution over the values of all columns together, or a number.

    Attributes:
        categories: as for `TableEncoder`.
        dtype: compute type.
    """

    categories: tuple[int, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits `[batch, categorical columns, values]`, numbers `[batch, continuous columns]`.

        Both are float32.

        Args:
            tokens: `[batch, 1 + columns, width]`, class token first.
        """
        split = 1 + len(self.categories)
        values = nn.Dense(
            max(sum(self.categories), 1),
            kernel_init=small_normal,
            dtype=self.dtype,
            name="values",
        )
        number = nn.Dense(1, kernel_init=small_normal, dtype=self.dtype, name="number")
        logits, numbers = values(tokens[:, 1:split]), number(tokens[:, split:])[..., 0]
        return logits.astype(jnp.float32), numbers.astype(jnp.float32)
