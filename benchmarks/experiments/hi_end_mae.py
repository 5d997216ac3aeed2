"""Do encoder levels that a decoder attends to hold more than those of a plain masked autoencoder?

    python -m benchmarks.experiments.hi_end_mae

Procedural abdomens of 24 voxels a side: a body and four organs, two of one grey level. Equal
numbers of steps on the same encoder:

 * Hi-End-MAE: the decoder attends to the blocks 3, 6, 9 and sees the last output;
 * a plain MAE: the same decoder without these attentions, five blocks of self-attention;
 * the encoder as it was initialized.

Each tapped level is frozen, and a ridge regression on the tokens of 24 volumes tells the share of
each organ in a patch; the score is R^2 on 48 other volumes, mean over organs.

Claim: Hi-End-MAE is above the plain MAE on every level. The training is short, so that nothing is
claimed about the encoder as initialized.
Result: benchmarks/results/hi_end_mae.json and a picture of shares of organs as predicted.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from sklearn.linear_model import Ridge

from benchmarks.experiments.seeded import Seeded
from benchmarks.experiments.toy_task import spread
from benchmarks.measure import RESULTS, Report
from mim_jax import config as configs
from mim_jax.data.sources import open_source
from mim_jax.method import Variables
from mim_jax.methods.hi_end_mae import HiEndMAE
from mim_jax.methods.parts.volumes import COLOURS
from mim_jax.targets import patchify
from mim_jax.training.experiment import Experiment
from mim_jax.training.pictures import picture_grid

SIDE, PATCH, ORGANS = 24, 6, 4
TAPS = (3, 6, 9)
LEVELS = (*(f"h{tap}" for tap in TAPS), "final")
BATCH, LR, RIDGE = 16, 1e-3, 10.0
LABELLED = 24

SIZES = {
    "model.width": 60,
    "model.depth": 12,
    "model.heads": 4,
    "model.patch_size": (PATCH,) * 3,
    "model.taps": TAPS,
    "model.decoder_width": 48,
    "model.decoder_depth": 2,
    "model.decoder_heads": 4,
    "model.scan": True,
    "compute_dtype": "float32",
}

Abdomens = tuple[np.ndarray, np.ndarray]
"""Samples uint16 `[n, side, side, side, 1]`, and classes uint8 `[n, side, side, side]`."""


def abdomens(split: str) -> Abdomens:
    """All volumes of a split."""
    source = open_source(f"synthetic:abdomens:{SIDE}", split)
    whole = (slice(0, SIDE),) * 3
    examples: list[Mapping[str, Any]] = [source[i] for i in range(len(source))]
    images = np.stack([example["image"].read(whole) for example in examples])
    return images[..., None], np.stack([e["segmentation"].read(whole) for e in examples])


def shares(classes: np.ndarray) -> np.ndarray:
    """Share of each organ in each patch, float32 `[n, tokens, organs]`."""
    organs = np.stack([classes == organ for organ in range(1, ORGANS + 1)], axis=-1)
    patches = np.asarray(patchify(jnp.asarray(organs, jnp.float32), (PATCH,) * 3))
    return patches.reshape(*patches.shape[:2], -1, ORGANS).mean(axis=2)


def batches(images: np.ndarray, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of shuffled epochs without end."""
    random = np.random.default_rng(seed)
    while True:
        order = random.permutation(len(images))
        for first in range(0, len(order) - BATCH + 1, BATCH):
            yield {"image": images[order[first : first + BATCH]]}


class Arm:
    """One way to pre-train; what is compiled serves all seeds."""

    def __init__(self, steps: int, examples: int, *, cross_attention: bool) -> None:
        """Builds the experiment; nothing is compiled before it is needed."""
        config = configs.load("hi_end_mae:tiny", {**SIZES, "optimizer.lr": LR})
        config.model.cross_attention = cross_attention
        config.update(steps=steps, batch_size=BATCH)
        config.schedule.warmup_epochs = steps / 10 / (examples // BATCH)
        self.experiment = experiment = Experiment.build(config, examples, jax.devices()[:1])
        assert isinstance(experiment.method, HiEndMAE)
        self.method = experiment.method
        self.steps = steps
        seeded = Seeded(experiment)
        self.initial, self._step = seeded.initial, seeded.step
        self._levels = jax.jit(
            lambda variables, images: self.method.levels(
                variables, {"image": images.astype(jnp.float32) / (2**16 - 1)}
            )
        )

    def train(self, images: np.ndarray, seed: int) -> tuple[Variables, float]:
        """Variables after training, and the mean loss of the last tenth of the steps."""
        state, tail = self.initial(seed), []
        for number, batch in zip(range(self.steps), batches(images, seed)):
            state, metrics = self._step(state, batch, seed)
            if number >= int(self.steps * 0.9):
                tail.append(metrics["loss"])
        return state.variables, float(np.mean([float(loss) for loss in tail]))

    def levels(self, variables: Variables, images: np.ndarray) -> list[np.ndarray]:
        """Patch tokens of every level, `[n, tokens, width]` each."""
        return [np.asarray(level[:, 1:]) for level in self._levels(variables, images)]


def probe(tokens: np.ndarray, wanted: np.ndarray) -> tuple[float, np.ndarray]:
    """R^2 of a ridge regression on standardized tokens, mean over organs, and its predictions.

    The first volumes are labelled, the others tested.
    """
    width = tokens.shape[-1]
    train, test = (part.reshape(-1, width) for part in (tokens[:LABELLED], tokens[LABELLED:]))
    mean, deviation = train.mean(axis=0), train.std(axis=0) + 1e-6
    known, true = (part.reshape(-1, ORGANS) for part in (wanted[:LABELLED], wanted[LABELLED:]))
    ridge = Ridge(alpha=RIDGE).fit((train - mean) / deviation, known)
    guess = ridge.predict((test - mean) / deviation)
    unexplained = ((true - guess) ** 2).sum(axis=0) / ((true - true.mean(axis=0)) ** 2).sum(axis=0)
    return float(np.mean(1 - unexplained)), guess.reshape(wanted[LABELLED:].shape)


def scores(
    arm: Arm, variables: Variables, labelled: Abdomens
) -> tuple[dict[str, float], np.ndarray]:
    """R^2 of every level, and predicted shares from the middle one."""
    wanted = shares(labelled[1])
    found = [probe(level, wanted) for level in arm.levels(variables, labelled[0])]
    return {name: r2 for name, (r2, _) in zip(LEVELS, found, strict=True)}, found[1][1]


def draw(
    path: Path, labelled: Abdomens, predicted: Mapping[str, np.ndarray], rows: int = 4
) -> None:
    """Planes through test volumes with the shares of organs over them, true and predicted."""
    images, classes = (part[LABELLED : LABELLED + rows] for part in labelled)
    through = classes.astype(bool).sum(axis=(1, 2)).argmax(axis=1)  # the fullest axial plane
    side = SIDE // PATCH

    def plane(voxels: np.ndarray) -> np.ndarray:
        return np.stack([v[:, :, z] for v, z in zip(voxels, through)])

    grey = plane(images[..., 0].astype(np.float32) / (2**16 - 1))[..., None].repeat(3, axis=-1)

    def overlaid(share: np.ndarray) -> np.ndarray:
        cells = share[:rows].reshape(-1, side, side, side, ORGANS)
        voxels = cells.repeat(PATCH, 1).repeat(PATCH, 2).repeat(PATCH, 3)
        weight = np.clip(2 * plane(voxels), 0, 0.8)  # a share of 0.4 in full colour
        total = weight.sum(axis=-1, keepdims=True)
        weight = weight / np.maximum(total / 0.8, 1)
        colour = weight @ np.asarray(COLOURS[:ORGANS], np.float32)
        return grey * (1 - weight.sum(axis=-1, keepdims=True)) + colour

    true = shares(labelled[1])[LABELLED:]
    shown = {"volume": grey, "true shares": overlaid(true)}
    shown |= {name: overlaid(share) for name, share in predicted.items()}
    columns = {
        name: (255 * np.clip(values, 0, 1)).astype(np.uint8).swapaxes(1, 2)[:, ::-1]
        for name, values in shown.items()
    }
    caption = f"Share of each organ in a patch, by ridge regression on block {TAPS[1]}."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture_grid(columns, caption)).save(path)


def main(arguments: list[str] | None = None) -> int:
    """Runs everything and writes the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--output", type=Path, default=RESULTS / "hi_end_mae.json")
    options = parser.parse_args(arguments)
    report = Report("experiments.hi_end_mae", arguments)
    unlabelled, labelled = abdomens("train")[0], abdomens("test")
    arms = {
        "plain MAE": Arm(options.steps, len(unlabelled), cross_attention=False),
        "Hi-End-MAE": Arm(options.steps, len(unlabelled), cross_attention=True),
    }
    rows: dict[str, dict[str, list[float]]] = {}
    predicted: dict[str, np.ndarray] = {}

    def add(row: str, arm: Arm, variables: Variables, loss: Mapping[str, float]) -> None:
        found, guess = scores(arm, variables, labelled)
        predicted.setdefault(row, guess)  # of the first seed
        for name, value in {**found, **loss}.items():
            rows.setdefault(row, {}).setdefault(name, []).append(value)
        print(row, {name: round(value, 4) for name, value in found.items()}, loss, flush=True)

    for seed in range(options.seeds):
        untrained = arms["Hi-End-MAE"]
        add("untrained", untrained, untrained.initial(seed).variables, {})
        for row, arm in arms.items():
            started = time.monotonic()
            variables, loss = arm.train(unlabelled, seed)
            print(f"seed {seed}: {time.monotonic() - started:.0f} s", flush=True)
            add(row, arm, variables, {"loss": loss})
    draw(options.output.with_suffix(".png"), labelled, predicted)
    above = [
        sum(ours > theirs for ours, theirs in zip(rows["Hi-End-MAE"][x], rows["plain MAE"][x]))
        for x in LEVELS
    ]
    report.write(
        options.output,
        {
            "claim": "R^2 of Hi-End-MAE > plain MAE on every level",
            "seeds": options.seeds,
            "steps": options.steps,
            "batch size": BATCH,
            "learning rate": LR,
            "volumes": {
                "unlabelled": len(unlabelled),
                "labelled": LABELLED,
                "test": len(labelled[0]) - LABELLED,
            },
            "seeds where Hi-End-MAE is above": dict(zip(LEVELS, above, strict=True)),
            "scores": {
                row: {name: spread(values) for name, values in columns.items()}
                for row, columns in rows.items()
            },
            "picture": options.output.with_suffix(".png").name,
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
