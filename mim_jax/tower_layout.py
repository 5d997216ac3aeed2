"""What the checkpoints of image towers call their weights: one table for each naming."""

from collections.abc import Iterable
from typing import Any

from mim_jax.layout import (
    CONV2D,
    BlockNames,
    Layout,
    Rule,
    layer_norm_rules,
    linear,
    reshape,
    transformer_rules,
    vit_constants,
    vit_rules,
)

HF_CLIP_BLOCKS = BlockNames(
    norm1="layer_norm1",
    qkv=tuple(f"self_attn.{name}_proj.weight" for name in "qkv"),
    qkv_bias=tuple(f"self_attn.{name}_proj.bias" for name in "qkv"),
    out="self_attn.out_proj",
    norm2="layer_norm2",
)
"""Blocks of CLIP and SigLIP in transformers."""


def tower_layout(tower: Any, naming: str, path: str, key: str = "") -> Layout:
    """The table of a `Tower` in one naming.

    Args:
        tower: the `Tower`.
        naming: a name in `NAMINGS`.
        path: path of the tower in our parameters, such as "teacher".
        key: official prefix, such as "clip_model.".
    """
    return NAMINGS[naming](tower, path, key)


def _timm(tower: Any, path: str, key: str) -> Layout:
    """Timm and the MAE code."""
    encoder = tower.encoder
    rules = vit_rules(f"{path}/encoder", encoder, key)
    return Layout(tuple(rules), vit_constants(encoder, key))


def _hf_clip(tower: Any, path: str, key: str) -> Layout:
    """`CLIPVisionModel` and `CLIPModel` of transformers."""
    return Layout(
        tuple(_hf_clip_rules(tower, path, key)), unused=(r".*\.position_ids", r"logit_scale")
    )


def _hf_clip_rules(tower: Any, path: str, key: str) -> Iterable[Rule]:
    encoder, inside = tower.encoder, f"{key}vision_model."
    ours = f"{path}/encoder"
    embeddings = f"{inside}embeddings."
    yield Rule(
        f"{embeddings}class_embedding",
        f"{ours}/cls_token",
        reshape((1, 1, encoder.width), (encoder.width,)),
    )
    yield Rule(f"{embeddings}patch_embedding.weight", f"{ours}/patch_embed/kernel", CONV2D)
    yield Rule(f"{embeddings}position_embedding.weight", f"{ours}/positions")
    yield from layer_norm_rules(f"{inside}pre_layrnorm", f"{ours}/pre_norm")
    yield from transformer_rules(
        f"{inside}encoder.layers",
        f"{ours}/transformer",
        encoder.transformer,
        encoder.width,
        HF_CLIP_BLOCKS,
    )
    yield from layer_norm_rules(f"{inside}post_layernorm", f"{ours}/norm")
    if tower.outputs:
        yield Rule(f"{key}visual_projection.weight", f"{path}/projection/kernel", linear())


NAMINGS = {"timm": _timm, "hf-clip": _hf_clip}
"""Tables by name."""
