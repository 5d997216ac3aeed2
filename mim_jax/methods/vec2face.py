"""Vec2Face: Scaling Face Dataset Generation with Loosely Constrained Vectors (Wu et al., 2025).

"Official" is the authors' code, which differs from the paper in places.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mim_jax import layout, losses
from mim_jax.generation.identities import perturbed
from mim_jax.layout import vec2face as tables
from mim_jax.masking import MaskRate, NestedMasking, nested_masking, rounded_up
from mim_jax.method import (
    Aux,
    Batch,
    Features,
    Group,
    Input,
    Method,
    Picture,
    Pretrained,
    Variables,
    register,
)
from mim_jax.methods.parts.encoders import blocks_of
from mim_jax.models.face_tokens import FaceTokens, FeatureMaskedAutoencoder
from mim_jax.models.image_decoder import ImageDecoder
from mim_jax.models.iresnet import IResNet, iresnet_blocks
from mim_jax.models.lpips import LPIPS
from mim_jax.models.patch_discriminator import PatchDiscriminator
from mim_jax.models.transformer import DROPOUT, restacked

SIZES: dict[str, dict[str, int]] = {
    "base": dict(width=768, depth=12, heads=12),
    "large": dict(width=1024, depth=24, heads=16),
    "huge": dict(width=1280, depth=32, heads=16),
}
"""The encoder; the decoder always has its width, 8 blocks and 16 heads."""

TRAINING_MASK, GENERATION_MASK = MaskRate(0.5, 1.0, 0.75), MaskRate(0.1, 1.0, 0.15)
"""Shares of masked tokens, as the official scripts draw them."""

PICTURE_SIGMAS = (0.3, 0.7)
"""Noise on the vectors of the pictures."""

Image = jax.Array


class Generated(NamedTuple):
    """What one forward pass of the generator computes.

    Attributes:
        tokens: see `FaceTokens`.
        projected: `[batch, rows, columns, inputs]`, what the image decoder sees.
        before_image: what its last convolution sees.
        image: `[batch, height, width, channels]`, not clipped.
    """

    tokens: FaceTokens
    projected: jax.Array
    before_image: jax.Array
    image: Image


class FaceGenerator(nn.Module):
    """From a vector to tokens, and from tokens to an image.

    Attributes:
        tokens: the feature masked autoencoder.
        image_decoder: the convolutional decoder.
        inputs: channels of what it sees.
    """

    tokens: FeatureMaskedAutoencoder
    image_decoder: ImageDecoder
    inputs: int = 256

    def setup(self) -> None:
        """The projection between both."""
        self.projection = nn.Dense(
            self.inputs,
            kernel_init=nn.initializers.xavier_uniform(),
            dtype=self.image_decoder.dtype,
        )

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        rows, columns = self.tokens.grid
        return rows * self.image_decoder.upscale, columns * self.image_decoder.upscale

    def __call__(self, vectors: jax.Array, masking: NestedMasking) -> Generated:
        """Generates images of vectors `[batch, size]`."""
        tokens = self.tokens(vectors, masking)
        grid = (len(vectors), *self.tokens.grid, -1)
        projected = self.projection(tokens.logits[:, 1:]).reshape(grid)
        before = self.image_decoder.before_image(projected)
        return Generated(tokens, projected, before, self.image_decoder.image(before))

    def encode(self, vectors: jax.Array) -> jax.Array:
        """Encoder output of all tokens, `[batch, 1 + tokens, width]`, nothing masked."""
        return self.tokens(vectors).latent


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Factors of the terms of the generator's loss, by what they compare.

    Attributes:
        perceptual: of twice LPIPS; 0 leaves that network away.
        structure: of 1 - SSIM.
        tokens: of the error of predicted tokens.
        identity: of the distance between the vector and the face model's of the image.
        adversarial: of what the discriminator says; 0 leaves it away.
        adaptive: multiply the latter by the ratio of gradient norms at the last convolution, as
            VQGAN does.
    """

    perceptual: float = 0.1
    structure: float = 0.1
    tokens: float = 1.0
    identity: float = 1.0
    adversarial: float = 1.0
    adaptive: bool = False


@register("vec2face")
@dataclasses.dataclass(frozen=True)
class Vec2Face(Method):
    """A generator of faces from vectors of a face model, trained to give the vector's image back.

    Attributes:
        generator: vector to image.
        face_model: gives the vector of an image; frozen.
        discriminator: judges patches; None without an adversarial term.
        perceptual: LPIPS; None without that term.
        weights: of the terms of the loss.
        mask_rate: distribution of the share of masked tokens in training.
        generation_mask: the same where images are generated.
        discriminator_start: step at which the adversarial terms set in.
        leak_generator_gradient: let the generator's adversarial term reach the discriminator's
            gradient too, as the official loop does by never clearing it.
        face_model_path: where the weights of the face model are.
        perceptual_path: where those of LPIPS are.
    """

    generator: FaceGenerator
    face_model: IResNet
    discriminator: PatchDiscriminator | None = None
    perceptual: LPIPS | None = None
    weights: LossWeights = LossWeights()
    mask_rate: MaskRate = TRAINING_MASK
    generation_mask: MaskRate = GENERATION_MASK
    discriminator_start: int = 0
    leak_generator_gradient: bool = False
    face_model_path: str = ""
    perceptual_path: str = ""

    streams: ClassVar[tuple[str, ...]] = ("mask", DROPOUT)

    @classmethod
    def build(cls, config: ml_collections.ConfigDict) -> "Vec2Face":
        """Reads `config.model`, `config.compute_dtype` and the images of `config.data`.

        Raises:
            ValueError: if the images do not fit the image decoder, or their values do not lie in
                [-1, 1].
        """
        model, data = config.model, config.data
        dtype = jnp.dtype(config.compute_dtype)
        if set(data.mean) != {0.5} or set(data.std) != {0.5}:
            raise ValueError(
                f"data.mean is {tuple(data.mean)} and data.std {tuple(data.std)}; the face model "
                "and this method need values in [-1, 1], so set both to 0.5 for every channel."
            )
        decoder = ImageDecoder(
            data.channels,
            tuple(model.image_decoder_widths),
            model.image_decoder_blocks,
            model.image_decoder_groups,
            model.official_shortcut,
            dtype,
        )
        rows, columns = data.image_size
        if rows % decoder.upscale or columns % decoder.upscale:
            raise ValueError(
                f"data.image_size is {tuple(data.image_size)}; {len(decoder.widths)} levels in "
                f"model.image_decoder_widths make {decoder.upscale} x {decoder.upscale} pixels of "
                "a token, so both sides must be multiples of that."
            )
        size = {**SIZES.get(model.size, {})}
        size |= {k: model[k] for k in ("width", "depth", "heads") if model[k]}
        if set(size) != {"width", "depth", "heads"}:
            raise ValueError(
                f"model.size is {model.size!r}; known are {', '.join(SIZES)}. Or set model.width, "
                "model.depth and model.heads."
            )
        # The official blocks compute in float32 even where everything else has half precision.
        blocks = blocks_of(config)
        fields = dict(dtype=jnp.promote_types(dtype, jnp.float32), dropout=model.dropout)
        tokens = FeatureMaskedAutoencoder(
            (rows // decoder.upscale, columns // decoder.upscale),
            size["width"],
            blocks(size["depth"], size["heads"], **fields),
            blocks(model.decoder_depth, model.decoder_heads, **fields),
            model.dropout,
            data.channels,
        )
        face = model.face_model
        weights = LossWeights(**model.loss_weights)
        return cls(
            FaceGenerator(tokens, decoder, model.image_decoder_inputs),
            IResNet(
                (rows, columns),
                data.channels,
                tuple(face.blocks) or iresnet_blocks(face.size),
                tuple(face.widths),
                face.outputs,
                dtype,
            ),
            discriminator=PatchDiscriminator(
                tuple(model.discriminator_widths), model.discriminator_groups, dtype
            )
            if weights.adversarial
            else None,
            perceptual=LPIPS(dtype=dtype) if weights.perceptual else None,
            weights=weights,
            mask_rate=MaskRate(*model.mask_rate),
            generation_mask=MaskRate(*model.generation_mask),
            discriminator_start=model.discriminator_start,
            leak_generator_gradient=model.leak_generator_gradient,
            face_model_path=face.path,
            perceptual_path=model.perceptual_path,
        )

    @property
    def groups(self) -> tuple[Group, ...]:  # type: ignore[override]
        """The discriminator has an optimizer of its own, whose rate never changes (official)."""
        if self.discriminator is None:
            return ()
        own = {"constant_rate": True, "clip_alone": True}
        return (Group("discriminator", "^discriminator/", own),)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Face model, LPIPS, and the layers that nothing calls."""
        parts = ("face_model/", *(("perceptual/",) if self.perceptual is not None else ()))
        return (*(f"^{part}" for part in parts), "^generator/tokens/unused_")

    @property
    def pretrained(self) -> tuple[Pretrained, ...]:
        """Face model and LPIPS."""
        face = Pretrained(
            "face_model", self.face_model, self.face_model_path, "model.face_model.path"
        )
        if self.perceptual is None:
            return (face,)
        field = "model.perceptual_path"
        return face, Pretrained("perceptual", self.perceptual, self.perceptual_path, field)

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Images of the model's size.

        Where a batch has an entry `feature`, `[batch, size]`, it takes the place of the face
        model's vector of the image.
        """
        return {"image": Input((*self.face_model.image_size, self.face_model.channels))}

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Initial parameters.

        All of the frozen networks is among the parameters, the running statistics of the face
        model too: they never change.
        """
        generator, face, discriminator, perceptual = jax.random.split(rng, 4)
        images = jnp.zeros((1, *batch["image"].shape[1:]))
        vectors = jnp.zeros((1, self.face_model.outputs))
        masking = self.masks(self.mask_rate, jnp.zeros((1, self.tokens)), jnp.zeros(()))
        frozen = self.face_model.init(face, images)
        params = {
            "generator": self.generator.init(generator, vectors, masking)["params"],
            "face_model": jax.tree.map(lambda x: x.astype(jnp.float32), dict(frozen)),
        }
        if self.discriminator is not None:
            params["discriminator"] = self.discriminator.init(discriminator, images)["params"]
        if self.perceptual is not None:
            params["perceptual"] = self.perceptual.init(perceptual, images, images)["params"]
        return {"params": params}

    @property
    def tokens(self) -> int:
        """Number of tokens, without that of the vector itself."""
        return self.generator.tokens.tokens

    def masks(self, rate: MaskRate, noise: jax.Array, uniform: jax.Array) -> NestedMasking:
        """The masking of a batch.

        Args:
            rate: distribution of the share of masked tokens.
            noise: `[batch, tokens]`, uniform in [0, 1); the tokens of smallest noise are masked.
            uniform: quantile of the share, one for the whole batch.
        """
        return self.masks_of_share(rate, noise, rate.draw(uniform))

    def masks_of_share(self, rate: MaskRate, noise: jax.Array, share: jax.Array) -> NestedMasking:
        """The masking of a batch for a given share of masked tokens."""
        dropped = rate.smallest(self.tokens)
        masked = jnp.maximum(dropped, rounded_up(share, self.tokens))
        return nested_masking(noise, dropped, masked)

    def draw_masks(self, rate: MaskRate, rng: jax.Array, batch: int) -> NestedMasking:
        """A random masking of a batch: every image its own, of the same number of tokens."""
        for_noise, for_share = jax.random.split(rng)
        noise = jax.random.uniform(for_noise, (batch, self.tokens))
        return self.masks(rate, noise, jax.random.uniform(for_share))

    def forward(
        self,
        variables: Variables,
        vectors: jax.Array,
        masking: NestedMasking,
        rngs: Mapping[str, jax.Array] | None = None,
    ) -> Generated:
        """One forward pass of the generator; dropout only where `rngs` has its stream."""
        params = {"params": variables["params"]["generator"]}
        output: Any = self.generator.apply(params, vectors, masking, rngs=dict(rngs or {}))
        return output

    def face_features(self, variables: Variables, images: Image) -> jax.Array:
        """Vectors of the face model, float32 `[batch, size]`, not normalized.

        Args:
            variables: of the method.
            images: `[batch, height, width, channels]`, values in [-1, 1].
        """
        features: Any = self.face_model.apply(variables["params"]["face_model"], images)
        return features

    def generate(self, variables: Variables, vectors: jax.Array, rng: jax.Array) -> Image:
        """Images `[batch, height, width, channels]` of vectors `[batch, size]`, in [-1, 1].

        Tokens stay masked, as `generation_mask` says, so two keys give two images of a vector.
        """
        masking = self.draw_masks(self.generation_mask, rng, len(vectors))
        return jnp.clip(self.forward(variables, vectors, masking).image, -1, 1)

    def nll(
        self,
        variables: Variables,
        images: Image,
        vectors: jax.Array,
        target: jax.Array,
        logits: jax.Array,
        generated: Image,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """All terms of the generator's loss but the adversarial one, and their weighted sum.

        Args:
            variables: of the method.
            images: the true ones.
            vectors: what the images were generated from.
            target: tokens before masking.
            logits: predicted tokens.
            generated: the generated images.
        """
        weights = self.weights
        terms = {
            "rec_loss": jnp.mean(losses.squared_error(generated, images)),
            "token_loss": jnp.mean(losses.squared_error(logits[:, 1:], target[:, 1:])),
        }
        features = self.face_features(variables, generated)
        terms["feature_loss"] = jnp.mean(losses.cosine_distance(features, vectors))
        total = (
            terms["rec_loss"]
            + weights.tokens * terms["token_loss"]
            + weights.identity * terms["feature_loss"]
        )
        if weights.structure:
            similarity = losses.structural_similarity((generated + 1) / 2, (images + 1) / 2)
            terms["ssim_loss"] = 1 - similarity
            total += weights.structure * terms["ssim_loss"]
        if self.perceptual is not None:
            params = {"params": variables["params"]["perceptual"]}
            distance: Any = self.perceptual.apply(params, generated, images)
            terms["p_loss"] = 2 * jnp.mean(distance)
            total += weights.perceptual * terms["p_loss"]
        return total, terms

    def objective(
        self,
        variables: Variables,
        images: Image,
        vectors: jax.Array,
        output: Generated,
        step: jax.Array,
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """The losses of generator and discriminator, and their terms by name.

        The gradient of the generator's is cut off from the discriminator, unless
        `leak_generator_gradient`, and that of the discriminator's from the generator; so both
        networks learn from one sum.

        Args:
            variables: of the method.
            images: the true ones.
            vectors: what the images were generated from.
            output: of the generator.
            step: of the run.
        """

        def nll_of(generated: Image) -> tuple[jax.Array, dict[str, jax.Array]]:
            tokens = output.tokens
            return self.nll(variables, images, vectors, tokens.target, tokens.logits, generated)

        nll, metrics = nll_of(output.image)
        metrics["nll"] = nll
        if self.discriminator is None:
            return nll, jnp.zeros(()), metrics
        judge, params = self.discriminator, variables["params"]["discriminator"]
        judging = params if self.leak_generator_gradient else jax.lax.stop_gradient(params)

        def g_loss_of(generated: Image) -> jax.Array:
            logits: Any = judge.apply({"params": judging}, generated)
            return -jnp.mean(logits)

        started = jnp.where(step >= self.discriminator_start, 1.0, 0.0)
        g_loss = g_loss_of(output.image)
        weight = jnp.asarray(self.weights.adversarial)
        if self.weights.adaptive:
            ratio = self._gradient_ratio(
                variables, output, lambda image: nll_of(image)[0], g_loss_of
            )
            weight = weight * ratio
        ae_loss = nll + weight * started * g_loss
        fake: Any = judge.apply({"params": params}, jax.lax.stop_gradient(output.image))
        real: Any = judge.apply({"params": params}, images)
        d_loss = started * 0.5 * (jnp.mean((real - 1) ** 2) + jnp.mean(fake**2))
        metrics |= {"g_loss": g_loss, "d_weight": weight, "ae_loss": ae_loss, "d_loss": d_loss}
        return ae_loss, d_loss, metrics

    def _gradient_ratio(
        self,
        variables: Variables,
        output: Generated,
        nll_of: Callable[[Image], jax.Array],
        g_loss_of: Callable[[Image], jax.Array],
    ) -> jax.Array:
        """|gradient of nll| / |gradient of g_loss| at the last convolution (VQGAN, equation 7)."""
        params = variables["params"]["generator"]["image_decoder"]
        # What the ratio weighs must not move it.
        params, before = jax.lax.stop_gradient((params, output.before_image))
        decoder = self.generator.image_decoder

        def image(kernel: jax.Array) -> Image:
            last = {**params["conv_out"], "kernel": kernel}
            shown: Any = decoder.apply(
                {"params": {**params, "conv_out": last}}, before, method=ImageDecoder.image
            )
            return shown

        kernel = params["conv_out"]["kernel"]
        shown, pull = jax.vjp(image, kernel)
        norms = [
            jnp.linalg.norm(jnp.ravel(pull(jax.grad(loss)(shown))[0]))
            for loss in (nll_of, g_loss_of)
        ]
        return jax.lax.stop_gradient(jnp.clip(norms[0] / (norms[1] + 1e-4), 0, 1e4))

    def loss(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array], step: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """Sum of both losses under a fresh mask, see `objective`."""
        images = batch["image"].astype(jnp.float32)
        vectors = jax.lax.stop_gradient(self.vectors(variables, batch))
        masking = self.draw_masks(self.mask_rate, rngs["mask"], len(images))
        output = self.forward(variables, vectors, masking, {DROPOUT: rngs[DROPOUT]})
        ae_loss, d_loss, metrics = self.objective(variables, images, vectors, output, step)
        return ae_loss + d_loss, Aux(metrics)

    def vectors(self, variables: Variables, batch: Batch) -> jax.Array:
        """What images are generated from: `feature` of the batch, or the face model's vectors."""
        if "feature" in batch:
            return batch["feature"].astype(jnp.float32)
        return self.face_features(variables, batch["image"])

    def features(self, variables: Variables, batch: Batch) -> Features:
        """Encoder output of all tokens, nothing masked; pooled is that of the vector itself."""
        params = {"params": variables["params"]["generator"]}
        latent: Any = self.generator.apply(
            params, self.vectors(variables, batch), method=FaceGenerator.encode
        )
        return Features(latent[:, 0], latent[:, 1:], self.generator.tokens.grid)

    def pictures(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array]
    ) -> dict[str, Picture]:
        """Images beside those generated from their vectors, and from vectors with noise."""
        images = batch["image"].astype(jnp.float32)
        vectors = self.vectors(variables, batch)
        for_noise, rng = jax.random.split(rngs["mask"])
        columns = {"image": images, "generated": self.generate(variables, vectors, rng)}
        noise = jax.random.normal(for_noise, vectors.shape)
        for sigma in PICTURE_SIGMAS:
            moved = perturbed(vectors, sigma * noise)
            columns[f"noise {sigma}"] = self.generate(variables, moved, rng)
        caption = "Generated from the face model's vector alone, and with noise on it."
        return {"faces": Picture(columns, caption)}

    def layout(self) -> layout.Layout:
        """The official training state: generator, and discriminator where it is there."""
        generator, key = self.generator, "model_vec2face."
        rules = [
            *tables.token_rules(key, "generator/tokens", generator.tokens),
            *layout.linear_rules(f"{key}im_decoder_proj", "generator/projection"),
            *tables.image_decoder_rules(
                f"{key}im_decoder.", "generator/image_decoder", generator.image_decoder
            ),
        ]
        if self.discriminator is not None:
            rules += tables.discriminator_rules("model_disc.", "discriminator", self.discriminator)
        return layout.Layout(
            tuple(rules),
            (tables.position_ids(key, generator.tokens),),
            optional=(r"model_disc\..*",),
            unused=(r"model_disc\..*",) if self.discriminator is None else (),
        )

    def sized_like(self, state: Mapping[str, np.ndarray], known: Mapping[str, Any]) -> "Vec2Face":
        """A Vec2Face of the sizes of an official training state."""
        return _resized(self, state, known)

    def adopt(self, path: str, given: Mapping[str, np.ndarray], donor: Method) -> np.ndarray | None:
        """Parameters of another Vec2Face."""
        if not isinstance(donor, Vec2Face):
            return None
        old, new = donor.generator.tokens, self.generator.tokens
        blocks = (old.decoder, new.decoder) if "/decoder/" in path else (old.encoder, new.encoder)
        return restacked(path, given, *blocks)


def _resized(
    method: Vec2Face, state: Mapping[str, np.ndarray], known: Mapping[str, Any]
) -> Vec2Face:
    """See `Vec2Face.sized_like`."""
    start = "model_vec2face."
    own = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
    needed = ("latent_prior_proj_f.weight", "feature_token.weight", "im_decoder.conv_out.weight")
    if any(key not in own for key in needed):
        raise ValueError(
            f"it has no {', '.join(start + key for key in needed)}, so it is no training state of "
            f"Vec2Face; it begins with {', '.join(sorted(state)[:5])}."
        )

    def count(key: str, among: Mapping[str, np.ndarray] = own) -> int:
        numbers = [k.removeprefix(f"{key}.") for k in among if k.startswith(f"{key}.")]
        return 1 + max((int(number.split(".")[0]) for number in numbers), default=-1)

    width, size = own["latent_prior_proj_f.weight"].shape
    old = method.generator
    # No shape tells the heads; those of all published sizes are 64 wide.
    same = width == old.tokens.width
    heads = known.get("heads", old.tokens.encoder.heads if same else max(1, width // 64))
    decoder_heads = known.get("decoder_heads", old.tokens.decoder.heads)
    channels = len(own["im_decoder.conv_out.weight"])
    levels = range(count("im_decoder.up"))
    decoder = old.image_decoder.clone(
        channels=channels,
        widths=tuple(len(own[f"im_decoder.up.{i}.block.0.conv1.weight"]) for i in levels),
        blocks=count("im_decoder.up.0.block"),
    )
    side = round(len(own["feature_token.weight"]) ** 0.5)
    tokens = old.tokens.clone(
        grid=old.tokens.grid if len(own["feature_token.weight"]) == method.tokens else (side, side),
        width=width,
        encoder=old.tokens.encoder.clone(depth=count("blocks"), heads=heads),
        decoder=old.tokens.decoder.clone(depth=count("decoder_blocks"), heads=decoder_heads),
        channels=channels,
    )
    generator = old.clone(
        tokens=tokens, image_decoder=decoder, inputs=len(own["im_decoder_proj.weight"])
    )
    face = method.face_model.clone(image_size=generator.image_size, channels=channels, outputs=size)
    discriminator, start = method.discriminator, "model_disc."
    judge = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
    if discriminator is not None and judge:
        stem = sum(len(judge[f"layers.0.0.convs.{i}.weight"]) for i in range(3))
        stages = range(1, count("layers", judge))
        widths = (stem, *(len(judge[f"layers.{i}.0.weight"]) for i in stages))
        discriminator = discriminator.clone(widths=widths)
    return dataclasses.replace(
        method, generator=generator, face_model=face, discriminator=discriminator
    )
