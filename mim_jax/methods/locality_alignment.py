"""Locality Alignment: MaskEmbed and its MIM precursor (Covert et al., ICLR 2025).

A trained ViT is trained on for a short while, with itself as the only supervision, so that its
patch tokens carry what is at their patches: tokens of the whole image, some of them hidden, must
tell what a frozen copy sees where the hidden patches are blank.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mim_jax import config as configs
from mim_jax import layout, losses, masking
from mim_jax.data.mixing import Mixing
from mim_jax.method import Aux, Batch, Features, Input, Method, Pretrained, Variables, register
from mim_jax.methods.parts.encoders import (
    adopt_encoder,
)
from mim_jax.models.tower import Tower, build_tower
from mim_jax.models.transformer import ACTIVATIONS, Transformer, layer_norm, token_rows
from mim_jax.models.vit import ViT

LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "mse": losses.squared_error,
    "cosine": losses.cosine_distance,
    "l1": losses.absolute_error,
    "masked_mse": losses.squared_error,
    "unmasked_mse": losses.squared_error,
}
"""Errors of one token by name; the last two count hidden or kept patches alone."""

CHOICES = {
    "task": ("mask_embed", "mim"),
    "loss": tuple(LOSSES),
    "mask_sampler": ("uniform", "bernoulli", "blockwise"),
    "output_head": ("linear", "mlp"),
}
"""Known values of the fields of `config.model` that are names."""

CALIBRATION = "calibration"
"""Collection of the statistics of the teacher's outputs, see `with_values`."""


def hide_pixels(images: jax.Array, kept: jax.Array, encoder: ViT) -> jax.Array:
    """Normalized images in which hidden patches are zero, the mean colour.

    Pixels at the right and bottom that fill no patch are always hidden (official `MaskLayer`).

    Args:
        images: `[batch, height, width, channels]`.
        kept: `[rows * batch, tokens]`, 1 where a patch is kept; the rows of an image together.
        encoder: whose patches they are.

    Returns:
        `[rows * batch, height, width, channels]`.
    """
    (height, width), (rows, columns) = encoder.patch_size, encoder.grid
    pixels = kept.reshape(-1, rows, columns).repeat(height, axis=1).repeat(width, axis=2)
    border = [whole - part for whole, part in zip(encoder.image_size, pixels.shape[1:])]
    pixels = jnp.pad(pixels, ((0, 0), (0, border[0]), (0, border[1])))
    return _for_masks(images, kept) * pixels[..., None]


class ZeroHead(nn.Module):
    """One linear layer, or an MLP, whose output is zero at first.

    Attributes:
        outputs: width of the output.
        hidden: width of a hidden layer; 0 for none.
        activation: behind the hidden layer, a name in `ACTIVATIONS`.
        dtype: compute type.
    """

    outputs: int
    hidden: int = 0
    activation: str = "gelu"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps `[batch, tokens, width]` to `[batch, tokens, outputs]`."""
        x = token_rows(tokens)
        if self.hidden:
            x = ACTIVATIONS[self.activation](nn.Dense(self.hidden, dtype=self.dtype, name="fc1")(x))
        zeros = nn.initializers.zeros
        out = nn.Dense(self.outputs, kernel_init=zeros, dtype=self.dtype, name="out")
        return out(x).reshape(*tokens.shape[:-1], self.outputs)


class MaskEmbedDecoder(nn.Module):
    """Predicts the teacher's tokens from those tokens of the student that a mask keeps.

    Attributes:
        outputs: width of the teacher.
        transformer: the blocks; epsilon and compute type are those of the whole decoder.
    """

    outputs: int
    transformer: Transformer

    @nn.compact
    def __call__(self, tokens: jax.Array, kept: jax.Array) -> jax.Array:
        """Maps `[batch, prefix + tokens, width]` to `[batch, prefix + tokens, outputs]`.

        Hidden tokens, and class token and registers under every mask, are zero before the
        positions are added.

        Args:
            tokens: of the student.
            kept: `[batch, tokens]`, 1 where a patch is kept.
        """
        blocks, (_, length, width) = self.transformer, tokens.shape
        visible = jnp.pad(kept, ((0, 0), (length - kept.shape[1], 0))).astype(blocks.dtype)
        positions = self.param("positions", nn.initializers.normal(0.02), (length, width))
        x = tokens.astype(blocks.dtype) * visible[..., None] + positions.astype(blocks.dtype)
        x = layer_norm("norm", blocks.dtype, blocks.epsilon)(blocks(x)[0])
        # PyTorch's default: uniform in +-1/sqrt(width).
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        head = nn.Dense(self.outputs, kernel_init=init, dtype=blocks.dtype, name="head")
        return head(token_rows(x)).reshape(*x.shape[:-1], self.outputs)


class Prediction(NamedTuple):
    """What one forward pass computes.

    Attributes:
        latent: normalized output of the encoder, `[batch, prefix + tokens, width]`; of the masked
            images, `[rows * batch, ...]`, in the precursor.
        tokens: what the head makes of it.
        reconstruction: `[rows * batch, prefix + tokens, outputs]`, to be like the teacher's.
    """

    latent: jax.Array
    tokens: jax.Array
    reconstruction: jax.Array


class MaskEmbedStudent(nn.Module):
    """Encoder of whole images and decoder of masked tokens; or, in the precursor, an encoder alone.

    Attributes:
        encoder: a ViT.
        head: on every token of the encoder; None if the encoder is frozen.
        decoder: None in the MIM precursor, whose encoder sees masked images instead.
    """

    encoder: ViT
    head: ZeroHead | None
    decoder: MaskEmbedDecoder | None

    def __call__(self, images: jax.Array, kept: jax.Array) -> Prediction:
        """Predicts the teacher's tokens under every mask.

        Args:
            images: `[batch, height, width, channels]`, normalized.
            kept: `[rows * batch, tokens]`, 1 where a patch is kept; the rows of an image together.
        """
        if self.decoder is None:
            images = hide_pixels(images, kept, self.encoder)
        latent, _ = self.encoder(images)
        tokens = latent if self.head is None else self.head(latent)
        if self.decoder is None:
            return Prediction(latent, tokens, tokens)
        return Prediction(latent, tokens, self.decoder(_for_masks(tokens, kept), kept))


def no_values() -> dict[str, jax.Array]:
    """Statistics of no value at all."""
    return {name: jnp.zeros(()) for name in ("count", "mean", "squares")}


def with_values(statistics: Mapping[str, jax.Array], values: jax.Array) -> dict[str, jax.Array]:
    """Running count, mean and sum of squared differences from it, with more values of any shape.

    `n += count; d = y - mean; mean += sum(d) / n; squares += sum(d * (y - mean))` (Welford, 1962).
    """
    values = values.astype(jnp.float32)

    def average(x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.mean(x, axis=-1))  # in two steps, which lose less

    count = statistics["count"] + values.size
    difference = values - statistics["mean"]
    mean = statistics["mean"] + average(difference) * (values.size / count)
    squares = statistics["squares"] + average(difference * (values - mean)) * values.size
    return {"count": count, "mean": mean, "squares": squares}


def scale_of(statistics: Mapping[str, jax.Array]) -> jax.Array:
    """The factor that makes the variance of values 1, around their one global mean; 1 for none."""
    known = statistics["squares"] > 0
    return jnp.where(
        known, jnp.sqrt(statistics["count"] / jnp.where(known, statistics["squares"], 1)), 1.0
    )


@register("locality_alignment")
@dataclasses.dataclass(frozen=True)
class LocalityAlignment(Method):
    """Trains a ViT on, so that its tokens under a mask tell what the masked image shows.

    Attributes:
        model: the student; its encoder starts from the teacher's weights.
        teacher: frozen copy without its last blocks.
        teacher_path: where the weights of both are.
        loss_name: a name in `LOSSES`.
        prefix_only: compare the class token alone. The official ablation pairs every prediction
            with every target by an accidental broadcast; here each has its own.
        mask_sampler: one of `CHOICES`.
        kept_share: of "bernoulli" and "blockwise".
        complement: of every mask is used, too.
        null_mask: every image is also used whole.
        frozen_encoder: train the decoder alone.
        batches: number of batches to calibrate on.
        mixing: mixup and cutmix.
    """

    model: MaskEmbedStudent
    teacher: ViT
    teacher_path: str = ""
    loss_name: str = "mse"
    prefix_only: bool = False
    mask_sampler: str = "uniform"
    kept_share: float = 0.5
    complement: bool = True
    null_mask: bool = True
    frozen_encoder: bool = False
    batches: int = 0
    mixing: Mixing = dataclasses.field(default_factory=Mixing)

    streams: ClassVar[tuple[str, ...]] = ("mask", "mixing")

    @classmethod
    def build(cls, config: ml_collections.ConfigDict) -> "LocalityAlignment":
        """Reads `config.model`, `config.compute_dtype`, and images and statistics of `config.data`.

        Raises:
            ValueError: for an unknown name, or if images, teacher, decoder and options do not fit
                together.
        """
        model = config.model
        configs.check_choices(model, CHOICES)
        tower = build_tower(
            model.teacher,
            config.compute_dtype,
            scan=model.scan,
            remat=model.remat,
            attention=model.attention or None,
        )
        _check_images(tower, config.data)
        original, blocks = tower.encoder, tower.encoder.transformer
        if not 0 <= model.skip_blocks < blocks.depth:
            raise ValueError(
                f"model.skip_blocks is {model.skip_blocks}, but the teacher has {blocks.depth} "
                "blocks; one must stay."
            )
        _check_options(model, original)
        teacher = original.clone(transformer=blocks.clone(depth=blocks.depth - model.skip_blocks))
        capped = blocks.clone(logit_cap=model.logit_cap or blocks.logit_cap)
        encoder = original.clone(transformer=capped)
        if not model.freeze_student:
            encoder = encoder.clone(norm_epsilon=model.norm_epsilon)
        method = cls(
            _student(encoder, model),
            teacher,
            model.teacher.path,
            model.loss,
            model.prefix_only,
            model.mask_sampler,
            model.kept_share,
            model.complement,
            model.null_mask,
            model.freeze_student,
            model.calibration_batches,
            Mixing(mixup=model.mixup, cutmix=model.cutmix),
        )
        # Raises if the grid is too small for blocks.
        jax.eval_shape(lambda: method.masks(jax.random.key(0), 1))
        return method

    @property
    def encoder(self) -> ViT:
        """The student's encoder; its attention logits stay bounded wherever it is used."""
        return self.model.encoder

    @property
    def frozen(self) -> tuple[str, ...]:
        """The teacher, and the encoder on request."""
        return ("^teacher/", "^encoder/") if self.frozen_encoder else ("^teacher/",)

    @property
    def pretrained(self) -> tuple[Pretrained, ...]:
        """Teacher and encoder from the same weights, but for the encoder's new final norm."""
        fresh = () if self.frozen_encoder else ("norm/",)
        return (
            Pretrained("teacher", self.teacher, self.teacher_path),
            Pretrained("encoder", self.encoder, self.teacher_path, fresh=fresh),
        )

    @property
    def is_calibrated(self) -> bool:
        """Whether targets are scaled to variance 1; the squared error alone needs it."""
        return self.loss_name == "mse"

    @property
    def calibration_batches(self) -> int:
        """See the contract."""
        return self.batches if self.is_calibrated else 0

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Images of the teacher's size."""
        return {"image": Input((*self.encoder.image_size, self.encoder.channels))}

    @property
    def tokens(self) -> int:
        """Number of patches in an image."""
        return math.prod(self.encoder.grid)

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Initial parameters of student and teacher, and empty statistics."""
        images = jnp.zeros((1, *batch["image"].shape[1:]))
        student, teacher = jax.random.split(rng)
        kept = jnp.ones((1, self.tokens))
        params = dict(self.model.init(student, images, kept)["params"])
        params["teacher"] = self.teacher.init(teacher, images)["params"]
        statistics = {CALIBRATION: no_values()} if self.is_calibrated else {}
        return {"params": params, **statistics}

    def masks(self, rng: jax.Array, batch: int) -> jax.Array:
        """Draws masks `[rows * batch, tokens]`, 1 where a patch is kept; see `mask_triples`."""
        if self.mask_sampler == "blockwise":

            def one(key: jax.Array) -> jax.Array:
                draw = masking.uniform_draws(key)
                return masking.blockwise_kept(draw, self.encoder.grid, share=self.kept_share)

            kept = jax.vmap(one)(jax.random.split(rng, batch))
        elif self.mask_sampler == "bernoulli":
            noise = jax.random.uniform(rng, (batch, self.tokens))
            kept = masking.bernoulli_kept(noise, self.kept_share)
        else:
            kept = masking.uniform_kept(jax.random.uniform(rng, (batch, 1 + self.tokens)))
        return masking.mask_triples(kept, complement=self.complement, null=self.null_mask)

    def unscaled_target(
        self, variables: Variables, images: jax.Array, kept: jax.Array
    ) -> jax.Array:
        """The teacher's tokens under every mask; of the whole image in the precursor.

        Returns:
            float32 `[rows * batch, prefix + tokens, outputs]`, or the class token alone.
        """
        params = {"params": jax.lax.stop_gradient(variables["params"]["teacher"])}
        if self.model.decoder is None:
            tokens = _for_masks(self.teacher.apply(params, images)[0], kept)
        else:
            tokens, _ = self.teacher.apply(params, hide_pixels(images, kept, self.teacher))
        tokens = jax.lax.stop_gradient(tokens.astype(jnp.float32))
        return tokens[:, :1] if self.prefix_only else tokens

    def target(self, variables: Variables, images: jax.Array, kept: jax.Array) -> jax.Array:
        """`unscaled_target`, scaled to variance 1 if the loss needs it."""
        tokens = self.unscaled_target(variables, images, kept)
        return tokens * scale_of(variables[CALIBRATION]) if self.is_calibrated else tokens

    def calibrate(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array]
    ) -> Mapping[str, Any]:
        """Statistics of the teacher's tokens under the masks of training, all of them alike."""
        images = self.mixed(rngs["mixing"], batch["image"])
        kept = self.masks(rngs["mask"], images.shape[0])
        values = self.unscaled_target(variables, images, kept)
        return {CALIBRATION: with_values(variables[CALIBRATION], values)}

    def mixed(self, rng: jax.Array, images: jax.Array) -> jax.Array:
        """Images after mixup or cutmix."""
        return self.mixing(rng, images, jnp.zeros(images.shape[0], jnp.int32), 1)[0]

    def predict(self, variables: Variables, images: jax.Array, kept: jax.Array) -> Prediction:
        """One forward pass, see `MaskEmbedStudent`."""
        params = {k: v for k, v in variables["params"].items() if k != "teacher"}
        output = self.model.apply({"params": params}, images, kept)
        assert isinstance(output, Prediction)
        return output

    def objective(self, reconstruction: jax.Array, target: jax.Array, kept: jax.Array) -> jax.Array:
        """Mean error over all masks and tokens (the objective of section 3).

        "masked_mse" and "unmasked_mse" count hidden or kept patches and, both of them, the class
        token and registers, but are means over all tokens, too (official code).
        """
        if self.prefix_only:
            reconstruction = reconstruction[:, :1]
        error = LOSSES[self.loss_name](reconstruction, target)  # [rows * B, T]
        if self.loss_name in ("masked_mse", "unmasked_mse"):
            weights = kept if self.loss_name == "unmasked_mse" else 1 - kept
            prefix = ((0, 0), (self.encoder.prefix_tokens, 0))
            error *= jnp.pad(weights, prefix, constant_values=1)[:, : error.shape[1]]
        return jnp.mean(error)

    def loss(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array], step: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """The objective under fresh masks; 1 is what a constant prediction reaches with "mse"."""
        images = self.mixed(rngs["mixing"], batch["image"])
        kept = self.masks(rngs["mask"], images.shape[0])
        target = self.target(variables, images, kept)
        output = self.predict(variables, images, kept)
        return self.objective(output.reconstruction, target, kept), Aux()

    def features(self, variables: Variables, batch: Batch) -> Features:
        """Patch tokens of whole images after the final norm, before the head; and their mean.

        The class token does not stand for the image: the decoder never sees it, so that nothing
        has trained what the encoder's last block makes of it.
        """
        encoder = self.encoder
        tokens, _ = encoder.apply({"params": variables["params"]["encoder"]}, batch["image"])
        patches = tokens[:, encoder.prefix_tokens :]
        return Features(patches.mean(axis=1), patches, encoder.grid)

    def layout(self) -> layout.Layout:
        """The official checkpoint of a student; encoder alone and teacher may come with it.

        The teacher's scale, which official files do not hold, is measured anew by every run.
        """
        head, decoder = self.model.head, self.model.decoder
        key = "" if decoder is None else "encoder."
        rules = [*layout.vit_rules("encoder", self.encoder, key)]
        constants = [*layout.vit_constants(self.encoder, key)]
        if head is not None:
            last = f"{key}head.fc2" if head.hidden else f"{key}head"
            rules += layout.linear_rules(last, "head/out")
            if head.hidden:
                rules += layout.linear_rules(f"{key}head.fc1", "head/fc1")
        if decoder is not None:
            blocks, width = decoder.transformer, self.decoder_width
            positions = (self.encoder.prefix_tokens + self.tokens, width)
            add_axis = layout.reshape(positions, (1, *positions))
            rules.append(layout.Rule("decoder.pos_embed", "decoder/positions", add_axis))
            rules += layout.transformer_rules(
                "decoder.blocks", "decoder/transformer", blocks, width
            )
            rules += layout.layer_norm_rules("decoder.norm", "decoder/norm")
            rules += layout.linear_rules("decoder.head", "decoder/head")
        rules += layout.vit_rules("teacher", self.teacher, "teacher.")
        constants += layout.vit_constants(self.teacher, "teacher.")
        return layout.Layout(
            tuple(rules),
            tuple(constants),
            optional=(
                rf"{re.escape(key)}head\..*",
                r"decoder\..*",
                r"teacher\.(?!output_scaling\.).*",
            ),
            unused=(r"teacher\.output_scaling\.scale",),
        )

    @property
    def decoder_width(self) -> int:
        """Width of the tokens that the decoder gets."""
        return self.model.head.outputs if self.model.head else self.encoder.width

    def adopt(self, path: str, given: Mapping[str, np.ndarray], donor: Method) -> np.ndarray | None:
        """Encoders of any method; head, decoder and teacher of another run of this one."""
        if path.startswith("encoder/"):
            return adopt_encoder(path, given, donor, self.encoder)
        return given.get(path) if isinstance(donor, LocalityAlignment) else None


def _student(encoder: ViT, model: ml_collections.ConfigDict) -> MaskEmbedStudent:
    """The student around an encoder; what the config leaves open is that of the encoder."""
    blocks = encoder.transformer
    width = model.decoder_width or encoder.width
    head = decoder = None
    if not model.freeze_student:
        outputs = width if model.task == "mask_embed" else encoder.width
        hidden = int(encoder.width * blocks.mlp_ratio + 1e-6) if model.output_head == "mlp" else 0
        head = ZeroHead(outputs, hidden, blocks.activation, blocks.dtype)
    if model.task == "mask_embed":
        heads = model.decoder_heads or blocks.heads
        if width % heads:
            raise ValueError(
                f"model.decoder_width {width} is not divisible by model.decoder_heads {heads}."
            )
        decoder_blocks = Transformer(
            model.decoder_depth,
            heads,
            scan=blocks.scan,
            remat=blocks.remat,
            dtype=blocks.dtype,
            attention=blocks.attention,
            epsilon=model.norm_epsilon,
            activation=blocks.activation,
            qkv_bias="full" if blocks.qkv_bias == "full" else "none",
            layer_scale=model.decoder_layer_scale,
        )
        decoder = MaskEmbedDecoder(encoder.width, decoder_blocks)
    return MaskEmbedStudent(encoder, head, decoder)


def _check_images(tower: Tower, data: ml_collections.ConfigDict) -> None:
    """Raises `ValueError` if the data are not as the teacher, and so the student, saw images."""
    encoder = tower.encoder
    wanted = {
        "image_size": tuple(encoder.image_size),
        "channels": encoder.channels,
        "mean": tuple(tower.mean),
        "std": tuple(tower.std),
    }
    for field, value in wanted.items():
        given = data[field] if field == "channels" else tuple(data[field])
        if given != value:
            raise ValueError(
                f"data.{field} is {given}, but the teacher, which the student starts from, has "
                f"{value}; set data.{field} to that, or model.teacher.{field}."
            )


def _check_options(model: ml_collections.ConfigDict, encoder: ViT) -> None:
    """Raises `ValueError` for options that exclude each other."""
    if model.prefix_only and (model.skip_blocks or not encoder.class_token):
        raise ValueError(
            "model.prefix_only compares the class token of the whole teacher: set "
            "model.skip_blocks to 0, and take a teacher that has one."
        )
    if model.task == "mim" and model.freeze_student:
        raise ValueError(
            "model.freeze_student leaves nothing to train under model.task 'mim'; set it to False."
        )
    if model.freeze_student and model.decoder_width not in (0, encoder.width):
        raise ValueError(
            f"model.decoder_width is {model.decoder_width}, but a frozen student has no head that "
            f"could change its width {encoder.width}; set it to 0."
        )
    if not 0 <= model.kept_share <= 1:
        raise ValueError(f"model.kept_share is {model.kept_share}; it must be in [0, 1].")


def _for_masks(x: jax.Array, kept: jax.Array) -> jax.Array:
    """`x [batch, ...]` once for every mask `[rows * batch, tokens]`: `[rows * batch, ...]`."""
    return x.repeat(kept.shape[0] // x.shape[0], axis=0)
