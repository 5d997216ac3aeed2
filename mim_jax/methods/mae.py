"""MAE: Masked Autoencoders Are Scalable Vision Learners (He et al., CVPR 2022)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mim_jax import layout, losses, masking, targets
from mim_jax.method import Aux, Batch, Features, Input, Method, Picture, Variables, register
from mim_jax.methods.parts.encoders import (
    adopt_encoder,
    blocks_of,
    build_encoder,
    encoder_like,
)
from mim_jax.methods.parts.pixel_decoder import (
    adopt_decoder,
    decoder_like,
    decoder_rules,
    reconstruction_picture,
)
from mim_jax.models.masked_decoder import MaskedDecoder
from mim_jax.models.vit import ViT


class Reconstruction(NamedTuple):
    """What one forward pass computes.

    Attributes:
        latent: `[batch, 1 + kept, width]`, normalized encoder output, class token first.
        pred: `[batch, tokens, values]`, predicted patches.
        masking: the choice of visible tokens.
    """

    latent: jax.Array
    pred: jax.Array
    masking: masking.Masking


class MaskedAutoencoder(nn.Module):
    """Encoder on visible patches, light decoder on all (section 3).

    Attributes:
        encoder: a ViT.
        decoder: predicts the values of every patch.
        kept: number of visible patches.
    """

    encoder: ViT
    decoder: MaskedDecoder
    kept: int

    def __call__(self, images: jax.Array, noise: jax.Array) -> Reconstruction:
        """Reconstructs images `[batch, height, width, channels]`.

        Args:
            images: normalized.
            noise: `[batch, tokens]`, uniform in [0, 1); the smallest values stay visible.
        """
        chosen = masking.random_masking(noise, self.kept)
        latent, _ = self.encoder(images, chosen.keep_ids)
        return Reconstruction(latent, self.decoder(latent, chosen.restore_ids), chosen)

    def encode(self, images: jax.Array) -> jax.Array:
        """Encodes whole images: `[batch, 1 + tokens, width]`, class token first."""
        return self.encoder(images)[0]


@register("mae")
@dataclasses.dataclass(frozen=True)
class MAE(Method):
    """Pre-training by reconstructing removed patches.

    Attributes:
        model: encoder and decoder.
        normalize_target: predict patches normalized by their own mean and variance.
    """

    model: MaskedAutoencoder
    normalize_target: bool = True

    streams: ClassVar[tuple[str, ...]] = ("mask",)

    @classmethod
    def build(cls, config: ml_collections.ConfigDict) -> "MAE":
        """Reads `config.model`, `config.compute_dtype`, and size and channels from `config.data`.

        Raises:
            ValueError: if image, patch, model size and mask ratio do not fit together.
        """
        model = config.model
        encoder = build_encoder(config)
        decoder = MaskedDecoder(
            encoder.grid,
            outputs=math.prod(encoder.patch_size) * encoder.channels,
            width=model.decoder_width,
            transformer=blocks_of(config)(model.decoder_depth, model.decoder_heads),
            position_grid=encoder.position_grid,
        )
        kept = masking.num_kept(math.prod(encoder.grid), model.mask_ratio)
        return cls(MaskedAutoencoder(encoder, decoder, kept), model.normalize_target)

    @property
    def encoder(self) -> ViT:
        """The encoder."""
        return self.model.encoder

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Images of the model's size."""
        encoder = self.model.encoder
        return {"image": Input((*encoder.image_size, encoder.channels))}

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Initial parameters of encoder and decoder."""
        images = jnp.zeros((1, *batch["image"].shape[1:]))
        return self.model.init(rng, images, jnp.zeros((1, self.tokens)))

    @property
    def tokens(self) -> int:
        """Number of patches in an image."""
        rows, columns = self.model.encoder.grid
        return rows * columns

    def reconstruct(
        self, variables: Variables, images: jax.Array, noise: jax.Array
    ) -> Reconstruction:
        """One forward pass, see `MaskedAutoencoder`."""
        output = self.model.apply(variables, images, noise)
        assert isinstance(output, Reconstruction)
        return output

    def target(self, images: jax.Array) -> jax.Array:
        """What to predict for every patch, `[batch, tokens, values]`, float32."""
        patches = targets.patchify(images.astype(jnp.float32), self.model.encoder.patch_size)
        return targets.normalize_patches(patches) if self.normalize_target else patches

    def reconstruction_loss(self, images: jax.Array, output: Reconstruction) -> jax.Array:
        """Mean squared error over the removed patches (section 3, "Reconstruction target")."""
        error = losses.squared_error(output.pred, self.target(images))  # [B, L]
        return losses.masked_mean(error, output.masking.mask)

    def loss(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array], step: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """Reconstruction loss under a fresh random mask."""
        images = batch["image"]
        noise = jax.random.uniform(rngs["mask"], (images.shape[0], self.tokens))
        return self.reconstruction_loss(images, self.reconstruct(variables, images, noise)), Aux()

    def features(self, variables: Variables, batch: Batch) -> Features:
        """Class token and patch tokens of whole images, after the final norm."""
        latent = self.model.apply(variables, batch["image"], method=MaskedAutoencoder.encode)
        assert isinstance(latent, jax.Array)
        return Features(latent[:, 0], latent[:, 1:], self.model.encoder.grid)

    def pictures(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array]
    ) -> dict[str, Picture]:
        """What `reconstruction_picture` shows."""
        images = batch["image"].astype(jnp.float32)
        noise = jax.random.uniform(rngs["mask"], (images.shape[0], self.tokens))
        output = self.reconstruct(variables, images, noise)
        picture = reconstruction_picture(
            images, output.pred, output.masking.mask, self.encoder, self.normalize_target
        )
        return {"reconstruction": picture}

    def layout(self) -> layout.Layout:
        """The official pre-training checkpoint; releases without the decoder are accepted."""
        decoder = self.model.decoder
        return layout.Layout(
            rules=(*layout.vit_rules("encoder", self.encoder), *decoder_rules(decoder)),
            constants=(
                *layout.vit_constants(self.encoder),
                layout.Constant("decoder_pos_embed", decoder.position_table()[None]),
            ),
            optional=(r"decoder_.*|mask_token",),
        )

    def sized_like(self, state: Mapping[str, np.ndarray], known: Mapping[str, Any]) -> "MAE":
        """An MAE of the sizes of an official checkpoint, with or without a decoder."""
        encoder = encoder_like(state, known, self.encoder)
        decoder = decoder_like(state, known, self.model.decoder, encoder)
        kept = masking.num_kept(math.prod(encoder.grid), 1 - self.model.kept / self.tokens)
        return dataclasses.replace(self, model=MaskedAutoencoder(encoder, decoder, kept))

    def adopt(self, path: str, given: Mapping[str, np.ndarray], donor: Method) -> np.ndarray | None:
        """Encoders of any method; the decoder of another MAE, its prediction resized."""
        if path.startswith("encoder/"):
            return adopt_encoder(path, given, donor, self.encoder)
        if not isinstance(donor, MAE):
            return None
        return adopt_decoder(
            path,
            given,
            (donor.encoder, donor.model.decoder),
            (self.encoder, self.model.decoder),
        )
