"""Fine-tuning a pre-trained ViT as a classifier (MAE, appendix A.1, and its official code)."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mim_jax import layout, losses
from mim_jax.data.mixing import Mixing, random_erasing
from mim_jax.method import Aux, Batch, Features, Input, Method, Variables, register
from mim_jax.methods.mae import adopt_encoder, build_encoder, encoder_like
from mim_jax.models.transformer import layer_norm
from mim_jax.models.vit import ViT

POOLS = ("mean", "cls")
"""Mean of the patch tokens with a norm of its own, or the class token after the final norm."""

LABELS = ("single", "multi")
"""One class for each image, or any number of them."""


class Classifier(nn.Module):
    """A ViT and a linear layer.

    Attributes:
        encoder: a ViT; it has a final norm only if the class token is used.
        num_classes: number of logits.
        pool: one of `POOLS`.
    """

    encoder: ViT
    num_classes: int
    pool: str

    def setup(self) -> None:
        """Names the parts: `encoder`, `fc_norm` (mean of the patches only) and `head`."""
        if self.pool == "mean":
            self.fc_norm = layer_norm(None, self.encoder.transformer.dtype)
        self.head = nn.Dense(
            self.num_classes, kernel_init=nn.initializers.truncated_normal(2e-5), dtype=jnp.float32
        )

    def tokens(self, images: jax.Array, drop_path_noise: jax.Array | None = None) -> jax.Array:
        """The encoder's output `[batch, 1 + tokens, width]`, class token first."""
        return self.encoder(images, drop_path_noise=drop_path_noise)[0]

    def pooled(self, tokens: jax.Array) -> jax.Array:
        """What the linear layer sees, `[batch, width]`."""
        return self.fc_norm(tokens[:, 1:].mean(axis=1)) if self.pool == "mean" else tokens[:, 0]

    def __call__(self, images: jax.Array, drop_path_noise: jax.Array | None = None) -> jax.Array:
        """Logits `[batch, classes]`, float32, of images `[batch, height, width, channels]`."""
        logits = self.head(self.pooled(self.tokens(images, drop_path_noise)))
        assert isinstance(logits, jax.Array)
        return logits

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Pooled representation `[batch, width]` and patch tokens `[batch, tokens, width]`."""
        tokens = self.tokens(images)
        return self.pooled(tokens), tokens[:, 1:]


@register("finetune")
@dataclasses.dataclass(frozen=True)
class FineTune(Method):
    """A classifier trained end to end, with layer-wise learning rates.

    Attributes:
        model: encoder and linear layer.
        labels: one of `LABELS`.
        layer_decay: factor on the learning rate from one layer to the one below it.
        mixing: mixup, cutmix and label smoothing.
        erasing: probability that a box of an image is replaced by noise.
    """

    model: Classifier
    labels: str = "single"
    layer_decay: float = 1.0
    mixing: Mixing = dataclasses.field(default_factory=Mixing)
    erasing: float = 0.0

    streams: ClassVar[tuple[str, ...]] = ("drop_path", "mixing", "erasing")
    no_decay: ClassVar[tuple[str, ...]] = (r"encoder/positions$", r"encoder/cls_token$")

    @classmethod
    def build(cls, config: ml_collections.ConfigDict) -> "FineTune":
        """Reads `config.model`, `config.compute_dtype`, and size and channels from `config.data`.

        Raises:
            ValueError: if image, patch and model size do not fit together, the number of classes
                is unknown, or a name is.
        """
        model = config.model
        if model.num_classes < 1:
            raise ValueError(
                f"model.num_classes is {model.num_classes}, and no labelled data tell it: set it."
            )
        labels = model.labels or "single"  # left open, and no data at hand
        for field, value, known in (("pool", model.pool, POOLS), ("labels", labels, LABELS)):
            if value not in known:
                raise ValueError(f"model.{field} is {value!r}; known are {', '.join(known)}.")
        encoder = build_encoder(
            config, model.drop_path, positions="learned", final_norm=model.pool == "cls"
        )
        return cls(
            Classifier(encoder, model.num_classes, model.pool),
            labels,
            model.layer_decay,
            Mixing(
                mixup=model.mixup,
                cutmix=model.cutmix,
                cutmix_probability=model.cutmix_probability,
                smoothing=model.smoothing,
            ),
            model.erasing,
        )

    @property
    def encoder(self) -> ViT:
        """The encoder."""
        return self.model.encoder

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Images of the model's size, and a class, or a 0 or 1 for each class."""
        shape = (self.model.num_classes,) if self.labels == "multi" else ()
        return {
            "image": Input((*self.encoder.image_size, self.encoder.channels)),
            "label": Input(shape, "int"),
        }

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Initial parameters of encoder and linear layer."""
        return self.model.init(rng, jnp.zeros((1, *batch["image"].shape[1:])))

    def logits(
        self, variables: Variables, images: jax.Array, drop_path_noise: jax.Array | None = None
    ) -> jax.Array:
        """Logits `[batch, classes]`, float32; see `Classifier`."""
        logits = self.model.apply(variables, images, drop_path_noise)
        assert isinstance(logits, jax.Array)
        return logits

    def objective(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
        """Cross-entropy with soft targets, or a binary one for each class of multi-label data."""
        if self.labels == "multi":
            return losses.binary_cross_entropy(logits, targets)
        return losses.soft_cross_entropy(logits, targets)

    def loss(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array], step: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """The objective on erased and mixed images, with random branches switched off."""
        images = random_erasing(rngs["erasing"], batch["image"], self.erasing)
        images, targets = self.mixing(
            rngs["mixing"], images, batch["label"], self.model.num_classes
        )
        blocks = self.encoder.transformer
        noise = jax.random.uniform(rngs["drop_path"], (blocks.depth, 2, len(images)))
        logits = self.logits(variables, images, noise)
        metrics = {}
        if self.labels == "single":
            # Against the class that has the larger part of a mixed image.
            metrics["top1"] = jnp.mean(jnp.argmax(logits, 1) == jnp.argmax(targets, 1))
        return self.objective(logits, targets), Aux(metrics)

    def features(self, variables: Variables, batch: Batch) -> Features:
        """What the linear layer sees, and the patch tokens."""
        encoded: Any = self.model.apply(variables, batch["image"], method=Classifier.encode)
        pooled, tokens = encoded
        return Features(pooled, tokens, self.encoder.grid)

    def rate_scale(self, path: str, shape: tuple[int, ...]) -> float | np.ndarray:
        """`layer_decay` to the power of the layers above (official `util/lr_decay.py`)."""
        depth = self.encoder.transformer.depth
        if path.startswith("encoder/transformer/blocks/"):
            above = depth - np.arange(depth).reshape(-1, *(1,) * (len(shape) - 1))
            return (self.layer_decay**above).astype(np.float32)
        return float(self.layer_decay ** (depth + 1 - self.layer_of(path)))

    def layer_of(self, path: str) -> int:
        """0 for what embeds patches, i + 1 for block i, and depth + 1 for norms and classifier."""
        block = re.match(r"encoder/transformer/blocks_(\d+)/", path)
        if block:
            return int(block[1]) + 1
        embeds = re.match(r"encoder/(cls_token|positions|patch_embed)\b", path)
        return 0 if embeds else self.encoder.transformer.depth + 1

    def layout(self) -> layout.Layout:
        """The official fine-tuned checkpoint; reads a pre-trained one too, without its decoder."""
        norms = layout.layer_norm_rules("fc_norm", "fc_norm") if self.model.pool == "mean" else ()
        return layout.Layout(
            rules=(
                *layout.vit_rules("encoder", self.encoder),
                *norms,
                *layout.linear_rules("head", "head"),
            ),
            optional=(r"head\..*", r"fc_norm\..*"),
            unused=(r"decoder_.*|mask_token", r"norm\..*"),
        )

    def sized_like(self, state: Mapping[str, np.ndarray], known: Mapping[str, Any]) -> "FineTune":
        """A classifier of the sizes of an official checkpoint, fine-tuned or pre-trained."""
        classes = len(state["head.weight"]) if "head.weight" in state else self.model.num_classes
        model = self.model.clone(
            encoder=encoder_like(state, known, self.encoder), num_classes=classes
        )
        return dataclasses.replace(self, model=model)

    def adopt(self, path: str, given: Mapping[str, np.ndarray], donor: Method) -> np.ndarray | None:
        """Encoders of any method; norm and linear layer of a classifier of the same classes."""
        if path.startswith("encoder/"):
            return adopt_encoder(path, given, donor, self.encoder)
        other_classes = (
            isinstance(donor, FineTune) and donor.model.num_classes != self.model.num_classes
        )
        return None if other_classes and path.startswith("head/") else given.get(path)
