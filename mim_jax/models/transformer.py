"""Pre-norm transformer blocks (Dosovitskiy et al., 2021), as MAE and its descendants use them."""

import functools
import re
from collections.abc import Callable, Mapping
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

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}
"""GELU exactly (by erf), by tanh (SigLIP), and by a sigmoid (OpenAI's CLIP)."""

QKV_BIASES = ("full", "query_value", "none")
"""Biases of the attention projections: all three, not the key's (BEiT, CAE), or none."""

ATTENTION = "attention"
"""Collection that gets every block's attention probabilities, if it is mutable in `apply`."""


DROPOUT = "dropout"
"""Random stream of dropout; without it, nothing is dropped."""


def dropout(rate: float, module: nn.Module) -> nn.Dropout:
    """Dropout inside a module, active where the module has the stream `DROPOUT`."""
    return nn.Dropout(rate, deterministic=not module.has_rng(DROPOUT), rng_collection=DROPOUT)


def layer_norm(name: str | None, dtype: Any, epsilon: float = LAYER_NORM_EPSILON) -> nn.LayerNorm:
    """LayerNorm with float32 statistics, computed in two passes as PyTorch does."""
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


def token_rows(x: jax.Array) -> jax.Array:
    """`[..., width]` as the rows of one matrix, which is how linear layers should see tokens.

    The result is the same either way. But if matrix products take `[batch, tokens, width]`, XLA
    for CPU folds the sum of all later blocks' gradients into the gradient of every weight, and so
    computes it again and again, a sixth of the time of a ViT-S step.
    """
    return x.reshape(-1, x.shape[-1])


class RelativePositionBias(nn.Module):
    """A learned term of the attention logits for every offset between patches (BEiT, CAE).

    The table has a row for each offset on the grid, and three for the class token: from it to a
    patch, from a patch to it, and to itself. It starts at zero.

    Attributes:
        grid: patches along height and width.
        heads: attention heads.
    """

    grid: tuple[int, ...]
    heads: int

    @nn.compact
    def __call__(self) -> jax.Array:
        """The bias float32 `[1, heads, 1 + tokens, 1 + tokens]`, class token first."""
        index = relative_position_index(self.grid)
        table = self.param("table", nn.initializers.zeros, (int(index.max()) + 1, self.heads))
        return table[index].transpose(2, 0, 1)[None]


def relative_position_index(grid: tuple[int, ...]) -> np.ndarray:
    """Rows of the table of `RelativePositionBias`, int `[1 + tokens, 1 + tokens]` (BEiT code)."""
    rows, columns = grid
    row, column = (x.reshape(-1) for x in np.mgrid[:rows, :columns])
    offsets = (2 * rows - 1) * (2 * columns - 1)
    index = np.empty((1 + rows * columns, 1 + rows * columns), np.int32)
    index[1:, 1:] = (row[:, None] - row + rows - 1) * (2 * columns - 1) + (
        column[:, None] - column + columns - 1
    )
    index[0, :], index[:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
    return index


class Attention(nn.Module):
    """Multi-head self-attention with a fused query-key-value projection.

    The kernel of the projection is `[width, 3, heads, head_width]`, so that heads can be sharded;
    Xavier initialization sees it as the one matrix `[width, 3 * width]` that it is (MAE code).
    The attributes are those of `Transformer`.
    """

    heads: int
    dtype: Any = jnp.float32
    implementation: Literal["xla", "cudnn"] | None = None
    qkv_bias: str = "full"
    head_width: int | None = None
    logit_cap: float | None = None
    position_bias: tuple[int, ...] | None = None
    causal: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """Maps `[batch, tokens, width]` to the same shape.

        Args:
            x: tokens.
            bias: added to the logits, broadcast to `[batch, heads, tokens, tokens]`.

        Raises:
            ValueError: if the heads do not divide the width, or for an unknown `qkv_bias`.
        """
        width = x.shape[-1]
        query, key, value = self.projected(x)
        if self.position_bias is not None:
            own = RelativePositionBias(self.position_bias, self.heads, name="position_bias")()
            bias = own if bias is None else bias + own
        sees = self.is_mutable_collection(ATTENTION) and not self.is_initializing()
        drops = self.dropout > 0 and self.has_rng(DROPOUT)
        if sees or drops or self.logit_cap is not None:
            weights = attention_weights(
                query, key, bias=bias, logit_cap=self.logit_cap, causal=self.causal
            )
        if sees:
            self.sow(ATTENTION, "weights", weights, reduce_fn=lambda _, new: new, init_fn=lambda: 0)
        if drops or self.logit_cap is not None:
            weights = dropout(self.dropout, self)(weights)
            x = jnp.einsum("bhts,bshd->bthd", weights.astype(value.dtype), value)
        else:
            # Scaled by head_width^-0.5; logits and softmax are float32 whatever the compute type.
            x = jax.nn.dot_product_attention(
                query,
                key,
                value,
                bias=None if bias is None else bias.astype(query.dtype),
                is_causal=self.causal,
                implementation=self.implementation,
            )
        return dropout(self.dropout, self)(self.merged(x, width))

    def projected(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Query, key and value of `[batch, tokens, width]`, `[batch, tokens, heads, head_width]`.

        Raises:
            ValueError: see `__call__`.
        """
        shape, width = x.shape, x.shape[-1]
        if self.head_width is None and width % self.heads:
            raise ValueError(f"width {width} is not divisible by {self.heads} attention heads.")
        if self.qkv_bias not in QKV_BIASES:
            raise ValueError(f"qkv_bias is {self.qkv_bias!r}; known are {', '.join(QKV_BIASES)}.")
        heads = (self.heads, self.head_width or width // self.heads)
        qkv = nn.DenseGeneral(
            (3, *heads),
            use_bias=self.qkv_bias == "full",
            kernel_init=nn.initializers.xavier_uniform(),
            dtype=self.dtype,
            name="qkv",
        )(token_rows(x)).reshape(*shape[:-1], 3, *heads)  # [B, T, 3, H, D / H]
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if self.qkv_bias == "query_value":
            zeros = nn.initializers.zeros
            query += self.param("query_bias", zeros, heads).astype(query.dtype)
            value += self.param("value_bias", zeros, heads).astype(value.dtype)
        return query, key, value

    def merged(self, x: jax.Array, width: int) -> jax.Array:
        """The output projection, `[batch, tokens, heads, head_width]` -> `[..., width]`."""
        xavier = nn.initializers.xavier_uniform()
        out = nn.DenseGeneral(
            width, axis=(-2, -1), kernel_init=xavier, dtype=self.dtype, name="out"
        )
        return out(x.reshape(-1, *x.shape[-2:])).reshape(*x.shape[:-2], width)


def attention_weights(
    query: jax.Array,
    key: jax.Array,
    *,
    bias: jax.Array | None = None,
    logit_cap: float | None = None,
    causal: bool = False,
) -> jax.Array:
    """Attention probabilities, float32 `[batch, heads, queries, keys]`.

    Args:
        query: `[batch, queries, heads, head_width]`.
        key: `[batch, keys, heads, head_width]`.
        bias: added to the scaled logits.
        logit_cap: c of `c * tanh(logits / c)`, which bounds the scaled logits.
        causal: a query sees no later key.
    """
    scaled = query * query.shape[-1] ** -0.5
    logits = jnp.einsum("bthd,bshd->bhts", scaled, key, preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias
    if logit_cap is not None:
        logits = logit_cap * jnp.tanh(logits / logit_cap)
    if causal:
        logits = jnp.where(
            jnp.tri(logits.shape[-2], logits.shape[-1], dtype=bool), logits, -jnp.inf
        )
    return jax.nn.softmax(logits, axis=-1)


class Mlp(nn.Module):
    """Two linear layers with an activation between them, by default exact (erf) GELU."""

    ratio: float
    dtype: Any = jnp.float32
    activation: str = "gelu"
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., width]` to the same shape through `ratio * width` hidden units.

        Raises:
            ValueError: for an unknown activation.
        """
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation is {self.activation!r}; known are {', '.join(ACTIVATIONS)}."
            )
        shape, width = x.shape, x.shape[-1]
        xavier = nn.initializers.xavier_uniform()
        x = token_rows(x)
        # A ratio that was read off a checkpoint may lie a rounding error below the quotient.
        hidden = int(width * self.ratio + 1e-6)
        x = nn.Dense(hidden, kernel_init=xavier, dtype=self.dtype, name="fc1")(x)
        x = dropout(self.dropout, self)(ACTIVATIONS[self.activation](x))
        x = nn.Dense(width, kernel_init=xavier, dtype=self.dtype, name="fc2")(x)
        return dropout(self.dropout, self)(x).reshape(shape)


class LayerScale(nn.Module):
    """A learned factor for every channel (Touvron et al., 2021)."""

    initial: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., width]` to the same shape."""
        scale = self.param("scale", nn.initializers.constant(self.initial), (x.shape[-1],))
        return x * scale.astype(x.dtype)


class Block(nn.Module):
    """`x + Attention(LN(x))`, then `x + Mlp(LN(x))`; the attributes are those of `Transformer`."""

    heads: int
    mlp_ratio: float = 4.0
    dtype: Any = jnp.float32
    attention: Literal["xla", "cudnn"] | None = None
    epsilon: float = LAYER_NORM_EPSILON
    activation: str = "gelu"
    qkv_bias: str = "full"
    head_width: int | None = None
    layer_scale: float | None = None
    logit_cap: float | None = None
    position_bias: tuple[int, ...] | None = None
    causal: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        branch_scales: tuple[jax.Array, jax.Array] | None = None,
        attention_bias: jax.Array | None = None,
    ) -> jax.Array:
        """Maps `[batch, tokens, width]` to the same shape.

        Args:
            x: tokens.
            branch_scales: factors on both branches, each broadcast against `x`; see `drop_path`.
            attention_bias: added to the attention logits.
        """
        attention = Attention(
            self.heads,
            self.dtype,
            self.attention,
            self.qkv_bias,
            self.head_width,
            self.logit_cap,
            self.position_bias,
            self.causal,
            self.dropout,
            name="attention",
        )
        branch = attention(layer_norm("norm1", self.dtype, self.epsilon)(x), attention_bias)
        if self.layer_scale is not None:
            branch = LayerScale(self.layer_scale, name="layer_scale1")(branch)
        x = x + (branch if branch_scales is None else branch * branch_scales[0])
        mlp = Mlp(self.mlp_ratio, self.dtype, self.activation, self.dropout, name="mlp")
        branch = mlp(layer_norm("norm2", self.dtype, self.epsilon)(x))
        if self.layer_scale is not None:
            branch = LayerScale(self.layer_scale, name="layer_scale2")(branch)
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
        epsilon: of every LayerNorm.
        activation: of the MLP, a name in `ACTIVATIONS`.
        qkv_bias: one of `QKV_BIASES`.
        head_width: width of an attention head; None divides the width by the heads.
        layer_scale: initial factor on both branches, learned for every channel; None for none.
        logit_cap: bound of the attention logits, see `attention_weights`; None for none.
        position_bias: grid of a `RelativePositionBias` in every block; None for none.
        causal: a token sees no later one.
        dropout: rate on attention weights, after the attention's projection and after both layers
            of the MLP, wherever `apply` gets the random stream `DROPOUT`.
    """

    depth: int
    heads: int
    mlp_ratio: float = 4.0
    scan: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32
    attention: Literal["xla", "cudnn"] | None = None
    drop_path: float = 0.0
    epsilon: float = LAYER_NORM_EPSILON
    activation: str = "gelu"
    qkv_bias: str = "full"
    head_width: int | None = None
    layer_scale: float | None = None
    logit_cap: float | None = None
    position_bias: tuple[int, ...] | None = None
    causal: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        drop_path_noise: jax.Array | None = None,
        attention_bias: jax.Array | None = None,
    ) -> tuple[jax.Array, list[jax.Array] | jax.Array]:
        """Maps `[batch, tokens, width]` to the same shape.

        Args:
            x: tokens.
            drop_path_noise: uniform in [0, 1), `[depth, 2, batch]`; None keeps every branch. With
                more rows than blocks, these are the last blocks of a longer stack, whose rate
                grows over all its rows.
            attention_bias: added to the attention logits of every block.

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
        settings: dict[str, Any] = dict(
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            dtype=self.dtype,
            attention=self.attention,
            epsilon=self.epsilon,
            activation=self.activation,
            qkv_bias=self.qkv_bias,
            head_width=self.head_width,
            layer_scale=self.layer_scale,
            logit_cap=self.logit_cap,
            position_bias=self.position_bias,
            causal=self.causal,
            dropout=self.dropout,
        )
        scales = None
        if drop_path_noise is not None and self.drop_path:
            scales = drop_path_scales(drop_path_noise, self.drop_path)[-self.depth :]
            scales = scales.astype(x.dtype)
        if self.scan:

            def body(
                module: nn.Module, carry: jax.Array, scale: jax.Array | None
            ) -> tuple[jax.Array, jax.Array]:
                pair = None if scale is None else (scale[0], scale[1])
                carry = module(carry, pair, attention_bias)
                return carry, carry

            loop = nn.scan(
                body,
                variable_axes={"params": 0, ATTENTION: 0},
                split_rngs={"params": True, DROPOUT: True},
                length=self.depth,
            )
            return loop(block(**settings, name="blocks"), x, scales)
        outputs = []
        for i in range(self.depth):
            scale = None if scales is None else (scales[i, 0], scales[i, 1])
            x = block(**settings, name=f"blocks_{i}")(x, scale, attention_bias)
            outputs.append(x)
        return x, outputs


def class_attention(
    collected: Mapping[str, Any], transformer: Transformer, prefix_tokens: int = 1
) -> jax.Array:
    """What the class token attends to in the last block: `[batch, patches]`, mean over heads.

    The probabilities are as the softmax gives them, so those of a row add up to less than 1.

    Args:
        collected: the `ATTENTION` collection below a `Transformer`.
        transformer: the blocks.
        prefix_tokens: tokens before the patches, the class token first.
    """
    if transformer.scan:
        weights = collected["blocks"]["attention"]["weights"][-1]
    else:
        weights = collected[f"blocks_{transformer.depth - 1}"]["attention"]["weights"]
    return weights[:, :, 0, prefix_tokens:].mean(axis=1)


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
        parts = [
            given.get(name.replace("/blocks/", f"/blocks_{i}/")) for i in range(receiver.depth)
        ]
        return None if any(part is None for part in parts) else np.stack(parts)  # type: ignore[arg-type]
    return given.get(name)


def layer_scale_behind(name: str) -> str:
    """Path of the LayerScale that acts on what a parameter's layer gives; "" if there is none."""
    for layer, scale in (("/attention/out/", "layer_scale1"), ("/mlp/fc2/", "layer_scale2")):
        block, found, _ = name.partition(layer)
        if found:
            return f"{block}/{scale}/scale"
    return ""


def scaled_outputs(value: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Kernel or bias of a linear layer that has taken in the LayerScale behind it.

    Args:
        value: `[..., width]`, or `[depth, ..., width]` of stacked blocks.
        scale: `[width]` or `[depth, width]`.
    """
    return value * scale.reshape(*scale.shape[:-1], *(1,) * (value.ndim - scale.ndim), -1)
