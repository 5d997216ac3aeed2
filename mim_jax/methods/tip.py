"""TIP: Tabular-Image Pre-training for Multimodal Classification (Du et al., ECCV 2024)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mim_jax import layout, losses, masking
from mim_jax.layout.tip import encoder_rules
from mim_jax.method import Aux, Batch, Features, Input, Method, Picture, Variables, register
from mim_jax.methods.parts.table_image import (
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
from mim_jax.models.table_encoder import CellPredictor, column_codes, column_offsets
from mim_jax.models.vit import ViT
from mim_jax.targets import unit_length

LOSSES = ("itc", "itm", "mtr")
"""Image-tabular contrast, image-tabular matching, masked tabular reconstruction."""

SMALLEST_WEIGHT = 1e-4
"""Added to the probability of every pair before negatives are drawn."""


class Output(NamedTuple):
    """What one forward pass computes; what a switched-off loss needs is None.

    Attributes:
        image: `[batch, image tokens, image width]`.
        table: tokens of the corrupted table, `[batch, 1 + columns, width]`.
        image_projection: `[batch, projection]`, before normalization.
        table_projection: likewise.
        similarity: float32 `[batch, batch]`, cosines of images (rows) and tables over the
            temperature.
        weights: float32 `[2, batch, batch]`: of drawing a table (column) for each image, and an
            image (column) for each table; not normalized, zero for an example itself.
        negatives: int32 `[2, batch]`, what was drawn.
        fused: multimodal tokens `[3 * batch, 1 + columns, width]` of true pairs, of the tables
            with other images, and of the images with other tables.
        matching: logits float32 `[3 * batch, 2]` of being no pair and a pair.
        masked_table: tokens of the masked table, `[batch, 1 + columns, width]`.
        masked_fused: these, fused with the image.
        values: logits float32 `[batch, categorical columns, values of all columns]`.
        numbers: float32 `[batch, continuous columns]`.
    """

    image: jax.Array
    table: jax.Array | None = None
    image_projection: jax.Array | None = None
    table_projection: jax.Array | None = None
    similarity: jax.Array | None = None
    weights: jax.Array | None = None
    negatives: jax.Array | None = None
    fused: jax.Array | None = None
    matching: jax.Array | None = None
    masked_table: jax.Array | None = None
    masked_fused: jax.Array | None = None
    values: jax.Array | None = None
    numbers: jax.Array | None = None


class Projector(nn.Module):
    """Linear, ReLU, linear; there is no batch norm (lightly 1.2).

    Attributes:
        outputs: width of the projection.
        dtype: compute type.
    """

    outputs: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, width]` to `[batch, outputs]`."""
        width = x.shape[-1]
        x = nn.relu(torch_linear(width, width, self.dtype, "fc1")(x))
        return torch_linear(self.outputs, width, self.dtype, "fc2")(x)


class TableImageModel(TableImageEncoders):
    """The encoders, with what their pre-training needs (figure 2).

    Attributes:
        projection: width in which images and tables are compared.
        temperature: of the similarities.
        objectives: those of `LOSSES` that are computed.
    """

    projection: int = 128
    temperature: float = 0.1
    objectives: tuple[str, ...] = LOSSES

    def setup(self) -> None:
        """Names the parts."""
        table = self.table_encoder
        dtype = table.transformer.dtype
        self.image_projector = Projector(self.projection, dtype)
        self.table_projector = Projector(self.projection, dtype)
        self.predictor = CellPredictor(table.categories, dtype)
        self.matching_head = torch_linear(2, table.width, jnp.float32)

    def __call__(
        self,
        images: jax.Array,
        tables: tuple[jax.Array, jax.Array],
        missing: jax.Array,
        masked: jax.Array,
        noise: jax.Array,
        train: bool = True,
    ) -> Output:
        """Encodes pairs, draws negatives, and predicts pairs and cells.

        Args:
            images: `[batch, height, width, channels]`, normalized.
            tables: as they are and corrupted, both `[batch, columns]`; see `TableEncoder`.
            missing: bool `[batch, columns]`, cells without a value.
            masked: bool `[batch, columns]`, cells to reconstruct.
            noise: `[2, batch, batch]`, Gumbel noise that draws a table for each image and an image
                for each table.
            train: see `TableImageEncoders.see`.
        """
        wanted = LOSSES if self.is_initializing() else self.objectives
        table, corrupted = tables
        seen = self.see(images, train)
        output = Output(seen.tokens)
        if "itc" in wanted or "itm" in wanted:
            output = self._contrast(output, seen.pooled, corrupted, missing, noise)
        if "itm" in wanted:
            output = self._match(output)
        if "mtr" in wanted:
            tokens = self.table_encoder(table, masked | missing)
            fused = self.fusion(tokens, seen.tokens)
            values, numbers = self.predictor(fused)
            output = output._replace(
                masked_table=tokens, masked_fused=fused, values=values, numbers=numbers
            )
        return output

    def _contrast(
        self,
        output: Output,
        pooled: jax.Array,
        corrupted: jax.Array,
        missing: jax.Array,
        noise: jax.Array,
    ) -> Output:
        """Compares all images with all tables of the (global) batch, and draws negatives."""
        table = self.table_encoder(corrupted, missing)
        projections = self.image_projector(pooled), self.table_projector(table[:, 0])
        image_unit, table_unit = (unit_length(x.astype(jnp.float32)) for x in projections)
        exact = jax.lax.Precision.HIGHEST
        similarity = jnp.matmul(image_unit, table_unit.T, precision=exact) / self.temperature
        both = jnp.stack([similarity, similarity.T])
        weights = jax.lax.stop_gradient(jax.nn.softmax(both, axis=-1) + SMALLEST_WEIGHT)
        weights = weights * (1 - jnp.eye(len(table)))
        # The largest of log weight plus Gumbel noise is a draw by the weights.
        negatives = jnp.argmax(jnp.log(weights) + noise, axis=-1)
        return output._replace(
            table=table,
            image_projection=projections[0],
            table_projection=projections[1],
            similarity=similarity,
            weights=weights,
            negatives=negatives,
        )

    def _match(self, output: Output) -> Output:
        """Tells pairs from what was drawn."""
        image, table, negatives = output.image, output.table, output.negatives
        assert table is not None and negatives is not None
        tables = jnp.concatenate([table, table, table[negatives[0]]])
        images = jnp.concatenate([image, image[negatives[1]], image])
        fused = self.fusion(tables, images)
        matching = self.matching_head(fused[:, 0])
        return output._replace(fused=fused, matching=matching.astype(jnp.float32))


@register("tip")
@dataclasses.dataclass(frozen=True)
class TIP(Method):
    """Pre-training on pairs of an image and a row of a table.

    Attributes:
        model: the networks.
        masked: number of cells of a row that are reconstructed.
        image_share: of the contrastive loss, what the direction from image to table has.
        mean: of each channel, for pictures.
        std: likewise.
    """

    model: TableImageModel
    masked: int
    image_share: float = 0.5
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    streams: ClassVar[tuple[str, ...]] = ("mask", "negatives")

    @classmethod
    def build(cls, config: ml_collections.ConfigDict) -> "TIP":
        """Reads `config.model`, `config.compute_dtype`, and size and channels from `config.data`.

        Raises:
            ValueError: if sizes do not fit together, the table has no columns, no cell or loss is
                left, or a name is unknown.
        """
        model = config.model
        objectives = tuple(model.objectives)
        if not objectives or not set(objectives) <= set(LOSSES):
            raise ValueError(
                f"model.objectives is {objectives}; give one or more of {', '.join(LOSSES)}."
            )
        parts = build_parts(config)
        network = TableImageModel(
            **parts,
            projection=model.projection,
            temperature=model.temperature,
            objectives=objectives,
        )
        columns = network.table_encoder.columns
        masked = round(columns * model.mask_ratio)  # a half goes to the even number
        if not 0 < masked <= columns:
            raise ValueError(
                f"model.mask_ratio {model.mask_ratio} masks {masked} of {columns} columns; at "
                "least one must be masked, and at most all."
            )
        return cls(
            network, masked, model.image_share, tuple(config.data.mean), tuple(config.data.std)
        )

    @property
    def frozen(self) -> tuple[str, ...]:
        """Parts that none of the objectives trains, so that weight decay leaves them alone too."""
        trained_by = {
            "(image|table)_projector": {"itc"},
            "matching_head": {"itm"},
            "predictor": {"mtr"},
            "fusion": {"itm", "mtr"},
        }
        return tuple(
            f"^{part}/"
            for part, losses in trained_by.items()
            if losses.isdisjoint(self.model.objectives)
        )

    @property
    def encoder(self) -> ViT | None:
        """The image encoder, if it is a ViT."""
        return self.model.encoder if isinstance(self.model.encoder, ViT) else None

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Images, tables, tables with some cells of other rows, and which cells are missing."""
        entries = pair_inputs(self.model)
        return {**entries, "table_corrupted": entries["table"]}

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Initial parameters, and running statistics of the image encoder, if it has any."""
        columns, (networks, matrices) = self.model.table_encoder.columns, jax.random.split(rng)
        images = jnp.zeros((2, *batch["image"].shape[1:]))
        table, cells = jnp.zeros((2, columns)), jnp.zeros((2, columns), bool)
        noise = jnp.zeros((2, 2, 2))
        variables = self.model.init(networks, images, (table, table), cells, cells, noise)
        params, statistics = split_statistics(variables)
        parts = ("table_encoder", "fusion", "predictor")
        return {"params": started(params, parts, matrices), **statistics}

    def draw(self, rngs: Mapping[str, jax.Array], batch: int) -> tuple[jax.Array, jax.Array]:
        """Cells to mask, bool `[batch, columns]`, and noise for negatives `[2, batch, batch]`."""
        columns = self.model.table_encoder.columns
        order = jax.random.uniform(rngs["mask"], (batch, columns))
        masked = masking.random_masking(order, columns - self.masked).mask > 0
        return masked, jax.random.gumbel(rngs["negatives"], (2, batch, batch))

    def forward(
        self,
        variables: Variables,
        batch: Batch,
        masked: jax.Array,
        noise: jax.Array,
        train: bool = True,
    ) -> tuple[Output, dict[str, Any]]:
        """One forward pass, see `TableImageModel`, and new running statistics if there are any.

        Raises:
            ValueError: for a batch of one pair, which has no other to tell it from.
        """
        if len(batch["image"]) < 2:
            raise ValueError(
                "TIP tells every pair from the others of its batch, and this batch has one: set "
                "batch_size / accumulate to 2 or more."
            )
        params, statistics = split_statistics(variables)
        tables = batch["table"], batch.get("table_corrupted", batch["table"])
        given = (batch["image"], tables, missing_cells(batch), masked, noise, train)
        if not statistics or not train:
            output = self.model.apply({"params": params, **statistics}, *given)
            assert isinstance(output, Output)
            return output, statistics
        changed: Any = self.model.apply(
            {"params": params, **statistics}, *given, mutable=[STATISTICS]
        )
        return changed[0], dict(changed[1])

    def objective(
        self, output: Output, batch: Batch, masked: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The mean of the losses (equation 6), and its terms by name.

        Args:
            output: of `forward`.
            batch: that it was computed of.
            masked: bool `[batch, columns]`, cells to reconstruct. Missing ones have no target.
        """
        terms: list[jax.Array] = []
        metrics: dict[str, jax.Array] = {}
        if "itc" in self.model.objectives:
            assert output.similarity is not None
            itc, top1 = self._contrastive(output.similarity)
            terms.append(itc)
            metrics |= {"loss_itc": itc, "itc_top1": top1}
        if "itm" in self.model.objectives:
            assert output.matching is not None
            labels = (jnp.arange(len(output.matching)) < len(batch["image"])).astype(jnp.int32)
            itm = losses.cross_entropy(output.matching, labels)
            terms.append(itm)
            correct = jnp.argmax(output.matching, axis=-1) == labels
            metrics |= {"loss_itm": itm, "itm_top1": jnp.mean(correct)}
        if "mtr" in self.model.objectives:
            assert output.values is not None and output.numbers is not None
            counted = masked & ~missing_cells(batch)
            cells = reconstruction(
                output.values,
                output.numbers,
                batch["table"],
                counted,
                self.model.table_encoder.categories,
            )
            mtr = (cells["loss_mtr_categorical"] + cells["loss_mtr_continuous"]) / 2
            terms.append(mtr)
            metrics |= {"loss_mtr": mtr, **cells}
        return jnp.mean(jnp.stack(terms)), metrics

    def _contrastive(self, similarity: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The contrastive loss (equation 1), and how often the true table is the nearest."""
        labels = jnp.arange(len(similarity))
        to_table = losses.cross_entropy(similarity, labels)
        to_image = losses.cross_entropy(similarity.T, labels)
        loss = self.image_share * to_table + (1 - self.image_share) * to_image
        return loss, jnp.mean(jnp.argmax(similarity, axis=1) == labels)

    def loss(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array], step: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """The objective under fresh masks and negatives."""
        masked, noise = self.draw(rngs, len(batch["image"]))
        output, statistics = self.forward(variables, batch, masked, noise)
        loss, metrics = self.objective(output, batch, masked)
        return loss, Aux(metrics, statistics)

    def features(self, variables: Variables, batch: Batch) -> Features:
        """The multimodal class token, or without a table the pooled image; and image tokens."""
        table = batch.get("table")
        missing = None if table is None else missing_cells(batch)
        encoded: Any = self.model.apply(
            variables, batch["image"], table, missing, method=TableImageModel.encode
        )
        pooled, tokens = encoded
        return Features(pooled, tokens, self.model.encoder.grid)

    def pictures(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array]
    ) -> dict[str, Picture]:
        """What masked categorical cells hold, and what is predicted: a row for each column."""
        table_encoder = self.model.table_encoder
        if "mtr" not in self.model.objectives or not table_encoder.categories:
            return {}
        masked, noise = self.draw(rngs, len(batch["image"]))
        output, _ = self.forward(variables, batch, masked, noise, train=False)
        assert output.values is not None
        categories = table_encoder.categories
        true = jax.nn.one_hot(column_codes(batch["table"], categories), sum(categories))
        shown = masked[:, : len(categories), None]
        columns = {"image": batch["image"].astype(jnp.float32)}
        for title, shares in (("true", true), ("predicted", jax.nn.softmax(output.values))):
            columns[title] = self._value_map(jnp.where(shown, shares, 0))
        caption = (
            "One row for each categorical column, one field for each of its values, brighter the "
            "more probable; rows without light were not masked."
        )
        return {"cells": Picture(columns, caption)}

    def _value_map(self, shares: jax.Array) -> jax.Array:
        """Probabilities `[batch, columns, values of all]` as images of the model's size."""
        categories = self.model.table_encoder.categories
        rows = [
            jnp.pad(shares[:, i, start : start + count], ((0, 0), (0, max(categories) - count)))
            for i, (start, count) in enumerate(zip(column_offsets(categories), categories))
        ]
        encoder = self.model.encoder
        shape = (len(shares), *encoder.image_size)
        light = jax.image.resize(jnp.stack(rows, axis=1), shape, "nearest")[..., None]
        light = jnp.broadcast_to(light, (*shape, encoder.channels))
        return (light - jnp.asarray(self.mean)) / jnp.asarray(self.std)

    def layout(self) -> layout.Layout:
        """The official pre-training checkpoint (a Lightning file)."""
        rules = [*encoder_rules("", "", self.model)]
        for theirs, ours in (("imaging", "image"), ("tabular", "table")):
            for i, layer in ((0, "fc1"), (2, "fc2")):
                key, path = f"projector_{theirs}.layers.{i}", f"{ours}_projector/{layer}"
                rules += layout.linear_rules(key, path)
        rules += layout.linear_rules("predictor_tabular.cat_classifier", "predictor/values")
        rules += layout.linear_rules("predictor_tabular.con_regressor", "predictor/number")
        rules += layout.linear_rules("itm_head", "matching_head")
        return layout.Layout(tuple(rules), collections=collections_of(self.model))

    def sized_like(self, state: Mapping[str, np.ndarray], known: Mapping[str, Any]) -> "TIP":
        """A TIP of the sizes of an official checkpoint; its columns must be known."""
        parts = parts_like(state, known, self.model)
        projection = len(state.get("projector_tabular.layers.2.weight", np.zeros(128)))
        return dataclasses.replace(self, model=self.model.clone(**parts, projection=projection))

    def adopt(self, path: str, given: Mapping[str, np.ndarray], donor: Method) -> np.ndarray | None:
        """Image ViTs of any method; all parts of another TIP or of its classifier."""
        return adopt_part(path, given, donor, self.model.encoder)


def reconstruction(
    values: jax.Array,
    numbers: jax.Array,
    table: jax.Array,
    counted: jax.Array,
    categories: tuple[int, ...],
) -> dict[str, jax.Array]:
    """The two terms of masked tabular reconstruction (section 3.3), and an accuracy.

    The terms are means over the counted cells of the (global) batch, and zero without any.

    Args:
        values: logits `[batch, categorical columns, values of all columns]`; the soft-max is over
            the values of all columns.
        numbers: `[batch, continuous columns]`.
        table: `[batch, columns]`, the true cells.
        counted: bool `[batch, columns]`, cells that count.
        categories: number of values of each categorical column.
    """
    split = len(categories)
    codes, probability = column_codes(table, categories), jax.nn.softmax(values, axis=-1)
    true = jnp.take_along_axis(probability, codes[..., None], axis=-1)[..., 0]
    right = jnp.argmax(values, axis=-1) == codes
    # What an uncounted cell holds, perhaps NaN, reaches neither loss nor gradient.
    targets = jnp.where(counted[:, split:], table[:, split:], numbers)

    def mean(errors: jax.Array, counted: jax.Array) -> jax.Array:
        total = jnp.sum(jnp.where(counted, errors, 0.0), dtype=jnp.float32)
        return total / jnp.maximum(jnp.sum(counted), 1)

    return {
        "loss_mtr_categorical": mean(-jnp.log(true + 1e-8), counted[:, :split]),
        "loss_mtr_continuous": mean((numbers - targets) ** 2, counted[:, split:]),
        "mtr_top1": mean(right, counted[:, :split]),
    }
