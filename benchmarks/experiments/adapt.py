"""Does adapting a checkpoint beat training from scratch on a small set of other images?

    python -m benchmarks.experiments.adapt

A checkpoint is pre-trained on 50,000 grey images of Fashion-MNIST (28 x 28) without labels. The
small set is 1,000 other images of it, made to look otherwise: 42 x 42 pixels, in colour, each with
a tint of its own, half of them inverted. `mae:adapt` trains on them as on any folder of PNG files,
once from the checkpoint (patch embedding and prediction are resized to three channels) and once
from scratch, for the same number of epochs, each at the learning rate that is derived for it.
Features are scored on 2,000 test images of the same kind by a linear probe and k-NN, beside the
checkpoint as it is, the untrained encoder and raw pixels.

Settings were fixed before the runs that are reported. Runs are kept below --workdir and go on where
they stopped. Result: benchmarks/results/adapt_fashion_mnist.json.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.measure import RESULTS, Report, summary
from mim_jax import config as configs
from mim_jax.conversion.initial import initialize_from
from mim_jax.data import open_source
from mim_jax.evaluation.protocols import evaluate
from mim_jax.training.experiment import Experiment
from mim_jax.training.loop import train
from mim_jax.training.run_log import read_metrics

SIDE = 42
TRAIN, TEST = 1000, 2000
FIRST_HELD_OUT = 50_000
"""Images of the training set from here on are not in the checkpoint's training."""


def pretrained(folder: Path, epochs: float) -> Path:
    """A run of `mae:tiny` on the first 50,000 images."""
    changes = {
        "data.source": "fashion_mnist",
        "data.split": f"train[:{FIRST_HELD_OUT}]",
        "epochs": epochs,
        "schedule.warmup_epochs": epochs / 10,
        "evaluate.protocols": (),
        "log.every_steps": 200,
    }
    train(configs.load("mae:tiny", changes), folder)
    return folder


def write_images(folder: Path, seed: int) -> Path:
    """A folder of coloured images with class sub-folders for training and test."""
    if folder.is_dir():
        return folder
    random = np.random.default_rng(seed)
    first = FIRST_HELD_OUT + seed * TRAIN
    for split, source in (
        ("train", open_source("fashion_mnist", f"train[{first}:{first + TRAIN}]")),
        ("test", open_source("fashion_mnist", f"test[:{TEST}]")),
    ):
        for i in range(len(source)):
            element = source[i]
            place = folder / split / str(element["label"])
            place.mkdir(parents=True, exist_ok=True)
            tinted(element["image"], random).save(place / f"{i}.png")
    return folder


def tinted(image: np.ndarray, random: np.random.Generator) -> Image.Image:
    """A grey image `[28, 28, 1]` in two colours of its own, enlarged."""
    share = image.astype(np.float64) / 255
    share = 1 - share if random.random() < 0.5 else share
    dark, light = random.uniform(0, 90, 3), random.uniform(150, 255, 3)
    pixels = np.uint8(dark + (light - dark) * share)
    return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def final_loss(run: Path) -> dict[str, float]:
    """Mean of the last five logged reconstruction losses of a run."""
    losses = [line["loss"] for line in read_metrics(run) if "loss" in line]
    return {"reconstruction loss": float(np.mean(losses[-5:]))}


def main(arguments: list[str] | None = None) -> int:
    """Runs everything and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretraining-epochs", type=float, default=4.0)
    parser.add_argument("--epochs", type=float, default=40.0)
    parser.add_argument("--workdir", type=Path, default=Path("runs/experiments/adapt"))
    parser.add_argument("--output", type=Path, default=RESULTS / "adapt_fashion_mnist.json")
    options = parser.parse_args(arguments)
    report = Report("experiments.adapt", arguments)
    checkpoint = pretrained(options.workdir / "checkpoint", options.pretraining_epochs)
    scores: dict[str, dict[str, list[float]]] = {}

    def add(row: str, new: dict[str, float]) -> None:
        for name, value in new.items():
            scores.setdefault(row, {}).setdefault(name, []).append(value)
            print(f"  {row}: {name}: {value:.4f}", flush=True)

    settings: dict[str, Any] = {}
    for seed in range(options.seeds):
        print(f"seed {seed}", flush=True)
        data = write_images(options.workdir / f"images{seed}", seed)
        changes = {
            "seed": seed,
            "data.source": str(data),
            "epochs": options.epochs,
            # The target that the checkpoint was trained with.
            "model.normalize_target": False,
            "evaluate.protocols": ("knn", "linear"),
            "log.every_steps": 20,
            "export.formats": (),
        }
        start = {"init_from": str(checkpoint)}
        folder = options.workdir / f"adapted{seed}"
        run = train(configs.load("mae:adapt", {**changes, **start}), folder)
        add("adapted", {**run.evaluation["trained"], **final_loss(folder)})
        config = configs.from_json((folder / "config.json").read_text())
        experiment = Experiment.on_one_device(config)
        state = experiment.initial_state(experiment.batch_shapes())
        state, _ = initialize_from(str(checkpoint), experiment.method, state)
        add("checkpoint as it is", evaluate(experiment.method, state.variables, config))
        # From scratch: the model of the checkpoint, and the rate that is derived without one.
        sizes = ("width", "depth", "heads", "patch_size")
        decoder = ("decoder_width", "decoder_depth", "decoder_heads")
        same = {f"model.{name}": config.model[name] for name in (*sizes, *decoder)}
        same["data.image_size"] = config.data.image_size
        folder = options.workdir / f"scratch{seed}"
        run = train(configs.load("mae:adapt", {**changes, **same}), folder)
        add("from scratch", {**run.evaluation["trained"], **final_loss(folder)})
        add("untrained", run.evaluation["untrained"])
        add("raw pixels", run.evaluation["raw pixels"])
        settings = configs.leaves(config)
    steps = round(options.epochs * (TRAIN // settings["batch_size"]))
    figures = {
        row: {
            name: summary(values) | {"mean": float(np.mean(values)), "values": values}
            for name, values in columns.items()
        }
        for row, columns in scores.items()
    }
    kept = ("batch_size", "data.image_size", "model.patch_size", "model.position_grid")
    report.write(
        options.output,
        {
            "steps": steps,
            "settings": {name: settings[name] for name in kept},
            "scores": figures,
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
