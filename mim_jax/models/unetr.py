"""UNETR (Hatamizadeh et al., 2022): a 3-D ViT with a convolutional decoder, for segmentation.

As Hi-End-MAE fine-tunes it (official code on MONAI): the last stage is resized to the volume, so
that patches of any size fit.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.models.vit import ViT

INSTANCE_NORM_EPSILON = 1e-5
LEAKY_SLOPE = 0.01

SKIPS = 3
"""Levels of the encoder that the decoder gets, beside its output."""


def instance_norm(x: jax.Array) -> jax.Array:
    """Volumes `[batch, height, width, depth, channels]`, each channel with mean 0 and variance 1.

    The variance is biased; statistics are float32.
    """
    values, axes = x.astype(jnp.float32), (1, 2, 3)
    values -= values.mean(axis=axes, keepdims=True)
    variance = jnp.square(values).mean(axis=axes, keepdims=True)
    return (values * jax.lax.rsqrt(variance + INSTANCE_NORM_EPSILON)).astype(x.dtype)


def leaky_relu(x: jax.Array) -> jax.Array:
    """The activation of all blocks."""
    return nn.leaky_relu(x, LEAKY_SLOPE)


def uniform(fan_in: int) -> Callable[..., jax.Array]:
    """PyTorch's default for convolutions: uniform in +-1/sqrt(fan in)."""

    def draw(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -1, 1) / jnp.sqrt(fan_in).astype(dtype)

    return draw


def convolution(
    inputs: int, outputs: int, side: int, dtype: Any, name: str, *, use_bias: bool = False
) -> nn.Conv:
    """A 3-D convolution that keeps the size; `side` is that of its kernel."""
    draw = uniform(inputs * side**3)
    return nn.Conv(
        outputs,
        (side,) * 3,
        use_bias=use_bias,
        kernel_init=draw,
        bias_init=draw,
        dtype=dtype,
        conv_general_dilated=same_size_convolution,
        name=name,
    )


def same_size_convolution(
    x: jax.Array, kernel: jax.Array, *arguments: Any, **options: Any
) -> jax.Array:
    """A 3-D convolution of stride 1 that keeps the size; on CPUs a sum of 2-D ones.

    XLA's 3-D convolutions on CPUs are several times slower, their gradients above all.

    Args:
        x: `[batch, height, width, depth, channels]`.
        kernel: `[side, side, side, channels, outputs]`, its side odd.
        arguments: others of `jax.lax.conv_general_dilated`.
        options: likewise.
    """

    def whole(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, *arguments, **options)

    def by_planes(x: jax.Array, kernel: jax.Array) -> jax.Array:
        batch, height, width, depth, channels = x.shape
        beyond = kernel.shape[2] // 2
        planes = jnp.moveaxis(x, 3, 1)
        planes = jnp.pad(planes, ((0, 0), (beyond, beyond), (0, 0), (0, 0), (0, 0)))
        result = sum(
            jax.lax.conv_general_dilated(
                planes[:, z : z + depth].reshape(-1, height, width, channels),
                kernel[:, :, z],
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=options.get("precision"),
            )
            for z in range(kernel.shape[2])
        )
        assert isinstance(result, jax.Array)
        return jnp.moveaxis(result.reshape(batch, depth, height, width, -1), 1, 3)

    result = jax.lax.platform_dependent(x, kernel, cpu=by_planes, default=whole)
    assert isinstance(result, jax.Array)
    return result


class Doubling(nn.Module):
    """A transposed convolution of side and stride 2, as the matrix product that it is.

    The kernel has the shape `[2, 2, 2, channels, outputs]`: each voxel becomes a cube of eight.
    """

    outputs: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, height, width, depth, channels]` to a volume of twice the side."""
        *size, channels = x.shape
        shape = (2, 2, 2, channels, self.outputs)
        kernel = self.param("kernel", uniform(8 * self.outputs), shape)
        x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        cubes = jnp.einsum("bhwdi,xyzio->bhxwydzo", x, kernel)
        batch, height, width, depth = size
        return cubes.reshape(batch, 2 * height, 2 * width, 2 * depth, self.outputs)


@jax.custom_jvp
def normalizing_factor(weight: jax.Array, variance: jax.Array) -> jax.Array:
    """`weight / sqrt(weight^2 variance + epsilon)`: what instance norm makes of a factor."""
    return weight * jax.lax.rsqrt(jnp.square(weight) * variance + INSTANCE_NORM_EPSILON)


@normalizing_factor.defjvp
def _normalizing_factor_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The derivative by weight is that of epsilon alone; as a difference it would be round-off."""
    (weight, variance), (by_weight, by_variance) = primals, tangents
    cube = jax.lax.rsqrt(jnp.square(weight) * variance + INSTANCE_NORM_EPSILON) ** 3
    change = INSTANCE_NORM_EPSILON * by_weight - 0.5 * weight**3 * by_variance
    return normalizing_factor(weight, variance), cube * change


class NormalizedProjection(nn.Module):
    """A 1 x 1 x 1 convolution without bias, and instance norm.

    With one input channel only the sign of a weight matters, but for epsilon.
    """

    outputs: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., channels]` to `[..., outputs]`."""
        channels = x.shape[-1]
        kernel = self.param("kernel", uniform(channels), (1, 1, 1, channels, self.outputs))
        if channels > 1:
            x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
            return instance_norm(x @ kernel.reshape(channels, -1))
        centred = x.astype(jnp.float32)
        centred -= centred.mean(axis=(1, 2, 3), keepdims=True)
        variance = jnp.square(centred).mean(axis=(1, 2, 3), keepdims=True)
        factor = normalizing_factor(kernel.reshape(1, 1, 1, 1, -1), variance)
        return (centred * factor).astype(self.dtype)


class ResidualBlock(nn.Module):
    """Two normalized convolutions beside the input, or a projection of it of another width."""

    outputs: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, height, width, depth, channels]` to as large a volume."""
        channels, shortcut = x.shape[-1], x
        x = convolution(channels, self.outputs, 3, self.dtype, "conv1")(x)
        x = leaky_relu(instance_norm(x))
        x = convolution(self.outputs, self.outputs, 3, self.dtype, "conv2")(x)
        if channels != self.outputs:
            shortcut = NormalizedProjection(self.outputs, self.dtype, name="conv3")(shortcut)
        return leaky_relu(instance_norm(x) + shortcut)


class Enlargement(nn.Module):
    """A level of the encoder at twice its grid, and twice as large after each further step."""

    outputs: int
    steps: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, *grid, width]` to `[batch, *(2 ** (1 + steps) * grid), outputs]`."""
        x = Doubling(self.outputs, self.dtype, name="first")(x)
        for i in range(self.steps):
            x = Doubling(self.outputs, self.dtype, name=f"doubling_{i}")(x)
            x = ResidualBlock(self.outputs, self.dtype, name=f"block_{i}")(x)
        return x


class SegmentationDecoder(nn.Module):
    """From the volume, three levels of the encoder and its output to logits of all voxels.

    Attributes:
        num_classes: number of logits of a voxel.
        feature_size: channels of the finest maps; each coarser one has twice as many.
        dtype: compute type of convolutions.
    """

    num_classes: int
    feature_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, volumes: jax.Array, levels: Sequence[jax.Array], output: jax.Array
    ) -> jax.Array:
        """Logits `[batch, height, width, depth, classes]`, float32.

        Args:
            volumes: `[batch, height, width, depth, channels]`.
            levels: `[batch, *grid, width]` each, the shallowest first.
            output: like a level, normalized.
        """
        size, dtype = self.feature_size, self.dtype
        fine = ResidualBlock(size, dtype, name="encoder1")(volumes.astype(dtype))
        skips = [
            Enlargement(size * 2 ** (1 + i), SKIPS - 1 - i, dtype, name=f"encoder{2 + i}")(level)
            for i, level in enumerate(levels)
        ]
        x = output
        for i, skip in reversed(list(enumerate(skips))):
            outputs = size * 2 ** (1 + i)
            x = Doubling(outputs, dtype, name=f"decoder{3 + i}_doubling")(x)
            x = jnp.concatenate([x, skip], axis=-1)
            x = ResidualBlock(outputs, dtype, name=f"decoder{3 + i}")(x)
        # Half-pixel centres, as trilinear interpolation without aligned corners has them.
        shape = (*volumes.shape[:-1], x.shape[-1])
        x = jax.image.resize(x, shape, "linear", antialias=False)
        x = convolution(2 * size, size, 3, dtype, "decoder2_conv", use_bias=True)(x)
        x = ResidualBlock(size, dtype, name="decoder2")(jnp.concatenate([x, fine], axis=-1))
        logits = convolution(size, self.num_classes, 1, jnp.float32, "out", use_bias=True)(x)
        return logits


class UNETR(nn.Module):
    """A ViT and a `SegmentationDecoder`.

    Attributes:
        encoder: a ViT for volumes.
        decoder: what makes logits of its levels.
        taps: three blocks whose outputs are the levels, counted from 0, ascending.
    """

    encoder: ViT
    decoder: SegmentationDecoder
    taps: tuple[int, ...]

    def __call__(self, volumes: jax.Array) -> jax.Array:
        """Logits `[batch, height, width, depth, classes]`, float32.

        Args:
            volumes: `[batch, height, width, depth, channels]`, in [0, 1].
        """
        output, levels = self.encode(volumes)
        first, grid = self.encoder.prefix_tokens, self.encoder.grid

        def as_volume(tokens: jax.Array) -> jax.Array:
            return tokens[:, first:].reshape(len(tokens), *grid, -1)

        logits = self.decoder(volumes, [as_volume(x) for x in levels], as_volume(output))
        assert isinstance(logits, jax.Array)
        return logits

    def encode(self, volumes: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """The encoder's normalized output and the levels, `[batch, prefix + tokens, width]`."""
        output, outputs = self.encoder(volumes)
        return output, [outputs[tap] for tap in self.taps]
