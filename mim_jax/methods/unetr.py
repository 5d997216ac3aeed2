"""UNETR: fine-tuning a pre-trained 3-D ViT for segmentation, end to end.

The network of Hatamizadeh et al. (2022) with the recipe of Hi-End-MAE (Tang et al., 2026).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mim_jax import losses
from mim_jax.layout import Layout
from mim_jax.layout.unetr import unetr_layout
from mim_jax.method import Aux, Batch, Features, Input, Method, Picture, Variables, register
from mim_jax.methods.hi_end_mae import HEADS, encoder_alone
from mim_jax.methods.parts.encoders import adopt_encoder, build_encoder, depth_of
from mim_jax.methods.parts.volumes import check_taps, fullest_voxel, grid_of, overlaid, planes
from mim_jax.models.unetr import SKIPS, UNETR, SegmentationDecoder
from mim_jax.models.vit import ViT

EPSILON = 1e-5
"""Of every LayerNorm here (MONAI); that of pre-training is 1e-6."""


@register("unetr")
@dataclasses.dataclass(frozen=True)
class SegmentationFineTune(Method):
    """Segmentation of volumes, trained by Dice's loss and cross-entropy.

    Attributes:
        model: encoder and convolutional decoder.
    """

    model: UNETR

    @classmethod
    def build(cls, config: ml_collections.ConfigDict) -> "SegmentationFineTune":
        """Reads `config.model`, `config.compute_dtype`, and size and channels from `config.data`.

        Raises:
            ValueError: if volume, patch, model size and taps do not fit together, or there are
                fewer than two classes.
        """
        model = config.model
        if model.num_classes < 2:
            raise ValueError(
                f"model.num_classes is {model.num_classes}; count the background as a class, so "
                "that there are two or more."
            )
        encoder = build_encoder(
            config, positions=model.positions, class_token=False, norm_epsilon=EPSILON
        )
        encoder = encoder.clone(transformer=encoder.transformer.clone(epsilon=EPSILON))
        check_taps(model.taps, encoder.transformer.depth)
        if len(model.taps) != SKIPS:
            raise ValueError(f"model.taps is {tuple(model.taps)}; UNETR needs {SKIPS} blocks.")
        decoder = SegmentationDecoder(
            model.num_classes, model.feature_size, encoder.transformer.dtype
        )
        return cls(UNETR(encoder, decoder, tuple(model.taps)))

    @property
    def encoder(self) -> ViT:
        """The encoder."""
        return self.model.encoder

    @property
    def num_classes(self) -> int:
        """Classes of a voxel, the background among them."""
        return self.model.decoder.num_classes

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Volumes of the model's size, and a class for each voxel."""
        size = self.encoder.image_size
        return {
            "image": Input((*size, self.encoder.channels)),
            "segmentation": Input(size, "int"),
        }

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Initial parameters of encoder and decoder."""
        return self.model.init(rng, jnp.zeros((1, *batch["image"].shape[1:])))

    def logits(self, variables: Variables, batch: Batch) -> jax.Array:
        """Logits `[batch, height, width, depth, classes]`, float32."""
        logits = self.model.apply(variables, batch["image"])
        assert isinstance(logits, jax.Array)
        return logits

    def loss(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array], step: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """The sum of Dice's loss and the cross-entropy of voxels."""
        logits, labels = self.logits(variables, batch), batch["segmentation"].astype(jnp.int32)
        dice, cross_entropy = losses.dice_loss(logits, labels), losses.cross_entropy(logits, labels)
        return dice + cross_entropy, Aux({"dice_loss": dice, "cross_entropy": cross_entropy})

    def features(self, variables: Variables, batch: Batch) -> Features:
        """Mean of the patch tokens, and patch tokens, after the final norm."""
        encoded: Any = self.model.apply(variables, batch["image"], method=UNETR.encode)
        tokens = encoded[0]
        return Features(tokens.mean(axis=1), tokens, self.encoder.grid)

    def pictures(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array]
    ) -> dict[str, Picture]:
        """Three planes through each volume, with the true and the predicted classes in colour."""
        grey = batch["image"].astype(jnp.float32)
        true = batch["segmentation"].astype(jnp.int32)
        predicted = self.logits(variables, batch).argmax(axis=-1)
        centre = fullest_voxel(true)
        shown = {"true": true, "predicted": predicted}
        volumes = {
            "volume": overlaid(grey, jnp.zeros_like(true)),
            **{title: overlaid(grey, classes) for title, classes in shown.items()},
        }
        cut = {title: planes(values, centre) for title, values in volumes.items()}
        columns = {
            f"{plane}: {title}": cut[title][plane] for plane in cut["volume"] for title in volumes
        }
        return {"segmentation": Picture(columns, "Planes where most voxels have a class.")}

    def layout(self) -> Layout:
        """A checkpoint of MONAI's UNETR, or its ViT alone."""
        return unetr_layout(self.model)

    def sized_like(self, state: Mapping[str, np.ndarray], known: Mapping[str, Any]) -> Method:
        """The model of a checkpoint: a UNETR, or the Hi-End-MAE that it was pre-trained by."""
        if "encoder.patch_embed.proj.weight" in state:
            return encoder_alone(self.encoder, self.model.taps).sized_like(state, known)
        encoder = _encoder_like(state, known, self.encoder)
        decoder = self.model.decoder
        if "out.conv.conv.weight" in state:
            classes, feature_size = state["out.conv.conv.weight"].shape[:2]
            decoder = decoder.clone(num_classes=classes, feature_size=feature_size)
        return dataclasses.replace(self, model=self.model.clone(encoder=encoder, decoder=decoder))

    def adopt(self, path: str, given: Mapping[str, np.ndarray], donor: Method) -> np.ndarray | None:
        """Encoders of any method for volumes; the decoder of another UNETR.

        The last layer is taken over from a UNETR of the same number of classes only.
        """
        if path.startswith("encoder/"):
            return adopt_encoder(path, given, donor, self.encoder)
        if not isinstance(donor, SegmentationFineTune):
            return None
        other_classes = donor.num_classes != self.num_classes
        return None if other_classes and path.startswith("decoder/out/") else given.get(path)


def _encoder_like(state: Mapping[str, np.ndarray], known: Mapping[str, Any], template: ViT) -> ViT:
    """The ViT of a state dict in MONAI's names; what nothing tells is that of the template."""
    embedding = "vit.patch_embedding.patch_embeddings.1.weight"
    positions = "vit.patch_embedding.position_embeddings"
    if embedding not in state or positions not in state:
        raise ValueError(
            f"it has no {embedding} and {positions}, and no encoder.patch_embed.proj.weight, so it "
            "is neither a UNETR nor a Hi-End-MAE; it begins with "
            f"{', '.join(sorted(state)[:5])}."
        )
    width, values = state[embedding].shape
    first = state.get("encoder1.layer.conv1.conv.weight")
    channels = template.channels if first is None else first.shape[1]
    patch_size = template.patch_size
    if np.prod(patch_size) * channels != values:
        side = round((values / channels) ** (1 / 3))
        patch_size = (side, side, side)
        if side**3 * channels != values:
            raise ValueError(
                f"its patches have {values} values, no cube of {channels} channels; set "
                "model.patch_size and data.channels to those of the file."
            )
    grid = grid_of(state[positions].shape[1], template.grid)
    blocks = template.transformer
    heads = blocks.heads if width == template.width else HEADS.get(width, blocks.heads)
    return template.clone(
        image_size=tuple(side * patch for side, patch in zip(grid, patch_size)),
        patch_size=patch_size,
        channels=channels,
        width=width,
        transformer=blocks.clone(
            depth=depth_of("vit.blocks", state),
            heads=known.get("heads", heads),
            mlp_ratio=len(state["vit.blocks.0.mlp.linear1.weight"]) / width,
        ),
        positions="learned_patches",
        position_grid=None,
    )
