"""The Vision Transformer encoder (Dosovitskiy et al., 2021), with the choices of the MAE code."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.masking import gather_tokens, token_grid
from mim_jax.models.positions import sincos_positions
from mim_jax.models.transformer import Transformer, layer_norm
from mim_jax.targets import patchify

VIT_SIZES: dict[str, dict[str, int]] = {
    "base": dict(width=768, depth=12, heads=12),
    "large": dict(width=1024, depth=24, heads=16),
    "huge": dict(width=1280, depth=32, heads=16),
}
"""Encoder sizes of MAE (appendix A.1), named as in the paper."""


class PatchEmbed(nn.Module):
    """A strided convolution over patches, written as the matrix product that it is.

    The kernel has the shape `[patch_height, patch_width, channels, width]` of the convolution.
    Its initial values are Xavier-uniform over the matrix `[values, width]`; the bias starts
    uniform in +-1/sqrt(values), PyTorch's default for convolutions (MAE code).
    """

    width: int
    patch_size: tuple[int, int]
    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        """Maps patches `[batch, tokens, values]` of `patchify` to `[batch, tokens, width]`."""
        values = int(np.prod(self.patch_size)) * self.channels
        if patches.shape[-1] != values:
            raise ValueError(
                f"patches have {patches.shape[-1]} values, but patch size {self.patch_size} with "
                f"{self.channels} channels has {values}."
            )

        def xavier_as_matrix(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return nn.initializers.xavier_uniform()(key, (values, self.width)).reshape(shape)

        def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return jax.random.uniform(key, shape, minval=-1, maxval=1) / np.sqrt(values)

        kernel = self.param(
            "kernel", xavier_as_matrix, (*self.patch_size, self.channels, self.width)
        ).reshape(values, self.width)
        bias = self.param("bias", uniform, (self.width,))
        patches, kernel, bias = nn.dtypes.promote_dtype(patches, kernel, bias, dtype=self.dtype)
        return patches @ kernel + bias


class ViT(nn.Module):
    """Patch embedding, fixed positions, class token, transformer blocks and a final LayerNorm.

    Attributes:
        image_size: `(height, width)` in pixels; need not be square.
        patch_size: `(height, width)` in pixels.
        channels: channels of the image.
        width: token width.
        transformer: the blocks; their compute type is that of the whole encoder.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    channels: int
    width: int
    transformer: Transformer

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        rows, columns = token_grid(self.image_size, self.patch_size)
        return rows, columns

    @nn.compact
    def __call__(
        self, images: jax.Array, keep_ids: jax.Array | None = None
    ) -> tuple[jax.Array, list[jax.Array] | jax.Array]:
        """Encodes the patches named by `keep_ids`, or all of them.

        Args:
            images: `[batch, height, width, channels]`, normalized.
            keep_ids: int32 `[batch, kept]`, positions of visible patches. Removed patches are
                dropped before the embedding: nothing is computed for them.

        Returns:
            The normalized tokens `[batch, 1 + kept, width]`, class token first, and the outputs
            of all blocks before the final norm, see `Transformer`.

        Raises:
            ValueError: if the images do not have the size and channels of the model.
        """
        expected = (*self.image_size, self.channels)
        if images.shape[1:] != expected:
            raise ValueError(
                f"the model expects images [batch, {', '.join(map(str, expected))}], got "
                f"{images.shape}; set image_size and channels in the config to the data's."
            )
        batch, dtype = images.shape[0], self.transformer.dtype
        patches = patchify(images, self.patch_size)  # [B, L, values]
        table = sincos_positions(self.grid, self.width)  # fixed, so not a parameter
        positions = jnp.broadcast_to(jnp.asarray(table, dtype), (batch, *table.shape))
        if keep_ids is not None:
            patches = gather_tokens(patches, keep_ids)  # [B, K, values]
            positions = gather_tokens(positions, keep_ids)  # [B, K, D]
        embed = PatchEmbed(self.width, self.patch_size, self.channels, dtype, name="patch_embed")
        tokens = embed(patches) + positions
        # The class token's position is zero.
        cls_token = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, self.width))
        cls_token = jnp.broadcast_to(cls_token.astype(tokens.dtype), (batch, 1, self.width))
        tokens = jnp.concatenate([cls_token, tokens], axis=1)
        tokens, outputs = self.transformer(tokens)
        return layer_norm("norm", dtype)(tokens), outputs


def vit_size(name: str, **given: int) -> dict[str, int]:
    """Width, depth and heads of a named size; given values above 0 take precedence.

    Raises:
        ValueError: if the name is unknown, or neither name nor value fixes a number.
    """
    if name and name not in VIT_SIZES:
        raise ValueError(f"model.size is {name!r}; known are {', '.join(VIT_SIZES)}.")
    size = {**VIT_SIZES.get(name, {}), **{key: value for key, value in given.items() if value > 0}}
    for key in ("width", "depth", "heads"):
        if key not in size:
            raise ValueError(f"set model.size to one of {', '.join(VIT_SIZES)}, or model.{key}.")
    return size
