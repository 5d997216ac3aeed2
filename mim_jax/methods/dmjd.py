"""DMJD: Disjoint Masking with Joint Distillation for masked image modelling (Ma et al., 2023)."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mim_jax import config as configs
from mim_jax import layout, losses, masking, targets
from mim_jax.data.on_device import denormalize
from mim_jax.layout.conv_vit import conv_vit_constants, conv_vit_rules
from mim_jax.layout.towers import HUB_NAMINGS, tower_layout
from mim_jax.method import (
    Aux,
    Batch,
    Features,
    Input,
    Method,
    Pretrained,
    Variables,
    register,
)
from mim_jax.methods.parts.encoders import (
    adopt_encoder,
    blocks_of,
    build_conv_vit,
    build_encoder,
    conv_encoder_of,
    conv_vit_like,
    depth_of,
    encoder_like,
)
from mim_jax.methods.parts.pixel_decoder import (
    decoder_rules,
)
from mim_jax.models import conv_vit
from mim_jax.models.conv_vit import ConvViT
from mim_jax.models.masked_decoder import MaskedDecoder
from mim_jax.models.tower import Tower, build_tower, check_grid, initial_params, see
from mim_jax.models.transformer import ACTIVATIONS, LAYER_NORM_EPSILON, layer_norm, restacked
from mim_jax.models.vit import ViT

BINS = 9
"""Orientations of the HOG target."""

ERRORS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "l2": losses.squared_error,
    "smooth_l1": functools.partial(losses.smooth_l1, beta=2.0),
}
"""Distances of both branches, by the names of the official code."""

CHOICES = {
    "encoder": ("conv_vit", "vit"),
    "mask_type": ("block", "rand"),
    "target": ("hog", "teacher"),
    "masked_loss": tuple(ERRORS),
    "visible_loss": tuple(ERRORS),
    "visible_target_order": ("aligned", "raster"),
}
"""Known values of the fields of `config.model` that are names."""


class JointPrediction(NamedTuple):
    """What one forward pass computes for both views of a batch; those of an image lie together.

    Attributes:
        latent: `[batch * 2, prefix + kept, width]`, normalized encoder output.
        masked: `[batch * 2, tokens, values]`, predicted from the other tokens.
        visible: `[batch * 2, kept, values]`, predicted from each visible token itself, in the
            order of `keep_ids`.
    """

    latent: jax.Array
    masked: jax.Array
    visible: jax.Array


class VisibleHead(nn.Module):
    """Predicts the target of each visible token from its own latent: a projector and a layer.

    Attributes:
        width: hidden width.
        outputs: predicted values.
        dtype: compute type.
    """

    width: int
    outputs: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """`[batch, kept, encoder width]` -> `[batch, kept, outputs]`."""

        def linear(features: int, name: str) -> nn.Dense:
            xavier = nn.initializers.xavier_uniform()
            return nn.Dense(features, kernel_init=xavier, dtype=self.dtype, name=name)

        for i in (1, 2):
            tokens = layer_norm(f"norm{i}", self.dtype)(linear(self.width, f"fc{i}")(tokens))
            tokens = ACTIVATIONS["gelu"](tokens)
        tokens = targets.whiten(linear(self.width, "fc3")(tokens), LAYER_NORM_EPSILON)
        return linear(self.outputs, "pred")(tokens.astype(self.dtype))


class JointDistillation(nn.Module):
    """Encoder on visible tokens, a decoder for the masked ones, a head for the visible ones.

    Attributes:
        encoder: a hybrid of convolutions and ViT, or a plain ViT.
        decoder: predicts the target of every token.
        head: predicts the target of visible tokens.
    """

    encoder: ConvViT | ViT
    decoder: MaskedDecoder
    head: VisibleHead

    def __call__(self, images: jax.Array, chosen: masking.Masking) -> JointPrediction:
        """Predicts both views of images `[batch, height, width, channels]`.

        Args:
            images: normalized.
            chosen: masking of `batch * 2` samples, see `masking.disjoint_masking`.
        """
        if isinstance(self.encoder, ViT):
            images = masking.for_views(images, 2)
        latent, _ = self.encoder(images, chosen.keep_ids)
        visible = self.head(latent[:, self.encoder.prefix_tokens :])
        return JointPrediction(latent, self.decoder(latent, chosen.restore_ids), visible)


@register("dmjd")
@dataclasses.dataclass(frozen=True)
class DMJD(Method):
    """Two masked views of each image that together hide all of it; visible tokens learn as well.

    Attributes:
        model: encoder, decoder and head.
        mask_ratio: share of tokens that is masked in each view.
        prediction_ratio: share that is masked in at least one view.
        blocks: mask blocks of 2 x 2 tokens instead of single ones.
        cell_size: side in pixels of the cells of the HOG target.
        masked_loss: one of `ERRORS`, for masked tokens.
        visible_loss: one of `ERRORS`, for visible tokens.
        theta: weight of the visible tokens' loss.
        aligned: compare each visible token with its own target. The official code compares it
            with that of another visible token of the same view, since its targets are in raster
            order and its tokens are not.
        mean: of each channel of normalized images, for values in [0, 1].
        std: standard deviation of each channel.
        teacher: predict the features of this tower instead of HOG.
        teacher_path: where its weights are.
        teacher_naming: what its weights are called in an official file, see `tower_layout`.
    """

    model: JointDistillation
    mask_ratio: float = 0.6
    prediction_ratio: float = 1.0
    blocks: bool = True
    cell_size: int = 8
    masked_loss: str = "l2"
    visible_loss: str = "smooth_l1"
    theta: float = 1.0
    aligned: bool = True
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    teacher: Tower | None = None
    teacher_path: str = ""
    teacher_naming: str = "timm"

    streams: ClassVar[tuple[str, ...]] = ("mask",)

    @classmethod
    def build(cls, config: ml_collections.ConfigDict) -> "DMJD":
        """Reads `config.model`, `config.compute_dtype`, and images and statistics of `config.data`.

        Raises:
            ValueError: for an unknown name, or if image, patches, cells, teacher and ratios do
                not fit together.
        """
        model = config.model
        configs.check_choices(model, CHOICES)
        encoder = build_conv_vit(config) if model.encoder == "conv_vit" else build_encoder(config)
        teacher = None
        if model.target == "teacher":
            teacher = build_tower(model.teacher, config.compute_dtype)
            check_grid(teacher, encoder.grid)
            outputs = teacher.encoder.width
        else:
            outputs = hog_values(encoder, model.hog_cell_size)
        decoder = MaskedDecoder(
            encoder.grid,
            outputs=outputs,
            width=model.decoder_width,
            transformer=blocks_of(config)(
                model.decoder_depth, model.decoder_heads, mlp_ratio=model.decoder_mlp_ratio
            ),
            position_grid=encoder.position_grid,
            class_token=encoder.class_token,
        )
        head = VisibleHead(model.decoder_width, outputs, jnp.dtype(config.compute_dtype))
        method = cls(
            JointDistillation(encoder, decoder, head),
            model.mask_ratio,
            model.prediction_ratio,
            model.mask_type == "block",
            model.hog_cell_size,
            model.masked_loss,
            model.visible_loss,
            model.theta,
            model.visible_target_order == "aligned",
            tuple(config.data.mean),
            tuple(config.data.std),
            teacher,
            model.teacher.path,
            HUB_NAMINGS[model.teacher.family],
        )
        _ = method.counts  # raises if grid and ratios do not fit
        return method

    @property
    def encoder(self) -> ViT | None:
        """The encoder, if it is a plain ViT."""
        return self.model.encoder if isinstance(self.model.encoder, ViT) else None

    @property
    def frozen(self) -> tuple[str, ...]:
        """The teacher."""
        return ("^teacher/",) if self.teacher else ()

    @property
    def pretrained(self) -> tuple[Pretrained, ...]:
        """The teacher."""
        return (Pretrained("teacher", self.teacher, self.teacher_path),) if self.teacher else ()

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Images of the model's size."""
        encoder = self.model.encoder
        return {"image": Input((*encoder.image_size, encoder.channels))}

    @property
    def block_grid(self) -> tuple[int, int] | None:
        """Blocks along height and width, or None if single tokens are masked."""
        return masking.block_grid(self.model.encoder.grid) if self.blocks else None

    @property
    def counts(self) -> tuple[int, int, int]:
        """Units (tokens or blocks) of an image; how many a view shows, and the second one swaps.

        Raises:
            ValueError: if the grid has no blocks, or the ratios do not fit.
        """
        units = math.prod(self.block_grid or self.model.encoder.grid)
        return units, *masking.disjoint_counts(units, self.mask_ratio, self.prediction_ratio)

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Initial parameters of encoder, decoder, head and teacher."""
        images = jnp.zeros((1, *batch["image"].shape[1:]))
        model, teacher = jax.random.split(rng)
        params = dict(self.model.init(model, images, self.choose(rng, 1))["params"])
        if self.teacher:
            params["teacher"] = initial_params(self.teacher, teacher)
        return {"params": params}

    def choose(self, rng: jax.Array, batch: int) -> masking.Masking:
        """Draws the masks of both views: `batch * 2` samples."""
        units, kept, swapped = self.counts
        noise, visible, masked = jax.random.split(rng, 3)
        return masking.disjoint_masking(
            jax.random.uniform(noise, (batch, units)),
            jax.random.permutation(visible, kept),
            jax.random.permutation(masked, units - kept),
            swapped,
            self.block_grid,
        )

    def predict(
        self, variables: Variables, images: jax.Array, chosen: masking.Masking
    ) -> JointPrediction:
        """Encodes both views and predicts their targets, see `JointDistillation`."""
        params = {k: v for k, v in variables["params"].items() if k != "teacher"}
        output = self.model.apply({"params": params}, images, chosen)
        assert isinstance(output, JointPrediction)
        return output

    def target(self, variables: Variables, images: jax.Array) -> jax.Array:
        """What to predict for every token, `[batch, tokens, values]`, float32.

        Oriented gradients of the images as they were before normalization; or the output of the
        teacher's last block for every patch, with mean 0 and variance 1.
        """
        if self.teacher:
            seen = see(
                self.teacher,
                variables["params"]["teacher"],
                self.teacher.inputs(images, self.mean, self.std),
            )
            return targets.whiten(seen.patches(seen.blocks[-1]))
        pixels = denormalize(images, self.mean, self.std)
        cells = self.model.encoder.patch_size[0] // self.cell_size
        return targets.hog_tokens(targets.hog(pixels, self.cell_size, BINS), cells)

    def joint_loss(
        self, prediction: JointPrediction, target: jax.Array, chosen: masking.Masking
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The objective, and both of its terms by name.

        Args:
            prediction: for both views.
            target: `[batch, tokens, values]`, the same for both.
            chosen: the masking of both views.
        """
        target = masking.for_views(target, 2)
        error = ERRORS[self.masked_loss](prediction.masked, target)  # [B * 2, L]
        loss_mim = losses.masked_mean(error, chosen.mask)
        order = chosen.keep_ids if self.aligned else jnp.sort(chosen.keep_ids, axis=1)
        seen = masking.gather_tokens(target, order)  # [B * 2, K, values]
        loss_vis = jnp.mean(ERRORS[self.visible_loss](prediction.visible, seen))
        return loss_mim + self.theta * loss_vis, {"loss_mim": loss_mim, "loss_vis": loss_vis}

    def loss(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array], step: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """The loss of two fresh views of every image."""
        images = batch["image"]
        chosen = self.choose(rngs["mask"], images.shape[0])
        prediction = self.predict(variables, images, chosen)
        loss, terms = self.joint_loss(prediction, self.target(variables, images), chosen)
        return loss, Aux(terms)

    def features(self, variables: Variables, batch: Batch) -> Features:
        """Patch tokens of whole images, and their mean with mean 0 and variance 1.

        As the official evaluation takes them: without the final norm and the stages' outputs,
        which serve pre-training only.
        """
        encoder = self.model.encoder
        changes: dict[str, Any] = {"fusion": False} if isinstance(encoder, ConvViT) else {}
        bare = encoder.clone(final_norm=False, **changes)
        tokens, _ = bare.apply({"params": variables["params"]["encoder"]}, batch["image"])
        tokens = tokens[:, encoder.prefix_tokens :]
        pooled = targets.whiten(tokens.mean(axis=1), LAYER_NORM_EPSILON)
        return Features(pooled, tokens, encoder.grid)

    def layout(self) -> layout.Layout:
        """The official pre-training checkpoint; the plain ViT in the names of MAE.

        Files without decoder and head, or without teacher, are accepted.
        """
        encoder, decoder, teacher = self.model.encoder, self.model.decoder, layout.Layout(())
        if self.teacher:
            teacher = tower_layout(self.teacher, self.teacher_naming, "teacher", "teacher.")
        if isinstance(encoder, ConvViT):
            rules, constants = conv_vit_rules("encoder", encoder), conv_vit_constants(encoder)
        else:
            rules, constants = layout.vit_rules("encoder", encoder), layout.vit_constants(encoder)
        return layout.Layout(
            rules=(
                *rules,
                *decoder_rules(decoder),
                *layout.linear_rules("proj_embed.0", "head/fc1"),
                *layout.layer_norm_rules("proj_embed.1", "head/norm1"),
                *layout.linear_rules("proj_embed.3", "head/fc2"),
                *layout.layer_norm_rules("proj_embed.4", "head/norm2"),
                *layout.linear_rules("proj_embed.6", "head/fc3"),
                *layout.linear_rules("predictor.0", "head/pred"),
                *teacher.rules,
            ),
            constants=(
                *constants,
                layout.Constant("decoder_pos_embed", decoder.position_table()[None]),
                *teacher.constants,
            ),
            optional=(r"decoder_.*|mask_token|proj_embed.*|predictor.*", r"teacher\..*"),
            unused=teacher.unused,
        )

    def sized_like(self, state: Mapping[str, np.ndarray], known: Mapping[str, Any]) -> "DMJD":
        """A model of the sizes of an official checkpoint, with or without decoder and head."""
        encoder = self.model.encoder
        if isinstance(encoder, ConvViT):
            encoder = conv_vit_like(state, known, encoder)
        else:
            encoder = encoder_like(state, known, encoder)
        decoder, head, cell_size = self.model.decoder, self.model.head, self.cell_size
        blocks = decoder.transformer
        if "decoder_embed.weight" in state:
            width, outputs = len(state["decoder_embed.weight"]), len(state["decoder_pred.weight"])
            heads = blocks.heads if width == decoder.width else max(width // 32, 1)
            hidden = len(state["decoder_blocks.0.mlp.fc1.weight"])
            blocks = blocks.clone(
                depth=depth_of("decoder_blocks", state),
                heads=known.get("decoder_heads", heads),
                mlp_ratio=hidden / width,
            )
            decoder = decoder.clone(width=width, outputs=outputs)
            head = head.clone(width=width, outputs=outputs)
            if not self.teacher:
                cells = max(math.isqrt(outputs // (BINS * encoder.channels)), 1)
                cell_size = encoder.patch_size[0] // cells
        decoder = decoder.clone(
            grid=encoder.grid,
            transformer=blocks,
            position_grid=None,
            class_token=encoder.class_token,
        )
        return dataclasses.replace(
            self, model=JointDistillation(encoder, decoder, head), cell_size=cell_size
        )

    def adopt(self, path: str, given: Mapping[str, np.ndarray], donor: Method) -> np.ndarray | None:
        """Encoders of the same kind; decoder and head of another DMJD; never a teacher."""
        encoder = self.model.encoder
        if path.startswith("encoder/"):
            if isinstance(encoder, ViT):
                return adopt_encoder(path, given, donor, encoder)
            theirs = conv_encoder_of(donor)
            return conv_vit.adopted(path, given, theirs, encoder) if theirs else None
        if path.startswith("teacher/") or not isinstance(donor, DMJD):
            return None
        old, new = donor.model.decoder.transformer, self.model.decoder.transformer
        return restacked(path, given, old, new)


def hog_values(encoder: ConvViT | ViT, cell_size: int) -> int:
    """Values of the HOG target of a token.

    Raises:
        ValueError: if cells do not tile the patches, or patches are no squares.
    """
    height, width = encoder.patch_size
    if height != width or cell_size < 1 or height % cell_size:
        raise ValueError(
            f"model.hog_cell_size is {cell_size}, but a token stands for {height} x {width} "
            "pixels; it must be a square that whole cells tile."
        )
    return (height // cell_size) ** 2 * BINS * encoder.channels
