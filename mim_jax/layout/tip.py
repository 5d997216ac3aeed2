"""Tables of the official checkpoints of TIP, pre-trained and fine-tuned (Lightning's names)."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from mim_jax.layout import (
    CONV2D,
    Rule,
    Transform,
    layer_norm_rules,
    linear,
    linear_rules,
    reshape,
    transformer_rules,
    vit_rules,
)
from mim_jax.models.resnet import STATISTICS, ResNet

COUNT = Transform(lambda x: x.astype(np.int32), lambda x: x.astype(np.int64))
"""A counter, which PyTorch keeps in 64 bits."""


def encoder_rules(key: str, path: str, parts: Any) -> Iterable[Rule]:
    """Rules of the three encoders that pre-training and fine-tuning share.

    Args:
        key: official prefix, such as "model.".
        path: prefix of our parameters.
        parts: has `encoder`, `table_encoder` and `fusion`.
    """
    image, ours = f"{key}encoder_imaging", f"{path}encoder"
    if isinstance(parts.encoder, ResNet):
        yield from resnet_rules(image, ours, parts.encoder)
    else:
        yield from vit_rules(ours, parts.encoder.clone(final_norm=False), f"{image}.")
        yield from layer_norm_rules(f"{image}.ln_post", f"{ours}/norm")
    yield from table_rules(f"{key}encoder_tabular", f"{path}table_encoder", parts.table_encoder)
    yield from fusion_rules(f"{key}encoder_multimodal", f"{path}fusion", parts.fusion)


def resnet_rules(key: str, path: str, encoder: ResNet) -> Iterable[Rule]:
    """Rules of a ResNet in torchvision's names, running statistics included.

    Args:
        key: official prefix.
        path: of our `ResNet`.
        encoder: the `ResNet` itself.
    """

    def pair(conv: str, norm: str, our_conv: str, our_norm: str) -> Iterable[Rule]:
        yield Rule(f"{key}.{conv}.weight", f"{path}/{our_conv}/kernel", CONV2D)
        yield Rule(f"{key}.{norm}.weight", f"{path}/{our_norm}/scale")
        yield Rule(f"{key}.{norm}.bias", f"{path}/{our_norm}/bias")
        statistics = f"{STATISTICS}/{path}/{our_norm}"
        yield Rule(f"{key}.{norm}.running_mean", f"{statistics}/mean")
        yield Rule(f"{key}.{norm}.running_var", f"{statistics}/var")
        yield Rule(f"{key}.{norm}.num_batches_tracked", f"{statistics}/batches", COUNT)

    yield from pair("conv1", "bn1", "stem_conv", "stem_norm")
    before = encoder.base
    for stage, depth in enumerate(encoder.depths):
        outputs = encoder.stage_width(stage)
        for i in range(depth):
            theirs, ours = f"layer{stage + 1}.{i}", f"stage{stage + 1}_blocks_{i}"
            for j in range(1, 4 if encoder.bottleneck else 3):
                yield from pair(
                    f"{theirs}.conv{j}", f"{theirs}.bn{j}", f"{ours}/conv{j}", f"{ours}/norm{j}"
                )
            if not i and (stage or before != outputs):
                yield from pair(
                    f"{theirs}.downsample.0",
                    f"{theirs}.downsample.1",
                    f"{ours}/shortcut_conv",
                    f"{ours}/shortcut_norm",
                )
        before = outputs


def table_rules(key: str, path: str, encoder: Any) -> Iterable[Rule]:
    """Rules of a `TableEncoder`.

    Args:
        key: official prefix.
        path: of our module.
        encoder: the `TableEncoder` itself.
    """
    yield Rule(f"{key}.cls_token", f"{path}/cls_token")
    yield Rule(f"{key}.mask_special_token", f"{path}/mask_token")
    if encoder.categories:
        yield Rule(f"{key}.cat_embedding.weight", f"{path}/values/embedding")
    if encoder.continuous:
        yield from linear_rules(f"{key}.con_proj", f"{path}/number")
    yield Rule(f"{key}.column_embedding.weight", f"{path}/columns_table")
    yield from layer_norm_rules(f"{key}.norm", f"{path}/norm")
    yield from transformer_rules(
        f"{key}.transformer_blocks", f"{path}/transformer", encoder.transformer, encoder.width
    )


def fusion_rules(key: str, path: str, fusion: Any) -> Iterable[Rule]:
    """Rules of a `FusionEncoder`.

    Args:
        key: official prefix.
        path: of our module.
        fusion: the `FusionEncoder` itself.
    """
    blocks, width = fusion.settings, fusion.width
    heads = (blocks.heads, width // blocks.heads)
    joined = linear(inputs=heads)
    yield from linear_rules(f"{key}.image_proj", f"{path}/image_project")
    yield from layer_norm_rules(f"{key}.image_norm", f"{path}/image_norm")
    yield from layer_norm_rules(f"{key}.norm", f"{path}/norm")
    # What the blocks share with plain ones.
    yield from transformer_rules(f"{key}.transformer_blocks", path, blocks, width)
    for i in range(blocks.depth):
        theirs, ours = f"{key}.transformer_blocks.{i}", f"{path}/blocks_{i}"
        yield from layer_norm_rules(f"{theirs}.cross_norm", f"{ours}/cross_norm")
        attention, inside = f"{theirs}.cross_attn", f"{ours}/image_attention"
        yield Rule(f"{attention}.q_proj.weight", f"{inside}/query/kernel", linear(outputs=heads))
        yield Rule(f"{attention}.q_proj.bias", f"{inside}/query/bias", reshape(heads, (-1,)))
        packed = linear(outputs=(2, *heads))
        yield Rule(f"{attention}.kv_proj.weight", f"{inside}/key_value/kernel", packed)
        yield Rule(f"{attention}.proj.weight", f"{inside}/out/kernel", joined)
        yield Rule(f"{attention}.proj.bias", f"{inside}/out/bias")
