"""CAE: Context Autoencoder (Chen et al., IJCV 2023), and CAE v2 (Zhang et al., TMLR 2023)."""

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
from mim_jax.layout.regressor import regressor_rules
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
    blocks_of,
    build_encoder,
    encoder_like,
)
from mim_jax.models.dvae import STRIDE, DVAEEncoder, token_ids
from mim_jax.models.latent_regressor import SMALL, LatentDecoder, LatentRegressor
from mim_jax.models.positions import resize_positions, sincos_positions
from mim_jax.models.tower import Tower, build_tower, check_grid, initial_params, see
from mim_jax.models.transformer import Transformer, layer_norm, restacked
from mim_jax.models.vit import ViT

TARGETS = ("tokens", "features", "pixels")
"""Ids of DALL-E's tokenizer (CAE), features of CLIP (CAE v2), or pixels, which are ours."""

MASKS = ("block", "random")
"""Rectangles, or single tokens; always an exact number of tokens."""

UNTRAINED = "random"
"""In place of the path of a tokenizer: one of random weights, for runs without any file."""

Noise = jax.Array | None


class Prediction(NamedTuple):
    """What one forward pass computes; masked and visible patches are in raster order.

    Attributes:
        latent: `[batch, 1 + visible, width]`, normalized encoder output, class token first.
        states: of the masked patches after every block of the regressor,
            `[batch, masked, decoder width]`.
        predicted: `[batch, masked, decoder width]`, the regressor's latents of the masked patches.
        aligned: the encoder's own latents of the masked patches, which carry no gradient; None
            without alignment.
        pred: `[batch, masked, outputs]`, or with `decode_all`
            `[batch, 1 + visible + masked, outputs]`.
    """

    latent: jax.Array
    states: list[jax.Array]
    predicted: jax.Array
    aligned: jax.Array | None
    pred: jax.Array


class ContextAutoencoder(nn.Module):
    """Encoder, latent contextual regressor, decoder and alignment (section 3).

    Attributes:
        encoder: a ViT.
        regressor: predicts latents of masked patches from those of visible ones.
        decoder: predicts targets from latents.
        align: compute the latents that the prediction is compared with.
        decode_all: decode class token and visible patches too (CAE v2).
    """

    encoder: ViT
    regressor: LatentRegressor
    decoder: LatentDecoder
    align: bool = True
    decode_all: bool = False

    def setup(self) -> None:
        """A projection between encoder and regressor, if they differ in width."""
        width, blocks = self.regressor.width, self.regressor.settings
        if self.encoder.width != width:
            xavier = nn.initializers.xavier_uniform()
            self.project = nn.Dense(width, kernel_init=xavier, dtype=blocks.dtype)
            self.project_norm = layer_norm(None, blocks.dtype, blocks.epsilon)

    def position_table(self) -> np.ndarray:
        """The fixed table of regressor and decoder, `[1 + tokens, width]`: row, then column."""
        encoder = self.encoder
        source = encoder.position_grid or encoder.grid
        table = sincos_positions(source, self.regressor.width, leading_tokens=1, row_first=True)
        return resize_positions(table, source, encoder.grid)

    def projected(self, latent: jax.Array) -> jax.Array:
        """Encoder output in the width of the regressor."""
        if self.encoder.width == self.regressor.width:
            return latent
        return self.project_norm(self.project(latent))

    def __call__(
        self,
        images: jax.Array,
        visible: jax.Array,
        masked: jax.Array,
        drop_path_noise: Sequence[Noise] = (None, None, None, None),
    ) -> Prediction:
        """Predicts masked patches of images `[batch, height, width, channels]`.

        Args:
            images: normalized.
            visible: int32 `[batch, visible]`, ids of visible patches in raster order.
            masked: int32 `[batch, masked]`, ids of the others in raster order.
            drop_path_noise: see `Transformer`, for encoder, alignment, regressor and decoder.
        """
        for_encoder, for_alignment, for_regressor, for_decoder = drop_path_noise
        latent, _ = self.encoder(images, visible, for_encoder)
        tokens = self.projected(latent)
        dtype = self.regressor.settings.dtype
        table = jnp.asarray(self.position_table()[1:], dtype)
        positions = jnp.broadcast_to(table, (len(images), *table.shape))
        masked_positions = masking.gather_tokens(positions, masked)
        predicted, states = self.regressor(
            tokens[:, 1:],
            masked_positions,
            masking.gather_tokens(positions, visible),
            for_regressor,
        )
        if self.decode_all:
            decoded = jnp.concatenate([tokens, predicted], axis=1)
        else:
            decoded = predicted + masked_positions
        aligned = None
        if self.align:
            # The paper's target network is this encoder itself, without gradient.
            seen, _ = self.encoder(images, masked, for_alignment)
            aligned = jax.lax.stop_gradient(self.projected(seen)[:, 1:])
        return Prediction(latent, states, predicted, aligned, self.decoder(decoded, for_decoder))

    def encode(self, images: jax.Array) -> jax.Array:
        """Encodes whole images: `[batch, 1 + tokens, width]`, class token first."""
        return self.encoder(images)[0]


@register("cae")
@dataclasses.dataclass(frozen=True)
class CAE(Method):
    """Pre-training by predicting masked patches in the encoder's own representation space.

    Attributes:
        model: encoder, regressor and decoder.
        target: one of `TARGETS`.
        masked: number of masked patches of every image.
        mask: one of `MASKS`.
        min_block: smallest area of a masked rectangle in patches.
        max_block: largest area; 0 for `masked`.
        align_weight: weight of the alignment loss.
        target_weight: weight of the loss on the target.
        normalize_target: predict pixels normalized by mean and variance of their patch.
        tokenizer: gives token ids; None for other targets.
        tower: gives features; None for other targets.
        weights: where those of tokenizer or tower are.
        mean: of each channel of the images.
        std: standard deviation of each channel.
    """

    model: ContextAutoencoder
    target: str
    masked: int
    mask: str = "block"
    min_block: int = 16
    max_block: int = 0
    align_weight: float = 2.0
    target_weight: float = 1.0
    normalize_target: bool = False
    tokenizer: DVAEEncoder | None = None
    tower: Tower | None = None
    weights: str = ""
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    streams: ClassVar[tuple[str, ...]] = ("mask", "drop_path")

    @classmethod
    def build(cls, config: ml_collections.ConfigDict) -> "CAE":
        """Reads `config.model`, `config.compute_dtype`, and `config.data` for images.

        Raises:
            ValueError: for an unknown name, or if image, patch, target and model do not fit
                together.
        """
        model = config.model
        configs.check_choices(model, {"target": TARGETS, "mask": MASKS})
        of_features = model.target == "features"
        if of_features and (model.decoder_depth or model.align_weight):
            raise ValueError(
                "with model.target 'features' (CAE v2) there are neither decoder blocks nor an "
                "alignment branch; set model.decoder_depth and model.align_weight to 0."
            )
        encoder = build_encoder(config, model.drop_path, positions="sincos_row_first")
        blocks_of_encoder = encoder.transformer.clone(**block_fields(model.layer_scale))
        encoder = encoder.clone(transformer=blocks_of_encoder)
        tokens = math.prod(encoder.grid)
        if not 0 < model.masked < tokens:
            raise ValueError(
                f"model.masked is {model.masked}; it must lie between 1 and {tokens - 1}, since an "
                f"image has {tokens} patches."
            )
        tokenizer = tower = None
        if model.target == "tokens":
            outputs, weights = model.tokenizer.vocabulary, model.tokenizer.path
            tokenizer = build_tokenizer(model.tokenizer, config.compute_dtype)
        elif of_features:
            tower, weights = build_tower(model.teacher, config.compute_dtype), model.teacher.path
            check_grid(tower, encoder.grid)
            outputs = tower.outputs or tower.encoder.width
        else:
            outputs, weights = math.prod(encoder.patch_size) * encoder.channels, ""
        width, heads = model.decoder_width, model.decoder_heads

        def blocks(depth: int) -> Transformer:
            fields = block_fields(model.decoder_layer_scale)
            # The official code rounds down where the heads do not divide the width.
            head_width = width // heads if width % heads else None
            return blocks_of(config)(
                depth, heads, drop_path=model.drop_path, head_width=head_width, **fields
            )

        return cls(
            ContextAutoencoder(
                encoder,
                LatentRegressor(width, blocks(model.regressor_depth), final_norm=not of_features),
                LatentDecoder(outputs, blocks(model.decoder_depth)),
                align=model.align_weight > 0,
                decode_all=of_features,
            ),
            target=model.target,
            masked=model.masked,
            mask=model.mask,
            min_block=model.min_block,
            max_block=model.max_block,
            align_weight=model.align_weight,
            target_weight=model.target_weight,
            normalize_target=model.normalize_target,
            tokenizer=tokenizer,
            tower=tower,
            weights=weights,
            mean=tuple(config.data.mean),
            std=tuple(config.data.std),
        )

    @property
    def encoder(self) -> ViT:
        """The encoder."""
        return self.model.encoder

    @property
    def frozen(self) -> tuple[str, ...]:
        """Tokenizer and tower, and the regressor's norm where it is not applied."""
        unused = () if self.model.regressor.final_norm else ("^regressor/norm/",)
        parts = [("tokenizer", self.tokenizer), ("teacher", self.tower)]
        return (*unused, *(f"^{name}/" for name, part in parts if part is not None))

    @property
    def pretrained(self) -> tuple[Pretrained, ...]:
        """Tokenizer or tower."""
        if self.tower is not None:
            return (Pretrained("teacher", self.tower, self.weights),)
        if self.tokenizer is None or self.weights == UNTRAINED:
            return ()
        field = "model.tokenizer.path"
        return (Pretrained("tokenizer", self.tokenizer, self.weights, field),)

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Images of the model's size, and those that tokenizer or tower see, if other ones."""
        encoder = self.encoder
        wanted = {"image": Input((*encoder.image_size, encoder.channels))}
        if self.tokenizer is not None:
            size = (STRIDE * encoder.grid[0], STRIDE * encoder.grid[1])
            wanted["target_image"] = Input((*size, encoder.channels))
        elif self.tower is not None and self.tower.encoder.image_size != encoder.image_size:
            wanted["target_image"] = Input((*self.tower.encoder.image_size, encoder.channels))
        return wanted

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Initial parameters, as those of the official code end up.

        All linear layers are Xavier-uniform without bias; tokens and patch embedding are normal
        of deviation 0.02, cut off at one deviation.
        """
        model, patches, token, frozen = jax.random.split(rng, 4)
        ids = jnp.arange(math.prod(self.encoder.grid))[None]
        visible, masked = ids[:, self.masked :], ids[:, : self.masked]
        images = jnp.zeros((1, *batch["image"].shape[1:]))
        params = dict(self.model.init(model, images, visible, masked)["params"])
        encoder = dict(params["encoder"])
        kernel, cls_token = encoder["patch_embed"]["kernel"], encoder["cls_token"]
        encoder["patch_embed"] = {
            "kernel": SMALL(patches, kernel.shape),
            "bias": jnp.zeros_like(encoder["patch_embed"]["bias"]),
        }
        encoder["cls_token"] = SMALL(token, cls_token.shape)
        params["encoder"] = encoder
        if self.tokenizer is not None:
            seen = jnp.zeros((1, STRIDE, STRIDE, self.tokenizer.channels))
            params["tokenizer"] = self.tokenizer.init(frozen, seen)["params"]
        if self.tower is not None:
            params["teacher"] = initial_params(self.tower, frozen)
        return {"params": params}

    def choose(self, rng: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
        """Ids of visible and of masked patches, `[batch, visible]` and `[batch, masked]`."""
        grid = self.encoder.grid
        tokens = math.prod(grid)
        if self.mask == "random":
            noise = jax.random.uniform(rng, (batch, tokens))
            mask = masking.random_masking(noise, tokens - self.masked).mask
        else:
            mask = masking.block_masking(
                rng,
                batch,
                grid,
                self.masked,
                min_block=self.min_block,
                max_block=self.max_block or None,
            )
        return masking.split_by_mask(mask, self.masked)

    def predict(
        self,
        variables: Variables,
        images: jax.Array,
        visible: jax.Array,
        masked: jax.Array,
        drop_path_noise: Sequence[Noise] = (None, None, None, None),
    ) -> Prediction:
        """One forward pass, see `ContextAutoencoder`."""
        frozen = ("tokenizer", "teacher")
        params = {k: v for k, v in variables["params"].items() if k not in frozen}
        output = self.model.apply({"params": params}, images, visible, masked, drop_path_noise)
        assert isinstance(output, Prediction)
        return output

    def targets(
        self, variables: Variables, batch: Batch, visible: jax.Array, masked: jax.Array
    ) -> jax.Array:
        """What to predict, without gradient.

        Returns:
            Token ids int32 `[batch, masked]`; features `[batch, 1 + visible + masked, outputs]`
            in the order class, visible, masked; or pixels `[batch, masked, values]`.
        """
        images = batch["image"]
        if self.tokenizer is not None:
            ids = token_ids(self.tokenizer, variables["params"]["tokenizer"], batch["target_image"])
            return jnp.take_along_axis(ids, masked, axis=1)
        if self.tower is not None:
            if "target_image" in self.inputs:
                shown = self.tower.inputs(batch["target_image"], (0.0,), (1.0,))
            else:
                shown = self.tower.inputs(images, self.mean, self.std)
            seen = see(self.tower, variables["params"]["teacher"], shown)
            order = jnp.concatenate([visible, masked], axis=1)
            patches = masking.gather_tokens(seen.patches(seen.projected), order)
            prefix = self.tower.encoder.prefix_tokens
            return jnp.concatenate([seen.projected[:, : min(prefix, 1)], patches], axis=1)
        patches = targets.patchify(images.astype(jnp.float32), self.encoder.patch_size)
        if self.normalize_target:
            patches = targets.normalize_patches(patches)
        return masking.gather_tokens(patches, masked)

    def objective(
        self, output: Prediction, target: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss and its terms by name (section 3.2; CAE v2, section 3.3).

        Args:
            output: of `predict`.
            target: of `targets`.
        """
        metrics = {}
        if self.target == "tokens":
            logits, labels = output.pred.reshape(-1, output.pred.shape[-1]), target.reshape(-1)
            main = losses.cross_entropy(logits, labels)
            metrics["mlm_acc"] = jnp.mean(jnp.argmax(logits, axis=-1) == labels)
        elif self.target == "features":
            # A teacher without class token has no row for ours.
            rows = output.pred[:, -target.shape[1] :]
            main = jnp.mean(losses.cosine_distance(rows, target))
        else:
            main = jnp.mean(losses.squared_error(output.pred, target))
        main = self.target_weight * main
        metrics["loss_main"] = main
        if output.aligned is None:
            return main, metrics
        error = losses.squared_error(output.predicted, output.aligned)
        metrics["loss_align"] = self.align_weight * jnp.mean(error)
        return main + metrics["loss_align"], metrics

    def loss(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array], step: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """The objective under a fresh mask, with random branches switched off."""
        images = batch["image"]
        visible, masked = self.choose(rngs["mask"], len(images))
        encoder = self.encoder.transformer
        stacks = (encoder, encoder, self.model.regressor.settings, self.model.decoder.transformer)
        noise = [
            jax.random.uniform(key, (blocks.depth, 2, len(images)))
            for key, blocks in zip(jax.random.split(rngs["drop_path"], len(stacks)), stacks)
        ]
        output = self.predict(variables, images, visible, masked, noise)
        target = self.targets(variables, batch, visible, masked)
        loss, metrics = self.objective(output, target)
        return loss, Aux(metrics)

    def features(self, variables: Variables, batch: Batch) -> Features:
        """Class token and patch tokens of whole images, after the final norm."""
        params = {"encoder": variables["params"]["encoder"]}
        latent: Any = self.model.apply(
            {"params": params}, batch["image"], method=ContextAutoencoder.encode
        )
        return Features(latent[:, 0], latent[:, 1:], self.encoder.grid)

    def pictures(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array]
    ) -> dict[str, Picture]:
        """Image, visible patches and prediction; only pixels can be shown."""
        if self.target != "pixels":
            return {}
        images, encoder = batch["image"].astype(jnp.float32), self.encoder
        visible, masked = self.choose(rngs["mask"], len(images))
        pred = self.predict(variables, images, visible, masked).pred.astype(jnp.float32)
        patches = targets.patchify(images, encoder.patch_size)
        kept, hidden = (masking.gather_tokens(patches, ids) for ids in (visible, masked))
        caption = "Only masked patches are predicted."
        if self.normalize_target:
            pred = targets.denormalize_patches(pred, hidden)
            caption += "\nPredicted patches carry the mean and deviation of the true patches."
        places = jnp.argsort(jnp.concatenate([visible, masked], axis=1), axis=1)

        def picture(filling: jax.Array) -> jax.Array:
            whole = masking.gather_tokens(jnp.concatenate([kept, filling], axis=1), places)
            return targets.unpatchify(whole, encoder.image_size, encoder.patch_size)

        columns = {
            "image": images,
            "visible": picture(jnp.zeros_like(hidden)),
            "prediction + visible": picture(pred),
        }
        return {"reconstruction": Picture(columns, caption)}

    def layout(self) -> layout.Layout:
        """The official pre-training checkpoint; its copy of the encoder may be missing."""
        encoder, regressor, decoder = self.encoder, self.model.regressor, self.model.decoder
        copy = "alignment_encoder."
        copies = () if self.model.decode_all else (copy,)
        project: tuple[layout.Rule, ...] = ()
        if encoder.width != regressor.width:
            project = (
                *layout.linear_rules("encoder_to_regresser", "project"),
                *layout.layer_norm_rules("encoder_to_regresser_norm", "project_norm"),
            )
        rules, ones = regressor_rules("regresser", "regressor", regressor)
        # The copy comes first, so that the encoder itself has the last word.
        return layout.Layout(
            rules=(
                *(
                    rule
                    for key in (*copies, "encoder.")
                    for rule in layout.vit_rules("encoder", encoder, key, layout.CAE)
                ),
                *project,
                layout.Rule("mask_token", "regressor/mask_token"),
                *rules,
                *layout.transformer_rules(
                    "decoder.decoder_blocks",
                    "decoder/transformer",
                    decoder.transformer,
                    regressor.width,
                    layout.CAE,
                ),
                *layout.layer_norm_rules("decoder.norm", "decoder/norm"),
                *layout.linear_rules("decoder.head", "decoder/head"),
            ),
            constants=(
                *(
                    table
                    for key in (*copies, "encoder.")
                    for table in layout.vit_constants(encoder, key)
                ),
                layout.Constant("rd_pos_embed", self.model.position_table()[None]),
                *ones,
            ),
            optional=(r"alignment_encoder\..*",),
        )

    def sized_like(self, state: Mapping[str, np.ndarray], known: Mapping[str, Any]) -> "CAE":
        """A CAE of the sizes of an official checkpoint, whose mask token tells the decoder's."""
        start = "encoder."
        own = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
        if "patch_embed.proj.weight" not in own or "mask_token" not in state:
            raise ValueError(
                "it has no encoder.patch_embed.proj.weight and mask_token, so it is no pre-trained "
                f"CAE; it begins with {', '.join(sorted(state)[:5])}."
            )
        model, width = self.model, len(own["patch_embed.proj.weight"])
        # All sizes but the large one have 12 heads, which no shape tells.
        heads = model.encoder.transformer.heads
        if width != model.encoder.width:
            heads = 16 if width == 1024 else 12
        encoder = encoder_like(own, {"heads": heads, **known}, model.encoder)
        blocks = encoder.transformer
        encoder = encoder.clone(
            transformer=blocks.clone(layer_scale=_scale("blocks.0.gamma_1", own, blocks))
        )
        outputs, width = state["decoder.head.weight"].shape
        old = model.regressor.settings
        heads = old.heads if width == model.regressor.width else 12
        heads = known.get("decoder_heads", heads)
        rows = len(state["regresser.regressor_blocks.0.cross_attn.q.weight"])

        def resized(blocks: Transformer, key: str, gamma: str) -> Transformer:
            depth = _depth(key, state)
            scale = _scale(f"{key}.0.{gamma}", state, blocks) if depth else blocks.layer_scale
            return blocks.clone(
                depth=depth,
                heads=heads,
                head_width=rows // heads if rows != width else None,
                mlp_ratio=encoder.transformer.mlp_ratio,
                layer_scale=scale,
            )

        regressor = resized(old, "regresser.regressor_blocks", "gamma_1_cross")
        decoder = resized(model.decoder.transformer, "decoder.decoder_blocks", "gamma_1")
        fits = 0 < self.masked < math.prod(encoder.grid)
        return dataclasses.replace(
            self,
            model=model.clone(
                encoder=encoder,
                regressor=model.regressor.clone(width=width, settings=regressor),
                decoder=model.decoder.clone(outputs=outputs, transformer=decoder),
            ),
            masked=self.masked if fits else math.prod(encoder.grid) // 2,
        )

    def adopt(self, path: str, given: Mapping[str, np.ndarray], donor: Method) -> np.ndarray | None:
        """Encoders of any method; the other parts of another CAE."""
        if path.startswith("encoder/"):
            return adopt_encoder(path, given, donor, self.encoder)
        if not isinstance(donor, CAE):
            return None
        head = path.startswith("decoder/head/")
        if head and (donor.target, donor.model.decoder.outputs) != (
            self.target,
            self.model.decoder.outputs,
        ):
            return None
        old, new = donor.model.decoder.transformer, self.model.decoder.transformer
        return restacked(path, given, old, new)


def block_fields(layer_scale: float) -> dict[str, Any]:
    """What distinguishes the blocks of CAE from those of MAE, as fields of `Transformer`."""
    return {"qkv_bias": "query_value", "layer_scale": layer_scale or None}


def build_tokenizer(settings: Any, compute_dtype: str) -> DVAEEncoder:
    """The tokenizer of `config.model.tokenizer`; its own `compute_dtype` takes precedence."""
    return DVAEEncoder(
        hidden=settings.hidden,
        blocks_per_group=settings.blocks_per_group,
        vocabulary=settings.vocabulary,
        channels=settings.channels,
        dtype=jnp.dtype(settings.compute_dtype or compute_dtype),
    )


def _depth(key: str, state: Mapping[str, np.ndarray]) -> int:
    numbers = [name.removeprefix(f"{key}.") for name in state if name.startswith(f"{key}.")]
    return 1 + max((int(number.split(".")[0]) for number in numbers), default=-1)


def _scale(key: str, state: Mapping[str, np.ndarray], like: Transformer) -> float | None:
    """The layer scale of blocks that train one in a file; its value is that of the template."""
    if key not in state or np.all(state[key] == 1):  # the regressor's fixed ones
        return None
    return like.layer_scale or 1.0
