"""Encoders of a table, of an image and of both, as parts of TIP's pre-training and fine-tuning."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mim_jax.method import Batch, Input, Method
from mim_jax.methods.parts.encoders import (
    adopt_encoder,
    blocks_of,
    build_encoder,
    depth_of,
    encoder_like,
    mlp_ratio_of,
)
from mim_jax.models.conv_vit import torch_bias, torch_kernel
from mim_jax.models.resnet import RESNET_SIZES, STATISTICS, ResNet, resnet_size
from mim_jax.models.table_encoder import (
    EPSILON,
    FusionEncoder,
    TableEncoder,
    small_normal,
)
from mim_jax.models.vit import ViT

ENCODERS = (*RESNET_SIZES, "vit")
"""Image encoders of the official code."""

PARTS = ("encoder", "table_encoder", "fusion")
"""Modules that pre-training and fine-tuning share."""


class Seen(NamedTuple):
    """What an image encoder gives.

    Attributes:
        pooled: `[batch, width]`, the mean of the map, or the class token.
        tokens: `[batch, tokens, width]`, the map in row-major order; of a ViT all tokens, the
            class token first.
    """

    pooled: jax.Array
    tokens: jax.Array


class TableImageEncoders(nn.Module):
    """An image encoder, a table encoder, and the module in which the table looks at the image.

    Attributes:
        encoder: of the image.
        table_encoder: of the table.
        fusion: of both.
    """

    encoder: ResNet | ViT
    table_encoder: TableEncoder
    fusion: FusionEncoder

    def see(self, images: jax.Array, train: bool = False) -> Seen:
        """Encodes images `[batch, height, width, channels]`.

        Args:
            images: normalized.
            train: a ResNet normalizes by the batch, and updates its running statistics.
        """
        if isinstance(self.encoder, ViT):
            tokens, _ = self.encoder(images)
            return Seen(tokens[:, 0], tokens)
        maps = self.encoder(images, train)
        pooled = jnp.mean(maps.astype(jnp.float32), axis=(1, 2)).astype(maps.dtype)
        return Seen(pooled, maps.reshape(len(maps), -1, maps.shape[-1]))

    @property
    def prefix_tokens(self) -> int:
        """Number of image tokens before those of the grid."""
        return self.encoder.prefix_tokens if isinstance(self.encoder, ViT) else 0

    def encode(
        self, images: jax.Array, table: jax.Array | None, missing: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """The multimodal class token, and image tokens of the grid.

        Without a table, the pooled image is in place of the class token.
        """
        seen = self.see(images)
        grid = seen.tokens[:, self.prefix_tokens :]
        if table is None or missing is None:
            return seen.pooled, grid
        return self.fusion(self.table_encoder(table, missing), seen.tokens)[:, 0], grid


def missing_cells(batch: Batch) -> jax.Array:
    """Which cells of `batch["table"]` are missing, bool `[batch, columns]`."""
    table = batch["table"]
    return batch.get("table_missing", jnp.zeros(table.shape, bool)).astype(bool)


TINY_PAIRS: dict[str, Any] = dict(
    base=8,
    depths=(1, 1, 1, 1),
    table_width=32,
    table_depth=2,
    table_heads=4,
    fusion_depth=2,
)
"""Fields of `pair_settings` with sizes for a laptop."""


def pair_settings(vit: str = "") -> dict[str, Any]:
    """Fields of `config.model` that `build_parts` reads, of the published sizes.

    Args:
        vit: size of a ViT as image encoder; "" for a ResNet.
    """
    image: dict[str, Any] = dict(
        # "resnet18" or "resnet50".
        encoder="resnet50",
        # Channels of the first convolution; blocks in each stage, () for those of the name.
        base=64,
        depths=(),
    )
    if vit:
        image = dict(
            encoder="vit",
            # As in `VIT_SIZES`; width, depth, heads override it where > 0.
            size=vit,
            width=0,
            depth=0,
            heads=0,
            patch_size=(16, 16),
            position_grid=(),
        )
    return dict(
        **image,
        # Number of values of each categorical column, and number of continuous columns, which
        # follow them; () and 0 take those of the data.
        categories=(),
        continuous=0,
        # Token width, blocks and heads of the table; blocks in which the table sees the image.
        table_width=512,
        table_depth=4,
        table_heads=8,
        fusion_depth=4,
        mlp_ratio=4.0,
        # Compile one block of the table encoder and loop over it.
        scan=False,
        # "none", "dots" or "full": what the backward pass computes again to save memory.
        remat="none",
        # Implementation of jax.nn.dot_product_attention: "", "xla" or "cudnn".
        attention="",
    )


def build_parts(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """`PARTS` of `config.model` by name, for images of `config.data`.

    Raises:
        ValueError: for an unknown encoder, heads that do not divide the width, or a table without
            columns.
    """
    model, blocks = config.model, blocks_of(config)
    if model.encoder not in ENCODERS:
        raise ValueError(f"model.encoder is {model.encoder!r}; known are {', '.join(ENCODERS)}.")
    encoder: ResNet | ViT
    if model.encoder == "vit":
        encoder = build_encoder(config, positions="learned")
    else:
        encoder = ResNet(
            tuple(config.data.image_size),
            config.data.channels,
            base=model.base,
            dtype=jnp.dtype(config.compute_dtype),
            **resnet_size(model.encoder, tuple(model.depths)),
        )
    width, heads = model.table_width, model.table_heads
    if width % heads:
        raise ValueError(f"model.table_width {width} is not divisible by table_heads {heads}.")
    categories, continuous = tuple(model.categories), model.continuous
    if not categories and not continuous:
        raise ValueError(
            "model.categories is () and model.continuous is 0, and no table tells them: set the "
            "number of values of each categorical column, and the number of continuous ones."
        )
    fields: dict[str, Any] = {"epsilon": EPSILON, "qkv_bias": "none"}
    return {
        "encoder": encoder,
        "table_encoder": TableEncoder(
            categories, continuous, width, blocks(model.table_depth, heads, **fields)
        ),
        "fusion": FusionEncoder(
            width, blocks(model.fusion_depth, heads, **fields).clone(scan=False)
        ),
    }


def pair_inputs(parts: Any) -> dict[str, Input]:
    """Batch entries of pairs: the image, the table and which of its cells are missing."""
    encoder, columns = parts.encoder, parts.table_encoder.columns
    return {
        "image": Input((*encoder.image_size, encoder.channels)),
        "table": Input((columns,)),
        "table_missing": Input((columns,), "int"),
    }


def started(params: Mapping[str, Any], parts: tuple[str, ...], rng: jax.Array) -> dict[str, Any]:
    """Parameters in which all matrices of some parts are normal of deviation 0.02 (TIP code)."""
    flat = flatten_dict(dict(params))
    for i, (path, value) in enumerate(sorted(flat.items())):
        if path[0] in parts and path[-1] == "kernel":
            flat[path] = small_normal(jax.random.fold_in(rng, i), value.shape)
    return unflatten_dict(flat)


def torch_linear(width: int, inputs: int, dtype: Any, name: str | None = None) -> nn.Dense:
    """A linear layer that starts as in PyTorch."""
    return nn.Dense(
        width, kernel_init=torch_kernel, bias_init=torch_bias(inputs), dtype=dtype, name=name
    )


def split_statistics(variables: Any) -> tuple[Any, dict[str, Any]]:
    """The parameters, and running statistics as a dictionary that is empty where there are none."""
    return variables["params"], {k: variables[k] for k in (STATISTICS,) if k in variables}


def collections_of(parts: TableImageEncoders) -> tuple[str, ...]:
    """Mutable collections of the model."""
    return () if isinstance(parts.encoder, ViT) else (STATISTICS,)


def parts_like(
    state: Mapping[str, np.ndarray], known: Mapping[str, Any], parts: Any, key: str = ""
) -> dict[str, Any]:
    """`PARTS` of the sizes of an official state dict.

    Args:
        state: arrays by official key.
        known: see `Method.sized_like`.
        parts: has the modules whose other settings are taken.
        key: official prefix, such as "model.".

    Raises:
        ValueError: if the file holds no such model, or a table of other columns.
    """
    tokens = f"{key}encoder_tabular.cls_token"
    if tokens not in state:
        raise ValueError(
            f"it has no {tokens}, so it is no model of TIP; it begins with "
            f"{', '.join(sorted(state)[:5])}."
        )
    width = state[tokens].shape[-1]
    table, fusion = parts.table_encoder, parts.fusion
    embedding = state.get(f"{key}encoder_tabular.cat_embedding.weight", np.zeros((0, width)))
    values, columns = len(embedding), len(state[f"{key}encoder_tabular.column_embedding.weight"])
    if (values, columns - 1) != (sum(table.categories), table.columns):
        raise ValueError(
            f"its table has {columns - 1} columns and {values} categorical values, but the model "
            f"has {table.columns} and {sum(table.categories)}; set model.categories to the number "
            "of values of each categorical column of the file, and model.continuous."
        )

    def blocks_like(blocks: Any, part: str) -> Any:
        stack = f"{key}{part}.transformer_blocks"
        ratio = mlp_ratio_of(state, stack) if f"{stack}.0.mlp.fc1.weight" in state else 4.0
        return blocks.clone(depth=depth_of(re.escape(stack), state), mlp_ratio=ratio)

    blocks = blocks_like(table.transformer, "encoder_tabular")
    settings = blocks_like(fusion.settings, "encoder_multimodal")
    return {
        "encoder": _encoder_like(state, known, parts.encoder, f"{key}encoder_imaging."),
        "table_encoder": table.clone(width=width, transformer=blocks),
        "fusion": fusion.clone(width=width, settings=settings),
    }


def _encoder_like(
    state: Mapping[str, np.ndarray], known: Mapping[str, Any], encoder: Any, key: str
) -> ResNet | ViT:
    own = {k.removeprefix(key): value for k, value in state.items() if k.startswith(key)}
    if isinstance(encoder, ViT):
        return encoder_like(own, known, encoder)
    if "conv1.weight" not in own:
        raise ValueError(
            f"it has no {key}conv1.weight, so its image encoder is no ResNet; set model.encoder to "
            "that of the file."
        )
    base, channels = own["conv1.weight"].shape[:2]
    depths = (depth_of(f"layer{stage}", own) for stage in range(1, 5))
    return encoder.clone(
        channels=channels,
        base=base,
        depths=tuple(depth for depth in depths if depth),
        bottleneck="layer1.0.conv3.weight" in own,
    )


def adopt_part(
    path: str, given: Mapping[str, np.ndarray], donor: Method, encoder: ResNet | ViT
) -> np.ndarray | None:
    """A parameter of `PARTS` from another method: ViTs of any, all else by its name."""
    if isinstance(encoder, ViT) and path.startswith("encoder/"):
        return adopt_encoder(path, given, donor, encoder)
    return given.get(path)
