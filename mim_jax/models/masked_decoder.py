"""The decoder of a masked autoencoder: mask tokens, blocks and a linear prediction (MAE)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.masking import restore_tokens
from mim_jax.models.positions import resize_positions, sincos_positions
from mim_jax.models.transformer import Transformer, layer_norm


class MaskedDecoder(nn.Module):
    """Predicts `outputs` values for every patch from the tokens of the visible ones.

    Attributes:
        grid: patches along height and width.
        outputs: values predicted for each patch.
        width: token width.
        transformer: the blocks; their compute type is that of the whole decoder.
        position_grid: as for `ViT`.
        class_token: the encoder's tokens begin with a class token, which the blocks see.
    """

    grid: tuple[int, ...]
    outputs: int
    width: int
    transformer: Transformer
    position_grid: tuple[int, ...] | None = None
    class_token: bool = True

    def position_table(self) -> np.ndarray:
        """The fixed table, float32 `[1 + tokens, width]`; that of the class token is zero.

        Without class token its row is missing.
        """
        source, leading = self.position_grid or self.grid, int(self.class_token)
        table = sincos_positions(source, self.width, leading_tokens=leading)
        return resize_positions(table, source, self.grid)

    @nn.compact
    def __call__(self, tokens: jax.Array, restore_ids: jax.Array) -> jax.Array:
        """Decodes the whole image.

        Args:
            tokens: encoder output `[batch, 1 + kept, encoder width]`, class token first, visible
                tokens in drawn order; without class token `[batch, kept, encoder width]`.
            restore_ids: int32 `[batch, tokens]`, see `mim_jax.masking.Masking`.

        Returns:
            Predictions for every patch in row-major order, `[batch, tokens, outputs]`.
        """
        dtype = self.transformer.dtype
        xavier = nn.initializers.xavier_uniform()
        tokens = nn.Dense(self.width, kernel_init=xavier, dtype=dtype, name="embed")(tokens)
        mask_token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.width))
        leading = int(self.class_token)
        patches = restore_tokens(tokens[:, leading:], mask_token, restore_ids)  # [B, L, D]
        tokens = jnp.concatenate([tokens[:, :leading], patches], axis=1)
        tokens, _ = self.transformer(tokens + jnp.asarray(self.position_table(), dtype))
        tokens = layer_norm("norm", dtype)(tokens)
        pred = nn.Dense(self.outputs, kernel_init=xavier, dtype=dtype, name="pred")(tokens)
        return pred[:, leading:]
