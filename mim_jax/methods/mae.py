"""MAE: Masked Autoencoders Are Scalable Vision Learners (He et al., CVPR 2022)."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mim_jax import layout, losses, masking, targets
from mim_jax.method import Aux, Batch, Features, Input, Method, Picture, Variables, register
from mim_jax.models.masked_decoder import MaskedDecoder
from mim_jax.models.transformer import Transformer, restacked
from mim_jax.models.vit import VIT_SIZES, ViT, adopted, resize_patch_outputs, vit_size


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


def blocks_of(config: ml_collections.ConfigDict) -> Callable[..., Transformer]:
    """`Transformer` with what `config.model` and `config.compute_dtype` say of all blocks."""
    model = config.model
    return functools.partial(
        Transformer,
        mlp_ratio=model.mlp_ratio,
        scan=model.scan,
        remat=model.remat,
        dtype=jnp.dtype(config.compute_dtype),
        attention=model.attention or None,
    )


def build_encoder(config: ml_collections.ConfigDict, drop_path: float = 0.0, **fields: Any) -> ViT:
    """The ViT of `config.model` for images of `config.data`.

    Args:
        config: a complete config.
        drop_path: rate of stochastic depth.
        **fields: further fields of `ViT`.

    Raises:
        ValueError: if image, patch and model size do not fit together.
    """
    model = config.model
    size = vit_size(model.size, width=model.width, depth=model.depth, heads=model.heads)
    encoder = ViT(
        tuple(config.data.image_size),
        tuple(model.patch_size),
        config.data.channels,
        size["width"],
        blocks_of(config)(size["depth"], size["heads"], drop_path=drop_path),
        position_grid=tuple(model.position_grid) or None,
        **fields,
    )
    masking.token_grid(encoder.image_size, encoder.patch_size)  # raises if they do not fit
    return encoder


def encoder_like(state: Mapping[str, np.ndarray], known: Mapping[str, Any], template: ViT) -> ViT:
    """The ViT of an official state dict; what nothing tells is that of the template.

    Args:
        state: arrays by official key.
        known: see `Method.sized_like`.
        template: a ViT.

    Raises:
        ValueError: if the file has no patch embedding, or its positions fit no known grid.
    """
    if "patch_embed.proj.weight" not in state or "pos_embed" not in state:
        raise ValueError(
            "it has no patch_embed.proj.weight and pos_embed, so it is no ViT in the naming of "
            f"MAE and timm; it begins with {', '.join(sorted(state)[:5])}."
        )
    width, channels, *patch_size = state["patch_embed.proj.weight"].shape
    tokens = state["pos_embed"].shape[1] - 1
    grid = template.grid
    if "image_size" in known:
        height, columns = known["image_size"]
        grid = (height // patch_size[0], columns // patch_size[1])
    if math.prod(grid) != tokens:
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(
                f"its {tokens} positions are no square; set data.image_size and model.patch_size "
                "to those of the file."
            )
        grid = (side, side)
    blocks = template.transformer
    heads = next((s["heads"] for s in VIT_SIZES.values() if s["width"] == width), blocks.heads)
    if width == template.width:
        heads = blocks.heads
    heads = known.get("heads", heads)
    return template.clone(
        image_size=(grid[0] * patch_size[0], grid[1] * patch_size[1]),
        patch_size=tuple(patch_size),
        channels=channels,
        width=width,
        transformer=blocks.clone(
            depth=depth_of("blocks", state), heads=heads, mlp_ratio=_mlp_ratio(state)
        ),
        position_grid=None,
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
            mlp_ratio=_mlp_ratio(state, "decoder_blocks"),
        )
        template = template.clone(width=width)
    return template.clone(
        grid=encoder.grid,
        outputs=math.prod(encoder.patch_size) * encoder.channels,
        transformer=blocks,
        position_grid=None,
    )


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


def adopt_encoder(
    path: str, given: Mapping[str, np.ndarray], donor: Method, receiver: ViT
) -> np.ndarray | None:
    """A parameter below "encoder/" from the encoder of another method."""
    return adopted(path, given, donor.encoder, receiver) if donor.encoder else given.get(path)


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


def depth_of(key: str, state: Mapping[str, np.ndarray]) -> int:
    """Number of blocks `KEY.0.`, `KEY.1.`, ... in an official state dict."""
    found = [re.match(rf"{key}\.(\d+)\.", name) for name in state]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _mlp_ratio(state: Mapping[str, np.ndarray], key: str = "blocks") -> float:
    hidden, width = state[f"{key}.0.mlp.fc1.weight"].shape
    return hidden / width
