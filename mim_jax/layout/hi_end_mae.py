"""The official checkpoint of Hi-End-MAE, as table of keys."""

from collections.abc import Iterator
from typing import Any

from mim_jax.layout import (
    Constant,
    Layout,
    Rule,
    layer_norm_rules,
    linear,
    linear_rules,
    reshape,
    transformer_rules,
    vit_rules,
)


def hi_end_mae_layout(encoder: Any, decoder: Any, levels: int) -> Layout:
    """The table of a model's keys; a file without decoder is accepted.

    Args:
        encoder: the 3-D `ViT`.
        decoder: the `HierarchicalDecoder`.
        levels: encoder levels that the decoder attends to.
    """
    rules = [
        rule for rule in vit_rules("encoder", encoder, "encoder.") if "pos_embed" not in rule.key
    ]
    constants = []
    if encoder.learned_positions:
        shape = encoder.position_table().shape
        rules.append(Rule("encoder_pos_embed", "encoder/positions", reshape(shape, (1, *shape))))
    else:
        table = encoder.position_table()[encoder.leading_positions :]
        constants.append(Constant("encoder_pos_embed", table[None]))
    constants.append(Constant("decoder_pos_embed", decoder.position_table()[None]))
    return Layout(
        (*rules, *_decoder_rules(decoder, levels)),
        tuple(constants),
        optional=(r"decoder\..*|encoder_to_decoder\..*|mask_token|decoder_pos_embed",),
    )


def _decoder_rules(decoder: Any, levels: int) -> Iterator[Rule]:
    yield Rule("mask_token", "decoder/mask_token")
    for i in range(levels):
        yield from linear_rules(f"encoder_to_decoder.{i}", f"decoder/embed_level_{i}")
    yield from linear_rules(f"encoder_to_decoder.{levels}", "decoder/embed")
    blocks, width = decoder.transformer, decoder.width
    yield from transformer_rules("decoder.blocks", "decoder/transformer", blocks, width)
    heads = (blocks.heads, width // blocks.heads)
    for i in range(levels):
        key, path = f"decoder.cross_attention_blocks.{i}", f"decoder/cross_blocks_{i}"
        for name in ("norm0", "norm1", "norm2"):
            yield from layer_norm_rules(f"{key}.{name}", f"{path}/{name}")
        for theirs, ours, outputs in (
            ("self_attn.qkv", "self_attention/qkv", (3, *heads)),
            ("cross_attn.q", "cross_attention/query", heads),
            ("cross_attn.kv", "cross_attention/key_value", (2, *heads)),
        ):
            split = linear(outputs=outputs)
            yield Rule(f"{key}.{theirs}.weight", f"{path}/{ours}/kernel", split)
            yield Rule(f"{key}.{theirs}.bias", f"{path}/{ours}/bias", reshape(outputs, (-1,)))
        for theirs, ours in (("self_attn", "self_attention"), ("cross_attn", "cross_attention")):
            joined = linear(inputs=heads)
            yield Rule(f"{key}.{theirs}.proj.weight", f"{path}/{ours}/out/kernel", joined)
            yield Rule(f"{key}.{theirs}.proj.bias", f"{path}/{ours}/out/bias")
        for name in ("fc1", "fc2"):
            yield from linear_rules(f"{key}.mlp.{name}", f"{path}/mlp/{name}")
    yield from layer_norm_rules("decoder.norm", "decoder/norm")
    yield from linear_rules("decoder.head", "decoder/pred")
