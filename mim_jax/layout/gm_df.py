"""What a GM-DF checkpoint calls its weights: CLIP in OpenAI's names below `clip.`, and the rest.

The authors have released none. The names beside CLIP's are those of an independent PyTorch code.
"""

from collections.abc import Iterator
from typing import Any

from mim_jax.layout import (
    BlockNames,
    Layout,
    Rule,
    layer_norm_rules,
    linear,
    linear_rules,
    transformer_rules,
)
from mim_jax.layout.towers import text_layout, tower_layout

CLIP = "clip."
"""What CLIP's keys begin with."""

DECODER_BLOCKS = BlockNames(
    qkv=("attn.in_proj_weight",),
    qkv_bias=("attn.in_proj_bias",),
    out="attn.out_proj",
    fc1="fc1",
    fc2="fc2",
)
"""Blocks of the decoder: PyTorch's attention, and the MLP's layers without a level of their own."""


def gm_df_layout(model: Any, tower: Any) -> Layout:
    """The table of a `ForgeryDetector`.

    Args:
        model: the detector.
        tower: CLIP's `Tower` of the same sizes, whose parameters lie below "visual".
    """
    visual = tower_layout(tower, "openai", "visual", CLIP)
    text = text_layout(model.text, "openai", "text", CLIP)
    return Layout((*visual.rules, *text.rules, *_own_rules(model)))


def _own_rules(model: Any) -> Iterator[Rule]:
    encoder, decoder = model.visual.encoder, model.decoder
    yield Rule(f"{CLIP}logit_scale", "logit_scale")
    yield Rule("domain_embed.weight", "domain_embedding")
    yield Rule("e_dom", "domain_tokens")
    yield Rule("e_cls", "class_tokens")
    yield Rule("mask_token", "visual/encoder/mask_token")
    for i in range(encoder.transformer.depth):
        path = f"visual/encoder/transformer/blocks_{i}"
        yield from _adapter_rules(f"adapters.{i}", path, encoder.transformer.adaptation)
    layers = len(encoder.transformer.adaptation.layers)
    if layers:
        yield Rule("so_alpha", "fusion/alpha")
    for i in range(layers):
        yield from layer_norm_rules(f"so_norm.{i}", f"fusion/norm_{i}")
    yield from linear_rules("so_proj", "fusion/projection")
    yield from linear_rules("head", "head")
    yield from linear_rules("dec_in", "decoder/embed")
    yield Rule("dec_pos", "decoder/positions")
    yield from transformer_rules(
        "dec_blocks", "decoder/transformer", decoder.transformer, decoder.width, DECODER_BLOCKS
    )
    yield from layer_norm_rules("dec_norm", "decoder/norm")
    yield from linear_rules("dec_out", "decoder/pred")


def _adapter_rules(key: str, path: str, adaptation: Any) -> Iterator[Rule]:
    """What is added to one block."""

    def of_domain(key: str, path: str) -> Iterator[Rule]:
        yield Rule(f"{key}.w_gamma.weight", f"{path}/scale_of_domain/kernel", linear())
        yield Rule(f"{key}.w_beta.weight", f"{path}/bias_of_domain/kernel", linear())

    for n in range(adaptation.experts):
        for layer in ("fc1", "fc2"):
            theirs, ours = f"{key}.experts.{n}.{layer}", f"{path}/experts/experts/{layer}"
            yield Rule(f"{theirs}.weight", f"{ours}/kernel", linear(), (n,))
            yield Rule(f"{theirs}.bias", f"{ours}/bias", index=(n,))
    if adaptation.experts and adaptation.gate == "domain":
        for layer in ("fc1", "fc2"):
            yield from linear_rules(f"{key}.gate.{layer}", f"{path}/experts/gate/{layer}")
    if adaptation.site == "pre":
        for i in (1, 2):  # their scale and bias are those of CLIP's LayerNorm
            yield from of_domain(f"{key}.ln_{i}", f"{path}/norm{i}")
    elif adaptation.experts:
        yield Rule(f"{key}.dnorm.gamma0", f"{path}/domain_norm/scale")
        yield Rule(f"{key}.dnorm.beta0", f"{path}/domain_norm/bias")
        yield from of_domain(f"{key}.dnorm", f"{path}/domain_norm")
