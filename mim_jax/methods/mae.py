"""MAE: Masked Autoencoders Are Scalable Vision Learners (He et al., CVPR 2022)."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from mim_jax import layout, losses, masking, targets
from mim_jax.method import Aux, Batch, Features, Input, Method, Picture, Variables, register
from mim_jax.models.masked_decoder import MaskedDecoder
from mim_jax.models.positions import sincos_positions
from mim_jax.models.transformer import Transformer
from mim_jax.models.vit import ViT, vit_size


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
        size = vit_size(model.size, width=model.width, depth=model.depth, heads=model.heads)
        image_size, patch_size = tuple(config.data.image_size), tuple(model.patch_size)
        grid = masking.token_grid(image_size, patch_size)
        kept = masking.num_kept(grid[0] * grid[1], model.mask_ratio)
        blocks = functools.partial(
            Transformer,
            mlp_ratio=model.mlp_ratio,
            scan=model.scan,
            remat=model.remat,
            dtype=jnp.dtype(config.compute_dtype),
            attention=model.attention or None,
        )
        encoder = ViT(
            image_size,
            patch_size,
            config.data.channels,
            size["width"],
            blocks(size["depth"], size["heads"]),
        )
        decoder = MaskedDecoder(
            encoder.grid,
            outputs=patch_size[0] * patch_size[1] * config.data.channels,
            width=model.decoder_width,
            transformer=blocks(model.decoder_depth, model.decoder_heads),
        )
        return cls(MaskedAutoencoder(encoder, decoder, kept), model.normalize_target)

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
        """Image, visible patches, prediction, and prediction with the visible patches put in.

        Where the target is normalized, predicted patches get the mean and deviation of the true
        patches back; without this every reconstruction looks grey.
        """
        images = batch["image"].astype(jnp.float32)
        encoder = self.model.encoder
        noise = jax.random.uniform(rngs["mask"], (images.shape[0], self.tokens))
        output = self.reconstruct(variables, images, noise)
        patches = targets.patchify(images, encoder.patch_size)
        pred = output.pred.astype(jnp.float32)
        caption = "Loss on removed patches only; the prediction for visible ones is not trained."
        if self.normalize_target:
            pred = targets.denormalize_patches(pred, patches)
            caption += "\nPredicted patches carry the mean and deviation of the true patches."
        removed = output.masking.mask[..., None]
        columns = {
            "image": patches,
            "visible": patches * (1 - removed),
            "prediction": pred,
            "prediction + visible": jnp.where(removed == 1, pred, patches),
        }
        return {
            "reconstruction": Picture(
                {
                    title: targets.unpatchify(column, encoder.image_size, encoder.patch_size)
                    for title, column in columns.items()
                },
                caption,
            )
        }

    def layout(self) -> layout.Layout:
        """The official pre-training checkpoint; releases without the decoder are accepted."""
        encoder, decoder = self.model.encoder, self.model.decoder
        encoder_positions = sincos_positions(encoder.grid, encoder.width, leading_tokens=1)[None]
        decoder_positions = sincos_positions(decoder.grid, decoder.width, leading_tokens=1)[None]
        return layout.Layout(
            rules=(
                layout.Rule("cls_token", "encoder/cls_token"),
                layout.Rule("patch_embed.proj.weight", "encoder/patch_embed/kernel", layout.CONV2D),
                layout.Rule("patch_embed.proj.bias", "encoder/patch_embed/bias"),
                *_block_rules("blocks", "encoder/transformer", encoder),
                *layout.layer_norm_rules("norm", "encoder/norm"),
                *layout.linear_rules("decoder_embed", "decoder/embed"),
                layout.Rule("mask_token", "decoder/mask_token"),
                *_block_rules("decoder_blocks", "decoder/transformer", decoder),
                *layout.layer_norm_rules("decoder_norm", "decoder/norm"),
                *layout.linear_rules("decoder_pred", "decoder/pred"),
            ),
            constants=(
                layout.Constant("pos_embed", encoder_positions),
                layout.Constant("decoder_pos_embed", decoder_positions),
            ),
            optional=(r"decoder_.*|mask_token",),
        )


def _block_rules(key: str, path: str, part: ViT | MaskedDecoder) -> Iterable[layout.Rule]:
    blocks = part.transformer
    return layout.transformer_rules(
        key, path, depth=blocks.depth, width=part.width, heads=blocks.heads, scan=blocks.scan
    )
