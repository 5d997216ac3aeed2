"""ResNet with batch statistics as PyTorch keeps them (He et al., 2016; torchvision's variant)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

STATISTICS = "batch_stats"
"""Collection of the running statistics."""

RESNET_SIZES: dict[str, dict[str, Any]] = {
    "resnet18": dict(depths=(2, 2, 2, 2), bottleneck=False),
    "resnet50": dict(depths=(3, 4, 6, 3), bottleneck=True),
}
"""Blocks in each of the four stages, and their kind."""

EXPANSION = 4
"""Output channels of a bottleneck block over those of its 3 x 3 convolution."""

kaiming_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""torchvision's start of every convolution."""


class BatchNorm(nn.Module):
    """Batch norm in PyTorch's sense.

    The batch is normalized by its biased variance, while the running variance follows the unbiased
    one (Flax's own takes the biased one for both). Statistics are float32. In a jitted step they
    are those of the whole batch over all devices.

    Attributes:
        momentum: share of the new statistics in the running ones.
        epsilon: added to the variance.
        dtype: of the result.
    """

    momentum: float = 0.1
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `[batch, rows, columns, channels]` to the same shape.

        With `train`, normalizes by the batch and updates the collection `batch_stats` where it is
        mutable; without, by the running statistics.

        Raises:
            ValueError: training on a single value for each channel, which has no variance.
        """
        channels, count = x.shape[-1], x.size // x.shape[-1]
        running_mean = self.variable(STATISTICS, "mean", jnp.zeros, (channels,))
        running_var = self.variable(STATISTICS, "var", jnp.ones, (channels,))
        batches = self.variable(STATISTICS, "batches", jnp.zeros, (), jnp.int32)
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        mean, var = running_mean.value, running_var.value
        x = x.astype(jnp.float32)
        if train and not self.is_initializing():
            if count < 2:
                raise ValueError(
                    "batch norm needs 2 values or more for each channel, and this batch of one "
                    "image has one; set batch_size or data.image_size higher."
                )
            axes = tuple(range(x.ndim - 1))
            mean = jnp.mean(x, axis=axes)
            var = jnp.mean(jnp.square(x - mean), axis=axes)
            if self.is_mutable_collection(STATISTICS):
                new, keep = self.momentum, 1 - self.momentum
                running_mean.value = keep * running_mean.value + new * mean
                running_var.value = keep * running_var.value + new * var * (count / (count - 1))
                batches.value = batches.value + 1
        factor = scale * jax.lax.rsqrt(var + self.epsilon)
        return ((x - mean) * factor + bias).astype(self.dtype)


class ResNetBlock(nn.Module):
    """Two 3 x 3 convolutions, or a bottleneck of 1 x 1, 3 x 3 and 1 x 1, around a shortcut.

    The stride is that of the (first) 3 x 3 convolution. Where stride or channels change, the
    shortcut is a 1 x 1 convolution with a norm.

    Attributes:
        width: channels of the 3 x 3 convolution.
        stride: of the block.
        bottleneck: which of the two.
        dtype: compute type.
    """

    width: int
    stride: int
    bottleneck: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `[batch, rows, columns, channels]` to `[batch, rows / stride, ...]`."""
        outputs = self.width * (EXPANSION if self.bottleneck else 1)
        sizes = [(self.width, 3, self.stride), (outputs, 3, 1)]
        if self.bottleneck:
            sizes = [(self.width, 1, 1), (self.width, 3, self.stride), (outputs, 1, 1)]
        branch = x
        for i, (width, size, stride) in enumerate(sizes, 1):
            branch = convolution(width, size, stride, self.dtype, f"conv{i}")(branch)
            branch = BatchNorm(dtype=self.dtype, name=f"norm{i}")(branch, train)
            if i < len(sizes):
                branch = nn.relu(branch)
        if self.stride != 1 or x.shape[-1] != outputs:
            x = convolution(outputs, 1, self.stride, self.dtype, "shortcut_conv")(x)
            x = BatchNorm(dtype=self.dtype, name="shortcut_norm")(x, train)
        return nn.relu(branch + x)


class ResNet(nn.Module):
    """A 7 x 7 convolution of stride 2, max pooling, and four stages of blocks; no classifier.

    Attributes:
        image_size: `(height, width)` in pixels.
        channels: channels of the image.
        depths: blocks in each stage.
        base: channels of the first convolution and of the first stage's 3 x 3 convolutions; every
            later stage has twice those of the one before.
        bottleneck: kind of the blocks.
        dtype: compute type of convolutions; statistics are float32.
    """

    image_size: tuple[int, int]
    channels: int
    depths: tuple[int, ...] = (3, 4, 6, 3)
    base: int = 64
    bottleneck: bool = True
    dtype: Any = jnp.float32

    @property
    def width(self) -> int:
        """Channels of the last map."""
        return self.stage_width(len(self.depths) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the last map."""
        shrink = 2 ** (len(self.depths) + 1)
        rows, columns = (-(-side // shrink) for side in self.image_size)
        return rows, columns

    def stage_width(self, stage: int) -> int:
        """Channels of the map that a stage gives, counted from 0."""
        return self.base * 2**stage * (EXPANSION if self.bottleneck else 1)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """The last map `[batch, rows, columns, width]`.

        Args:
            images: `[batch, height, width, channels]`.
            train: normalize by the batch and update the collection `batch_stats`.

        Raises:
            ValueError: if the images do not have the size and channels of the model.
        """
        expected = (*self.image_size, self.channels)
        if images.shape[1:] != expected:
            raise ValueError(
                f"the model expects images [batch, {', '.join(map(str, expected))}], got "
                f"{images.shape}; set image_size and channels in the config to the data's."
            )
        x = convolution(self.base, 7, 2, self.dtype, "stem_conv")(images.astype(self.dtype))
        x = nn.relu(BatchNorm(dtype=self.dtype, name="stem_norm")(x, train))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # padded with -inf
        for stage, depth in enumerate(self.depths):
            for i in range(depth):
                stride = 2 if stage and not i else 1
                block = ResNetBlock(
                    self.base * 2**stage,
                    stride,
                    self.bottleneck,
                    self.dtype,
                    name=f"stage{stage + 1}_blocks_{i}",
                )
                x = block(x, train)
        return x


def convolution(width: int, size: int, stride: int, dtype: Any, name: str) -> nn.Conv:
    """A convolution without bias, padded on all sides alike (`SAME` would pad only behind)."""
    pad = (size // 2, size // 2)
    return nn.Conv(
        width,
        (size, size),
        (stride, stride),
        padding=(pad, pad),
        use_bias=False,
        kernel_init=kaiming_normal,
        dtype=dtype,
        name=name,
    )


def resnet_size(name: str, depths: tuple[int, ...] = ()) -> dict[str, Any]:
    """Depths and kind of blocks of a named size; given depths take precedence.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in RESNET_SIZES:
        raise ValueError(f"unknown ResNet {name!r}; known are {', '.join(RESNET_SIZES)}.")
    size = dict(RESNET_SIZES[name])
    return size | ({"depths": tuple(depths)} if depths else {})
