"""Checkpoints of UNETR in MONAI's names, and of its ViT alone."""

from collections.abc import Iterator
from typing import Any

from mim_jax.layout import (
    CONV3D,
    TIMM,
    Constant,
    Layout,
    Rule,
    Transform,
    layer_norm_rules,
    reshape,
    transformer_rules,
)

MONAI = TIMM._replace(out="attn.out_proj", fc1="mlp.linear1", fc2="mlp.linear2")
"""Blocks of MONAI's ViT."""

TRANSPOSED = Transform(lambda w: w.transpose(2, 3, 4, 0, 1), lambda k: k.transpose(3, 4, 0, 1, 2))
"""A weight `[in, out, k, k, k]` of a transposed convolution as a kernel `[k, k, k, in, out]`."""

DECODER = r"(encoder\d|decoder\d|out)\..*"
"""Keys of the convolutional parts."""


def unetr_layout(model: Any) -> Layout:
    """The table of a `UNETR`; a file of its ViT alone is accepted."""
    vit = vit_layout(model.encoder)
    rules = (*vit.rules, *_decoder_rules(model.decoder.feature_size, model.encoder.channels))
    return Layout(rules, vit.constants, optional=(DECODER,))


def vit_layout(encoder: Any) -> Layout:
    """The table of a 3-D ViT as UNETR's, which has no class token: ours is left out."""
    patches = (*encoder.patch_size, encoder.channels, encoder.width)
    embedding = "vit.patch_embedding.patch_embeddings.1"
    rules = [
        # Rows are in the order of the kernel: height, width, depth, channel.
        Rule(
            f"{embedding}.weight",
            "encoder/patch_embed/kernel",
            Transform(lambda w: w.T.reshape(patches), lambda k: k.reshape(-1, k.shape[-1]).T),
        ),
        Rule(f"{embedding}.bias", "encoder/patch_embed/bias"),
        *transformer_rules(
            "vit.blocks", "encoder/transformer", encoder.transformer, encoder.width, MONAI
        ),
        *layer_norm_rules("vit.norm", "encoder/norm"),
    ]
    positions, table = "vit.patch_embedding.position_embeddings", encoder.position_table()
    if not encoder.learned_positions:
        fixed = table[encoder.leading_positions :][None]
        return Layout(tuple(rules), (Constant(positions, fixed),))
    rules.append(Rule(positions, "encoder/positions", reshape(table.shape, (1, *table.shape))))
    return Layout(tuple(rules))


def _decoder_rules(feature_size: int, channels: int) -> Iterator[Rule]:
    yield from _block_rules("encoder1.layer", "encoder1", projects=channels != feature_size)
    levels = (2, 3, 4)
    for level in levels:
        key, path = f"encoder{level}", f"decoder/encoder{level}"
        yield Rule(f"{key}.transp_conv_init.conv.weight", f"{path}/first/kernel", TRANSPOSED)
        for i in range(levels[-1] - level):
            step = f"{key}.blocks.{i}"
            yield Rule(f"{step}.0.conv.weight", f"{path}/doubling_{i}/kernel", TRANSPOSED)
            yield from _block_rules(f"{step}.1", f"encoder{level}/block_{i}")
        up = f"decoder{level + 1}"
        doubling = f"decoder/{up}_doubling/kernel"
        yield Rule(f"{up}.transp_conv.conv.weight", doubling, TRANSPOSED)
        yield from _block_rules(f"{up}.conv_block", up, projects=True)
    for key, path in (("decoder2.conv3d", "decoder2_conv"), ("out.conv.conv", "out")):
        yield Rule(f"{key}.weight", f"decoder/{path}/kernel", CONV3D)
        yield Rule(f"{key}.bias", f"decoder/{path}/bias")
    yield from _block_rules("decoder2.conv_block", "decoder2", projects=True)


def _block_rules(key: str, path: str, *, projects: bool = False) -> Iterator[Rule]:
    for name in ("conv1", "conv2", "conv3") if projects else ("conv1", "conv2"):
        yield Rule(f"{key}.{name}.conv.weight", f"decoder/{path}/{name}/kernel", CONV3D)
