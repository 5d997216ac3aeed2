"""Tables of Vec2Face's checkpoints, and of the frozen networks that it learns with."""

from collections.abc import Iterable

import numpy as np

from mim_jax.layout import (
    CONV2D,
    Constant,
    Layout,
    Rule,
    Transform,
    layer_norm_rules,
    linear,
    linear_rules,
    reshape,
    transformer_rules,
)
from mim_jax.models.face_tokens import FeatureMaskedAutoencoder
from mim_jax.models.image_decoder import ImageDecoder
from mim_jax.models.iresnet import IResNet
from mim_jax.models.lpips import LPIPS, SCALE, SHIFT
from mim_jax.models.patch_discriminator import STEM_KERNELS, PatchDiscriminator
from mim_jax.models.resnet import STATISTICS

COUNT = Transform(lambda x: x, lambda x: x.astype(np.int64))
"""A counter, which PyTorch keeps in 64 bits."""


def conv_rules(key: str, path: str, *, bias: bool = True) -> Iterable[Rule]:
    """Rules of a convolution."""
    yield Rule(f"{key}.weight", f"{path}/kernel", CONV2D)
    if bias:
        yield Rule(f"{key}.bias", f"{path}/bias")


def token_rules(key: str, path: str, model: FeatureMaskedAutoencoder) -> Iterable[Rule]:
    """Rules of the feature masked autoencoder, its unused layers included.

    Args:
        key: official prefix, which may be empty.
        path: of the module in our parameters.
        model: the module itself.
    """
    yield from linear_rules(f"{key}latent_prior_proj_f", f"{path}/projection")
    yield from linear_rules(f"{key}feature_token", f"{path}/spread")
    yield Rule(f"{key}token_emb.position_embeddings.weight", f"{path}/positions")
    yield from layer_norm_rules(f"{key}token_emb.LayerNorm", f"{path}/embed_norm")
    yield from transformer_rules(f"{key}blocks", f"{path}/encoder", model.encoder, model.width)
    yield from layer_norm_rules(f"{key}norm", f"{path}/norm")
    yield from linear_rules(f"{key}decoder_embed", f"{path}/decoder_embed")
    shape = (1 + model.tokens, model.width)
    yield Rule(
        f"{key}decoder_pos_embed_learned", f"{path}/decoder_positions", reshape(shape, (1, *shape))
    )
    yield from transformer_rules(
        f"{key}decoder_blocks", f"{path}/decoder", model.decoder, model.width
    )
    yield from layer_norm_rules(f"{key}decoder_norm", f"{path}/decoder_norm")
    yield from conv_rules(f"{key}patch_embed.proj", f"{path}/unused_patch_embed")
    yield from linear_rules(f"{key}center_token", f"{path}/unused_center_token")


def position_ids(key: str, model: FeatureMaskedAutoencoder) -> Constant:
    """The only buffer of the generator: the numbers of the positions."""
    return Constant(f"{key}token_emb.position_ids", np.arange(1 + model.tokens)[None])


def image_decoder_rules(key: str, path: str, decoder: ImageDecoder) -> Iterable[Rule]:
    """Rules of the image decoder, whose levels are counted from the finest in both.

    Args:
        key: official prefix with its dot.
        path: of the module in our parameters.
        decoder: the module itself.
    """

    def block(theirs: str, ours: str, changes: bool) -> Iterable[Rule]:
        for i in (1, 2):
            yield from layer_norm_rules(f"{theirs}.norm{i}", f"{ours}/norm{i}")
            yield from conv_rules(f"{theirs}.conv{i}", f"{ours}/conv{i}", bias=False)
        if changes:
            yield from conv_rules(f"{theirs}.nin_shortcut", f"{ours}/shortcut", bias=False)

    yield from conv_rules(f"{key}conv_in", f"{path}/conv_in")
    for i in (1, 2):
        yield from block(f"{key}mid.block_{i}", f"{path}/middle_{i}", False)
    before = decoder.widths[-1]
    for level in reversed(range(len(decoder.widths))):
        for i in range(decoder.blocks):
            width = decoder.widths[level]
            theirs, ours = f"{key}up.{level}.block.{i}", f"{path}/level{level}_{i}"
            yield from block(theirs, ours, before != width)
            before = width
        if level:
            theirs, ours = f"{key}up.{level}.upsample.conv", f"{path}/level{level}_upsample"
            yield from conv_rules(theirs, ours)
    yield from layer_norm_rules(f"{key}norm_out", f"{path}/norm_out")
    yield from conv_rules(f"{key}conv_out", f"{path}/conv_out")


def discriminator_rules(key: str, path: str, model: PatchDiscriminator) -> Iterable[Rule]:
    """Rules of the discriminator.

    Args:
        key: official prefix, which may be empty.
        path: of the module in our parameters.
        model: the module itself.
    """
    for i, side in enumerate(STEM_KERNELS):
        yield from conv_rules(f"{key}layers.0.0.convs.{i}", f"{path}/stem_{side}")
    for i in range(1, len(model.widths)):
        theirs, ours = f"{key}layers.{i}", f"{path}/stage{i}"
        yield from conv_rules(f"{theirs}.0", f"{ours}_conv")
        yield from layer_norm_rules(f"{theirs}.2", f"{ours}_norm")
        yield from layer_norm_rules(f"{theirs}.3.block.groupnorm", f"{ours}_unit_norm")
        yield from conv_rules(f"{theirs}.3.block.project", f"{ours}_unit_conv")
    yield from conv_rules(f"{key}to_logits.0", f"{path}/head_conv")
    yield from conv_rules(f"{key}to_logits.2", f"{path}/logits")


def iresnet_layout(model: IResNet) -> Layout:
    """The table of InsightFace's checkpoints.

    Paths begin with `params` or `batch_stats`: what they name is all variables of the network.
    """

    def norm(theirs: str, ours: str) -> Iterable[Rule]:
        yield from layer_norm_rules(theirs, f"params/{ours}")
        statistics = f"{STATISTICS}/{ours}"
        yield Rule(f"{theirs}.running_mean", f"{statistics}/mean")
        yield Rule(f"{theirs}.running_var", f"{statistics}/var")
        yield Rule(f"{theirs}.num_batches_tracked", f"{statistics}/batches", COUNT)

    def conv(theirs: str, ours: str) -> Iterable[Rule]:
        return conv_rules(theirs, f"params/{ours}", bias=False)

    def rules() -> Iterable[Rule]:
        yield from conv("conv1", "stem_conv")
        yield from norm("bn1", "stem_norm")
        yield Rule("prelu.weight", "params/stem_prelu/slope")
        before = model.widths[0]
        for stage, (depth, width) in enumerate(zip(model.blocks, model.widths), 1):
            for i in range(depth):
                theirs, ours = f"layer{stage}.{i}", f"stage{stage}_blocks_{i}"
                for j in (1, 2, 3):
                    yield from norm(f"{theirs}.bn{j}", f"{ours}/norm{j}")
                for j in (1, 2):
                    yield from conv(f"{theirs}.conv{j}", f"{ours}/conv{j}")
                yield Rule(f"{theirs}.prelu.weight", f"params/{ours}/prelu/slope")
                if not i or before != width:
                    yield from conv(f"{theirs}.downsample.0", f"{ours}/shortcut_conv")
                    yield from norm(f"{theirs}.downsample.1", f"{ours}/shortcut_norm")
                before = width
        yield from norm("bn2", "norm")
        yield Rule("fc.weight", "params/linear/kernel", linear())
        yield Rule("fc.bias", "params/linear/bias")
        yield from norm("features", "vector_norm")

    return Layout(tuple(rules()))


def lpips_layout(model: LPIPS) -> Layout:
    """The table of LPIPS with VGG16, whose layers are numbered as torchvision numbers them."""

    def rules() -> Iterable[Rule]:
        number = 0
        for i, widths in enumerate(model.slices):
            for j in range(len(widths)):
                yield from conv_rules(f"net.slice{i + 1}.{number}", f"conv{i}_{j}")
                number += 2  # a ReLU follows
            number += 1  # a pooling layer lies between
        for i, widths in enumerate(model.slices):
            official = reshape((widths[-1],), (1, widths[-1], 1, 1))
            yield Rule(f"lin{i}.model.1.weight", f"head_{i}", official)

    constants = {"shift": SHIFT, "scale": SCALE}
    return Layout(
        tuple(rules()),
        tuple(
            Constant(f"scaling_layer.{name}", np.asarray(value, np.float32).reshape(1, 3, 1, 1))
            for name, value in constants.items()
        ),
    )
