"""MR-MAE: Mimic before Reconstruct (Gao et al., IJCV 2023); with ConvMAE and FastConvMAE.

Two targets for different tokens: the encoder's visible tokens mimic a frozen teacher, the removed
ones are reconstructed as pixels by a decoder. Without teacher and on its hybrid encoder this is
ConvMAE (Gao et al., NeurIPS 2022). No code of the mimic branch is public: its head, distance and
weight are a definition after abstract and overview figure of the paper.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mim_jax import config as configs
from mim_jax import layout, losses, masking, targets
from mim_jax.layout.conv_vit import conv_vit_constants, conv_vit_rules
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
from mim_jax.methods.mae import MAE
from mim_jax.methods.parts.encoders import (
    adopt_encoder,
    blocks_of,
    build_conv_vit,
    build_encoder,
    conv_encoder_of,
    conv_vit_like,
    encoder_like,
)
from mim_jax.methods.parts.pixel_decoder import (
    adopt_decoder,
    decoder_like,
    decoder_rules,
    reconstruction_picture,
)
from mim_jax.models import conv_vit
from mim_jax.models.conv_vit import ConvViT
from mim_jax.models.masked_decoder import MaskedDecoder
from mim_jax.models.tower import Seen, Tower, build_tower, check_grid, initial_params, see
from mim_jax.models.transformer import LAYER_NORM_EPSILON
from mim_jax.models.vit import ViT, adopted

CHOICES = {
    "encoder": ("vit", "conv_vit"),
    "teacher_output": ("hidden", "projected"),
    "target_norm": ("whiten", "none"),
    "mask_type": ("random", "attention"),
    "focus_p": ("attention", "softmax"),
    "mimic_layers": ("last", "quarters"),
}
"""Known values of the fields of `config.model` that are names."""


class MimicHead(nn.Module):
    """One linear layer from visible tokens to the teacher's features.

    Attributes:
        outputs: channels of the teacher's features.
        earlier: blocks whose outputs are added to the encoder's, each of them, and the encoder's
            too, through a linear layer of its own; empty for the encoder's alone.
        dtype: compute type.
    """

    outputs: int
    earlier: tuple[int, ...] = ()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, blocks: Sequence[jax.Array] | jax.Array) -> jax.Array:
        """Maps visible patch tokens `[batch, kept, width]` to `[batch, kept, outputs]`.

        Args:
            tokens: normalized output of the encoder.
            blocks: outputs of its blocks, which may have more tokens in front.
        """

        def linear(features: int, name: str) -> nn.Dense:
            xavier = nn.initializers.xavier_uniform()
            return nn.Dense(features, kernel_init=xavier, dtype=self.dtype, name=name)

        if self.earlier:
            layers = [*(blocks[i][:, -tokens.shape[1] :] for i in self.earlier), tokens]
            parts = [linear(x.shape[-1], f"fusion_{i}")(x) for i, x in enumerate(layers)]
            tokens = sum(parts[1:], start=parts[0])
        return linear(self.outputs, "out")(tokens)


class Prediction(NamedTuple):
    """What one forward pass computes; the views of an image follow one another.

    Attributes:
        latent: `[batch * views, prefix + kept, width]`, normalized encoder output.
        pred: `[batch * views, tokens, values]`, predicted patches; None without decoder.
        mimic: `[batch * views, kept, channels]`, predicted features of the visible patches in
            the order of `keep_ids`; None without mimic head.
    """

    latent: jax.Array
    pred: jax.Array | None
    mimic: jax.Array | None


class MimicAutoencoder(nn.Module):
    """Encoder on visible patches, mimic head on its output, decoder on all patches.

    Attributes:
        encoder: a ViT or ConvMAE's hybrid.
        decoder: predicts the pixels of every patch; None to mimic only.
        mimic_head: predicts the teacher's features; None to reconstruct only.
    """

    encoder: ViT | ConvViT
    decoder: MaskedDecoder | None
    mimic_head: MimicHead | None

    def __call__(self, images: jax.Array, chosen: masking.Masking) -> Prediction:
        """Predicts for images `[batch, height, width, channels]`, normalized.

        Args:
            images: normalized.
            chosen: a masking of `batch * views` samples.
        """
        prefix = self.encoder.prefix_tokens
        images = masking.for_views(images, len(chosen.keep_ids) // len(images))
        latent, blocks = self.encoder(images, chosen.keep_ids)
        mimic = pred = None
        if self.mimic_head is not None:
            mimic = self.mimic_head(latent[:, prefix:], blocks)
        if self.decoder is not None:
            tokens = latent if self.decoder.class_token else latent[:, prefix:]
            pred = self.decoder(tokens, chosen.restore_ids)
        return Prediction(latent, pred, mimic)


@register("mr_mae")
@dataclasses.dataclass(frozen=True)
class MRMAE(Method):
    """Visible tokens mimic a teacher's features, removed ones are reconstructed as pixels.

    Attributes:
        model: encoder, decoder and mimic head.
        kept: number of visible patches.
        views: masks of each image that together show every patch once (FastConvMAE); 1 for one
            mask drawn at random.
        normalize_target: predict patches normalized by their own mean and variance.
        mimic_weight: factor on the mimic loss.
        teacher: makes the features; None if nothing needs them.
        teacher_path: where its weights are.
        teacher_naming: what its weights are called in an official file, see `tower_layout`.
        teacher_output: "hidden" for the last block's output without norm, "projected" for tokens
            in the space that CLIP shares with texts.
        target_norm: "whiten" for features of mean 0 and variance 1 in every token, or "none".
        mask_type: "random", or "attention" to draw visible patches by the teacher's attention.
        focus_p: how: in proportion to the class token's "attention" itself, or to its "softmax".
        mean: of each channel of normalized images, for values in [0, 1].
        std: standard deviation of each channel.
    """

    model: MimicAutoencoder
    kept: int
    views: int = 1
    normalize_target: bool = True
    mimic_weight: float = 1.0
    teacher: Tower | None = None
    teacher_path: str = ""
    teacher_naming: str = "hf-clip"
    teacher_output: str = "hidden"
    target_norm: str = "whiten"
    mask_type: str = "random"
    focus_p: str = "attention"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    streams: ClassVar[tuple[str, ...]] = ("mask",)

    @classmethod
    def build(cls, config: ml_collections.ConfigDict) -> "MRMAE":
        """Reads `config.model`, `config.compute_dtype`, and images and statistics of `config.data`.

        Raises:
            ValueError: for an unknown name, or if image, patches, teacher, views and mask ratio
                do not fit together.
        """
        model = config.model
        configs.check_choices(model, CHOICES)
        mimics = model.mimic_weight > 0
        if model.mimic_weight < 0 or not (mimics or model.reconstruct):
            raise ValueError(
                f"model.mimic_weight is {model.mimic_weight} and model.reconstruct "
                f"{model.reconstruct}, which leaves nothing to learn; give a weight above 0, or "
                "reconstruct."
            )
        encoder = build_encoder(config) if model.encoder == "vit" else build_conv_vit(config)
        kept = masking.num_kept(math.prod(encoder.grid), model.mask_ratio)
        focused = model.mask_type == "attention"
        _check_views(model.views, kept, encoder, focused)
        teacher = head = decoder = None
        if mimics or focused:
            teacher = build_tower(model.teacher, config.compute_dtype)
            check_grid(teacher, encoder.grid)
            _check_teacher(teacher, model.teacher_output, focused)
        if mimics:
            assert teacher is not None
            projected = model.teacher_output == "projected"
            outputs = teacher.outputs if projected else teacher.encoder.width
            earlier: tuple[int, ...] = ()
            if model.mimic_layers == "quarters":
                earlier = ends_of_quarters(encoder.transformer.depth)[:-1]
            head = MimicHead(outputs, earlier, encoder.transformer.dtype)
        if model.reconstruct:
            # Blocks of the decoder have the MLP ratio of the first stage (official code).
            stages = encoder.mlp_ratios if isinstance(encoder, ConvViT) else (model.mlp_ratio,)
            decoder = MaskedDecoder(
                encoder.grid,
                outputs=math.prod(encoder.patch_size) * encoder.channels,
                width=model.decoder_width,
                transformer=blocks_of(config)(
                    model.decoder_depth, model.decoder_heads, mlp_ratio=stages[0]
                ),
                position_grid=encoder.position_grid,
                class_token=isinstance(encoder, ViT),
            )
        return cls(
            MimicAutoencoder(encoder, decoder, head),
            kept,
            model.views,
            model.normalize_target,
            model.mimic_weight,
            teacher,
            model.teacher.path,
            HUB_NAMINGS[model.teacher.family],
            model.teacher_output,
            model.target_norm,
            model.mask_type,
            model.focus_p,
            tuple(config.data.mean),
            tuple(config.data.std),
        )

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
    def tokens(self) -> int:
        """Number of patches in an image."""
        return math.prod(self.model.encoder.grid)

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Initial parameters of encoder, decoder, mimic head and teacher."""
        images = jnp.zeros((1, *batch["image"].shape[1:]))
        chosen = masking.random_masking(jnp.zeros((1, self.tokens)), self.kept)
        params = dict(self.model.init(rng, images, chosen)["params"])
        if self.teacher:
            params["teacher"] = initial_params(self.teacher, jax.random.fold_in(rng, 1))
        return {"params": params}

    def seen(self, variables: Variables, images: jax.Array) -> Seen | None:
        """What the teacher makes of whole images; None without teacher."""
        if self.teacher is None:
            return None
        images = self.teacher.inputs(images, self.mean, self.std)
        return see(self.teacher, variables["params"]["teacher"], images)

    def choose(self, rng: jax.Array, batch: int, seen: Seen | None) -> masking.Masking:
        """Draws a masking of `batch * views` samples."""
        if self.mask_type == "random":
            return self.random(jax.random.uniform(rng, (batch, self.tokens)))
        assert seen is not None
        return self.focused(jax.random.exponential(rng, (batch, self.tokens)), seen)

    def random(self, noise: jax.Array) -> masking.Masking:
        """The masking, or complementary views, from noise `[batch, tokens]` in [0, 1)."""
        if self.views == 1:
            return masking.random_masking(noise, self.kept)
        return masking.complementary_views(noise, self.views)

    def focused(self, exponential: jax.Array, seen: Seen) -> masking.Masking:
        """Visible patches drawn by the teacher's attention, with draws of Exp(1)."""
        weights = seen.class_attention
        if self.focus_p == "softmax":
            weights = jax.nn.softmax(weights, axis=-1)
        return masking.weighted_masking(exponential, weights, self.kept)

    def predict(
        self, variables: Variables, images: jax.Array, chosen: masking.Masking
    ) -> Prediction:
        """One forward pass, see `MimicAutoencoder`."""
        params = {k: v for k, v in variables["params"].items() if k != "teacher"}
        output = self.model.apply({"params": params}, images, chosen)
        assert isinstance(output, Prediction)
        return output

    def target(self, images: jax.Array) -> jax.Array:
        """Pixels to predict for every patch, `[batch, tokens, values]`, float32."""
        patches = targets.patchify(images.astype(jnp.float32), self.model.encoder.patch_size)
        return targets.normalize_patches(patches) if self.normalize_target else patches

    def mimic_target(self, seen: Seen) -> jax.Array:
        """Features to predict for every patch, `[batch, tokens, channels]`, float32."""
        tokens = seen.projected if self.teacher_output == "projected" else seen.blocks[-1]
        features = seen.patches(tokens).astype(jnp.float32)
        return targets.whiten(features) if self.target_norm == "whiten" else features

    def objective(
        self, output: Prediction, images: jax.Array, seen: Seen | None, chosen: masking.Masking
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss, and its terms by name: pixels of removed, features of visible patches."""
        terms, total = {}, jnp.float32(0)
        if output.pred is not None:
            error = losses.squared_error(
                output.pred, masking.for_views(self.target(images), self.views)
            )
            terms["loss_rec"] = losses.masked_mean(error, chosen.mask)
            total += terms["loss_rec"]
        if output.mimic is not None:
            assert seen is not None
            features = masking.for_views(self.mimic_target(seen), self.views)
            features = masking.gather_tokens(features, chosen.keep_ids)  # [B * V, K, C]
            terms["loss_mimic"] = jnp.mean(losses.squared_error(output.mimic, features))
            total += self.mimic_weight * terms["loss_mimic"]
        return total, terms

    def loss(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array], step: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """The objective under a fresh mask."""
        images = batch["image"]
        seen = self.seen(variables, images)
        chosen = self.choose(rngs["mask"], images.shape[0], seen)
        output = self.predict(variables, images, chosen)
        total, terms = self.objective(output, images, seen, chosen)
        return total, Aux(terms)

    def features(self, variables: Variables, batch: Batch) -> Features:
        """What the papers evaluate, of whole images.

        Of a ViT class token and patch tokens after the final norm, as MAE. Of the hybrid encoder
        patch tokens without final norm and fusion, which serve pre-training only, and their mean
        with mean 0 and variance 1.
        """
        encoder, params = self.model.encoder, {"params": variables["params"]["encoder"]}
        if isinstance(encoder, ViT):
            tokens, _ = encoder.apply(params, batch["image"])
            return Features(tokens[:, 0], tokens[:, encoder.prefix_tokens :], encoder.grid)
        bare = encoder.clone(final_norm=False, fusion=False)
        tokens = bare.apply(params, batch["image"])[0][:, encoder.prefix_tokens :]
        return Features(
            targets.whiten(tokens.mean(axis=1), LAYER_NORM_EPSILON), tokens, encoder.grid
        )

    def pictures(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array]
    ) -> dict[str, Picture]:
        """What `reconstruction_picture` shows, of the first view; nothing without decoder."""
        if self.model.decoder is None:
            return {}
        images = batch["image"].astype(jnp.float32)
        chosen = self.choose(rngs["mask"], images.shape[0], self.seen(variables, images))
        chosen = masking.Masking(*(rows[:: self.views] for rows in chosen))
        pred = self.predict(variables, images, chosen).pred
        assert pred is not None
        picture = reconstruction_picture(
            images, pred, chosen.mask, self.model.encoder, self.normalize_target
        )
        return {"reconstruction": picture}

    def layout(self) -> layout.Layout:
        """The checkpoint of ConvMAE or MAE; mimic head and teacher in the names of the write-up.

        Files without decoder, fusion, mimic head or teacher are accepted, and those of the hybrid
        encoder with or without class token.
        """
        encoder, decoder, head = self.model.encoder, self.model.decoder, self.model.mimic_head
        optional: list[str] = []  # what a file may lack
        unused: list[str] = []  # what this model has no place for
        if isinstance(encoder, ConvViT):
            rules = [*conv_vit_rules("encoder", encoder)]
            constants = [*conv_vit_constants(encoder)]
            optional.append(r"stage[12]_output_decode\..*")
            (optional if encoder.class_token else unused).append(r"cls_token")
        else:
            rules = [*layout.vit_rules("encoder", encoder)]
            constants = [*layout.vit_constants(encoder)]
        (unused if decoder is None else optional).extend((r"decoder_.*", r"mask_token"))
        if decoder is not None:
            rules += decoder_rules(decoder)
            constants.append(layout.Constant("decoder_pos_embed", decoder.position_table()[None]))
        (unused if head is None else optional).append(r"mimic_.*")
        if head is not None:
            rules += layout.linear_rules("mimic_head", "mimic_head/out")
            if head.earlier:
                for i in range(len(head.earlier) + 1):
                    rules += layout.linear_rules(f"mimic_fusion.{i}", f"mimic_head/fusion_{i}")
        (optional if self.teacher else unused).append(r"teacher\..*")
        if self.teacher:
            table = tower_layout(self.teacher, self.teacher_naming, "teacher", "teacher.")
            rules += table.rules
            constants += table.constants
            unused += table.unused
        return layout.Layout(tuple(rules), tuple(constants), tuple(optional), tuple(unused))

    def sized_like(self, state: Mapping[str, np.ndarray], known: Mapping[str, Any]) -> "MRMAE":
        """A model of the sizes of an official checkpoint; parts that it lacks stay as they are."""
        encoder = self.model.encoder
        if isinstance(encoder, ConvViT):
            encoder = conv_vit_like(state, known, encoder)
        else:
            encoder = encoder_like(state, known, encoder)
        decoder = self.model.decoder
        if decoder is not None:
            decoder = decoder_like(state, known, decoder, encoder)
        kept = masking.num_kept(math.prod(encoder.grid), 1 - self.kept / self.tokens)
        model = self.model.clone(encoder=encoder, decoder=decoder)
        return dataclasses.replace(self, model=model, kept=kept)

    def adopt(self, path: str, given: Mapping[str, np.ndarray], donor: Method) -> np.ndarray | None:
        """Encoders of the same kind, and the decoder of an MAE or MR-MAE.

        Of an MR-MAE also the head, if it predicts as many features of as many layers; and the
        teacher, if it came from the same path. Otherwise it has weights of its own.
        """
        encoder = self.model.encoder
        if path.startswith("encoder/"):
            if isinstance(encoder, ViT):
                return adopt_encoder(path, given, donor, encoder)
            theirs = conv_encoder_of(donor)
            return conv_vit.adopted(path, given, theirs, encoder) if theirs else None
        if path.startswith("decoder/"):
            if not isinstance(donor, MAE | MRMAE) or donor.model.decoder is None:
                return None
            assert self.model.decoder is not None
            old, new = (donor.model.encoder, donor.model.decoder), (encoder, self.model.decoder)
            return adopt_decoder(path, given, old, new)
        if not isinstance(donor, MRMAE):
            return None
        if path.startswith("mimic_head/"):
            heads = (donor.model.mimic_head, self.model.mimic_head)
            kinds = {head and (head.outputs, head.earlier) for head in heads}
            return given.get(path) if len(kinds) == 1 else None
        old_teacher, new_teacher = donor.teacher, self.teacher
        if old_teacher is None or new_teacher is None or donor.teacher_path != self.teacher_path:
            return None
        return adopted(path, given, old_teacher.encoder, new_teacher.encoder)


def ends_of_quarters(depth: int) -> tuple[int, ...]:
    """The last block of each quarter of `depth` blocks: `(2, 5, 8, 11)` of 12; fewer if shallow."""
    return tuple(sorted({math.ceil(depth * quarter / 4) - 1 for quarter in (1, 2, 3, 4)}))


def _check_views(views: int, kept: int, encoder: ViT | ConvViT, focused: bool) -> None:
    """Raises `ValueError` if views cannot show every patch exactly once."""
    tokens = math.prod(encoder.grid)
    if views < 1 or (views > 1 and views * kept != tokens):
        raise ValueError(
            f"model.views is {views}, but each shows {kept} of {tokens} patches; complementary "
            f"views need model.mask_ratio 1 - 1 / views, and views that divide {tokens}."
        )
    if views > 1 and focused:
        raise ValueError(
            f"model.views is {views}, which show every patch, so model.mask_type must be 'random'."
        )


def _check_teacher(teacher: Tower, output: str, focused: bool) -> None:
    """Raises `ValueError` if a teacher lacks what is wanted of it."""
    if output == "projected" and not teacher.outputs:
        raise ValueError(
            "model.teacher_output is 'projected', but the teacher has no projection; set "
            "model.teacher.outputs to its width (512 for CLIP ViT-B), or take 'hidden'."
        )
    if focused and not teacher.encoder.class_token:
        raise ValueError(
            "model.mask_type is 'attention', but the teacher has no class token to attend; take "
            "'random'."
        )
