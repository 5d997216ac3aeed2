"""Does pre-training on pairs of image and table help a classifier of which cells are missing?

    python -m benchmarks.experiments.tip

Procedural pairs: an object in one of four hues and three shapes, and a row that names both, each
wrong in one of ten rows. The class is hue and shape. A seed deals the 1,620 training rows into
1,500 for pre-training, without labels, and 120 for fine-tuning, where as in the test some cells are
missing (random values, at three rates). Fine-tuning is the same for all arms:

 * TIP: contrast, matching and reconstruction of masked cells;
 * TIP without reconstruction: contrast and matching;
 * contrast alone;
 * no pre-training;

and beside them a logistic regression of scikit-learn on the same 120 rows, categories as indicators
and missing cells as the mean of their column: on the table alone, and on the table beside the image
in 8 x 8 pixels.

After its pre-training, TIP also tells the hue of test pairs of which that cell is masked, and all
that match tell pairs from what was drawn in place of one side. A control tells the hue by the image
of another pair.

Claims: at every rate TIP > no pre-training; the masked hue is told far above 1/4, and pairs above
2/3, the share of those that are none.
All settings are those of the configs `tip:tiny` and `tip_classifier:tiny`, but for three. Images
have 32 pixels a side and the ResNet three stages, as at 64 and with four the runs would take longer
than twenty minutes of a core. There are 400 steps. There is no weight decay, by which Adam would
move what an arm does not train. The last weights are tested. Scores of a trial of 20 steps at 64
pixels were seen before; and since hue and pairs were hardly learned in 400 steps, the same was run
with --steps 1200 on the same seeds. No other setting was chosen by test scores.
Result: benchmarks/results/tip.json (400 steps) and tip_1200.json, and of each a picture of accuracy
by rate.
"""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image, ImageDraw
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from benchmarks.experiments.seeded import Seeded
from benchmarks.experiments.toy_task import spread
from benchmarks.measure import RESULTS, Report
from mim_jax import config as configs
from mim_jax.data.records import Record
from mim_jax.data.sources import open_source
from mim_jax.data.synthetic.pairs import SCHEMA, SIDE
from mim_jax.data.table import TableSource
from mim_jax.data.table_missing import with_missing
from mim_jax.evaluation.labelled_data import evaluation_transform
from mim_jax.method import Batch, Variables
from mim_jax.methods.parts.table_image import PARTS
from mim_jax.methods.tip import LOSSES, TIP
from mim_jax.methods.tip_classifier import TIPClassifier
from mim_jax.training.experiment import Experiment, training_batches
from mim_jax.training.pictures import load_font
from mim_jax.training.state import TrainState, state_from_variables

CATEGORIES = tuple(len(c.values) for c in SCHEMA.columns if c.kind == "categorical")
SIZES: dict[str, Any] = {
    "model.categories": CATEGORIES,
    "model.continuous": len(SCHEMA.columns) - len(CATEGORIES),
    "model.depths": (1, 1, 1),
    "data.image_size": (32, 32),
    "compute_dtype": "float32",
    "optimizer.weight_decay": 0.0,
}
RATES = (0.0, 0.4, 0.7)
LABELLED, SCORED_AT_ONCE = 120, 100
THUMBNAIL = 8

TIP_ARM, UNTRAINED = "TIP", "no pre-training"
OBJECTIVES = {
    TIP_ARM: LOSSES,
    "TIP without reconstruction": ("itc", "itm"),
    "contrast alone": ("itc",),
}
BASELINES = {"table alone": False, "table and pixels": True}
"""Whether a logistic regression sees pixels."""

HUE, HUE_BY_ANOTHER, MATCHING = "hue, masked", "hue, masked, another image", "matching"

Batches = Sequence[Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The images of a split in memory."""

    array: np.ndarray

    def __getitem__(self, row: int) -> np.ndarray:
        """Return uint8 `[64, 64, 3]`."""
        return self.array[row]

    def record(self, row: int) -> Record | None:
        """Return None: there are no files."""
        return None


@functools.cache
def pairs(split: str) -> TableSource:
    """A split, drawn once."""
    source = open_source("synthetic:pairs", split)
    assert isinstance(source, TableSource)
    images = Drawn(np.stack([source[i]["image"] for i in range(len(source))]))
    parts = source.schema, source.table, source.missing, source.labels, images
    return TableSource(source.name, split, *parts)


def dealt(seed: int) -> tuple[TableSource, TableSource]:
    """The pairs to pre-train on, and those with labels."""
    source = pairs("train")
    order = np.random.default_rng(seed).permutation(len(source))
    unlabelled, labelled = order[LABELLED:], order[:LABELLED]
    return source.subset(unlabelled, "unlabelled"), source.subset(labelled, "labelled")


class Trainer:
    """A method with its compiled step, which serves all seeds."""

    def __init__(self, config: ml_collections.ConfigDict, examples: int) -> None:
        """Builds the experiment; nothing is compiled before it is needed."""
        self.experiment = experiment = Experiment.build(config, examples, jax.devices()[:1])
        self.config, self.method = experiment.config, experiment.method
        seeded = Seeded(experiment)
        self.initial, self._step = seeded.initial, seeded.step

    def batches(self, source: TableSource, seed: int) -> Batches:
        """All batches of a training."""
        config = self.config.copy_and_resolve_references()
        config.seed = seed
        return list(training_batches(config, source, 0, self.experiment.total_steps))

    def train(self, state: TrainState, batches: Batches, seed: int) -> Variables:
        """Variables after training on the batches.

        Raises:
            ValueError: if a loss or gradient was not finite.
        """
        for batch in batches:
            state, _ = self._step(state, {name: batch[name] for name in self.method.inputs}, seed)
        if skipped := int(state.skipped):
            raise ValueError(f"{skipped} steps were not finite.")
        return state.variables

    def given(self, source: TableSource, rows: Sequence[int]) -> Batch:
        """Rows as evaluation sees them."""
        look = evaluation_transform(self.config, source)
        views = [look(source[i]) for i in rows]
        batch = {name: jnp.asarray(np.stack([view[name] for view in views])) for name in views[0]}
        return self.experiment.normalized(batch)


class Pretraining(Trainer):
    """TIP with some of its losses."""

    method: TIP

    def __init__(self, objectives: Sequence[str], steps: int, examples: int) -> None:
        """Builds the experiment."""
        config = configs.load("tip:tiny", SIZES)
        config.model.objectives = tuple(objectives)
        config.update(steps=steps)
        config.schedule.warmup_epochs = steps / 10 / (examples // config.batch_size)
        super().__init__(config, examples)
        self._hues = jax.jit(self._hues_right)
        self._matching = jax.jit(self._matching_right)

    def scores(self, variables: Variables, seed: int) -> dict[str, float]:
        """On test pairs: the hue told with its cell masked, and pairs told from others."""
        source, found = pairs("test"), dict[str, list[float]]()
        size = self.config.batch_size
        for first in range(0, len(source) - size + 1, size):
            batch = self.given(source, range(first, first + size))
            if "mtr" in self.method.model.objectives:
                other = {**batch, "image": jnp.roll(batch["image"], 1, axis=0)}
                for name, shown in ((HUE, batch), (HUE_BY_ANOTHER, other)):
                    found.setdefault(name, []).append(float(self._hues(variables, shown)))
            if "itm" in self.method.model.objectives:
                rng = jax.random.fold_in(jax.random.key(seed), first)
                right = float(self._matching(variables, batch, rng))
                found.setdefault(MATCHING, []).append(right)
        return {name: float(np.mean(values)) for name, values in found.items()}

    def _hues_right(self, variables: Variables, batch: Batch) -> jax.Array:
        hue = [column.name for column in SCHEMA.columns].index("hue")
        masked = jnp.zeros(batch["table"].shape, bool).at[:, hue].set(True)
        noise = jnp.zeros((2, len(masked), len(masked)))
        output, _ = self.method.forward(variables, batch, masked, noise, train=False)
        return self.method.objective(output, batch, masked)[1]["mtr_top1"]

    def _matching_right(self, variables: Variables, batch: Batch, rng: jax.Array) -> jax.Array:
        keys = dict(zip(self.method.streams, jax.random.split(rng)))
        masked, noise = self.method.draw(keys, len(batch["table"]))
        output, _ = self.method.forward(variables, batch, masked, noise, train=False)
        return self.method.objective(output, batch, masked)[1]["itm_top1"]


class FineTuning(Trainer):
    """The classifier, trained in full."""

    method: TIPClassifier

    def __init__(self) -> None:
        """Builds the experiment."""
        config = configs.load("tip_classifier:tiny", SIZES)
        assert SCHEMA.label is not None
        config.model.num_classes = len(SCHEMA.label.values)
        super().__init__(config, LABELLED)
        self._logits = jax.jit(
            lambda variables, batch: self.method.logits(
                variables, batch["image"], batch["table"], batch["table_missing"]
            )
        )

    def start(self, given: Variables | None, seed: int) -> TrainState:
        """A new state; its encoders are those given."""
        state = self.initial(seed)
        if given is None:
            return state
        # The step gives its state away, and more than one starts from these.
        given = jax.tree.map(jnp.copy, given)
        variables = {
            **state.variables,
            **{name: tree for name, tree in given.items() if name != "params"},
            "params": {**state.params, **{part: given["params"][part] for part in PARTS}},
        }
        return state_from_variables(self.method, self.experiment.optimizer, variables)

    def accuracy(self, variables: Variables, source: TableSource) -> float:
        """Share of the rows whose class is told."""
        assert source.labels is not None
        right = 0
        for first in range(0, len(source), SCORED_AT_ONCE):
            rows = range(first, min(first + SCORED_AT_ONCE, len(source)))
            logits = np.asarray(self._logits(variables, self.given(source, rows)))
            right += int((logits.argmax(axis=1) == source.labels[rows]).sum())
        return right / len(source)


def imputed(source: TableSource, train: TableSource, pixels: bool) -> np.ndarray:
    """Indicators of categories and numbers, missing ones as the mean over training rows.

    Args:
        source: what to describe, `[rows, features]`.
        train: gives the means.
        pixels: add the image, averaged to a thumbnail.
    """

    def columns(of: TableSource) -> tuple[np.ndarray, np.ndarray]:
        values, missing = [], []
        for i, cells in enumerate(of.table.T):
            wide = cells[:, None]
            if i < len(CATEGORIES):
                wide = (wide == np.arange(CATEGORIES[i])).astype(np.float32)
            values.append(wide)
            missing.append(np.repeat(of.missing[:, i, None], wide.shape[1], axis=1))
        return np.hstack(values), np.hstack(missing)

    known, absent = columns(train)
    mean = np.nan_to_num(np.ma.array(known, mask=absent).mean(axis=0).filled(0))
    values, missing = columns(source)
    features = np.where(missing, mean, values)
    if not pixels:
        return features
    side = SIDE // THUMBNAIL
    images = np.stack([source[i]["image"] for i in range(len(source))]) / 255
    cells = images.reshape(len(images), THUMBNAIL, side, THUMBNAIL, side, -1).mean(axis=(2, 4))
    return np.hstack([features, cells.reshape(len(cells), -1)])


def regression_accuracy(train: TableSource, test: TableSource, pixels: bool) -> float:
    """Share of test rows whose class a logistic regression on standardized features tells."""
    scaler = StandardScaler().fit(imputed(train, train, pixels))
    model = LogisticRegression(max_iter=5000)
    model.fit(scaler.transform(imputed(train, train, pixels)), train.labels)
    return float(model.score(scaler.transform(imputed(test, train, pixels)), test.labels))


def draw(path: Path, table: Mapping[str, Mapping[str, Sequence[float]]], caption: str) -> None:
    """Accuracy by rate: a line for the mean of each arm, and a bar from lowest to highest seed."""
    font, small = load_font(15), load_font(12)
    left, right, top, foot = 70, 560, 30, 400
    colours = ("#1f77b4", "#2ca02c", "#9467bd", "#d62728", "#7f7f7f", "#c08020")
    canvas = Image.new("RGB", (right + 250, foot + 84), "white")
    pen = ImageDraw.Draw(canvas)
    inner = 30  # from the axes to the first and last rate

    def across(rate: float) -> float:
        return left + inner + (right - left - 2 * inner) * rate / max(RATES)

    def down(accuracy: float) -> float:
        return foot - (foot - top) * accuracy

    for accuracy in np.linspace(0, 1, 6):
        y = down(accuracy)
        pen.line([left, y, right, y], "#ddd" if accuracy else "black")
        pen.text((left - 8, y), f"{accuracy:.1f}", "black", small, anchor="rm")
    for rate in RATES:
        pen.text((across(rate), foot + 6), f"{rate:g}", "black", small, anchor="ma")
    middle = (left + right) / 2
    pen.text((middle, foot + 24), "share of missing cells", "black", small, anchor="ma")
    pen.text((left - 40, 8), "accuracy", "black", small)
    for index, ((arm, scores), colour) in enumerate(zip(table.items(), colours, strict=True)):
        shift = 4 * (index - (len(table) - 1) / 2)  # so that bars do not hide each other
        points = []
        for rate, values in zip(RATES, scores.values(), strict=True):
            x = across(rate) + shift
            pen.line([x, down(min(values)), x, down(max(values))], colour, 2)
            points.append((x, down(float(np.mean(values)))))
        pen.line(points, colour, 3 if arm == TIP_ARM else 2)
        for x, y in points:
            pen.ellipse([x - 4, y - 4, x + 4, y + 4], colour)
        y = top + 24 * index
        pen.line([right + 16, y, right + 40, y], colour, 3)
        pen.text((right + 48, y), arm, "black", font, anchor="lm")
    pen.text((14, foot + 56), caption, "black", small)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


Scores = dict[str, dict[str, float]]
"""Accuracy by arm and rate; by arm and what was told after pre-training."""


def scores_of_seed(
    arms: Mapping[str, Pretraining], classifier: FineTuning, seed: int
) -> tuple[Scores, Scores]:
    """Everything that one seed gives."""
    unlabelled, labelled = dealt(seed)
    start: dict[str, Variables | None] = {}
    accuracy: Scores = {}
    told: Scores = {}
    first = arms[TIP_ARM]  # All arms start from the same weights and see the same batches.
    batches = first.batches(unlabelled, seed)
    for arm, trainer in arms.items():
        started = time.monotonic()
        start[arm] = variables = trainer.train(first.initial(seed), batches, seed)
        told[arm] = trainer.scores(variables, seed)
        seconds = time.monotonic() - started
        print(f"[{seconds:4.0f} s] seed {seed}, {arm}: {told[arm]}", flush=True)
    start[UNTRAINED] = None
    for rate in RATES:
        train, test = (with_missing(s, "random_values", rate) for s in (labelled, pairs("test")))
        batches = classifier.batches(train, seed)
        for arm, given in start.items():
            variables = classifier.train(classifier.start(given, seed), batches, seed)
            accuracy.setdefault(arm, {})[f"{rate:g}"] = classifier.accuracy(variables, test)
        for arm, pixels in BASELINES.items():
            score = regression_accuracy(train, test, pixels)
            accuracy.setdefault(arm, {})[f"{rate:g}"] = score
        found = {arm: round(scores[f"{rate:g}"], 4) for arm, scores in accuracy.items()}
        print(f"seed {seed}, {rate:g} missing: {found}", flush=True)
    return accuracy, told


def main(arguments: list[str] | None = None) -> int:
    """Runs everything and writes the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of pre-training")
    parser.add_argument("--output", type=Path, default=RESULTS / "tip.json")
    options = parser.parse_args(arguments)
    report = Report("experiments.tip", arguments)
    unlabelled = len(pairs("train")) - LABELLED
    arms = {
        arm: Pretraining(objectives, options.steps, unlabelled)
        for arm, objectives in OBJECTIVES.items()
    }
    classifier = FineTuning()
    tables: tuple[dict[str, dict[str, list[float]]], ...] = ({}, {})
    for seed in range(options.seeds):
        for table, scores in zip(tables, scores_of_seed(arms, classifier, seed), strict=True):
            for arm, columns in scores.items():
                for name, value in columns.items():
                    table.setdefault(arm, {}).setdefault(name, []).append(value)
    accuracy, told = tables

    def wins(first: str, second: str) -> dict[str, int]:
        return {
            rate: sum(a > b for a, b in zip(accuracy[first][rate], accuracy[second][rate]))
            for rate in accuracy[first]
        }

    picture = options.output.with_suffix(".png")
    caption = (
        f"Twelve classes, {LABELLED} labelled pairs, fine-tuned and tested with cells missing: "
        "mean over seeds, and their range."
    )
    draw(picture, accuracy, caption)
    first, tuned = arms[TIP_ARM].config, classifier.config
    report.write(
        options.output,
        {
            "claim": "accuracy of TIP > no pre-training at every rate; masked hue far above 1/4, "
            "matching above 2/3",
            "seeds": options.seeds,
            "pre-training": {
                "pairs": unlabelled,
                "steps": options.steps,
                "pixels a side": first.data.image_size[0],
                "batch size": first.batch_size,
                "learning rate": first.optimizer.lr,
            },
            "fine-tuning": {
                "pairs": LABELLED,
                "epochs": tuned.epochs,
                "batch size": tuned.batch_size,
                "learning rate": tuned.optimizer.lr,
            },
            "test pairs": len(pairs("test")),
            "seeds where TIP is above, by rate": {
                arm: wins(TIP_ARM, arm) for arm in accuracy if arm != TIP_ARM
            },
            "after pre-training": {
                arm: {name: spread(values) for name, values in columns.items()}
                for arm, columns in told.items()
            },
            "accuracy by rate": {
                arm: {rate: spread(values) for rate, values in columns.items()}
                for arm, columns in accuracy.items()
            },
            "picture": picture.name,
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
