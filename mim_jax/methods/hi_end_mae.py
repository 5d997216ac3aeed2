"""Hi-End-MAE: hierarchical encoder-driven masked autoencoders for 3-D medical images.

Tang et al., "Hi-End-MAE: Hierarchical encoder-driven masked autoencoders are stronger vision
learners for medical image segmentation", Medical Image Analysis, 2026.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mim_jax import losses, masking, targets
from mim_jax.layout import Layout
from mim_jax.layout.hi_end_mae import hi_end_mae_layout
from mim_jax.method import Aux, Batch, Features, Input, Method, Picture, Variables, register
from mim_jax.methods.parts.encoders import (
    adopt_encoder,
    blocks_of,
    build_encoder,
    depth_of,
    mlp_ratio_of,
)
from mim_jax.methods.parts.volumes import check_taps, grid_of, planes
from mim_jax.models.cross_decoder import Decoded, HierarchicalDecoder
from mim_jax.models.transformer import LAYER_NORM_EPSILON, restacked
from mim_jax.models.vit import ViT, resize_patch_outputs

MASK_RATIO = 0.75

HEADS = {768: 12, 1536: 16}
"""Heads of the published encoders by width; shapes do not tell them."""

DECODER_HEADS = {384: 12, 528: 16}
"""Heads of the published decoders by width."""


class Reconstruction(NamedTuple):
    """What one forward pass computes; tokens are in drawn order, visible ones first.

    Attributes:
        latent: `[batch, 1 + kept, width]`, normalized encoder output, class token first.
        levels: outputs of the tapped blocks, like `latent` but not normalized.
        decoded: what the decoder computes.
        order: int32 `[batch, tokens]`, positions of the tokens.
    """

    latent: jax.Array
    levels: list[jax.Array]
    decoded: Decoded
    order: jax.Array


class HierarchicalAutoencoder(nn.Module):
    """A ViT on visible patches, and a decoder that attends to several of its levels (figure 2).

    Attributes:
        encoder: a ViT with class token.
        decoder: predicts the values of every patch.
        kept: number of visible patches.
        taps: blocks whose outputs are the levels, counted from 0, ascending.
        cross_attention: the decoder attends to the levels; otherwise it sees the final output of
            the encoder alone, as MAE's does.
    """

    encoder: ViT
    decoder: HierarchicalDecoder
    kept: int
    taps: tuple[int, ...]
    cross_attention: bool = True

    def __call__(self, volumes: jax.Array, noise: jax.Array) -> Reconstruction:
        """Reconstructs volumes `[batch, height, width, depth, channels]`.

        Args:
            volumes: in [0, 1].
            noise: `[batch, tokens]`, uniform in [0, 1); the smallest values stay visible.
        """
        order = jnp.argsort(noise, axis=1)  # ascending and stable
        latent, outputs = self.encoder(volumes, order[:, : self.kept])
        levels = [outputs[tap] for tap in self.taps]
        decoded = self.decoder(latent, levels if self.cross_attention else [], order)
        return Reconstruction(latent, levels, decoded, order)

    def encode(self, volumes: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Encodes whole volumes: the normalized output and the levels, class token first."""
        latent, outputs = self.encoder(volumes)
        return latent, [outputs[tap] for tap in self.taps]


@register("hi_end_mae")
@dataclasses.dataclass(frozen=True)
class HiEndMAE(Method):
    """Pre-training by reconstructing removed patches of volumes from several encoder levels.

    Attributes:
        model: encoder and decoder.
        decay_all: weight decay on all parameters, as the official code has it; otherwise not on
            biases, norms, tokens and position tables, as it means to.
    """

    model: HierarchicalAutoencoder
    decay_all: bool = True

    streams: ClassVar[tuple[str, ...]] = ("mask",)

    @classmethod
    def build(cls, config: ml_collections.ConfigDict) -> "HiEndMAE":
        """Reads `config.model`, `config.compute_dtype`, and size and channels from `config.data`.

        `config.optimizer.decay_all` says which of the two weight decays is meant.

        Raises:
            ValueError: if volume, patch, model size, taps and mask ratio do not fit together.
        """
        model = config.model
        encoder = build_encoder(config, positions=model.positions)
        check_taps(model.taps, encoder.transformer.depth)
        # Without cross-attention, blocks that attend to a level are plain ones.
        plain = 0 if model.cross_attention else len(model.taps)
        decoder = HierarchicalDecoder(
            encoder.grid,
            outputs=math.prod(encoder.patch_size) * encoder.channels,
            width=model.decoder_width,
            transformer=blocks_of(config)(model.decoder_depth + plain, model.decoder_heads),
            position_grid=encoder.position_grid,
        )
        kept = masking.num_kept(math.prod(encoder.grid), model.mask_ratio)
        parts = HierarchicalAutoencoder(
            encoder, decoder, kept, tuple(model.taps), model.cross_attention
        )
        return cls(parts, config.optimizer.decay_all)

    @property
    def no_decay(self) -> tuple[str, ...]:  # type: ignore[override]
        """Nothing, or tokens and positions, which have more than one axis."""
        return () if self.decay_all else (r"(cls_token|mask_token|positions)$",)

    @property
    def encoder(self) -> ViT:
        """The encoder."""
        return self.model.encoder

    @property
    def tokens(self) -> int:
        """Number of patches in a volume."""
        return math.prod(self.encoder.grid)

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Volumes of the model's size."""
        return {"image": Input((*self.encoder.image_size, self.encoder.channels))}

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Initial parameters of encoder and decoder."""
        volumes = jnp.zeros((1, *batch["image"].shape[1:]))
        return self.model.init(rng, volumes, jnp.zeros((1, self.tokens)))

    def reconstruct(
        self, variables: Variables, volumes: jax.Array, noise: jax.Array
    ) -> Reconstruction:
        """One forward pass, see `HierarchicalAutoencoder`."""
        output = self.model.apply(variables, volumes, noise)
        assert isinstance(output, Reconstruction)
        return output

    def target(self, volumes: jax.Array, order: jax.Array) -> jax.Array:
        """Normalized values of the masked patches, float32 `[batch, masked, values]`.

        Each patch has mean 0 and is divided by the root of its biased variance plus 1e-6. Tissue
        of one grey level would otherwise be all noise.
        """
        patches = targets.patchify(volumes.astype(jnp.float32), self.encoder.patch_size)
        masked = masking.gather_tokens(patches, order[:, self.model.kept :])
        return jax.lax.stop_gradient(targets.whiten(masked, epsilon=1e-6))

    def reconstruction_loss(self, volumes: jax.Array, output: Reconstruction) -> jax.Array:
        """Mean squared error over the masked patches."""
        pred = output.decoded.pred[:, 1 + self.model.kept :]
        return jnp.mean(losses.squared_error(pred, self.target(volumes, output.order)))

    def loss(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array], step: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """Reconstruction loss under a fresh random mask."""
        volumes = batch["image"]
        noise = jax.random.uniform(rngs["mask"], (len(volumes), self.tokens))
        output = self.reconstruct(variables, volumes, noise)
        return self.reconstruction_loss(volumes, output), Aux()

    def features(self, variables: Variables, batch: Batch) -> Features:
        """Class token and patch tokens of whole volumes, after the final norm."""
        *_, latent = self.levels(variables, batch)
        return Features(latent[:, 0], latent[:, 1:], self.encoder.grid)

    def levels(self, variables: Variables, batch: Batch) -> list[jax.Array]:
        """Tapped block outputs of whole volumes, and the normalized final output.

        Returns:
            Arrays `[batch, 1 + tokens, width]`, class token first, the shallowest level first.
        """
        encoded: Any = self.model.apply(
            variables, batch["image"], method=HierarchicalAutoencoder.encode
        )
        latent, levels = encoded
        return [*levels, latent]

    def reconstructed_patches(self, volumes: jax.Array, output: Reconstruction) -> jax.Array:
        """Predictions for all patches with the mean and deviation of the true ones (official code).

        Returns:
            float32 `[batch, tokens, values]`, in row-major order.
        """
        patches = targets.patchify(volumes.astype(jnp.float32), self.encoder.patch_size)
        restore = jnp.argsort(output.order, axis=1)
        pred = masking.gather_tokens(output.decoded.pred[:, 1:].astype(jnp.float32), restore)
        deviation = jnp.sqrt(patches.var(axis=-1, keepdims=True, ddof=1)) + 1e-6
        return pred * deviation + patches.mean(axis=-1, keepdims=True)

    def pictures(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array]
    ) -> dict[str, Picture]:
        """Three planes through each volume, what is visible of it, and its reconstruction."""
        volumes = batch["image"].astype(jnp.float32)
        noise = jax.random.uniform(rngs["mask"], (len(volumes), self.tokens))
        output = self.reconstruct(variables, volumes, noise)
        patches = targets.patchify(volumes, self.encoder.patch_size)
        mask = masking.masking_of_order(output.order, self.model.kept).mask[..., None]
        pred = self.reconstructed_patches(volumes, output)
        size, patch_size = self.encoder.image_size, self.encoder.patch_size
        shown = {
            "volume": volumes,
            "visible": targets.unpatchify(patches * (1 - mask), size, patch_size),
            "prediction + visible": targets.unpatchify(
                jnp.where(mask == 1, pred, patches), size, patch_size
            ),
        }
        cut = {title: planes(values) for title, values in shown.items()}
        columns = {
            f"{plane}: {title}": cut[title][plane] for plane in cut["volume"] for title in shown
        }
        caption = (
            "Planes through the middle. Loss on removed patches only.\n"
            "Predicted patches carry the mean and deviation of the true patches."
        )
        return {"reconstruction": Picture(columns, caption)}

    def layout(self) -> Layout:
        """The official pre-training checkpoint, without the prefix `module.` of its keys."""
        levels = len(self.model.taps) if self.model.cross_attention else 0
        return hi_end_mae_layout(self.encoder, self.model.decoder, levels)

    def sized_like(self, state: Mapping[str, np.ndarray], known: Mapping[str, Any]) -> "HiEndMAE":
        """A model of the sizes of an official checkpoint, with or without a decoder."""
        encoder = _encoder_like(state, known, self.encoder)
        parts, decoder = self.model, self.model.decoder
        blocks, taps = decoder.transformer, parts.taps
        cross_attention = parts.cross_attention
        if "mask_token" in state:
            width = state["mask_token"].shape[-1]
            heads = blocks.heads if width == decoder.width else DECODER_HEADS.get(width, 1)
            blocks = blocks.clone(
                depth=depth_of("decoder.blocks", state),
                heads=known.get("decoder_heads", heads),
                mlp_ratio=mlp_ratio_of(state, "decoder.blocks"),
            )
            decoder = decoder.clone(width=width)
            levels = depth_of("encoder_to_decoder", state) - 1
            cross_attention = levels > 0
            if cross_attention and levels != len(taps):
                raise ValueError(
                    f"its decoder attends to {levels} levels; set model.taps to as many blocks."
                )
        decoder = decoder.clone(
            grid=encoder.grid,
            outputs=math.prod(encoder.patch_size) * encoder.channels,
            transformer=blocks,
            position_grid=None,
        )
        check_taps(taps, encoder.transformer.depth)
        kept = masking.num_kept(math.prod(encoder.grid), 1 - parts.kept / self.tokens)
        model = HierarchicalAutoencoder(encoder, decoder, kept, taps, cross_attention)
        return dataclasses.replace(self, model=model)

    def adopt(self, path: str, given: Mapping[str, np.ndarray], donor: Method) -> np.ndarray | None:
        """Encoders of any method; the decoder of another Hi-End-MAE, its prediction resized."""
        if path.startswith("encoder/"):
            return adopt_encoder(path, given, donor, self.encoder)
        if not isinstance(donor, HiEndMAE):
            return None
        if path.startswith("decoder/pred/") and path in given:
            old, new = donor.encoder, self.encoder
            return resize_patch_outputs(
                given[path], (old.patch_size, old.channels), (new.patch_size, new.channels)
            )
        blocks, ours = donor.model.decoder.transformer, self.model.decoder.transformer
        return restacked(path, given, blocks, ours)


def encoder_alone(encoder: ViT, taps: tuple[int, ...]) -> HiEndMAE:
    """A method around the encoder of a UNETR, to read pre-training checkpoints by."""
    blocks = encoder.transformer
    # MONAI's epsilon is another one than that of pre-training.
    encoder = encoder.clone(
        class_token=True, norm_epsilon=None, transformer=blocks.clone(epsilon=LAYER_NORM_EPSILON)
    )
    decoder = HierarchicalDecoder(encoder.grid, 1, encoder.width, encoder.transformer)
    kept = masking.num_kept(math.prod(encoder.grid), MASK_RATIO)
    return HiEndMAE(HierarchicalAutoencoder(encoder, decoder, kept, taps))


def _encoder_like(state: Mapping[str, np.ndarray], known: Mapping[str, Any], template: ViT) -> ViT:
    """The encoder of an official state dict; what nothing tells is that of the template."""
    kernel, table = "encoder.patch_embed.proj.weight", "encoder_pos_embed"
    if kernel not in state or table not in state or state[kernel].ndim != 5:
        raise ValueError(
            f"it has no {kernel} of five axes and {table}, so it is no Hi-End-MAE; it begins with "
            f"{', '.join(sorted(state)[:5])}."
        )
    width, channels, *patch_size = state[kernel].shape
    grid = grid_of(state[table].shape[1], template.grid)
    blocks = template.transformer
    heads = blocks.heads if width == template.width else HEADS.get(width, blocks.heads)
    encoder = template.clone(
        image_size=tuple(side * patch for side, patch in zip(grid, patch_size)),
        patch_size=tuple(patch_size),
        channels=channels,
        width=width,
        transformer=blocks.clone(
            depth=depth_of("encoder.blocks", state),
            heads=known.get("heads", heads),
            mlp_ratio=mlp_ratio_of(state, "encoder.blocks"),
        ),
        positions="sincos",
        position_grid=None,
    )
    fixed = np.allclose(state[table][0], encoder.position_table()[1:], atol=1e-4)
    return encoder if fixed else encoder.clone(positions="learned_patches")
