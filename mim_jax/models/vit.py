"""The Vision Transformer encoder (Dosovitskiy et al., 2021), with the choices of the MAE code."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.masking import gather_tokens, token_grid
from mim_jax.models.positions import (
    along_axes,
    bicubic_matrix,
    resize_positions,
    sincos_positions,
)
from mim_jax.models.transformer import (
    RelativePositionBias,
    Transformer,
    layer_norm,
    layer_scale_behind,
    restacked,
    scaled_outputs,
)
from mim_jax.targets import patchify

VIT_SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(width=192, depth=12, heads=3),
    "small": dict(width=384, depth=12, heads=6),
    "base": dict(width=768, depth=12, heads=12),
    "large": dict(width=1024, depth=24, heads=16),
    "huge": dict(width=1280, depth=32, heads=16),
}
"""Encoder sizes of MAE (appendix A.1), named as in the paper, and the two smaller ones of DeiT."""


class PatchEmbed(nn.Module):
    """A strided convolution over patches, written as the matrix product that it is.

    The kernel has the shape `[patch_height, patch_width, channels, width]` of the convolution,
    with the depth of 3-D patches behind their width.
    Its initial values are Xavier-uniform over the matrix `[values, width]`; the bias starts
    uniform in +-1/sqrt(values), PyTorch's default for convolutions (MAE code).
    """

    width: int
    patch_size: tuple[int, ...]
    channels: int
    dtype: Any = jnp.float32
    use_bias: bool = True

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
        patches, kernel = nn.dtypes.promote_dtype(patches, kernel, dtype=self.dtype)
        tokens = patches @ kernel
        if not self.use_bias:
            return tokens
        return tokens + self.param("bias", uniform, (self.width,)).astype(tokens.dtype)


POSITIONS = ("sincos", "sincos_row_first", "learned", "learned_patches", "none")
"""Fixed sine-cosine tables of MAE and (row before column) of CAE, a parameter for all tokens or for
patches alone, or nothing."""


class ViT(nn.Module):
    """Patch embedding, positions, class token, transformer blocks and a final LayerNorm.

    Attributes:
        image_size: `(height, width)` in pixels; need not be square. Volumes have three numbers,
            `(height, width, depth)`, in this and in all other sizes and grids.
        patch_size: `(height, width)` in pixels.
        channels: channels of the image.
        width: token width.
        transformer: the blocks; their compute type and epsilon are those of the whole encoder.
        positions: one of `POSITIONS`. Learned ones are a parameter `[1 + tokens, width]`, the
            class token's first, which starts as the fixed table; under "learned_patches" it is
            `[tokens, width]` and starts normal, with a deviation of 0.02 (Hi-End-MAE, UNETR).
        position_grid: the fixed table is that of this grid, resized to the model's own, so that
            an encoder pre-trained on one image size sees another as it did the first; None takes
            the model's own grid.
        final_norm: normalize the output.
        class_token: put a learned token before the patches.
        registers: number of learned tokens between class token and patches, without positions
            (Darcet et al., 2024).
        pre_norm: normalize the tokens before the first block (CLIP).
        patch_bias: the patch embedding has a bias.
        shared_position_bias: one `RelativePositionBias` for all blocks (BEiT).
        floor_grid: pixels at the right and bottom that fill no patch are left out; otherwise
            they are an error.
        norm_epsilon: of the final norm; None for that of the blocks.
    """

    image_size: tuple[int, ...]
    patch_size: tuple[int, ...]
    channels: int
    width: int
    transformer: Transformer
    positions: str = "sincos"
    position_grid: tuple[int, ...] | None = None
    final_norm: bool = True
    class_token: bool = True
    registers: int = 0
    pre_norm: bool = False
    patch_bias: bool = True
    shared_position_bias: bool = False
    floor_grid: bool = False
    norm_epsilon: float | None = None

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches along height and width, and depth."""
        return token_grid(self.covered_size, self.patch_size)

    @property
    def covered_size(self) -> tuple[int, ...]:
        """Size in pixels of what the patches cover."""
        if not self.floor_grid:
            return self.image_size
        return tuple(size - size % patch for size, patch in zip(self.image_size, self.patch_size))

    @property
    def prefix_tokens(self) -> int:
        """Number of tokens before the patches."""
        return int(self.class_token) + self.registers

    @property
    def learned_positions(self) -> bool:
        """Whether positions are a parameter."""
        return self.positions in ("learned", "learned_patches")

    @property
    def leading_positions(self) -> int:
        """Rows of the position table before those of patches: the class token's, if it has one."""
        return int(self.class_token and self.positions != "learned_patches")

    def position_table(self) -> np.ndarray:
        """The fixed table, float32 `[1 + tokens, width]`; that of the class token is zero.

        Without class token its row is missing, as it is where only patches have positions;
        without positions the table is zero.

        Raises:
            ValueError: for an unknown name in `positions`.
        """
        if self.positions not in POSITIONS:
            raise ValueError(f"positions is {self.positions!r}; known are {', '.join(POSITIONS)}.")
        source = self.position_grid or self.grid
        leading = self.leading_positions
        if self.positions == "none":
            return np.zeros((leading + math.prod(self.grid), self.width), np.float32)
        row_first = self.positions == "sincos_row_first"
        table = sincos_positions(source, self.width, leading_tokens=leading, row_first=row_first)
        return resize_positions(table, source, self.grid)

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        keep_ids: jax.Array | None = None,
        drop_path_noise: jax.Array | None = None,
    ) -> tuple[jax.Array, list[jax.Array] | jax.Array]:
        """Encodes the patches named by `keep_ids`, or all of them.

        Args:
            images: `[batch, height, width, channels]`, normalized; with a depth for volumes.
            keep_ids: int32 `[batch, kept]`, positions of visible patches. Removed patches are
                dropped before the embedding: nothing is computed for them.
            drop_path_noise: see `Transformer`.

        Returns:
            The tokens `[batch, prefix_tokens + kept, width]` (class token, registers, patches),
            normalized if `final_norm`, and the outputs of all blocks before that, see
            `Transformer`.

        Raises:
            ValueError: if the images do not have the size and channels of the model.
        """
        tokens = self.embedded(images, keep_ids)
        blocks, dtype = self.transformer, self.transformer.dtype
        bias = None
        if self.shared_position_bias:
            bias = RelativePositionBias(self.grid, blocks.heads, name="position_bias")()
        tokens, outputs = blocks(tokens, drop_path_noise, bias)
        if self.final_norm:
            epsilon = blocks.epsilon if self.norm_epsilon is None else self.norm_epsilon
            tokens = layer_norm("norm", dtype, epsilon)(tokens)
        return tokens, outputs

    def embedded(
        self,
        images: jax.Array,
        keep_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        mask_token: jax.Array | None = None,
    ) -> jax.Array:
        """What the first block gets, `[batch, prefix_tokens + kept, width]`; see `__call__`.

        Args:
            images: `[batch, height, width, channels]`, normalized.
            keep_ids: int32 `[batch, kept]`, positions of visible patches; None for all.
            mask: `[batch, tokens]`, 1 where the embedding of a patch is replaced, before positions
                are added; None replaces none.
            mask_token: `[width]`, what it is replaced by.

        Raises:
            ValueError: if the images do not have the size and channels of the model.
        """
        expected = (*self.image_size, self.channels)
        if images.shape[1:] != expected:
            raise ValueError(
                f"the model expects images [batch, {', '.join(map(str, expected))}], got "
                f"{images.shape}; set image_size and channels in the config to the data's."
            )
        batch, blocks, leading = images.shape[0], self.transformer, int(self.class_token)
        dtype = blocks.dtype
        covered = images[(slice(None), *map(slice, self.covered_size))]
        patches = patchify(covered, self.patch_size)  # [B, L, values]
        table: Any = self.position_table()  # fixed, so not a parameter
        if self.positions == "learned":
            table = self.param("positions", lambda key: jnp.asarray(table))
        elif self.positions == "learned_patches":
            table = self.param("positions", nn.initializers.normal(0.02), table.shape)
            table = jnp.pad(table, ((leading, 0), (0, 0)))
        table = jnp.asarray(table, dtype)  # [1 + L, D]
        positions = jnp.broadcast_to(table[leading:], (batch, *table[leading:].shape))
        if keep_ids is not None:
            patches = gather_tokens(patches, keep_ids)  # [B, K, values]
            positions = gather_tokens(positions, keep_ids)  # [B, K, D]
        embed = PatchEmbed(
            self.width, self.patch_size, self.channels, dtype, self.patch_bias, name="patch_embed"
        )
        tokens = embed(patches)
        if mask is not None and mask_token is not None:
            tokens = jnp.where(mask[..., None] == 1, mask_token.astype(dtype), tokens)
        tokens = tokens + positions
        prefix = []
        if self.class_token:
            cls_token = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, self.width))
            prefix.append(cls_token.astype(dtype) + table[0])
        if self.registers:
            shape = (1, self.registers, self.width)
            prefix.append(self.param("registers", nn.initializers.normal(0.02), shape))
        prefix = [jnp.broadcast_to(x, (batch, *x.shape[1:])).astype(dtype) for x in prefix]
        tokens = jnp.concatenate([*prefix, tokens], axis=1)
        if self.pre_norm:
            tokens = layer_norm("pre_norm", dtype, blocks.epsilon)(tokens)
        return tokens


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


def adopted(
    name: str, given: Mapping[str, np.ndarray], donor: ViT, receiver: ViT
) -> np.ndarray | None:
    """One parameter of an encoder from those of another, which may see images of another kind.

    The patch kernel is resized to the receiver's patches and channels, positions to its grid (a
    fixed table may become the start of a learned one), blocks are stacked or unstacked, and
    LayerScale that the receiver lacks is folded into the layer in front of it.

    Args:
        name: path of the parameter, the same in both.
        given: the donor's parameters by path.
        donor: the encoder that has them.
        receiver: the encoder that gets them.

    Returns:
        The array, or None if the donor has nothing for it. Its shape may still be wrong, if the
        encoders differ in width or depth.
    """
    if name.endswith("/positions"):
        table = np.asarray(given.get(name, donor.position_table()))
        return _with_rows(resize_positions(table, donor.grid, receiver.grid), receiver)
    if name.endswith("/patch_embed/kernel") and name in given:
        return resize_patch_kernel(given[name], receiver.patch_size, receiver.channels)
    blocks, ours = donor.transformer, receiver.transformer
    value = restacked(name, given, blocks, ours)
    scale_name = layer_scale_behind(name)
    if blocks.layer_scale is None or ours.layer_scale is not None or not scale_name:
        return value
    scale = restacked(scale_name, given, blocks, ours)
    return None if value is None or scale is None else scaled_outputs(value, scale)


def _with_rows(table: np.ndarray, encoder: ViT) -> np.ndarray:
    """A table with as many rows before the patches as an encoder has: fewer, or more of zeros."""
    missing = encoder.leading_positions + math.prod(encoder.grid) - len(table)
    if missing <= 0:
        return table[-missing:]
    return np.concatenate([np.zeros((missing, table.shape[1]), table.dtype), table])


def resize_patch_kernel(
    kernel: np.ndarray, patch_size: tuple[int, ...], channels: int
) -> np.ndarray:
    """A patch kernel `[*patch_size, channels, width]` for other patches.

    Of another size: the kernel whose product with a bicubically resized patch is nearest to that
    of the old kernel with the old patch (FlexiViT, Beyer et al., 2023, section 3.4). Of another
    number of channels: summed for one, so that a grey image gives what its three equal channels
    gave; else repeated in turn and scaled to keep the size of the output (timm).
    """
    old = kernel.shape[:-2]
    if len(old) != len(patch_size):
        return kernel  # of pictures for volumes, or the other way round: the shape is reported
    if tuple(old) != tuple(patch_size):
        inverses = [np.linalg.pinv(bicubic_matrix(*sides).T) for sides in zip(old, patch_size)]
        kernel = along_axes(inverses, kernel).astype(np.float32)
    before = kernel.shape[-2]
    if channels == before:
        return kernel
    if channels == 1:
        return kernel.sum(axis=-2, keepdims=True)
    return kernel[..., np.arange(channels) % before, :] * np.float32(before / channels)


def resize_patch_outputs(
    values: np.ndarray,
    old: tuple[tuple[int, ...], int],
    new: tuple[tuple[int, ...], int],
) -> np.ndarray:
    """Weights or biases `[..., values]` that predict the pixels of a patch, for other patches.

    Another size is reached by bicubic interpolation of the predicted patch, one channel by the
    mean, another number of channels by repeating them in turn.

    Args:
        values: the last axis is a flattened patch, see `targets.patchify`.
        old: patch size and channels of `values`.
        new: wanted patch size and channels.
    """
    (old_size, before), (new_size, channels) = old, new
    patches = values.reshape(*values.shape[:-1], *old_size, before)
    if old_size != new_size:
        matrices = [bicubic_matrix(*sides) for sides in zip(old_size, new_size, strict=True)]
        first = values.ndim - 1  # of the patch's axes
        patches = along_axes(matrices, patches, first)
    if channels == 1:
        patches = patches.mean(axis=-1, keepdims=True)
    elif channels != before:
        patches = patches[..., np.arange(channels) % before]
    return patches.reshape(*values.shape[:-1], -1).astype(np.float32)
