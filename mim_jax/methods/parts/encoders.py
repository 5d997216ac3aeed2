"""Encoders as parts of methods: built from a config, sized like a checkpoint, taken over."""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np

from mim_jax import masking
from mim_jax.method import Method
from mim_jax.models.conv_vit import CONV_VIT_SIZES, ConvViT, conv_vit_size
from mim_jax.models.transformer import Transformer
from mim_jax.models.vit import VIT_SIZES, ViT, adopted, vit_size


def blocks_of(config: ml_collections.ConfigDict) -> Callable[..., Transformer]:
    """`Transformer` with what `config.model` and `config.compute_dtype` say of all blocks."""
    model = config.model
    return functools.partial(
        Transformer,
        mlp_ratio=model.mlp_ratio,
        scan=model.scan,
        remat=model.remat,
        dtype=jnp.dtype(config.compute_dtype),
        attention=model.attention or None,
    )


def build_encoder(config: ml_collections.ConfigDict, drop_path: float = 0.0, **fields: Any) -> ViT:
    """The ViT of `config.model` for images of `config.data`.

    Args:
        config: a complete config.
        drop_path: rate of stochastic depth.
        **fields: further fields of `ViT`.

    Raises:
        ValueError: if image, patch and model size do not fit together.
    """
    model = config.model
    size = vit_size(model.size, width=model.width, depth=model.depth, heads=model.heads)
    encoder = ViT(
        tuple(config.data.image_size),
        tuple(model.patch_size),
        config.data.channels,
        size["width"],
        blocks_of(config)(size["depth"], size["heads"], drop_path=drop_path),
        position_grid=tuple(model.position_grid) or None,
        **fields,
    )
    masking.token_grid(encoder.image_size, encoder.patch_size)  # raises if they do not fit
    return encoder


def encoder_like(state: Mapping[str, np.ndarray], known: Mapping[str, Any], template: ViT) -> ViT:
    """The ViT of an official state dict; what nothing tells is that of the template.

    Args:
        state: arrays by official key.
        known: see `Method.sized_like`.
        template: a ViT.

    Raises:
        ValueError: if the file has no patch embedding, or its positions fit no known grid.
    """
    if "patch_embed.proj.weight" not in state or "pos_embed" not in state:
        raise ValueError(
            "it has no patch_embed.proj.weight and pos_embed, so it is no ViT in the naming of "
            f"MAE and timm; it begins with {', '.join(sorted(state)[:5])}."
        )
    width, channels, *patch_size = state["patch_embed.proj.weight"].shape
    tokens = state["pos_embed"].shape[1] - 1
    grid = template.grid
    if "image_size" in known:
        height, columns = known["image_size"]
        grid = (height // patch_size[0], columns // patch_size[1])
    if math.prod(grid) != tokens:
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(
                f"its {tokens} positions are no square; set data.image_size and model.patch_size "
                "to those of the file."
            )
        grid = (side, side)
    blocks = template.transformer
    heads = next((s["heads"] for s in VIT_SIZES.values() if s["width"] == width), blocks.heads)
    if width == template.width:
        heads = blocks.heads
    heads = known.get("heads", heads)
    return template.clone(
        image_size=(grid[0] * patch_size[0], grid[1] * patch_size[1]),
        patch_size=tuple(patch_size),
        channels=channels,
        width=width,
        transformer=blocks.clone(
            depth=depth_of("blocks", state), heads=heads, mlp_ratio=mlp_ratio_of(state)
        ),
        position_grid=None,
    )


def adopt_encoder(
    path: str, given: Mapping[str, np.ndarray], donor: Method, receiver: ViT
) -> np.ndarray | None:
    """A parameter below "encoder/" from the encoder of another method."""
    return adopted(path, given, donor.encoder, receiver) if donor.encoder else given.get(path)


def build_conv_vit(
    config: ml_collections.ConfigDict, drop_path: float = 0.0, **fields: Any
) -> ConvViT:
    """ConvMAE's hybrid encoder of `config.model` for images of `config.data`.

    Args:
        config: a complete config.
        drop_path: rate of stochastic depth in the last block; it grows over those of all stages.
        **fields: further fields of `ConvViT`.

    Raises:
        ValueError: if image, patches and model size do not fit together.
    """
    model = config.model
    size = conv_vit_size(model.size, widths=model.widths, depths=model.depths, heads=model.heads)
    *conv_depths, depth = size["depths"]
    encoder = ConvViT(
        tuple(config.data.image_size),
        config.data.channels,
        tuple(size["widths"]),
        tuple(conv_depths),
        blocks_of(config)(depth, size["heads"], drop_path=drop_path),
        tuple(model.patch_sizes),
        tuple(model.conv_mlp_ratios),
        **{
            "position_grid": tuple(model.position_grid) or None,
            "class_token": model.get("cls_token", False),
            "removed": model.get("removed", "skipped"),
            **fields,
        },
    )
    masking.token_grid(encoder.image_size, encoder.patch_size)  # raises if they do not fit
    return encoder


def conv_vit_like(
    state: Mapping[str, np.ndarray], known: Mapping[str, Any], template: ConvViT
) -> ConvViT:
    """The hybrid encoder of an official state dict; what nothing tells is that of the template.

    Args:
        state: arrays by official key.
        known: see `Method.sized_like`.
        template: a hybrid encoder.

    Raises:
        ValueError: if the file holds no hybrid encoder, or its positions fit no known grid.
    """
    if "patch_embed1.proj.weight" not in state or "pos_embed" not in state:
        raise ValueError(
            "it has no patch_embed1.proj.weight and pos_embed, so it is no hybrid encoder in the "
            f"naming of ConvMAE; it begins with {', '.join(sorted(state)[:5])}."
        )
    first, second, third = (state[f"patch_embed{stage}.proj.weight"] for stage in (1, 2, 3))
    patch_sizes = (first.shape[-1], second.shape[-1], third.shape[-1])
    side, tokens, grid = math.prod(patch_sizes), state["pos_embed"].shape[1], template.grid
    if "image_size" in known:
        grid = (known["image_size"][0] // side, known["image_size"][1] // side)
    if math.prod(grid) != tokens:
        if math.isqrt(tokens) ** 2 != tokens:
            raise ValueError(
                f"its {tokens} positions are no square; set data.image_size to that of the file."
            )
        grid = (math.isqrt(tokens), math.isqrt(tokens))

    def mlp_ratio(block: str) -> float:
        hidden, width = state[f"{block}.mlp.fc1.weight"].shape[:2]
        return hidden / width

    widths, blocks = (len(first), len(second), len(third)), template.transformer
    sizes = CONV_VIT_SIZES.values()
    heads = next((s["heads"] for s in sizes if s["widths"] == widths), blocks.heads)
    if widths == template.widths:
        heads = blocks.heads
    return template.clone(
        image_size=(grid[0] * side, grid[1] * side),
        channels=first.shape[1],
        widths=widths,
        depths=(depth_of("blocks1", state), depth_of("blocks2", state)),
        transformer=blocks.clone(
            depth=depth_of("blocks3", state),
            heads=known.get("heads", heads),
            mlp_ratio=mlp_ratio("blocks3.0"),
        ),
        patch_sizes=patch_sizes,
        mlp_ratios=(mlp_ratio("blocks1.0"), mlp_ratio("blocks2.0")),
        position_grid=None,
        class_token="cls_token" in state,
    )


def conv_encoder_of(method: Method) -> ConvViT | None:
    """The hybrid encoder below a method's `model`, or None if it has none."""
    encoder = getattr(getattr(method, "model", None), "encoder", None)
    return encoder if isinstance(encoder, ConvViT) else None


def depth_of(key: str, state: Mapping[str, np.ndarray]) -> int:
    """Number of blocks `KEY.0.`, `KEY.1.`, ... in an official state dict."""
    found = [re.match(rf"{key}\.(\d+)\.", name) for name in state]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def mlp_ratio_of(state: Mapping[str, np.ndarray], key: str = "blocks") -> float:
    """Hidden width of the MLP over the width, of the first block of a stack."""
    hidden, width = state[f"{key}.0.mlp.fc1.weight"].shape
    return hidden / width
