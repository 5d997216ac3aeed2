"""Fine-tuning a pre-trained encoder as a classifier, end to end.

The recipe of MAE (appendix A.1, and its official code), which the methods after it share, with
what they add: relative position bias and layer scale (CAE), convolutional stages (ConvMAE, DMJD),
attention with bounded logits and a transformer block as pooling head (Locality Alignment).
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mim_jax import layout, losses
from mim_jax.data.mixing import Mixing, random_erasing
from mim_jax.layout.conv_vit import conv_vit_constants, conv_vit_rules
from mim_jax.method import Aux, Batch, Features, Input, Method, Variables, register
from mim_jax.methods.parts.encoders import (
    adopt_encoder,
    build_conv_vit,
    build_encoder,
    conv_encoder_of,
    conv_vit_like,
    encoder_like,
)
from mim_jax.models import conv_vit
from mim_jax.models.conv_vit import ConvViT
from mim_jax.models.pooling import TransformerPool, pooling_blocks
from mim_jax.models.tower import FAMILIES
from mim_jax.models.transformer import Transformer, layer_norm, relative_position_index
from mim_jax.models.vit import ViT

ENCODERS = ("vit", "conv_vit")
"""A plain ViT, or ConvMAE's hybrid encoder."""

POOLS = ("mean", "cls", "block")
"""Mean of the patch tokens with a norm of its own; the class token after the final norm; or a
`TransformerPool` on all tokens after that norm, and the mean of what it gives."""

LABELS = ("single", "multi")
"""One class for each image, or any number of them."""


PRETRAINING = (
    # Decoders and mask tokens, heads of DMJD and MR-MAE, ConvMAE's fusion, MaskAlign's adaptors.
    r"decoder_.*|mask_token|proj_embed\..*|predictor\..*|mimic_head\..*",
    r"stage\d_output_decode\..*|distill_.*",
    # Teachers.
    r"(teacher|clip_model|dino_model)\..*",
    r"norm\..*",
)
"""Keys of pre-training checkpoints that a classifier has no place for."""


class Classifier(nn.Module):
    """An encoder, a pool and a linear layer.

    Attributes:
        encoder: a ViT or a hybrid encoder; it has no final norm under the pool "mean".
        num_classes: number of logits.
        pool: one of `POOLS`.
    """

    encoder: ViT | ConvViT
    num_classes: int
    pool: str

    def setup(self) -> None:
        """Names the parts: `encoder`, `fc_norm` or `block_pool` if the pool has it, `head`."""
        blocks = self.encoder.transformer
        if self.pool == "mean":
            self.fc_norm = layer_norm(None, blocks.dtype, blocks.epsilon)
        if self.pool == "block":
            self.block_pool = TransformerPool(pool_of(blocks))
        self.head = nn.Dense(
            self.num_classes, kernel_init=nn.initializers.truncated_normal(2e-5), dtype=jnp.float32
        )

    @property
    def depth(self) -> int:
        """Number of blocks, convolutional ones included."""
        encoder = self.encoder
        return encoder.depth if isinstance(encoder, ConvViT) else encoder.transformer.depth

    def tokens(self, images: jax.Array, drop_path_noise: jax.Array | None = None) -> jax.Array:
        """The encoder's output `[batch, prefix + tokens, width]`, class token first."""
        return self.encoder(images, drop_path_noise=drop_path_noise)[0]

    def pooled(self, tokens: jax.Array) -> jax.Array:
        """What the linear layer sees, `[batch, width]`."""
        if self.pool == "mean":
            return self.fc_norm(tokens[:, self.encoder.prefix_tokens :].mean(axis=1))
        return self.block_pool(tokens).mean(axis=1) if self.pool == "block" else tokens[:, 0]

    def __call__(self, images: jax.Array, drop_path_noise: jax.Array | None = None) -> jax.Array:
        """Logits `[batch, classes]`, float32, of images `[batch, height, width, channels]`."""
        logits = self.head(self.pooled(self.tokens(images, drop_path_noise)))
        assert isinstance(logits, jax.Array)
        return logits

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Pooled representation `[batch, width]` and patch tokens `[batch, tokens, width]`."""
        tokens = self.tokens(images)
        return self.pooled(tokens), tokens[:, self.encoder.prefix_tokens :]


def pool_of(blocks: Transformer) -> Transformer:
    """The one block of the pool "block", on tokens that come from given blocks."""
    return pooling_blocks(
        blocks.heads,
        dtype=blocks.dtype,
        attention=blocks.attention,
        mlp_ratio=blocks.mlp_ratio,
    )


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
        takes_norm: `fc_norm` starts from the final norm of the pre-trained encoder (CAE).
        key_prefix: of the encoder's keys in the checkpoint that `layout` is for.
        norm_key: what that checkpoint calls `fc_norm`.
    """

    model: Classifier
    labels: str = "single"
    layer_decay: float = 1.0
    mixing: Mixing = dataclasses.field(default_factory=Mixing)
    erasing: float = 0.0
    takes_norm: bool = False
    key_prefix: str = ""
    norm_key: str = "fc_norm"

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
        for field, value, known in (
            ("encoder", model.encoder, ENCODERS),
            ("pool", model.pool, POOLS),
            ("labels", labels, LABELS),
        ):
            if value not in known:
                raise ValueError(f"model.{field} is {value!r}; known are {', '.join(known)}.")
        encoder: ViT | ConvViT
        if model.encoder == "vit":
            encoder = _build_vit(config)
        else:
            encoder = build_conv_vit(
                config,
                model.drop_path,
                positions="learned",
                final_norm=model.pool != "mean",
                fusion=False,
            )
        if model.pool == "cls" and not encoder.class_token:
            raise ValueError("model.pool is 'cls', but this encoder has no class token.")
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
            takes_norm=model.encoder == "vit" and model.family == "cae",
        )

    @property
    def encoder(self) -> ViT | None:
        """The encoder, if it is a ViT."""
        return self.model.encoder if isinstance(self.model.encoder, ViT) else None

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Images of the model's size, and a class, or a 0 or 1 for each class."""
        shape = (self.model.num_classes,) if self.labels == "multi" else ()
        return {
            "image": Input((*self.model.encoder.image_size, self.model.encoder.channels)),
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
        noise = jax.random.uniform(rngs["drop_path"], (self.model.depth, 2, len(images)))
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
        return Features(pooled, tokens, self.model.encoder.grid)

    def rate_scale(self, path: str, shape: tuple[int, ...]) -> float | np.ndarray:
        """`layer_decay` to the power of the layers above (official `util/lr_decay.py`)."""
        depth = self.model.encoder.transformer.depth
        if path.startswith("encoder/transformer/blocks/"):
            above = depth - np.arange(depth).reshape(-1, *(1,) * (len(shape) - 1))
            return (self.layer_decay**above).astype(np.float32)
        return float(self.layer_decay ** (depth + 1 - self.layer_of(path)))

    def layer_of(self, path: str) -> int:
        """0 for what embeds patches, i + 1 for block i, and depth + 1 for norms and classifier.

        Convolutional stages embed patches, too: they all have the lowest rate (ConvMAE code).
        """
        encoder, top = self.model.encoder, self.model.encoder.transformer.depth + 1
        if isinstance(encoder, ConvViT):
            part, _, name = path.partition("/")
            return encoder.layer_of(name) if part == "encoder" else top
        block = re.match(r"encoder/transformer/blocks_(\d+)/", path)
        if block:
            return int(block[1]) + 1
        embeds = re.match(r"encoder/(cls_token|registers|positions|patch_embed|pre_norm)\b", path)
        return 0 if embeds else top

    def layout(self) -> layout.Layout:
        """The official fine-tuned checkpoint; reads a pre-trained one too, without its decoder."""
        encoder, prefix = self.model.encoder, self.key_prefix
        rules: list[layout.Rule] = []
        if isinstance(encoder, ConvViT):
            rules += conv_vit_rules("encoder", encoder, prefix)
            constants = conv_vit_constants(encoder, prefix)
        else:
            rules += layout.vit_rules("encoder", encoder, prefix, _names(encoder.transformer))
            constants = (
                *layout.vit_constants(encoder, prefix),
                *_position_indices(encoder, prefix),
            )
            if encoder.shared_position_bias:
                table = f"{prefix}rel_pos_bias.relative_position_bias_table"
                rules.append(layout.Rule(table, "encoder/position_bias/table"))
        if self.model.pool == "mean":
            rules += layout.layer_norm_rules(self.norm_key, "fc_norm")
        if self.model.pool == "block":
            rules += _pool_rules(encoder)
        unused: tuple[str, ...] = PRETRAINING
        if prefix:  # a pre-training checkpoint, which has more than the encoder
            start = re.escape(prefix)
            unused += (rf"(?!{start}).*", rf"{start}(norm|head)\..*")
        return layout.Layout(
            rules=(*rules, *layout.linear_rules("head", "head")),
            constants=constants,
            optional=(
                r"head\..*",
                r"fc_norm\..*",
                r"attn_pool\..*",
                r".*relative_position_(bias_table|index)",
            ),
            unused=unused,
        )

    def sized_like(self, state: Mapping[str, np.ndarray], known: Mapping[str, Any]) -> "FineTune":
        """A classifier of the sizes of an official checkpoint, fine-tuned or pre-trained."""
        prefix = "encoder." if any(key.startswith("encoder.patch_embed") for key in state) else ""
        norm = f"{prefix}norm"
        takes_norm = self.takes_norm and f"{norm}.weight" in state
        named = {
            key.removeprefix(prefix): value
            for key, value in state.items()
            if key.startswith(prefix)
        }
        encoder = self.model.encoder
        if isinstance(encoder, ConvViT):
            encoder = conv_vit_like(named, known, encoder)
        else:
            encoder = encoder_like(named, known, encoder)
            blocks = encoder.transformer
            if blocks.position_bias is not None:
                encoder = encoder.clone(transformer=blocks.clone(position_bias=encoder.grid))
        classes = len(state["head.weight"]) if "head.weight" in state else self.model.num_classes
        return dataclasses.replace(
            self,
            model=self.model.clone(encoder=encoder, num_classes=classes),
            key_prefix=prefix,
            norm_key=norm if takes_norm else "fc_norm",
        )

    def adopt(self, path: str, given: Mapping[str, np.ndarray], donor: Method) -> np.ndarray | None:
        """Encoders of any method; norm and linear layer of a classifier of the same classes."""
        encoder = self.model.encoder
        if path.startswith("encoder/"):
            if isinstance(encoder, ConvViT):
                theirs = conv_encoder_of(donor)
                return conv_vit.adopted(path, given, theirs, encoder) if theirs else None
            value = adopt_encoder(path, given, donor, encoder)
            if value is None and any(name.startswith("encoder/") for name in given):
                return _added_to_blocks(path, encoder)
            return value
        if self.takes_norm and path.startswith("fc_norm/") and path not in given:
            return given.get(f"encoder/{path.removeprefix('fc_')}")
        other_classes = (
            isinstance(donor, FineTune) and donor.model.num_classes != self.model.num_classes
        )
        return None if other_classes and path.startswith("head/") else given.get(path)


def _build_vit(config: ml_collections.ConfigDict) -> ViT:
    """The ViT of `config.model` with what its family and the fields beside it say."""
    model = config.model
    if model.family not in FAMILIES:
        raise ValueError(f"model.family is {model.family!r}; known are {', '.join(FAMILIES)}.")
    family = FAMILIES[model.family]
    encoder = build_encoder(
        config,
        model.drop_path,
        **{"positions": "learned", **family.encoder},
        final_norm=model.pool != "mean",
    )
    if model.position_bias and not encoder.class_token:
        raise ValueError(
            f"model.position_bias is on, but encoders of the family {model.family!r} have no class "
            "token, for which the table has rows; turn it off."
        )
    blocks = dict(family.blocks)
    if model.position_bias:
        blocks["position_bias"] = encoder.grid
    if model.layer_scale:
        blocks["layer_scale"] = model.layer_scale
    if model.logit_cap:
        blocks["logit_cap"] = model.logit_cap
    return encoder.clone(transformer=encoder.transformer.clone(**blocks))


def _names(blocks: Transformer) -> layout.BlockNames:
    """What an official checkpoint calls the parts of a block."""
    if blocks.qkv_bias == "query_value":
        return layout.CAE
    return layout.TIMM._replace(position_bias=layout.CAE.position_bias)


def _position_indices(encoder: ViT, prefix: str) -> Iterator[layout.Constant]:
    """The index tables that go with relative position biases in BEiT's and CAE's checkpoints."""
    blocks, places = encoder.transformer, []
    if blocks.position_bias is not None:
        places = [f"blocks.{i}.attn" for i in range(blocks.depth)]
    if encoder.shared_position_bias:
        places.append("rel_pos_bias")
    for place in places:
        index = relative_position_index(encoder.grid).astype(np.int64)
        yield layout.Constant(f"{prefix}{place}.relative_position_index", index)


def _pool_rules(encoder: ViT | ConvViT) -> Iterator[layout.Rule]:
    """Rules of the pool "block", in the names of Locality Alignment's code."""
    path, blocks = "block_pool", pool_of(encoder.transformer)
    yield layout.Rule("attn_pool.pos_embed", f"{path}/positions")
    yield from layout.transformer_rules(
        "attn_pool.blocks", f"{path}/transformer", blocks, encoder.width
    )
    yield from layout.layer_norm_rules("attn_pool.norm", f"{path}/norm")


def _added_to_blocks(path: str, encoder: ViT) -> np.ndarray | None:
    """The start of what fine-tuning adds to pre-trained blocks; None for anything else."""
    blocks = encoder.transformer
    stacked = (blocks.depth,) if blocks.scan else ()
    if path.endswith("/attention/position_bias/table"):
        rows = int(relative_position_index(encoder.grid).max()) + 1
        return np.zeros((*stacked, rows, blocks.heads), np.float32)
    if re.search(r"/layer_scale\d/scale$", path):
        return np.full((*stacked, encoder.width), blocks.layer_scale, np.float32)
    return None
