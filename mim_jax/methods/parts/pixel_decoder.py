"""The decoder of pixels as part of a method: its checkpoint names, sizes and picture (MAE)."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import layout, targets
from mim_jax.method import Picture
from mim_jax.methods.parts.encoders import depth_of, mlp_ratio_of
from mim_jax.models.masked_decoder import MaskedDecoder
from mim_jax.models.transformer import restacked
from mim_jax.models.vit import resize_patch_outputs


def decoder_rules(decoder: MaskedDecoder) -> tuple[layout.Rule, ...]:
    """Rules of a decoder below "decoder/", in the names of the MAE code."""
    blocks = decoder.transformer
    return (
        *layout.linear_rules("decoder_embed", "decoder/embed"),
        layout.Rule("mask_token", "decoder/mask_token"),
        *layout.transformer_rules("decoder_blocks", "decoder/transformer", blocks, decoder.width),
        *layout.layer_norm_rules("decoder_norm", "decoder/norm"),
        *layout.linear_rules("decoder_pred", "decoder/pred"),
    )


def decoder_like(
    state: Mapping[str, np.ndarray], known: Mapping[str, Any], template: MaskedDecoder, encoder: Any
) -> MaskedDecoder:
    """The decoder of pixels of an official state dict; the template's if it has none.

    Args:
        state: arrays by official key.
        known: see `Method.sized_like`.
        template: a decoder.
        encoder: whose patches are predicted: a `ViT`, or what has its sizes.
    """
    blocks = template.transformer
    if "decoder_embed.weight" in state:
        width = len(state["decoder_embed.weight"])
        # All released decoders have 32 channels a head, which no shape tells.
        heads = blocks.heads if width == template.width else max(width // 32, 1)
        blocks = blocks.clone(
            depth=depth_of("decoder_blocks", state),
            heads=known.get("decoder_heads", heads),
            mlp_ratio=mlp_ratio_of(state, "decoder_blocks"),
        )
        template = template.clone(width=width)
    return template.clone(
        grid=encoder.grid,
        outputs=math.prod(encoder.patch_size) * encoder.channels,
        transformer=blocks,
        position_grid=None,
    )


def adopt_decoder(
    path: str,
    given: Mapping[str, np.ndarray],
    donor: tuple[Any, MaskedDecoder],
    receiver: tuple[Any, MaskedDecoder],
) -> np.ndarray | None:
    """A parameter below "decoder/" from another decoder of pixels, its prediction resized.

    Args:
        path: of the parameter.
        given: the donor's parameters by path.
        donor: encoder and decoder that have them; the encoder tells patch size and channels.
        receiver: encoder and decoder that get them.
    """
    (old, old_decoder), (new, new_decoder) = donor, receiver
    if path.startswith("decoder/pred/") and path in given:
        return resize_patch_outputs(
            given[path], (old.patch_size, old.channels), (new.patch_size, new.channels)
        )
    return restacked(path, given, old_decoder.transformer, new_decoder.transformer)


def reconstruction_picture(
    images: jax.Array, pred: jax.Array, removed: jax.Array, encoder: Any, normalized: bool
) -> Picture:
    """Image, visible patches, prediction, and prediction with the visible patches put in.

    Where the target is normalized, predicted patches get the mean and deviation of the true
    patches back; without this every reconstruction looks grey.

    Args:
        images: `[batch, height, width, channels]`, normalized, float32.
        pred: predicted patches `[batch, tokens, values]`.
        removed: `[batch, tokens]`, 1 where a patch is removed and 0 where it is visible.
        encoder: a `ViT`, or what has its sizes.
        normalized: whether predicted patches are in units of their own deviation.
    """
    patches = targets.patchify(images, encoder.patch_size)
    pred, removed = pred.astype(jnp.float32), removed[..., None]
    caption = "Loss on removed patches only; the prediction for visible ones is not trained."
    if normalized:
        pred = targets.denormalize_patches(pred, patches)
        caption += "\nPredicted patches carry the mean and deviation of the true patches."
    columns = {
        "image": patches,
        "visible": patches * (1 - removed),
        "prediction": pred,
        "prediction + visible": jnp.where(removed == 1, pred, patches),
    }
    return Picture(
        {
            title: targets.unpatchify(column, encoder.image_size, encoder.patch_size)
            for title, column in columns.items()
        },
        caption,
    )
