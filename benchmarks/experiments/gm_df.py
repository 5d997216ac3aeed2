"""Does meta-learning over collections detect forgeries of a collection that nothing was trained on?

    python -m benchmarks.experiments.gm_df

Four procedural collections of real and forged faces, each with a camera and a seam of its own. A
seed leaves one of them out, seed 0 the first, and the other three train. Equal steps, batch sizes
and towers, which are tiny and trained from scratch, as there is no pre-trained CLIP of that size:

 * single: a detector for each of the three, with a linear head on the class token;
 * naive joint: one such detector for all three;
 * joint, experts and norms: with experts and domain norms in every block;
 * full: with prompts, masked patches, the meta step and the alignment of domains as well; a batch
   has two domains, of which the experts alone learn from the first, and all else from the second.

The score is the area under the ROC curve on the test images of the collection left out (unseen),
and its mean over those of the three others (seen). The seen score of the single detectors is that
of each on its own collection; their unseen one is that of the best of the three on the collection
left out, chosen by this very score, beside the mean of the three.

Claim: unseen, full > naive joint; seen, naive joint <= single.
Patch size, depth, rate and number of steps were chosen with the naive joint detector alone, of
another seed, on training images that it had not seen; all else is as in the config.
Result: benchmarks/results/gm_df.json and a picture of the ladder.
"""

import argparse
import functools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw

from benchmarks.experiments.seeded import Seeded
from benchmarks.experiments.toy_task import spread
from benchmarks.measure import RESULTS, Report
from mim_jax import config as configs
from mim_jax.data.domains import UNSEEN, DomainSource
from mim_jax.data.on_device import normalize
from mim_jax.data.sources import ArraySource, open_source
from mim_jax.data.synthetic.collections import CLASS_NAMES, COLLECTIONS
from mim_jax.evaluation.detection import detection_scores
from mim_jax.method import Variables
from mim_jax.methods.gm_df import GMDF
from mim_jax.training.experiment import Experiment, training_batches
from mim_jax.training.pictures import load_font

SIZES: dict[str, Any] = {
    "model.clip.patch_size": (8, 8),
    "model.clip.depth": 3,
    "model.second_order_layers": (0, 1),
    "compute_dtype": "float32",
}
BATCH, LR = 64, 1e-3

SINGLE = "single"
LADDER = {"naive joint": "clip_joint", "joint, experts and norms": "experts", "full": "full"}
"""Rows with a detector for all domains, each with its variant of the config."""

SEEN, UNSEEN_AREA, UNSEEN_MEAN = "seen", "unseen", "unseen, mean of three"


@functools.cache
def images(number: int, split: str) -> ArraySource:
    """A split of a collection in memory."""
    source = open_source(f"synthetic:collections:{number}", split)
    examples: list[Mapping[str, Any]] = [source[i] for i in range(len(source))]
    labels = np.array([example["label"] for example in examples], np.int32)
    stacked = np.stack([example["image"] for example in examples])
    return ArraySource(str(number), stacked, labels, CLASS_NAMES)


def domains(numbers: Sequence[int]) -> DomainSource:
    """The training images of some collections."""
    sources = [images(number, "train") for number in numbers]
    return DomainSource("collections", sources, [source.name for source in sources])


def rung(variant: str) -> dict[str, Any]:
    """What the model of a variant of the ladder has unlike the full one."""
    full, own = (configs.leaves(configs.load(f"gm_df:{name}").model) for name in ("full", variant))
    return {f"model.{field}": value for field, value in own.items() if value != full[field]}


class Arm:
    """A detector of some number of domains; what is compiled serves all seeds and collections."""

    def __init__(self, variant: str, domains: int, steps: int) -> None:
        """Builds the experiment; nothing is compiled before it is needed."""
        own = {
            "model.domains": domains,
            "data.domains_per_batch": min(2, domains),
            "batch_size": BATCH,
            "optimizer.lr": LR,
        }
        self.config = configs.load("gm_df:tiny", {**SIZES, **rung(variant), **own})
        self.config.optimizer.groups.clip.lr = LR
        examples = domains * len(images(0, "train"))
        self.config.update(steps=steps)
        self.config.schedule.warmup_epochs = steps / 10 / (examples // BATCH)
        self.experiment = experiment = Experiment.build(self.config, examples, jax.devices()[:1])
        assert isinstance(experiment.method, GMDF)
        self.method, self.steps = experiment.method, steps
        data = experiment.config.data
        seeded = Seeded(experiment)
        self.initial, self._step = seeded.initial, seeded.step
        self._scores = jax.jit(
            lambda variables, batch: self.method.scores(
                variables, {**batch, "image": normalize(batch["image"], data.mean, data.std)}
            )
        )

    def train(self, numbers: Sequence[int], seed: int) -> Variables:
        """Variables after training on some collections."""
        config, names = self.experiment.config, set(self.method.inputs)
        config.seed = seed
        state, batches = self.initial(seed), training_batches(config, domains(numbers), 0)
        for _, batch in zip(range(self.steps), batches):
            given = {name: array for name, array in batch.items() if name in names}
            state, _ = self._step(state, given, seed)
        batches.close()
        if skipped := int(state.skipped):
            raise ValueError(f"{skipped} steps were not finite.")
        return state.variables

    def areas(self, variables: Variables, numbers: Sequence[int]) -> dict[int, float]:
        """Area under the ROC curve on the test images of every collection.

        Args:
            variables: after training.
            numbers: of the collections that it has trained on; others are unseen.
        """
        found = {}
        for number in range(len(COLLECTIONS)):
            source = images(number, "test")
            domain = numbers.index(number) if number in numbers else UNSEEN
            rows = np.stack([source[i]["image"] for i in range(len(source))])
            batch = {"image": rows, "domain": np.full(len(rows), domain, np.int32)}
            scores = np.asarray(self._scores(variables, batch))
            assert source.labels is not None
            found[number] = detection_scores(scores, source.labels)["auc"]
        return found


Areas = dict[str, float]
"""Areas under the curve of a row, by column."""


def areas_of_seed(arms: Mapping[str, Arm], seed: int) -> dict[str, Areas]:
    """The columns of every row, with the collection of the seed left out."""
    left = seed % len(COLLECTIONS)
    kept = [number for number in range(len(COLLECTIONS)) if number != left]
    rows: dict[str, Areas] = {}

    def trained(row: str, numbers: Sequence[int]) -> dict[int, float]:
        started = time.monotonic()
        found = arms[row].areas(arms[row].train(numbers, seed), numbers)
        told = " ".join(f"{number}: {area:.3f}" for number, area in found.items())
        seconds = time.monotonic() - started
        print(f"[{seconds:4.0f} s] seed {seed}, {row} on {numbers}: {told}", flush=True)
        return found

    singles = {number: trained(SINGLE, [number]) for number in kept}
    on_left = [areas[left] for areas in singles.values()]
    rows[SINGLE] = {
        SEEN: float(np.mean([areas[number] for number, areas in singles.items()])),
        UNSEEN_AREA: max(on_left),
        UNSEEN_MEAN: float(np.mean(on_left)),
    }
    for row in LADDER:
        areas = trained(row, kept)
        seen = float(np.mean([areas[number] for number in kept]))
        rows[row] = {SEEN: seen, UNSEEN_AREA: areas[left]}
    return rows


def draw(path: Path, table: Mapping[str, Mapping[str, Sequence[float]]], caption: str) -> None:
    """The ladder: a dot for each seed and a bar for their mean, seen and unseen, in every row."""
    font, small = load_font(15), load_font(12)
    left, right, top, step = 210, 720, 40, 62
    colours = {SEEN: (31, 119, 180), UNSEEN_AREA: (214, 96, 20)}
    foot = top + step * len(table)
    canvas = Image.new("RGB", (right + 40, foot + 62), "white")
    pen = ImageDraw.Draw(canvas)
    low = min(0.5, *(min(columns[name]) for columns in table.values() for name in colours))
    low = np.floor(10 * low) / 10

    def across(area: float) -> float:
        return left + (right - left) * (area - low) / (1 - low)

    for area in np.arange(low, 1.01, 0.1):
        pen.line(
            [across(area), top - 8, across(area), foot],
            "black" if np.isclose(area, 0.5) else "#ddd",
        )
        pen.text((across(area), foot + 6), f"{area:.1f}", "black", small, anchor="ma")
    for index, (row, columns) in enumerate(table.items()):
        middle = top + step * index + step // 2
        pen.text((left - 14, middle), row, "black", font, anchor="rm")
        for (name, colour), down in zip(colours.items(), (-12, 12)):
            mean, y = across(float(np.mean(columns[name]))), middle + down
            pen.line([mean, y - 10, mean, y + 10], colour, 4)
            for area in columns[name]:
                pen.ellipse([across(area) - 4, y - 4, across(area) + 4, y + 4], outline=colour)
    for (name, colour), start in zip(colours.items(), (left, left + 130)):
        pen.ellipse([start, 12, start + 10, 22], fill=colour)
        pen.text((start + 16, 17), name, "black", font, anchor="lm")
    pen.text((14, foot + 34), caption, "black", small)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def main(arguments: list[str] | None = None) -> int:
    """Runs everything and writes the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps of every detector")
    parser.add_argument("--output", type=Path, default=RESULTS / "gm_df.json")
    options = parser.parse_args(arguments)
    report = Report("experiments.gm_df", arguments)
    arms = {
        row: Arm(variant, len(COLLECTIONS) - 1, options.steps) for row, variant in LADDER.items()
    }
    arms[SINGLE] = Arm("clip_joint", 1, options.steps)
    table: dict[str, dict[str, list[float]]] = {}
    for seed in options.seeds:
        for row, areas in areas_of_seed(arms, seed).items():
            for name, area in areas.items():
                table.setdefault(row, {}).setdefault(name, []).append(area)

    def wins(name: str, first: str, second: str) -> int:
        return sum(a > b for a, b in zip(table[first][name], table[second][name], strict=True))

    joint, experts, full = LADDER
    tower = configs.load("gm_df:tiny", SIZES).model.clip
    picture = options.output.with_suffix(".png")
    draw(picture, table, "Area under the ROC curve: a dot for each seed, and their mean.")
    report.write(
        options.output,
        {
            "claim": "unseen: full > naive joint; seen: naive joint <= single",
            "seeds": options.seeds,
            "left out": [seed % len(COLLECTIONS) for seed in options.seeds],
            "steps": options.steps,
            "batch size": BATCH,
            "learning rate": LR,
            "towers": f"from scratch, width {tower.width}, depth {tower.depth}, patches of "
            f"{tower.patch_size[0]} in images of {tower.image_size[0]} pixels",
            "images": {
                "training, of a collection": len(images(0, "train")),
                "test, of a collection": len(images(0, "test")),
            },
            "seeds where the first is above": {
                "unseen: full, naive joint": wins(UNSEEN_AREA, full, joint),
                "unseen: full, experts and norms": wins(UNSEEN_AREA, full, experts),
                "unseen: experts and norms, naive joint": wins(UNSEEN_AREA, experts, joint),
                "unseen: full, best single": wins(UNSEEN_AREA, full, SINGLE),
                "seen: single, naive joint": wins(SEEN, SINGLE, joint),
            },
            "scores": {
                row: {name: spread(areas) for name, areas in columns.items()}
                for row, columns in table.items()
            },
            "picture": picture.name,
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
