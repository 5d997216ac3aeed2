"""Layout tables of the hybrid encoder of ConvMAE, in the naming of its code."""

from collections.abc import Iterable
from typing import Any

from mim_jax.layout import (
    CONV2D,
    Constant,
    Rule,
    Transform,
    layer_norm_rules,
    linear_rules,
    reshape,
    transformer_rules,
)

POINTWISE = Transform(lambda w: w[:, :, 0, 0].T, lambda k: k.T[:, :, None, None])
"""The weight `[out, in, 1, 1]` of a PyTorch convolution of one pixel as a kernel `[in, out]`."""


def conv_vit_rules(path: str, encoder: Any, key: str = "") -> Iterable[Rule]:
    """Rules of a `ConvViT`, without fixed positions; what an encoder lacks has no rules.

    Args:
        path: path of our `ConvViT`.
        encoder: the `ConvViT` itself.
        key: official prefix, such as "encoder.".
    """
    if encoder.class_token:
        yield Rule(f"{key}cls_token", f"{path}/cls_token")
    if encoder.learned_positions:
        shape = encoder.position_table().shape
        yield Rule(f"{key}pos_embed", f"{path}/positions", reshape(shape, (1, *shape)))
    for stage in (1, 2, 3):
        ours = f"{path}/stage{stage}"
        yield from _conv_rules(f"{key}patch_embed{stage}.proj", f"{ours}_embed/conv")
        yield from layer_norm_rules(f"{key}patch_embed{stage}.norm", f"{ours}_embed/norm")
        if stage == 3:
            break
        for i in range(encoder.depths[stage - 1]):
            block, theirs = f"{ours}_blocks_{i}", f"{key}blocks{stage}.{i}"
            yield from layer_norm_rules(f"{theirs}.norm1", f"{block}/norm1")
            yield from _conv_rules(f"{theirs}.conv1", f"{block}/conv1", POINTWISE)
            yield from _conv_rules(f"{theirs}.attn", f"{block}/depthwise")
            yield from _conv_rules(f"{theirs}.conv2", f"{block}/conv2", POINTWISE)
            yield from layer_norm_rules(f"{theirs}.norm2", f"{block}/norm2")
            yield from _conv_rules(f"{theirs}.mlp.fc1", f"{block}/fc1", POINTWISE)
            yield from _conv_rules(f"{theirs}.mlp.fc2", f"{block}/fc2", POINTWISE)
        if encoder.fusion:
            yield from _conv_rules(f"{key}stage{stage}_output_decode", f"{ours}_fusion")
    yield from linear_rules(f"{key}patch_embed4", f"{path}/token_embed")
    blocks = encoder.transformer
    yield from transformer_rules(f"{key}blocks3", f"{path}/transformer", blocks, encoder.width)
    if encoder.final_norm:
        yield from layer_norm_rules(f"{key}norm", f"{path}/norm")


def conv_vit_constants(encoder: Any, key: str = "") -> tuple[Constant, ...]:
    """The fixed position table of a `ConvViT`, if it has one."""
    if encoder.learned_positions:
        return ()
    return (Constant(f"{key}pos_embed", encoder.position_table()[None]),)


def _conv_rules(key: str, path: str, transform: Transform = CONV2D) -> tuple[Rule, Rule]:
    return Rule(f"{key}.weight", f"{path}/kernel", transform), Rule(f"{key}.bias", f"{path}/bias")
