"""What checkpoints call the weights of image and text towers: one table for each naming."""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any

from mim_jax.layout import (
    AS_IS,
    CAE,
    CONV2D,
    TIMM,
    BlockNames,
    Constant,
    Layout,
    Rule,
    layer_norm_rules,
    linear,
    linear_rules,
    reshape,
    transformer_rules,
)


@dataclasses.dataclass(frozen=True)
class Naming:
    """What one family of checkpoints calls the parts of an image tower.

    A part that it has no name for is "". All names but the projection's come after `level`.

    Attributes:
        patch: the convolution over patches, which every file has.
        blocks: stack of blocks.
        names: parts of a block.
        class_token: class token.
        positions: table of positions.
        norm: final LayerNorm.
        tells: regular expression of keys, one of which a file of this naming has.
        level: prefix of the encoder.
        batch_axis: class token and positions have a leading axis of size 1.
        registers: register tokens.
        pre_norm: LayerNorm before the blocks.
        mean_norm: the final LayerNorm, where it is applied to the mean of the patches.
        shared_bias: table of relative positions for all blocks.
        pool: attention pooling.
        projection: linear projection without bias.
        transposed_projection: it is stored as `[inputs, outputs]`.
        unused: regular expressions of keys beside a tower, without `level`.
    """

    patch: str
    blocks: str
    names: BlockNames
    class_token: str
    positions: str
    norm: str
    tells: str = ".*"
    level: str = ""
    batch_axis: bool = True
    registers: str = ""
    pre_norm: str = ""
    mean_norm: str = ""
    shared_bias: str = ""
    pool: str = ""
    projection: str = ""
    transposed_projection: bool = False
    unused: tuple[str, ...] = ()


CLIP_BLOCKS = BlockNames(
    norm1="layer_norm1",
    qkv=tuple(f"self_attn.{name}_proj.weight" for name in "qkv"),
    qkv_bias=tuple(f"self_attn.{name}_proj.bias" for name in "qkv"),
    out="self_attn.out_proj",
    norm2="layer_norm2",
)
"""Blocks of CLIP and SigLIP in transformers."""

OPENAI_BLOCKS = BlockNames(
    norm1="ln_1",
    qkv=("attn.in_proj_weight",),
    qkv_bias=("attn.in_proj_bias",),
    out="attn.out_proj",
    norm2="ln_2",
    fc1="mlp.c_fc",
    fc2="mlp.c_proj",
)
"""Blocks of OpenAI's CLIP and of OpenCLIP."""

_QKV = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))

VIT_BLOCKS = BlockNames(
    norm1="layernorm_before",
    qkv=tuple(f"{name}.weight" for name in _QKV),
    qkv_bias=tuple(f"{name}.bias" for name in _QKV),
    out="attention.output.dense",
    norm2="layernorm_after",
    fc1="intermediate.dense",
    fc2="output.dense",
)
"""Blocks of ViT, MAE and DINO in transformers."""

DINOV2_BLOCKS = VIT_BLOCKS._replace(
    norm1="norm1",
    norm2="norm2",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
    layer_scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
)
"""Blocks of DINOv2 in transformers."""

BEIT_BLOCKS = VIT_BLOCKS._replace(
    layer_scales=("lambda_1", "lambda_2"),
    position_bias=(
        "attention.attention.relative_position_bias.relative_position_bias_table",
        "",
    ),
)
"""Blocks of BEiT in transformers."""

_TIMM = Naming(
    patch="patch_embed.proj",
    blocks="blocks",
    names=TIMM,
    class_token="cls_token",
    positions="pos_embed",
    norm="norm",
    registers="reg_token",
    pre_norm="norm_pre",
    mean_norm="fc_norm",
    unused=(r"head(_dist)?\..*", r"attn_pool\..*", r"mask_token", r"decoder_.*"),
)
_HF_CLIP = Naming(
    patch="embeddings.patch_embedding",
    blocks="encoder.layers",
    names=CLIP_BLOCKS,
    class_token="embeddings.class_embedding",
    positions="embeddings.position_embedding.weight",
    norm="post_layernorm",
    tells=r"pre_layrnorm\..*|embeddings\.class_embedding",
    level="vision_model.",
    batch_axis=False,
    pre_norm="pre_layrnorm",
    pool="head",
    projection="visual_projection.weight",
    unused=(r"text_model\..*", r"text_projection\..*", r"logit_(scale|bias)", r".*position_ids"),
)
_HF_SIGLIP = dataclasses.replace(_HF_CLIP, tells=r".*", class_token="", pre_norm="", projection="")
_HF_VIT = Naming(
    patch="embeddings.patch_embeddings.projection",
    blocks="encoder.layer",
    names=VIT_BLOCKS,
    class_token="embeddings.cls_token",
    positions="embeddings.position_embeddings",
    norm="layernorm",
    unused=(r"(pooler|classifier|decoder)\..*", r"embeddings\.mask_token"),
)

NAMINGS: dict[str, Naming] = {
    "openai": Naming(
        patch="conv1",
        blocks="transformer.resblocks",
        names=OPENAI_BLOCKS,
        class_token="class_embedding",
        positions="positional_embedding",
        norm="ln_post",
        level="visual.",
        batch_axis=False,
        pre_norm="ln_pre",
        projection="visual.proj",
        transposed_projection=True,
        unused=(
            r"transformer\..*",
            r"(token_embedding|ln_final)\..*",
            r"positional_embedding|text_projection|attn_mask",
            r"logit_(scale|bias)|input_resolution|context_length|vocab_size",
        ),
    ),
    "hf-clip": _HF_CLIP,
    "hf-clip-flat": dataclasses.replace(_HF_CLIP, level=""),
    "hf-siglip": _HF_SIGLIP,
    "hf-siglip-flat": dataclasses.replace(_HF_SIGLIP, level=""),
    "hf-dinov2": dataclasses.replace(
        _HF_VIT,
        names=DINOV2_BLOCKS,
        tells=r".*\.layer_scale[12]\.lambda1",
        registers="embeddings.register_tokens",
    ),
    "hf-beit": dataclasses.replace(
        _HF_VIT,
        names=BEIT_BLOCKS,
        tells=r".*\.lambda_[12]|.*relative_position_bias_table",
        mean_norm="pooler.layernorm",
        shared_bias="encoder.relative_position_bias.relative_position_bias_table",
        unused=(
            r"(pooler|classifier|lm_head|decode_head|auxiliary_head|fpn\d)\..*",
            r"embeddings\.mask_token|.*relative_position_index",
        ),
    ),
    "hf-vit": _HF_VIT,
    "dinov2": dataclasses.replace(_TIMM, tells="register_tokens", registers="register_tokens"),
    "beit": dataclasses.replace(
        _TIMM,
        names=CAE,
        tells=r".*\.q_bias|.*relative_position_bias_table",
        shared_bias="rel_pos_bias.relative_position_bias_table",
        unused=(r"(head|lm_head)\..*", r"mask_token|.*relative_position_index"),
    ),
    "timm": _TIMM,
}
"""By name: OpenAI's and OpenCLIP's code, transformers ("hf-...", CLIP and SigLIP with and without
the level `vision_model.`), the codes of DINOv2 and of BEiT and CAE, and timm, which the MAE code
and DINO share. Where two have the same patch convolution, the one that asks for more comes first.
"""

HUB_NAMINGS = {
    "clip": "hf-clip",
    "openclip": "hf-clip",
    "siglip": "hf-siglip",
    "dino": "hf-vit",
    "dinov2": "hf-dinov2",
    "mae": "hf-vit",
    "vit": "hf-vit",
    "beit": "hf-beit",
    "beit_finetuned": "hf-beit",
    "cae": "beit",
}
"""What a family's weights are called where they were published, on the hub of Hugging Face as far
as it has them."""


def tower_layout(tower: Any, naming: str, path: str, key: str = "") -> Layout:
    """The table of a `Tower` in one naming.

    Args:
        tower: the `Tower`.
        naming: a name in `NAMINGS`.
        path: path of the tower in our parameters, such as "teacher".
        key: official prefix, such as "clip_model.".

    Raises:
        ValueError: if the naming is unknown, or has no name for a part of the tower.
    """
    if naming not in NAMINGS:
        raise ValueError(f"the naming is {naming!r}; known are {', '.join(NAMINGS)}.")
    names = NAMINGS[naming]
    unused = [*names.unused]
    if names.projection and not tower.outputs:
        unused.append(re.escape(names.projection))
    if names.pool and tower.pool != "attention":
        unused.append(re.escape(names.level + names.pool) + r"\..*")
    constants: tuple[Constant, ...] = ()
    if tower.encoder.positions.startswith("sincos"):
        table = tower.encoder.position_table()
        constants = (Constant(f"{key}{names.level}{names.positions}", table[None]),)
    return Layout(
        tuple(_tower_rules(tower, names, naming, path, key)),
        constants,
        unused=tuple(f"{re.escape(key)}(?:{pattern})" for pattern in unused),
    )


def _tower_rules(tower: Any, names: Naming, naming: str, path: str, key: str) -> Iterator[Rule]:
    encoder, inside, ours = tower.encoder, key + names.level, f"{path}/encoder"

    def named(part: str) -> str:
        name = getattr(names, part)
        if not name:
            raise ValueError(f"naming {naming!r} has no name for the tower's {part}.")
        return f"{inside}{name}"

    if encoder.class_token:
        one = reshape((1, 1, encoder.width), (encoder.width,))
        yield Rule(named("class_token"), f"{ours}/cls_token", AS_IS if names.batch_axis else one)
    if encoder.registers:
        yield Rule(named("registers"), f"{ours}/registers")
    if encoder.learned_positions:
        shape = encoder.position_table().shape
        official = (1, *shape) if names.batch_axis else shape
        yield Rule(named("positions"), f"{ours}/positions", reshape(shape, official))
    yield Rule(f"{named('patch')}.weight", f"{ours}/patch_embed/kernel", CONV2D)
    if encoder.patch_bias:
        yield Rule(f"{named('patch')}.bias", f"{ours}/patch_embed/bias")
    if encoder.pre_norm:
        yield from layer_norm_rules(named("pre_norm"), f"{ours}/pre_norm")
    if encoder.shared_position_bias:
        yield Rule(named("shared_bias"), f"{ours}/position_bias/table")
    yield from transformer_rules(
        named("blocks"), f"{ours}/transformer", encoder.transformer, encoder.width, names.names
    )
    norm = "mean_norm" if tower.pool == "mean" and names.mean_norm else "norm"
    yield from layer_norm_rules(named(norm), f"{ours}/norm")
    if tower.outputs:
        if not names.projection:
            raise ValueError(f"naming {naming!r} has no name for the tower's projection.")
        transform = AS_IS if names.transposed_projection else linear()
        yield Rule(f"{key}{names.projection}", f"{path}/projection/kernel", transform)
    if tower.pool == "attention":
        yield from _pool_rules(encoder, named("pool"), f"{path}/attention_pool")


def _pool_rules(encoder: Any, theirs: str, ours: str) -> Iterator[Rule]:
    """SigLIP's attention pooling: PyTorch's `MultiheadAttention`, a LayerNorm and an MLP."""
    width, count = encoder.width, encoder.transformer.heads
    heads = (count, width // count)
    yield Rule(f"{theirs}.probe", f"{ours}/probe")
    yield Rule(
        f"{theirs}.attention.in_proj_weight", f"{ours}/qkv/kernel", linear(outputs=(3, *heads))
    )
    yield Rule(f"{theirs}.attention.in_proj_bias", f"{ours}/qkv/bias", reshape((3, *heads), (-1,)))
    yield Rule(f"{theirs}.attention.out_proj.weight", f"{ours}/out/kernel", linear(inputs=heads))
    yield Rule(f"{theirs}.attention.out_proj.bias", f"{ours}/out/bias")
    yield from layer_norm_rules(f"{theirs}.layernorm", f"{ours}/norm")
    for layer in ("fc1", "fc2"):
        yield from linear_rules(f"{theirs}.mlp.{layer}", f"{ours}/mlp/{layer}")


TEXT_NAMINGS = ("openai", "hf-clip", "hf-clip-flat")
"""Namings of `NAMINGS` that name CLIP's text tower as well."""


def text_layout(tower: Any, naming: str, path: str, key: str = "") -> Layout:
    """The table of a `TextTower` in one naming; image weights in the same file are passed over.

    Args:
        tower: the `TextTower`.
        naming: a name in `TEXT_NAMINGS`.
        path: path of the tower in our parameters, such as "text".
        key: official prefix.

    Raises:
        ValueError: for another naming.
    """
    if naming not in TEXT_NAMINGS:
        raise ValueError(f"the naming is {naming!r}; known are {', '.join(TEXT_NAMINGS)}.")
    projection = "text_projection"
    if naming == "openai":
        inside, blocks, names, norm = key, "transformer.resblocks", OPENAI_BLOCKS, "ln_final"
        tokens, positions, transform = "token_embedding.weight", "positional_embedding", AS_IS
        unused = [r"visual\..*", r"logit_(scale|bias)|attn_mask|input_resolution"]
        unused.append(r"context_length|vocab_size")
    else:
        inside = key + ("text_model." if naming == "hf-clip" else "")
        blocks, names, norm = "encoder.layers", CLIP_BLOCKS, "final_layer_norm"
        tokens = "embeddings.token_embedding.weight"
        positions, transform = "embeddings.position_embedding.weight", linear()
        projection += ".weight"
        unused = [r"(vision_model|visual_projection)\..*", r"logit_(scale|bias)", r".*position_ids"]
    if not tower.outputs:
        unused.append(re.escape(projection))

    def rules() -> Iterable[Rule]:
        yield Rule(inside + tokens, f"{path}/token_embedding")
        yield Rule(inside + positions, f"{path}/positions")
        yield from transformer_rules(
            inside + blocks, f"{path}/transformer", tower.transformer, tower.width, names
        )
        yield from layer_norm_rules(inside + norm, f"{path}/norm")
        if tower.outputs:
            yield Rule(key + projection, f"{path}/projection/kernel", transform)

    return Layout(
        tuple(rules()), unused=tuple(f"{re.escape(key)}(?:{pattern})" for pattern in unused)
    )
