"""Fine-tuning of TIP: classes of pairs of an image and a table, parts of which may be missing."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mim_jax import layout, losses
from mim_jax.layout.tip import encoder_rules
from mim_jax.method import Aux, Batch, Features, Input, Method, Variables, register
from mim_jax.methods.parts.table_image import (
    PARTS,
    TableImageEncoders,
    adopt_part,
    build_parts,
    collections_of,
    missing_cells,
    pair_inputs,
    parts_like,
    split_statistics,
    started,
    torch_linear,
)
from mim_jax.models.resnet import STATISTICS
from mim_jax.models.vit import ViT

FINETUNE = ("frozen", "trainable")
"""Linear probing, in which the heads alone are trained, and full fine-tuning."""

PRETRAINING = r"(projector_imaging|projector_tabular|predictor_tabular|itm_head)\..*"
"""Keys of pre-training checkpoints that a classifier has no place for."""


class TableImageClassifier(TableImageEncoders):
    """Linear layers on the multimodal class token, and of an ensemble on either modality too.

    Attributes:
        num_classes: number of logits.
        ensemble: average the logits of three linear layers.
    """

    num_classes: int = 2
    ensemble: bool = False

    def setup(self) -> None:
        """Names the heads: `head`, and of an ensemble `image_head` and `table_head`."""
        width = self.table_encoder.width
        self.head = torch_linear(self.num_classes, width, jnp.float32)
        if self.ensemble:
            self.image_head = torch_linear(self.num_classes, self.encoder.width, jnp.float32)
            self.table_head = torch_linear(self.num_classes, width, jnp.float32)

    def __call__(
        self, images: jax.Array, table: jax.Array, missing: jax.Array, train: bool = False
    ) -> jax.Array:
        """Logits `[batch, classes]`, float32.

        Args:
            images: `[batch, height, width, channels]`, normalized.
            table: `[batch, columns]`, see `TableEncoder`.
            missing: bool `[batch, columns]`, cells without a value.
            train: see `TableImageEncoders.see`.
        """
        seen = self.see(images, train)
        tokens = self.table_encoder(table, missing)
        logits = self.head(self.fusion(tokens, seen.tokens)[:, 0])
        if self.ensemble:
            logits += self.image_head(seen.pooled) + self.table_head(tokens[:, 0])
            logits /= 3
        assert isinstance(logits, jax.Array)
        return logits


@register("tip_classifier")
@dataclasses.dataclass(frozen=True)
class TIPClassifier(Method):
    """A classifier of pairs, whole or with cells missing.

    Attributes:
        model: encoders and heads.
        finetune: one of `FINETUNE`.
        moving_statistics: in training, a ResNet normalizes by the batch and updates its running
            statistics, even where its parameters are frozen (official); else it does neither.
        key_prefix: of all keys in the checkpoint that `layout` is for.
    """

    model: TableImageClassifier
    finetune: str = "trainable"
    moving_statistics: bool = True
    key_prefix: str = "model."

    streams: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def build(cls, config: ml_collections.ConfigDict) -> "TIPClassifier":
        """Reads `config.model`, `config.compute_dtype`, and size and channels from `config.data`.

        Raises:
            ValueError: if sizes do not fit together, the table has no columns, the number of
                classes is unknown, or a name is.
        """
        model = config.model
        if model.num_classes < 1:
            raise ValueError(
                f"model.num_classes is {model.num_classes}, and no labelled data tell it: set it."
            )
        if model.finetune not in FINETUNE:
            raise ValueError(
                f"model.finetune is {model.finetune!r}; known are {', '.join(FINETUNE)}."
            )
        network = TableImageClassifier(
            **build_parts(config), num_classes=model.num_classes, ensemble=model.ensemble
        )
        return cls(network, model.finetune, model.moving_statistics)

    @property
    def encoder(self) -> ViT | None:
        """The image encoder, if it is a ViT."""
        return self.model.encoder if isinstance(self.model.encoder, ViT) else None

    @property
    def frozen(self) -> tuple[str, ...]:
        """In linear probing all but the heads."""
        return tuple(f"{part}/" for part in PARTS) if self.finetune == "frozen" else ()

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Images, tables, which cells are missing, and classes."""
        return {**pair_inputs(self.model), "label": Input((), "int")}

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Initial parameters, and running statistics of the image encoder, if it has any."""
        columns, (networks, matrices) = self.model.table_encoder.columns, jax.random.split(rng)
        images = jnp.zeros((1, *batch["image"].shape[1:]))
        table, missing = jnp.zeros((1, columns)), jnp.zeros((1, columns), bool)
        params, statistics = split_statistics(self.model.init(networks, images, table, missing))
        return {"params": started(params, ("table_encoder", "fusion"), matrices), **statistics}

    def logits(
        self,
        variables: Variables,
        images: jax.Array,
        table: jax.Array | None = None,
        table_missing: jax.Array | None = None,
    ) -> jax.Array:
        """Logits `[batch, classes]`, float32.

        Args:
            variables: of the method.
            images: normalized, `[batch, height, width, channels]`.
            table: `[batch, columns]`; None for a table of which every cell is missing.
            table_missing: `[batch, columns]`, not zero where a cell is missing; None for nowhere.
        """
        if table is None:
            table = jnp.zeros((len(images), self.model.table_encoder.columns))
            table_missing = jnp.ones(table.shape, bool)
        batch = {"image": images, "table": table}
        if table_missing is not None:
            batch["table_missing"] = table_missing
        return self.forward(variables, batch, train=False)[0]

    def forward(
        self, variables: Variables, batch: Batch, train: bool
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Logits, and new running statistics if there are any; see `TableImageClassifier`."""
        _, statistics = split_statistics(variables)
        given = batch["image"], batch["table"], missing_cells(batch), train
        if not statistics or not train:
            logits = self.model.apply(variables, *given)
            assert isinstance(logits, jax.Array)
            return logits, statistics
        changed: Any = self.model.apply(variables, *given, mutable=[STATISTICS])
        return changed[0], dict(changed[1])

    def loss(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array], step: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """Cross-entropy."""
        logits, statistics = self.forward(variables, batch, self.moving_statistics)
        top1 = jnp.mean(jnp.argmax(logits, axis=1) == batch["label"])
        return losses.cross_entropy(logits, batch["label"]), Aux({"top1": top1}, statistics)

    def features(self, variables: Variables, batch: Batch) -> Features:
        """The multimodal class token, or without a table the pooled image; and image tokens."""
        table = batch.get("table")
        missing = None if table is None else missing_cells(batch)
        encoded: Any = self.model.apply(
            variables, batch["image"], table, missing, method=TableImageClassifier.encode
        )
        pooled, tokens = encoded
        return Features(pooled, tokens, self.model.encoder.grid)

    def layout(self) -> layout.Layout:
        """The official fine-tuned checkpoint; reads a pre-trained one too, without its heads."""
        prefix, head = self.key_prefix, "classifier"
        rules = [*encoder_rules(prefix, "", self.model)]
        if self.model.ensemble:
            head = "classifier_multimodal"
            for theirs, ours in (("imaging", "image"), ("tabular", "table")):
                key = f"{prefix}classifier_{theirs}"
                rules += layout.linear_rules(key, f"{ours}_head")
        rules += layout.linear_rules(f"{prefix}{head}", "head")
        return layout.Layout(
            rules=tuple(rules),
            optional=(rf"{re.escape(prefix)}classifier.*",),
            unused=() if prefix else (PRETRAINING,),
            collections=collections_of(self.model),
        )

    def sized_like(
        self, state: Mapping[str, np.ndarray], known: Mapping[str, Any]
    ) -> "TIPClassifier":
        """A classifier of the sizes of an official checkpoint, fine-tuned or pre-trained."""
        prefix = "model." if any(key.startswith("model.") for key in state) else ""
        parts = parts_like(state, known, self.model, prefix)
        single, several = (
            state.get(f"{prefix}{name}.bias") for name in ("classifier", "classifier_multimodal")
        )
        heads: dict[str, Any] = {}
        for bias, ensemble in ((single, False), (several, True)):
            if bias is not None:
                heads = {"num_classes": len(bias), "ensemble": ensemble}
        return dataclasses.replace(
            self, model=self.model.clone(**parts, **heads), key_prefix=prefix
        )

    def adopt(self, path: str, given: Mapping[str, np.ndarray], donor: Method) -> np.ndarray | None:
        """All parts of a TIP or of another classifier, whose heads must be of as many classes."""
        if path.partition("/")[0] in PARTS:
            return adopt_part(path, given, donor, self.model.encoder)
        same = isinstance(donor, TIPClassifier) and (
            donor.model.num_classes,
            donor.model.ensemble,
        ) == (self.model.num_classes, self.model.ensemble)
        return given.get(path) if same else None
