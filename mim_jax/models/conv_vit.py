"""The hybrid encoder of ConvMAE: two convolutional stages, then a ViT (Gao et al., 2022)."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.masking import enlarge_mask, for_views, gather_tokens, restore_tokens, token_grid
from mim_jax.models.positions import resize_positions, sincos_positions
from mim_jax.models.transformer import (
    ACTIVATIONS,
    REMAT_POLICIES,
    Transformer,
    drop_path_scales,
    layer_norm,
    restacked,
    token_rows,
)
from mim_jax.targets import patchify, unpatchify

CONV_EPSILON = 1e-5
"""Epsilon of every LayerNorm in the convolutional stages; the transformer's is 1e-6."""

KERNEL = 5
"""Side of the depthwise convolution's kernel."""

REMOVED = ("skipped", "zeroed", "seen")
"""What the convolutional stages do with removed patches.

They compute nothing for them; or compute everything and show zeros to the convolutions, as the
official code does, which gives the same visible tokens; or let the convolutions see them, which
leaks what is to be predicted (an ablation)."""

STAGES = "stages"
"""Collection that gets the outputs of both convolutional stages, if it is mutable in `apply`."""

CONV_VIT_SIZES: dict[str, dict[str, Any]] = {
    "base": dict(widths=(256, 384, 768), depths=(2, 2, 11), heads=12),
    "large": dict(widths=(384, 768, 1024), depths=(2, 2, 23), heads=16),
}
"""The published sizes: base of ConvMAE, large of DMJD."""

torch_kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""PyTorch's default for convolutions, uniform in +-1/sqrt(fan_in)."""


def torch_bias(fan_in: int) -> nn.initializers.Initializer:
    """PyTorch's default for the bias of a convolution, uniform in +-1/sqrt(fan_in)."""

    def uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -1, 1) / math.sqrt(fan_in)

    return uniform


@flax.struct.dataclass
class VisibleCells:
    """Which cells of a map belong to visible patches, and where the kept ones lie.

    A map `[batch, rows * s, columns * s, width]` has a cell of s x s positions for every patch.

    Attributes:
        keep_ids: int32 `[batch, kept]`.
        restore_ids: int32 `[batch, tokens]`, see `mim_jax.masking.Masking`; removed patches may
            be in any order.
        grid: patches along height and width.
    """

    keep_ids: jax.Array
    restore_ids: jax.Array
    grid: tuple[int, int] = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, keep_ids: jax.Array, grid: tuple[int, int]) -> "VisibleCells":
        """The cells that `keep_ids` names."""
        batch, kept = keep_ids.shape
        rest = jnp.full((batch, math.prod(grid)), kept, keep_ids.dtype)
        ranks = jnp.broadcast_to(jnp.arange(kept, dtype=keep_ids.dtype), keep_ids.shape)
        # Mapped over samples, the scatter stays local to a device when the batch is sharded.
        restore_ids = jax.vmap(lambda row, ids, rank: row.at[ids].set(rank))(rest, keep_ids, ranks)
        return cls(keep_ids, restore_ids, grid)

    def spread(self, cells: jax.Array) -> jax.Array:
        """Cells `[batch, kept, s, s, width]` in their places of a map that is zero elsewhere."""
        batch, kept, side, _, width = cells.shape
        zero = jnp.zeros((1, 1, side * side * width), cells.dtype)
        patches = restore_tokens(cells.reshape(batch, kept, -1), zero, self.restore_ids)
        rows, columns = self.grid
        return unpatchify(patches, (rows * side, columns * side), (side, side))

    def pick(self, maps: jax.Array) -> jax.Array:
        """The cells of a map: `[batch, kept, s, s, width]`."""
        side = maps.shape[1] // self.grid[0]
        cells = gather_tokens(patchify(maps, (side, side)), self.keep_ids)
        return cells.reshape(*self.keep_ids.shape, side, side, -1)

    def mask(self, side: int, dtype: Any) -> jax.Array:
        """A map `[batch, rows * side, columns * side, 1]`, 1 at visible cells and 0 elsewhere."""
        visible = (self.restore_ids < self.keep_ids.shape[1]).astype(dtype)
        return enlarge_mask(visible, self.grid, side)[..., None]


class StridedConv(nn.Module):
    """A convolution whose stride is its size, written as the matrix product that it is.

    Attributes:
        width: output channels.
        size: side of the kernel `[size, size, channels, width]`.
        xavier: start Xavier-uniform over the matrix `[values, width]`; else as in PyTorch.
        dtype: compute type.
    """

    width: int
    size: int
    xavier: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., rows, columns, channels]` to `[..., rows / size, columns / size, width]`."""
        *leading, rows, columns, channels = x.shape
        values = self.size * self.size * channels

        def as_matrix(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            init = nn.initializers.xavier_uniform() if self.xavier else torch_kernel
            return init(key, (values, self.width)).reshape(shape)

        kernel = self.param("kernel", as_matrix, (self.size, self.size, channels, self.width))
        bias = self.param("bias", torch_bias(values), (self.width,))
        patches = patchify(x.reshape(-1, rows, columns, channels), (self.size, self.size))
        patches, kernel, bias = nn.dtypes.promote_dtype(patches, kernel, bias, dtype=self.dtype)
        x = token_rows(patches) @ kernel.reshape(values, self.width) + bias
        return x.reshape(*leading, rows // self.size, columns // self.size, self.width)


class ConvEmbed(nn.Module):
    """`StridedConv`, LayerNorm over channels and GELU; attributes are those of `StridedConv`."""

    width: int
    size: int
    xavier: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., rows, columns, channels]` to `[..., rows / size, columns / size, width]`."""
        x = StridedConv(self.width, self.size, self.xavier, self.dtype, name="conv")(x)
        return ACTIVATIONS["gelu"](layer_norm("norm", self.dtype, CONV_EPSILON)(x))


@jax.custom_vjp
def depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Each channel convolved with a kernel of its own; zeros lie around the map.

    A sum of shifted products instead of a grouped convolution. XLA's partitioner multiplies the
    gradient of a grouped convolution's kernel by the number of devices that hold the same part of
    the batch, as they do along a tensor axis of the mesh. And on CPU it is the faster way.

    Args:
        x: `[batch, rows, columns, width]`.
        kernel: `[side, side, 1, width]`, side odd.

    Returns:
        As `x`, summed in float32.
    """
    total = jnp.float32(0)
    for (i, j), shifted in _shifts(x, len(kernel)):
        total += shifted.astype(jnp.float32) * kernel[i, j, 0].astype(jnp.float32)
    return total.astype(x.dtype)


def _shifts(x: jax.Array, side: int) -> Iterator[tuple[tuple[int, int], jax.Array]]:
    """What lies at each place of a kernel, `[batch, rows, columns, width]`, with the place."""
    rows, columns = x.shape[1:3]
    around = (side // 2, side // 2)
    x = jnp.pad(x, ((0, 0), around, around, (0, 0)))
    for i, j in np.ndindex(side, side):
        yield (i, j), x[:, i : i + rows, j : j + columns]


def _depthwise_forward(
    x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return depthwise(x, kernel), (x, kernel)


def _depthwise_backward(
    given: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = given
    wide = gradient.astype(jnp.float32)
    sums = [
        jnp.sum(shifted.astype(jnp.float32) * wide, axis=(0, 1, 2))
        for _, shifted in _shifts(x, len(kernel))
    ]
    of_kernel = jnp.stack(sums).reshape(kernel.shape).astype(kernel.dtype)
    return depthwise(gradient, kernel[::-1, ::-1]), of_kernel


depthwise.defvjp(_depthwise_forward, _depthwise_backward)


class DepthwiseConv(nn.Module):
    """`depthwise` with a kernel of `KERNEL` x `KERNEL` and a bias, which start as in PyTorch."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, rows, columns, width]` to the same shape."""
        width = x.shape[-1]
        kernel = self.param("kernel", torch_kernel, (KERNEL, KERNEL, 1, width))
        bias = self.param("bias", torch_bias(KERNEL * KERNEL), (width,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return depthwise(x, kernel) + bias


class ConvBlock(nn.Module):
    """A transformer block whose attention is a depthwise convolution between two pointwise ones.

    Attributes:
        mlp_ratio: hidden width of the MLP over the width.
        dtype: compute type.
    """

    mlp_ratio: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        visible: VisibleCells | None = None,
        branch_scales: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """Maps cells or whole maps to the same shape.

        Args:
            x: `[batch, kept, s, s, width]`, cells of visible patches; or `[batch, rows, columns,
                width]`.
            visible: what the depthwise convolution sees; everything else is zero to it.
            branch_scales: factors on both branches, each `[batch]`; see `drop_path_scales`.
        """
        width = x.shape[-1]

        def pointwise(name: str, features: int, x: jax.Array) -> jax.Array:
            dense = nn.Dense(
                features,
                kernel_init=torch_kernel,
                bias_init=torch_bias(x.shape[-1]),
                dtype=self.dtype,
                name=name,
            )
            return dense(token_rows(x)).reshape(*x.shape[:-1], features)

        def scaled(branch: jax.Array, index: int) -> jax.Array:
            if branch_scales is None:
                return branch
            return branch * branch_scales[index].reshape(-1, *(1,) * (branch.ndim - 1))

        around = DepthwiseConv(self.dtype, name="depthwise")
        branch = pointwise("conv1", width, layer_norm("norm1", self.dtype, CONV_EPSILON)(x))
        # The mask comes after the first pointwise convolution, whose bias would fill the gaps.
        if visible is not None and x.ndim == 5:
            branch = visible.pick(around(visible.spread(branch)))
        elif visible is not None:
            branch = around(branch * visible.mask(x.shape[1] // visible.grid[0], x.dtype))
        else:
            branch = around(branch)
        x = x + scaled(pointwise("conv2", width, branch), 0)
        branch = layer_norm("norm2", self.dtype, CONV_EPSILON)(x)
        branch = pointwise("fc1", int(width * self.mlp_ratio + 1e-6), branch)
        branch = pointwise("fc2", width, ACTIVATIONS["gelu"](branch))
        return x + scaled(branch, 1)


class ConvViT(nn.Module):
    """Convolutional stages at a quarter and an eighth of the image, then a ViT on visible tokens.

    Masks are drawn on the last, coarsest grid and hold for all stages. Since patches do not
    overlap and only the depthwise convolutions look around, which see zeros in place of removed
    patches, no visible token knows anything of a removed one.

    Several masks of each image come as more rows of `keep_ids` than there are images.

    Attributes:
        image_size: `(height, width)` in pixels; need not be square.
        channels: channels of the image.
        widths: channels of the three stages.
        depths: number of blocks in both convolutional stages.
        transformer: the blocks of the third stage. Its compute type, `remat` and `drop_path` hold
            for all stages; the rate of `drop_path` grows over the blocks of all three.
        patch_sizes: side of the patch embedding's kernel of every stage.
        mlp_ratios: of both convolutional stages.
        positions: "sincos", a fixed table; or "learned", a parameter `[tokens, width]` that
            starts as that table.
        position_grid: as for `ViT`.
        fusion: add both stages' outputs, embedded at the last grid, to the tokens before the final
            norm (pre-training).
        final_norm: normalize the output.
        class_token: put a learned token, without position, before the visible ones (MR-MCMAE).
        removed: one of `REMOVED`.
    """

    image_size: tuple[int, int]
    channels: int
    widths: tuple[int, int, int]
    depths: tuple[int, int]
    transformer: Transformer
    patch_sizes: tuple[int, int, int] = (4, 2, 2)
    mlp_ratios: tuple[float, float] = (4.0, 4.0)
    positions: str = "sincos"
    position_grid: tuple[int, int] | None = None
    fusion: bool = True
    final_norm: bool = True
    class_token: bool = False
    removed: str = "skipped"

    @property
    def width(self) -> int:
        """Token width."""
        return self.widths[-1]

    @property
    def depth(self) -> int:
        """Number of blocks in all stages."""
        return sum(self.depths) + self.transformer.depth

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width in pixels of what a token stands for."""
        side = math.prod(self.patch_sizes)
        return side, side

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens along height and width."""
        rows, columns = token_grid(self.image_size, self.patch_size)
        return rows, columns

    @property
    def prefix_tokens(self) -> int:
        """Number of tokens before the patches."""
        return int(self.class_token)

    @property
    def learned_positions(self) -> bool:
        """Whether positions are a parameter."""
        return self.positions == "learned"

    def position_table(self) -> np.ndarray:
        """The fixed table, float32 `[tokens, width]`; the class token has no position."""
        source = self.position_grid or self.grid
        return resize_positions(sincos_positions(source, self.width), source, self.grid)

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        keep_ids: jax.Array | None = None,
        drop_path_noise: jax.Array | None = None,
    ) -> tuple[jax.Array, list[jax.Array] | jax.Array]:
        """Encodes the patches named by `keep_ids`, or all of them.

        Args:
            images: `[batch, height, width, channels]`, normalized.
            keep_ids: int32 `[batch * views, kept]`, positions of visible patches: all views of the
                first image, then all of the second, and so on.
            drop_path_noise: uniform in [0, 1), `[depth, 2, batch * views]`; None keeps every
                branch.

        Returns:
            The tokens `[batch * views, prefix_tokens + kept, width]` (class token, patches),
            normalized if `final_norm`, and the outputs of all blocks of the third stage before
            fusion and norm, see `Transformer`.

        Raises:
            ValueError: if the images do not have the size and channels of the model, `keep_ids`
                has no whole number of rows for each image, or a name is unknown.
        """
        self._check(images, keep_ids)
        blocks, grid = self.transformer, self.grid
        dtype = blocks.dtype
        noise, batch, views, visible = drop_path_noise, len(images), 1, None
        if keep_ids is not None:
            views = len(keep_ids) // batch
            visible = VisibleCells.of(keep_ids, grid)
        skips = visible is not None and self.removed == "skipped"
        x = images.astype(dtype)
        if visible is not None and skips:
            x = visible.pick(for_views(x, views))  # [B * V, K, patch, patch, channels]
        scales = None
        if noise is not None and blocks.drop_path:
            scales = drop_path_scales(noise, blocks.drop_path)[..., 0, 0].astype(dtype)
        block = ConvBlock
        if blocks.remat != "none":
            block = nn.remat(ConvBlock, policy=REMAT_POLICIES[blocks.remat])
        fused, done = [], 0
        for stage in (1, 2):
            name, size = f"stage{stage}", self.patch_sizes[stage - 1]
            width, ratio = self.widths[stage - 1], self.mlp_ratios[stage - 1]
            x = ConvEmbed(width, size, dtype=dtype, name=f"{name}_embed")(x)
            if stage == 1 and not skips:
                x = for_views(x, views)
            seen = None if self.removed == "seen" else visible
            for i in range(self.depths[stage - 1]):
                pair = None if scales is None else (scales[done, 0], scales[done, 1])
                x = block(ratio, dtype, name=f"{name}_blocks_{i}")(x, seen, pair)
                done += 1
            self.sow(STAGES, name, x, reduce_fn=lambda _, new: new, init_fn=lambda: 0)
            if self.fusion:
                rest = math.prod(self.patch_sizes[stage:])
                fuse = StridedConv(self.width, rest, dtype=dtype, name=f"{name}_fusion")
                fused.append(fuse(x).reshape(batch * views, -1, self.width))
        x = ConvEmbed(self.width, self.patch_sizes[2], True, dtype, name="stage3_embed")(x)
        tokens = x.reshape(batch * views, -1, self.width)
        xavier = nn.initializers.xavier_uniform()
        embed = nn.Dense(self.width, kernel_init=xavier, dtype=dtype, name="token_embed")
        tokens = embed(token_rows(tokens)).reshape(tokens.shape)
        table: Any = self.position_table()  # fixed, so not a parameter
        if self.learned_positions:
            table = self.param("positions", lambda key: jnp.asarray(table))
        positions = jnp.asarray(table, dtype)
        if keep_ids is None:
            tokens += positions
        else:
            positions = jnp.broadcast_to(positions, (batch * views, *positions.shape))
            if not skips:
                tokens = gather_tokens(tokens, keep_ids)
                fused = [gather_tokens(x, keep_ids) for x in fused]
            tokens += gather_tokens(positions, keep_ids)
        if self.class_token:
            cls_token = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, self.width))
            first = jnp.broadcast_to(cls_token.astype(dtype), (batch * views, 1, self.width))
            tokens = jnp.concatenate([first, tokens], axis=1)
        tokens, outputs = blocks(tokens, noise)
        for x in fused:
            tokens = tokens.at[:, self.prefix_tokens :].add(x)
        if self.final_norm:
            tokens = layer_norm("norm", dtype, blocks.epsilon)(tokens)
        return tokens, outputs

    def _check(self, images: jax.Array, keep_ids: jax.Array | None) -> None:
        expected = (*self.image_size, self.channels)
        if images.shape[1:] != expected:
            raise ValueError(
                f"the model expects images [batch, {', '.join(map(str, expected))}], got "
                f"{images.shape}; set image_size and channels in the config to the data's."
            )
        if keep_ids is not None and len(keep_ids) % len(images):
            raise ValueError(
                f"keep_ids has {len(keep_ids)} rows for {len(images)} images; every image needs "
                "the same number of views."
            )
        names = {"positions": ("sincos", "learned"), "removed": REMOVED}
        for field, known in names.items():
            if getattr(self, field) not in known:
                raise ValueError(
                    f"{field} is {getattr(self, field)!r}; known are {', '.join(known)}."
                )

    def layer_of(self, name: str) -> int:
        """The layer of a parameter below this encoder, for rates that decay by layer.

        0 for embeddings, positions and both convolutional stages, `i + 1` for block i of the third
        stage, and one more than its depth for what comes after (official `util/lr_decay.py`).

        Args:
            name: such as `transformer/blocks_3/mlp/fc1/kernel`; blocks may not be stacked.
        """
        part, *below = name.split("/")
        if part == "transformer":
            return int(below[0].removeprefix("blocks_")) + 1
        return self.transformer.depth + 1 if part == "norm" else 0


def conv_vit_size(
    name: str,
    *,
    widths: tuple[int, ...] = (),
    depths: tuple[int, ...] = (),
    heads: int = 0,
) -> dict[str, Any]:
    """Widths, depths and heads of a named size; what is given takes precedence.

    Raises:
        ValueError: if the name is unknown, neither name nor value fixes a number, or there are
            not three stages.
    """
    if name and name not in CONV_VIT_SIZES:
        raise ValueError(f"model.size is {name!r}; known are {', '.join(CONV_VIT_SIZES)}.")
    given = {"widths": tuple(widths), "depths": tuple(depths), "heads": heads}
    size = {**CONV_VIT_SIZES.get(name, {}), **{k: value for k, value in given.items() if value}}
    for key in given:
        if key not in size:
            raise ValueError(
                f"set model.size to one of {', '.join(CONV_VIT_SIZES)}, or model.{key}."
            )
        if key != "heads" and len(size[key]) != 3:
            raise ValueError(f"model.{key} is {size[key]}; each of the 3 stages needs a value.")
    return size


def adopted(
    name: str, given: Mapping[str, np.ndarray], donor: ConvViT, receiver: ConvViT
) -> np.ndarray | None:
    """One parameter of an encoder from those of another, which may have another grid.

    Positions are resized, a fixed table may become the start of a learned one, and blocks are
    stacked or unstacked.

    Args:
        name: path of the parameter, the same in both.
        given: the donor's parameters by path.
        donor: the encoder that has them.
        receiver: the encoder that gets them.

    Returns:
        The array, or None if the donor has nothing for it. Its shape may still be wrong, if the
        encoders differ in width, depth, patch size or channels.
    """
    if name.endswith("/positions"):
        table = given.get(name, donor.position_table())
        return resize_positions(np.asarray(table), donor.grid, receiver.grid)
    return restacked(name, given, donor.transformer, receiver.transformer)
