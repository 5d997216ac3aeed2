"""MaskAlign: Stare at What You See: Masked Image Modeling without Reconstruction (CVPR 2023).

The student sees some patches and aligns with what a frozen teacher makes of the whole image at
those same patches (Xue et al.). No decoder, no mask token, nothing predicted for hidden patches.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mim_jax import config as configs
from mim_jax import layout, losses, masking, targets
from mim_jax.layout.towers import HUB_NAMINGS, tower_layout
from mim_jax.method import (
    Aux,
    Batch,
    Features,
    Input,
    Method,
    Picture,
    Pretrained,
    Variables,
    register,
)
from mim_jax.methods.parts.encoders import (
    adopt_encoder,
    build_encoder,
    encoder_like,
)
from mim_jax.models.tower import Seen, Tower, build_tower, check_grid, initial_params, see
from mim_jax.models.transformer import ACTIVATIONS, layer_norm, token_rows
from mim_jax.models.vit import ViT

FUSIONS = ("simple", "linear", "sum")
"""No mixing of student layers; a square mixing that starts near the identity; any mixing."""

HEADS: dict[str, tuple[str, ...]] = {
    "linear": ("out",),
    "norm_linear": ("norm", "out"),
    "mlp": ("hidden", "gelu", "out"),
    "mlp2": ("hidden", "norm", "out"),
}
"""Steps of the adaptors, in the order of the official code."""

TARGET_NORMS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "none": lambda features: features.astype(jnp.float32),
    "l2": targets.unit_length,
    "whiten": targets.whiten,
    "bn": targets.batch_normalized,
}
"""What is done to the teacher's features of a layer; "bn" is over the whole batch."""

ERRORS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "l2": losses.squared_error,
    "l1": losses.absolute_error,
    # Twice the usual, so that it equals l2 where the difference is small.
    "smoothl1": lambda prediction, target: 2 * losses.smooth_l1(prediction, target),
}
"""Distances between aligned tokens."""

CHOICES: dict[str, Sequence[str]] = {
    "mask_type": ("attention", "random"),
    "fusion": FUSIONS,
    "head": tuple(HEADS),
    "target_norm": tuple(TARGET_NORMS),
    "loss": tuple(ERRORS),
}
"""Known values of the fields of `config.model` that are names."""

TEACHER_KEYS = {"clip": "clip_model.", "openclip": "clip_model.", "dino": "dino_model."}
"""What keys of a teacher begin with in an official file; "teacher." for other families."""


class Adaptor(nn.Module):
    """From the width of the student's tokens to that of the teacher's.

    Attributes:
        outputs: the teacher's width.
        head: a name in `HEADS`.
        dtype: compute type.
    """

    outputs: int
    head: str = "linear"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps `[batch, tokens, width]` to `[batch, tokens, outputs]`."""
        x, width = token_rows(tokens), tokens.shape[-1]
        for step in HEADS[self.head]:
            if step == "norm":
                x = layer_norm(step, self.dtype)(x)
            elif step == "gelu":
                x = ACTIVATIONS[step](x)
            else:
                size = self.outputs if step == "out" else width
                xavier = nn.initializers.xavier_uniform()
                x = nn.Dense(size, kernel_init=xavier, dtype=self.dtype, name=step)(x)
        return x.reshape(*tokens.shape[:-1], self.outputs)


class DynamicAlignment(nn.Module):
    """Mixes the student's layers for each aligned layer of the teacher, and adapts the width.

    Attributes:
        student_layers: S, number of the student's blocks.
        teacher_layers: T, number of the teacher's blocks.
        aligned: which of the teacher's layers are aligned; adaptors of others are not computed.
        outputs: the teacher's width.
        fusion: one of `FUSIONS`. The mixing weights `[T, S]` are free, there is no softmax.
        head: of the adaptors.
        dtype: compute type.
    """

    student_layers: int
    teacher_layers: int
    aligned: tuple[int, ...]
    outputs: int
    fusion: str = "linear"
    head: str = "linear"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, blocks: Sequence[jax.Array] | jax.Array) -> list[jax.Array]:
        """What is compared with each aligned layer of the teacher, `[batch, tokens, outputs]`.

        Args:
            blocks: outputs of all the student's blocks, `[batch, tokens, width]` each.
        """
        # All adaptors have parameters, since a checkpoint has them all.
        layers = range(self.teacher_layers) if self.is_initializing() else self.aligned
        if self.fusion == "simple":
            mixed: Sequence[jax.Array] | jax.Array = [blocks[i] for i in layers]
        else:
            shape = (self.teacher_layers, self.student_layers)
            weights = self.param("weights", self._initial_weights, shape)
            stacked = jnp.stack(blocks) if isinstance(blocks, Sequence) else blocks
            weights = weights[np.array(layers)].astype(stacked.dtype)
            rows = weights @ stacked.reshape(self.student_layers, -1)
            mixed = rows.reshape(len(layers), *stacked.shape[1:])
        return [
            Adaptor(self.outputs, self.head, self.dtype, name=f"adaptor_{i}")(tokens)
            for i, tokens in zip(layers, mixed)
        ]

    def _initial_weights(self, key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        return jnp.eye(*shape) + 0.01 if self.fusion == "linear" else jnp.full(shape, 1 / shape[1])


class AlignedEncoder(nn.Module):
    """The student on its visible patches, and what is compared with the teacher.

    Attributes:
        encoder: a ViT. Its final norm serves evaluation only.
        alignment: from its layers to those of the teacher.
    """

    encoder: ViT
    alignment: DynamicAlignment

    def __call__(
        self,
        images: jax.Array,
        keep_ids: jax.Array,
        drop_path_noise: jax.Array | None = None,
    ) -> list[jax.Array]:
        """See `DynamicAlignment`; tokens are the class token, and those of `keep_ids` in order.

        Args:
            images: `[batch, height, width, channels]`, normalized.
            keep_ids: int32 `[batch, kept]`, positions of visible patches.
            drop_path_noise: see `Transformer`; None keeps every branch.
        """
        return self.alignment(self.encoder(images, keep_ids, drop_path_noise)[1])


@register("maskalign")
@dataclasses.dataclass(frozen=True)
class MaskAlign(Method):
    """Visible tokens of the student align with a teacher that sees everything.

    Attributes:
        model: student and alignment.
        teacher: gives features, and attention that visible patches are drawn by.
        kept: number of visible patches.
        weights: a_i, of the loss at each of the teacher's layers.
        mask_type: visible patches are drawn in proportion to the teacher's "attention" from the
            class token, or at "random".
        target_norm: a name in `TARGET_NORMS`.
        error: a name in `ERRORS`.
        teacher_path: where the teacher's weights are.
        teacher_key: what their keys begin with in an official file.
        teacher_naming: what they are called there, see `tower_layout`.
        mean: of each channel of normalized images, for values in [0, 1].
        std: standard deviation of each channel.
    """

    model: AlignedEncoder
    teacher: Tower
    kept: int
    weights: tuple[float, ...]
    mask_type: str = "attention"
    target_norm: str = "whiten"
    error: str = "smoothl1"
    teacher_path: str = ""
    teacher_key: str = "clip_model."
    teacher_naming: str = "hf-clip"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    streams: ClassVar[tuple[str, ...]] = ("mask", "drop_path")
    no_decay: ClassVar[tuple[str, ...]] = ("^alignment/weights$",)

    @classmethod
    def build(cls, config: ml_collections.ConfigDict) -> "MaskAlign":
        """Reads `config.model`, `config.compute_dtype`, and images and statistics of `config.data`.

        Raises:
            ValueError: for an unknown name, or if image, patches, depths, teacher, loss weights
                and mask ratio do not fit together.
        """
        model = config.model
        configs.check_choices(model, CHOICES)
        encoder = build_encoder(config, model.drop_path)
        # Nobody reads what is behind the teacher's blocks, and official files do not have it.
        teacher = build_tower(
            model.teacher, config.compute_dtype, attention=model.attention or None
        ).clone(outputs=0)
        check_grid(teacher, encoder.grid)
        if not teacher.encoder.class_token:
            raise ValueError(
                f"a teacher of family {model.teacher.family!r} has no class token to align with; "
                "take one that has, such as CLIP or DINO."
            )
        students, teachers = (x.transformer.depth for x in (encoder, teacher.encoder))
        if model.fusion != "sum" and students != teachers:
            raise ValueError(
                f"model.fusion is {model.fusion!r}, which pairs layers, but the student has "
                f"{students} and the teacher {teachers}; take 'sum'."
            )
        weights = layer_weights(model.loss_weights, teachers)
        alignment = DynamicAlignment(
            students,
            teachers,
            aligned_layers(weights),
            teacher.encoder.width,
            model.fusion,
            model.head,
            encoder.transformer.dtype,
        )
        return cls(
            AlignedEncoder(encoder, alignment),
            teacher,
            masking.num_kept(math.prod(encoder.grid), model.mask_ratio),
            weights,
            model.mask_type,
            model.target_norm,
            model.loss,
            model.teacher.path,
            TEACHER_KEYS.get(model.teacher.family, "teacher."),
            HUB_NAMINGS[model.teacher.family],
            tuple(config.data.mean),
            tuple(config.data.std),
        )

    @property
    def encoder(self) -> ViT:
        """The student."""
        return self.model.encoder

    @property
    def used_blocks(self) -> int:
        """How many of the student's blocks have an influence on the loss."""
        alignment = self.model.alignment
        if alignment.fusion == "simple":
            return alignment.aligned[-1] + 1
        return alignment.student_layers

    @property
    def frozen(self) -> tuple[str, ...]:
        """The teacher, and what gets no gradient: PyTorch does not decay such parameters."""
        alignment, blocks = self.model.alignment, self.encoder.transformer
        layers = set(range(alignment.teacher_layers)) - set(alignment.aligned)
        unused = () if blocks.scan else range(self.used_blocks, blocks.depth)
        return (
            "^teacher/",
            "^encoder/norm/",
            *(f"^alignment/adaptor_{i}/" for i in sorted(layers)),
            *(f"^encoder/transformer/blocks_{i}/" for i in unused),
        )

    def rate_scale(self, path: str, shape: tuple[int, ...]) -> float | np.ndarray:
        """0 for the blocks of a stack that get no gradient, where `frozen` cannot name them."""
        depth = self.encoder.transformer.depth
        if not path.startswith("encoder/transformer/blocks/") or self.used_blocks == depth:
            return 1.0
        used = np.arange(depth) < self.used_blocks
        return used.astype(np.float32).reshape(-1, *(1,) * (len(shape) - 1))

    @property
    def pretrained(self) -> tuple[Pretrained, ...]:
        """The teacher."""
        return (Pretrained("teacher", self.teacher, self.teacher_path),)

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Images of the student's size."""
        return {"image": Input((*self.encoder.image_size, self.encoder.channels))}

    @property
    def tokens(self) -> int:
        """Number of patches in an image."""
        return math.prod(self.encoder.grid)

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Initial parameters of student, alignment and teacher."""
        images = jnp.zeros((1, *batch["image"].shape[1:]))
        ids = jnp.zeros((1, self.kept), jnp.int32)
        params = dict(self.model.init(rng, images, ids)["params"])
        params["teacher"] = initial_params(self.teacher, jax.random.fold_in(rng, 1))
        return {"params": params}

    def seen(self, variables: Variables, images: jax.Array) -> Seen:
        """What the teacher makes of whole images."""
        images = self.teacher.inputs(images, self.mean, self.std)
        return see(self.teacher, variables["params"]["teacher"], images)

    def choose(self, rng: jax.Array, seen: Seen) -> masking.Masking:
        """A fresh masking for every image that the teacher has seen."""
        shape = seen.class_attention.shape
        if self.mask_type == "random":
            return masking.random_masking(jax.random.uniform(rng, shape), self.kept)
        return self.focused(jax.random.exponential(rng, shape), seen)

    def focused(self, exponential: jax.Array, seen: Seen) -> masking.Masking:
        """Draws visible patches in proportion to the teacher's attention, with draws of Exp(1)."""
        return masking.weighted_masking(exponential, seen.class_attention, self.kept)

    def align(
        self,
        variables: Variables,
        images: jax.Array,
        keep_ids: jax.Array,
        drop_path_noise: jax.Array | None = None,
    ) -> list[jax.Array]:
        """What is compared with the aligned layers of the teacher, see `AlignedEncoder`."""
        params = {name: part for name, part in variables["params"].items() if name != "teacher"}
        student = self.model.apply({"params": params}, images, keep_ids, drop_path_noise)
        assert isinstance(student, list)
        return student

    def target(self, seen: Seen, layer: int, ids: jax.Array) -> jax.Array:
        """The teacher's class token and some patches after a block, normalized, float32.

        Args:
            seen: what the teacher sees.
            layer: which block; its output in the residual stream, without the final norm.
            ids: int32 `[batch, chosen]`, positions of the patches.

        Returns:
            `[batch, 1 + chosen, width]`.
        """
        tokens, norm = seen.blocks[layer], TARGET_NORMS[self.target_norm]
        if self.target_norm == "bn":  # statistics are those of all tokens
            tokens = norm(tokens)
        patches = masking.gather_tokens(seen.patches(tokens), ids)
        tokens = jnp.concatenate([tokens[:, :1], patches], axis=1)
        return tokens if self.target_norm == "bn" else norm(tokens)

    def objective(
        self, student: Sequence[jax.Array], teacher: Sequence[jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss, sum of a_i times the error at layer i, and those errors by name.

        Args:
            student: tokens to compare with each aligned layer, `[batch, tokens, width]` each.
            teacher: their targets.
        """
        layers = aligned_layers(self.weights)
        errors = [jnp.mean(ERRORS[self.error](ours, goal)) for ours, goal in zip(student, teacher)]
        total = sum((self.weights[i] * x for i, x in zip(layers, errors)), jnp.float32(0))
        return total, {f"loss_layer{i}": error for i, error in zip(layers, errors)}

    def loss(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array], step: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """The objective under a fresh mask and fresh stochastic depth."""
        images = batch["image"]
        seen = self.seen(variables, images)
        chosen = self.choose(rngs["mask"], seen)
        depth = self.encoder.transformer.depth
        noise = jax.random.uniform(rngs["drop_path"], (depth, 2, images.shape[0]))
        student = self.align(variables, images, chosen.keep_ids, noise)
        aligned = self.model.alignment.aligned
        total, terms = self.objective(
            student, [self.target(seen, layer, chosen.keep_ids) for layer in aligned]
        )
        if self.mask_type == "attention":
            terms |= sampling_metrics(seen.class_attention, chosen.keep_ids)
        return total, Aux(terms)

    def features(self, variables: Variables, batch: Batch) -> Features:
        """Class token and patch tokens of whole images, after the final norm."""
        encoder = self.encoder
        tokens, _ = encoder.apply({"params": variables["params"]["encoder"]}, batch["image"])
        return Features(tokens[:, 0], tokens[:, encoder.prefix_tokens :], encoder.grid)

    def pictures(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array]
    ) -> dict[str, Picture]:
        """What the teacher attends to, and a choice of visible patches."""
        images, size = batch["image"].astype(jnp.float32), self.encoder.patch_size
        seen = self.seen(variables, images)
        visible = 1 - self.choose(rngs["mask"], seen).mask
        patches = targets.patchify(images, size)
        shares = seen.class_attention / seen.class_attention.max(axis=1, keepdims=True)
        spread = jnp.broadcast_to(shares[..., None], patches.shape)
        attention = targets.unpatchify(spread, images.shape[1:3], size)
        columns = {
            "image": images,
            "attention": (attention - jnp.asarray(self.mean)) / jnp.asarray(self.std),
            "visible": targets.unpatchify(patches * visible[..., None], images.shape[1:3], size),
        }
        caption = "Attention of the teacher's class token; an image's brightest patch is white."
        return {"attention": Picture(columns, caption)}

    def layout(self) -> layout.Layout:
        """The official training file; files without teacher or alignment are accepted."""
        teacher = tower_layout(self.teacher, self.teacher_naming, "teacher", self.teacher_key)
        return layout.Layout(
            rules=(
                *layout.vit_rules("encoder", self.encoder),
                *alignment_rules(self.model.alignment),
                *teacher.rules,
            ),
            constants=(*layout.vit_constants(self.encoder), *teacher.constants),
            optional=(r"distill_.*", re.escape(self.teacher_key) + ".*"),
            unused=teacher.unused,
        )

    def sized_like(self, state: Mapping[str, np.ndarray], known: Mapping[str, Any]) -> "MaskAlign":
        """A student of the sizes of an official file; the teacher stays as it is.

        Newer versions of transformers have no level `vision_model.` in the names of CLIP.
        """
        encoder = encoder_like(state, known, self.encoder)
        depth = encoder.transformer.depth
        naming = self.teacher_naming
        if naming.startswith("hf-clip"):
            level = f"{self.teacher_key}vision_model."
            teacher = [key for key in state if key.startswith(self.teacher_key)]
            flat = teacher and not any(key.startswith(level) for key in teacher)
            naming = "hf-clip-flat" if flat else "hf-clip"
        return dataclasses.replace(
            self,
            model=AlignedEncoder(encoder, self.model.alignment.clone(student_layers=depth)),
            kept=max(1, self.kept * math.prod(encoder.grid) // self.tokens),
            teacher_naming=naming,
        )

    def adopt(self, path: str, given: Mapping[str, np.ndarray], donor: Method) -> np.ndarray | None:
        """Encoders of any method; alignment and teacher of another MaskAlign."""
        if path.startswith("encoder/"):
            return adopt_encoder(path, given, donor, self.encoder)
        return given.get(path) if isinstance(donor, MaskAlign) else None


def layer_weights(name: str, layers: int) -> tuple[float, ...]:
    """Weights of the loss at the layers of a teacher (official code).

    Args:
        name: "mean" for equal ones; "out" for the last layer alone; "linear_decay" for i over
            the sum of all i, from 0; "top5" for the last 5 alone, equally; "mid3" for layer 3
            alone, counted from 0.
        layers: number of layers.

    Raises:
        ValueError: for another name, or a layer that does not exist.
    """
    same = {"mean": f"top{layers}", "out": "top1"}
    match = re.fullmatch(r"(top|mid)(\d+)", same.get(name, name))
    kind, number = (match[1], int(match[2])) if match else (name, 0)
    if kind == "linear_decay" and layers > 1:
        return tuple(i / sum(range(layers)) for i in range(layers))
    if kind == "top" and 0 < number <= layers:
        return (0.0,) * (layers - number) + (1 / number,) * number
    if kind == "mid" and number < layers:
        return tuple(float(i == number) for i in range(layers))
    raise ValueError(
        f"model.loss_weights is {name!r}; known are 'mean', 'out', 'linear_decay', 'topK' and "
        f"'midK' with a number K, for a teacher of {layers} layers."
    )


def aligned_layers(weights: Sequence[float]) -> tuple[int, ...]:
    """Layers whose weight is not 0."""
    return tuple(i for i, weight in enumerate(weights) if weight)


def sampling_metrics(weights: jax.Array, keep_ids: jax.Array) -> dict[str, jax.Array]:
    """How sharply a teacher attends, and how much of it the visible patches have.

    Args:
        weights: `[batch, tokens]`, not negative.
        keep_ids: int32 `[batch, kept]`.

    Returns:
        `mask_entropy`, of the weights as a distribution, in nats, and `kept_weight`, the mean
        weight of visible patches; both averaged over the batch.
    """
    shares = weights / weights.sum(axis=1, keepdims=True)
    return {
        "mask_entropy": jax.scipy.special.entr(shares).sum(axis=1).mean(),
        "kept_weight": jnp.take_along_axis(weights, keep_ids, axis=1).mean(),
    }


def alignment_rules(alignment: DynamicAlignment) -> tuple[layout.Rule, ...]:
    """Rules of a `DynamicAlignment` below "alignment/", in the names of the official code."""
    rules: list[layout.Rule] = []
    if alignment.fusion != "simple":
        rules.append(layout.Rule("distill_weights", "alignment/weights"))
    steps = HEADS[alignment.head]
    for i in range(alignment.teacher_layers):
        for place, step in enumerate(steps):
            # One layer by itself has no number.
            key = f"distill_heads.{i}" + (f".{place}" if len(steps) > 1 else "")
            path = f"alignment/adaptor_{i}/{step}"
            if step == "norm":
                rules += layout.layer_norm_rules(key, path)
            elif step != "gelu":
                rules += layout.linear_rules(key, path)
    return tuple(rules)
