"""Does MAE do at toy scale what the paper claims? Full Fashion-MNIST, a small ViT, three seeds.

    python benchmarks/experiments/mae.py

Questions, and the claim that each one tests:
 1. Is the task learnable at all? The same network, trained with all labels (one seed).
 2. Are MAE's features better than those of the untrained encoder? Linear probe with 500 and with
    all labels, k-NN, and fine-tuning with 500 labels.
 3. Is a mask ratio of 75 % better than 50 %? (The paper's optimum; may differ here.)
 4. Is a step faster when the encoder sees visible patches only, rather than mask tokens as well?
 5. Are removed patches reconstructed better than by the mean patch, or the visible ones' mean?

Steps and settings were fixed before the runs that are reported. Runs are kept below --workdir and
go on where they stopped. Result: benchmarks/results/mae_fashion_mnist.json.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mim_jax import config as configs
from mim_jax import losses, targets
from mim_jax.data import EvaluationCrop, open_source, train_batches
from mim_jax.data.on_device import normalize
from mim_jax.evaluation.features import extract_features, raw_pixels
from mim_jax.evaluation.knn import knn_accuracy
from mim_jax.evaluation.labelled_data import centre_crops
from mim_jax.evaluation.linear_probe import linear_accuracy
from mim_jax.masking import random_masking
from mim_jax.method import Aux, Batch, Features, Input, Method, Variables
from mim_jax.methods.mae import MAE, MaskedAutoencoder, Reconstruction
from mim_jax.training.experiment import Experiment
from mim_jax.training.loop import train
from mim_jax.training.optimizer import build_optimizer, warmup_cosine
from mim_jax.training.state import state_from_variables
from mim_jax.training.step import make_train_step
from mim_jax.training.versions import versions

RESULT = Path(__file__).resolve().parents[1] / "results" / "mae_fashion_mnist.json"
FEW = 500
RATIOS = (0.75, 0.5)


def experiment_config(seed: int, ratio: float, epochs: float) -> ml_collections.ConfigDict:
    """The `mae:tiny` model on the full Fashion-MNIST."""
    return configs.load(
        "mae:tiny",
        {
            "seed": seed,
            "model.mask_ratio": ratio,
            "data.source": "fashion_mnist",
            "epochs": epochs,
            "schedule.warmup_epochs": epochs / 10,
            "evaluate.protocols": (),
            "log.every_steps": 200,
            "log.pictures_every_steps": 10**9,
            "checkpoint.every_steps": 1000,
        },
    )


class Head(nn.Module):
    """A linear classifier."""

    classes: int = 10

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """`[batch, width]` -> `[batch, classes]`."""
        return nn.Dense(self.classes)(nn.LayerNorm()(features))


@dataclasses.dataclass(frozen=True)
class Classifier(Method):
    """An encoder and a linear head on the mean of its patch tokens, trained end to end."""

    backbone: MAE
    head: ClassVar[Head] = Head()

    @classmethod
    def build(cls, config: ml_collections.ConfigDict) -> "Classifier":
        """Around the MAE of a config."""
        return cls(MAE.build(config))

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Images and labels."""
        return {**self.backbone.inputs, "label": Input((), "int")}

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """A fresh encoder and head."""
        return self.around(self.backbone.init(rng, batch)["params"], rng)

    def around(self, encoder: Any, rng: jax.Array) -> Variables:
        """A given encoder with a fresh head."""
        width = self.backbone.model.encoder.width
        head = self.head.init(rng, jnp.zeros((1, width)))["params"]
        return {"params": {"backbone": encoder, "head": head}}

    def logits(self, variables: Variables, batch: Batch) -> Any:
        """Class logits `[batch, classes]`."""
        params = variables["params"]
        features = self.backbone.features({"params": params["backbone"]}, batch)
        return self.head.apply({"params": params["head"]}, features.tokens.mean(axis=1))

    def loss(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array], step: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """Cross-entropy."""
        return losses.cross_entropy(self.logits(variables, batch), batch["label"]), Aux()

    def features(self, variables: Variables, batch: Batch) -> Features:
        """The encoder's."""
        return self.backbone.features({"params": variables["params"]["backbone"]}, batch)


def classifier_accuracy(
    experiment: Experiment, encoder: Any, split: str, steps: int, seed: int
) -> float:
    """Test accuracy after training encoder and head end to end on a labelled split."""
    config = experiment.config
    assert isinstance(experiment.method, MAE)
    method = Classifier(experiment.method)
    settings = config.optimizer.copy_and_resolve_references()
    settings.update(weight_decay=0.05, b2=0.999)
    schedule = warmup_cosine(
        1e-3, min_lr=0.0, warmup_epochs=steps / 10, epochs=steps, steps_per_epoch=1
    )
    schedules = {"default": schedule}
    optimizer = build_optimizer(settings, (), schedules)
    state = state_from_variables(method, optimizer, method.around(encoder, jax.random.key(seed)))
    # Not donated: the encoder that it starts from is used again.
    step = jax.jit(make_train_step(method, optimizer, schedules, experiment.prepare, seed=seed))
    source = open_source("fashion_mnist", split)
    crop = EvaluationCrop(tuple(config.data.image_size), crop_ratio=1.0)
    for batch in train_batches(source, crop, batch_size=128, seed=seed, num_steps=steps):
        state, _ = step(state, {"image": batch["image"], "label": batch["label"]})
    logits = jax.jit(method.logits)
    right = total = 0
    for batch in centre_crops(config, "test"):
        images = normalize(jnp.asarray(batch["image"]), config.data.mean, config.data.std)
        guess = np.asarray(logits(state.variables, {"image": images})).argmax(axis=1)
        right += int(((guess == batch["label"]) & batch["valid"]).sum())
        total += int(batch["valid"].sum())
    return right / total


def feature_scores(features: Any) -> dict[str, float]:
    """Probe and k-NN accuracies from `features(split) -> (features, labels)`."""
    test = features("test")
    few, every = features(f"train[:{FEW}]"), features("train")
    return {
        f"linear, {FEW} labels": linear_accuracy(*few, *test),
        "linear, all labels": linear_accuracy(*every, *test),
        "k-NN, all labels": knn_accuracy(*every, *test),
    }


def encoder_scores(experiment: Experiment, variables: Variables) -> dict[str, float]:
    """`feature_scores` of an encoder, on the mean of its patch tokens."""
    config = experiment.config

    def features(split: str) -> Any:
        batches = centre_crops(config, split)
        data = config.data
        return extract_features(
            experiment.method, variables, batches, mean=data.mean, std=data.std, pool="mean"
        )

    return feature_scores(features)


def reconstruction_errors(experiment: Experiment, variables: Variables) -> dict[str, float]:
    """Mean squared error on removed test patches, in units of the training target."""
    config, method = experiment.config, experiment.method
    assert isinstance(method, MAE)
    images = np.concatenate([b["image"][b["valid"]] for b in centre_crops(config, "test")])
    normalized = normalize(jnp.asarray(images[:2000]), config.data.mean, config.data.std)
    target = method.target(normalized)
    noise = jax.random.uniform(jax.random.key(1), (len(normalized), method.tokens))
    output = jax.jit(method.reconstruct)(variables, normalized, noise)
    mask = output.masking.mask
    visible = (1 - mask)[..., None]
    mean_patch = target.mean(axis=(0, 1), keepdims=True)
    visible_mean = (target * visible).sum(axis=1, keepdims=True) / visible.sum(axis=1)[:, None]

    def error(prediction: jax.Array) -> float:
        return float(losses.masked_mean(losses.squared_error(prediction, target), mask))

    return {
        "MAE": error(output.pred),
        "mean patch of the data": error(jnp.broadcast_to(mean_patch, target.shape)),
        "mean of the visible patches": error(jnp.broadcast_to(visible_mean, target.shape)),
    }


class WithMaskTokens(MaskedAutoencoder):
    """The same autoencoder, but removed patches go through the encoder as blank ones."""

    def __call__(self, images: jax.Array, noise: jax.Array) -> Reconstruction:
        """As `MaskedAutoencoder`, with all tokens in the encoder."""
        chosen = random_masking(noise, self.kept)
        patch_size = self.encoder.patch_size
        patches = targets.patchify(images, patch_size) * (1 - chosen.mask[..., None])
        latent, _ = self.encoder(targets.unpatchify(patches, self.encoder.image_size, patch_size))
        places = jnp.broadcast_to(jnp.arange(noise.shape[1]), noise.shape)
        return Reconstruction(latent, self.decoder(latent, places), chosen)


def step_times(config: ml_collections.ConfigDict, rounds: int = 12) -> dict[str, float]:
    """Median milliseconds of a train step of both kinds, timed in alternation."""
    experiments = {"visible patches only": Experiment.on_one_device(config)}
    plain = experiments["visible patches only"]
    assert isinstance(plain.method, MAE)
    model = plain.method.model
    full = dataclasses.replace(
        plain.method, model=WithMaskTokens(model.encoder, model.decoder, model.kept)
    )
    experiments["mask tokens in the encoder"] = dataclasses.replace(plain, method=full)
    shapes = plain.batch_shapes()
    batch = {"image": jax.random.randint(jax.random.key(0), shapes["image"].shape, 0, 256)}
    batch = {"image": batch["image"].astype(jnp.uint8)}
    compiled = {name: e.compiled_step(shapes) for name, e in experiments.items()}
    states = {name: e.initial_state(shapes) for name, e in experiments.items()}
    times: dict[str, list[float]] = {name: [] for name in experiments}
    for _ in range(rounds):
        for name in experiments:
            started = time.perf_counter()
            states[name], metrics = compiled[name](states[name], batch)
            jax.block_until_ready(metrics)
            times[name].append(time.perf_counter() - started)
    # The first two rounds warm up.
    return {name: 1000 * statistics.median(values[2:]) for name, values in times.items()}


def summary(values: list[float]) -> dict[str, Any]:
    """Mean and half the range, beside the values themselves."""
    return {
        "mean": statistics.mean(values),
        "spread": (max(values) - min(values)) / 2,
        "values": values,
    }


def main() -> int:
    """Runs everything and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--workdir", type=Path, default=Path("runs/experiments/mae"))
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    scores: dict[str, dict[str, list[float]]] = {}
    errors: dict[str, list[float]] = {}
    supervised, pictures = 0.0, []

    def add(row: str, new: dict[str, float]) -> None:
        for name, value in new.items():
            scores.setdefault(row, {}).setdefault(name, []).append(value)
            print(f"  {row}: {name}: {value:.4f}", flush=True)

    for seed in range(options.seeds):
        print(f"seed {seed}", flush=True)
        for ratio in RATIOS:
            config = experiment_config(seed, ratio, options.epochs)
            run = train(config, options.workdir / f"seed{seed}_ratio{ratio}")
            experiment = Experiment.on_one_device(config)
            variables = run.state.variables
            row = f"MAE {ratio:.0%}"
            add(row, encoder_scores(experiment, variables))
            if ratio != RATIOS[0]:
                continue
            pictures.append(str(run.picture))
            for name, value in reconstruction_errors(experiment, variables).items():
                errors.setdefault(name, []).append(value)
            initial = experiment.initial_state(experiment.batch_shapes()).variables
            add("untrained", encoder_scores(experiment, initial))
            for name, start in ((row, variables), ("untrained", initial)):
                accuracy = classifier_accuracy(
                    experiment, start["params"], f"train[:{FEW}]", steps=150, seed=seed
                )
                add(name, {f"fine-tuned, {FEW} labels": accuracy})
            if seed == 0:
                supervised = classifier_accuracy(
                    experiment, initial["params"], "train", steps=1000, seed=seed
                )
                print(f"  supervised with all labels: {supervised:.4f}", flush=True)
    pixels = experiment_config(0, RATIOS[0], 1.0)
    add("raw pixels", feature_scores(lambda split: raw_pixels(centre_crops(pixels, split))))
    result = {
        "command": " ".join(["python", "benchmarks/experiments/mae.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}, "
        f"{jax.device_count()} device",
        "versions": versions(),
        "epochs": options.epochs,
        "supervised, all labels": supervised,
        "accuracy": {
            row: {name: summary(values) for name, values in columns.items()}
            for row, columns in scores.items()
        },
        "error on removed patches": {name: summary(values) for name, values in errors.items()},
        "step milliseconds": step_times(experiment_config(0, RATIOS[0], 1.0)),
        "pictures": pictures,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
