"""What methods are compared with that no paper describes: controls of our experiments."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from mim_jax.masking import Masking, gather_tokens, random_masking
from mim_jax.method import Aux, Batch, Features, Input, Method, Pretrained, Variables
from mim_jax.methods.maskalign import MaskAlign
from mim_jax.models.masked_decoder import MaskedDecoder
from mim_jax.models.vit import ViT


class FeatureAutoencoder(nn.Module):
    """MAE's encoder on visible patches, and a decoder of features on all.

    Attributes:
        encoder: a ViT.
        decoder: predicts features of every patch.
    """

    encoder: ViT
    decoder: MaskedDecoder

    def __call__(
        self, images: jax.Array, chosen: Masking, drop_path_noise: jax.Array | None = None
    ) -> jax.Array:
        """Predictions `[batch, tokens, values]` for images `[batch, height, width, channels]`."""
        latent, _ = self.encoder(images, chosen.keep_ids, drop_path_noise)
        pred = self.decoder(latent, chosen.restore_ids)
        assert isinstance(pred, jax.Array)
        return pred


@dataclasses.dataclass(frozen=True)
class FeatureReconstruction(Method):
    """MaskAlign's control: the same, but features are predicted where patches are hidden.

    Student, teacher, masks, target layers, their norm and weights, and the error are those of a
    MaskAlign. What aligned visible tokens, mixing and adaptors, is gone; a decoder with mask tokens
    predicts the target layers at the hidden patches.

    Attributes:
        aligned: the MaskAlign whose control this is.
        model: encoder and decoder.
    """

    aligned: MaskAlign
    model: FeatureAutoencoder

    streams: ClassVar[tuple[str, ...]] = MaskAlign.streams

    @classmethod
    def build(cls, config: ml_collections.ConfigDict) -> "FeatureReconstruction":
        """The control, with a decoder of the default size, of a config of MaskAlign."""
        return cls.of(MaskAlign.build(config))

    @classmethod
    def of(cls, aligned: MaskAlign, depth: int = 2, width: int = 0) -> "FeatureReconstruction":
        """The control of a MaskAlign.

        Args:
            aligned: the method.
            depth: blocks of the decoder.
            width: of the decoder, a multiple of 4 and of the heads; 0 for half the encoder's.
        """
        encoder, alignment = aligned.encoder, aligned.model.alignment
        decoder = MaskedDecoder(
            encoder.grid,
            outputs=len(alignment.aligned) * alignment.outputs,
            width=width or encoder.width // 2,
            transformer=encoder.transformer.clone(depth=depth, drop_path=0.0),
            position_grid=encoder.position_grid,
        )
        return cls(aligned, FeatureAutoencoder(encoder, decoder))

    @property
    def encoder(self) -> ViT:
        """The student."""
        return self.model.encoder

    @property
    def frozen(self) -> tuple[str, ...]:
        """The teacher."""
        return ("^teacher/",)

    @property
    def pretrained(self) -> tuple[Pretrained, ...]:
        """The teacher."""
        return self.aligned.pretrained

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Images of the student's size."""
        return self.aligned.inputs

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Initial parameters; encoder and teacher have those of the MaskAlign."""
        images = jnp.zeros((1, *batch["image"].shape[1:]))
        shared = dict(self.aligned.init(rng, batch)["params"])
        chosen = random_masking(jnp.zeros((1, self.aligned.tokens)), self.aligned.kept)
        own = dict(self.model.init(rng, images, chosen)["params"])
        parts = {name: shared[name] for name in ("encoder", "teacher")}
        return {"params": {**own, **parts}}

    def loss(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array], step: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """MaskAlign's objective between predictions and targets at the hidden patches."""
        images, method = batch["image"], self.aligned
        seen = method.seen(variables, images)
        chosen = method.choose(rngs["mask"], seen)
        noise = jax.random.uniform(
            rngs["drop_path"], (self.encoder.transformer.depth, 2, images.shape[0])
        )
        params = {name: part for name, part in variables["params"].items() if name != "teacher"}
        pred: Any = self.model.apply({"params": params}, images, chosen, noise)
        hidden = jnp.argsort(chosen.restore_ids, axis=1)[:, method.kept :]
        layers = method.model.alignment.aligned
        total, terms = method.objective(
            jnp.split(gather_tokens(pred, hidden), len(layers), axis=-1),
            [method.target(seen, layer, hidden)[:, 1:] for layer in layers],
        )
        return total, Aux(terms)

    def features(self, variables: Variables, batch: Batch) -> Features:
        """Class token and patch tokens of whole images, after the final norm."""
        return self.aligned.features(variables, batch)
