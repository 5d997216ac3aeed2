"""What the small experiments share: a teacher, the training of an arm, scores of encoders.

An arm is a config. It is trained by the project's own step on the same batches as every other arm
of its seed, compiled once for all seeds. Scores are kept below a folder, so that a run that was cut
off goes on, and an arm that two experiments share is trained once.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from benchmarks.experiments.seeded import Seeded
from benchmarks.experiments.toy_images import Images, Task
from benchmarks.measure import RESULTS, Report, alternate, summary
from mim_jax import config as configs
from mim_jax.conversion.files import read_state_dict, write_state_dict
from mim_jax.conversion.pretrained import load_pretrained
from mim_jax.data import RandomResizedCrop, train_batches
from mim_jax.evaluation.features import TOKENS, extract_features
from mim_jax.evaluation.knn import knn_accuracy
from mim_jax.evaluation.linear_probe import linear_accuracy
from mim_jax.method import Method, Variables
from mim_jax.methods.finetune import FineTune
from mim_jax.models.tower import tower_settings
from mim_jax.models.vit import ViT
from mim_jax.training import tree
from mim_jax.training.experiment import Experiment, training_crop
from mim_jax.training.state import TrainState, state_from_variables
from mim_jax.training.step import make_train_step

WIDTH, DEPTH, HEADS = 64, 4, 4
"""Of every encoder and teacher."""

MEAN, STD = (0.2861,), (0.3530,)
"""Of Fashion-MNIST's pixels in [0, 1]."""

SIZES = {
    "compute_dtype": "float32",
    "model.size": "",
    "model.width": WIDTH,
    "model.depth": DEPTH,
    "model.heads": HEADS,
}

Scores = dict[str, float]

FINETUNE_BATCH, FINETUNE_LR = 50, 3e-3
TEACHER_SEED, TEACHER_LR = 7, 2e-3


def config_of(task: Task, name: str, changes: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A config for a task's images, all sizes set; `changes` are by dotted field name."""
    own = {
        "model.patch_size": (task.patch, task.patch),
        "data.source": task.name,
        "data.image_size": (task.side, task.side),
        "data.channels": 1,
        "data.mean": MEAN,
        "data.std": STD,
        "batch_size": task.batch_size,
        "epochs": 1.0,
    }
    # A hybrid encoder has other fields, and Locality Alignment the sizes of its teacher.
    known = configs.leaves(configs.load(name))
    given = {field: value for field, value in {**SIZES, **own}.items() if field in known}
    return configs.load(name, {**given, **changes})


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is compared: a config, or a method of the experiment's own in place of the config's.

    Attributes:
        config: name of the config.
        changes: of its fields.
        steps: optimizer steps; 0 for no training.
        method: from the method that the config describes to the one that is trained.
        start: what is done to a new state before training, such as giving it weights.
        watch: what is measured every `watch_every` steps.
    """

    config: str
    changes: Mapping[str, Any]
    steps: int
    method: Callable[[Method], Method] | None = None
    start: Callable[[Method, TrainState], TrainState] | None = None
    watch: Callable[["Trained"], float] | None = None
    watch_every: int = 100


@dataclasses.dataclass(frozen=True)
class Trained:
    """An arm after training.

    Attributes:
        task: the images.
        experiment: method and config.
        variables: of the method.
        metrics: means over the last tenth of the steps.
        seed: of the run.
        watched: by step, what `Arm.watch` gave.
    """

    task: Task
    experiment: Experiment
    variables: Variables
    metrics: Scores
    seed: int
    watched: Mapping[int, float] = dataclasses.field(default_factory=dict)

    @property
    def method(self) -> Method:
        """The method."""
        return self.experiment.method


def experiment_of(task: Task, arm: Arm) -> Experiment:
    """The experiment of an arm; its seed is given to the step later."""
    config = config_of(task, arm.config, arm.changes)
    steps = max(arm.steps, 20)
    config.update(steps=steps)
    examples = len(task.unlabelled.images)
    per_epoch = examples // config.batch_size
    config.schedule.warmup_epochs = steps / 10 / per_epoch
    experiment = Experiment.build(config, examples, jax.devices()[:1])
    if arm.method is None:
        return experiment
    return dataclasses.replace(experiment, method=arm.method(experiment.method))


class Trainer:
    """Trains one arm with any seed; what is compiled serves all of them."""

    def __init__(self, task: Task, arm: Arm) -> None:
        """Builds the experiment; nothing is compiled before it is needed."""
        self.task, self.arm = task, arm
        self.experiment = experiment = experiment_of(task, arm)
        seeded = Seeded(experiment)
        self.initial, self._step = seeded.initial, seeded.step

    def start(self, seed: int) -> TrainState:
        """The state before the first step: with its teacher, and calibrated."""
        experiment, method = self.experiment, self.experiment.method
        state, _ = load_pretrained(method, self.initial(seed))
        if self.arm.start is not None:
            state = self.arm.start(method, state)
        if method.calibration_batches:
            batches = self.batches(seed)
            first = [next(batches) for _ in range(method.calibration_batches)]
            batches.close()  # type: ignore[attr-defined]
            state = experiment.calibrated(state, first)
        return state

    def batches(self, seed: int) -> Iterator[dict[str, np.ndarray]]:
        """The training batches, the same for all arms with the same crops and batch size."""
        config, names = self.experiment.config, set(self.experiment.method.inputs)
        for batch in train_batches(
            self.task.unlabelled.source(),
            training_crop(config),
            batch_size=config.batch_size,
            seed=seed,
        ):
            yield {name: array for name, array in batch.items() if name in names}

    def train(self, seed: int) -> Trained:
        """The arm after its steps."""
        state, tail, watched = self.start(seed), [], {}
        for number, batch in zip(range(self.arm.steps), self.batches(seed)):
            state, metrics = self._step(state, batch, seed)
            if number >= int(self.arm.steps * 0.9):
                tail.append(metrics)
            if self.arm.watch is not None and (number + 1) % self.arm.watch_every == 0:
                now = Trained(self.task, self.experiment, state.variables, {}, seed)
                watched[number + 1] = self.arm.watch(now)
        if skipped := int(state.skipped):
            raise ValueError(f"{skipped} steps of {self.arm.config} were not finite.")
        means = {
            name: float(np.mean([float(metrics[name]) for metrics in tail]))
            for name in (tail[0] if tail else ())
            if name.startswith(("loss", "mlm_acc"))
        }
        return Trained(self.task, self.experiment, state.variables, means, seed, watched)


def evaluation_batches(images: Images, size: int = 250) -> list[dict[str, np.ndarray]]:
    """The images in batches of one size, the last one filled up."""
    batches = []
    for first in range(0, len(images.images), size):
        part = images.images[first : first + size]
        valid = np.arange(size) < len(part)
        fill = [(0, size - len(part))] + [(0, 0)] * 3
        batches.append({"image": np.pad(part, fill), "valid": valid})
    return batches


def tokens_of(method: Method, variables: Variables, images: Images) -> np.ndarray:
    """Frozen patch tokens `[n, tokens, width]`."""
    return extract_features(
        method, variables, evaluation_batches(images), mean=MEAN, std=STD, pool=TOKENS
    )[0]


def probe_scores(features: Callable[[Images], np.ndarray], task: Task) -> Scores:
    """Accuracies of linear probes with few and more labels, and of k-NN, from frozen features."""
    train, test = features(task.probe), features(task.test)
    few, labels, truth = len(task.few.images), task.probe.labels, task.test.labels
    return {
        f"linear, {few} labels": linear_accuracy(train[:few], labels[:few], test, truth),
        f"linear, {len(train):,} labels": linear_accuracy(train, labels, test, truth),
        f"k-NN, {len(train):,} labels": knn_accuracy(train, labels, test, truth),
    }


def encoder_scores(trained: Trained) -> Scores:
    """`probe_scores` of the mean of the patch tokens."""

    def features(images: Images) -> np.ndarray:
        return tokens_of(trained.method, trained.variables, images).mean(axis=1)

    return probe_scores(features, trained.task)


def pixel_scores(task: Task) -> Scores:
    """`probe_scores` of raw pixels."""
    return probe_scores(lambda x: x.images.reshape(len(x.images), -1) / np.float32(255), task)


@functools.cache
def classifier(
    task: Task, classes: int, pool: str, family: str, multi: bool, steps: int, lr: float
) -> tuple[FineTune, Callable, Callable, Any]:
    """A classifier of the encoder's size, its initial state, its step, and its optimizer."""
    changes = {
        "model.num_classes": classes,
        "model.labels": "multi" if multi else "single",
        "model.pool": pool,
        "model.family": family,
        "model.layer_decay": 1.0,
        "model.smoothing": 0.0,
        "batch_size": FINETUNE_BATCH,
        "steps": steps,
        "optimizer.lr": lr,
        "schedule.warmup_epochs": 0.1 * steps,
        "schedule.min_lr": 0.0,
    }
    config = config_of(task, "finetune:tiny", changes)
    config.update(steps=steps)
    experiment = Experiment.build(config, FINETUNE_BATCH, jax.devices()[:1])
    method = experiment.method
    assert isinstance(method, FineTune)
    like = {"image": jnp.zeros((1, *task.shape))}

    @jax.jit
    def step(state: TrainState, batch: Any, seed: jax.Array) -> Any:
        return make_train_step(
            method,
            experiment.optimizer,
            experiment.schedules,
            experiment.prepare,
            seed=seed,  # type: ignore[arg-type]
        )(state, batch)

    initial = jax.jit(lambda seed: method.init(jax.random.key(seed), like))
    return method, initial, step, experiment.optimizer


def train_classifier(
    task: Task,
    data: Images,
    steps: int,
    seed: int,
    *,
    donor: tuple[Method, Variables] | None = None,
    classes: int = 0,
    pool: str = "mean",
    family: str = "mae",
    lr: float = FINETUNE_LR,
) -> tuple[FineTune, Variables]:
    """A classifier after training on labelled images, from a donor's encoder or from scratch."""
    multi = data.labels.ndim == 2
    method, initial, step, optimizer = classifier(
        task, classes or task.classes, pool, family, multi, steps, lr
    )
    variables = dict(initial(seed))
    if donor is not None:
        given = tree.flatten(jax.tree.map(np.asarray, donor[1]["params"]))
        params = tree.flatten(variables["params"])
        for path in params:
            value = method.adopt(path, given, donor[0]) if path.startswith("encoder/") else None
            if value is None and path.startswith("encoder/"):
                raise ValueError(f"{type(donor[0]).__name__} gives nothing for {path}.")
            params[path] = params[path] if value is None else jnp.asarray(value)
        variables = {"params": tree.unflatten(params)}
    state = state_from_variables(method, optimizer, variables)
    crop = RandomResizedCrop((task.side, task.side), area=(0.7, 1.0))
    labels = data.labels
    batches = train_batches(data.source(), crop, batch_size=FINETUNE_BATCH, seed=seed)
    for _, batch in zip(range(steps), batches):
        told = labels[batch["index"]].astype(np.int32)
        state, _ = step(state, {"image": batch["image"], "label": told}, seed)
    batches.close()
    return method, state.variables


@functools.cache
def _logits(method: FineTune) -> Callable:
    @jax.jit
    def logits(variables: Variables, images: jax.Array) -> jax.Array:
        shares = images.astype(jnp.float32) / 255
        return method.logits(variables, (shares - jnp.asarray(MEAN)) / jnp.asarray(STD))

    return logits


def predictions(method: FineTune, variables: Variables, images: Images) -> np.ndarray:
    """Logits `[n, classes]`."""
    batches = evaluation_batches(images)
    rows = [np.asarray(_logits(method)(variables, b["image"]))[b["valid"]] for b in batches]
    return np.concatenate(rows)


def finetuned_accuracy(
    donor: tuple[Method, Variables], task: Task, seed: int, steps: int, family: str = "mae"
) -> float:
    """Test accuracy after fine-tuning the encoder of a method on the few labels."""
    method, variables = train_classifier(task, task.few, steps, seed, donor=donor, family=family)
    guess = predictions(method, variables, task.test).argmax(axis=1)
    return float(np.mean(guess == task.test.labels))


def supervised_accuracy(task: Task, seed: int, steps: int) -> float:
    """Test accuracy of the encoder trained with the labels of all images for pre-training."""
    method, variables = train_classifier(task, task.unlabelled, steps, seed)
    guess = predictions(method, variables, task.test).argmax(axis=1)
    return float(np.mean(guess == task.test.labels))


def encoder_of(method: Method) -> ViT:
    """The ViT of a method that has one."""
    assert method.encoder is not None
    return method.encoder


class Workbench:
    """Runs arms over seeds, keeps their scores, and writes the result."""

    def __init__(self, name: str, task: Task, options: argparse.Namespace) -> None:
        """Makes the folder.

        Args:
            name: of the experiment.
            task: its images.
            options: of `arguments`.
        """
        self.name, self.task, self.options = name, task, options
        self.report = Report(f"experiments.{name}", options.given)
        self.folder = options.workdir / task.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, dict[str, list[float]]] = {}

    @property
    def seeds(self) -> range:
        """The seeds of this run."""
        return range(self.options.first_seed, self.options.first_seed + self.options.seeds)

    def once(self, key: Sequence[Any], make: Callable[[], Any]) -> Any:
        """What `make` gives, or gave when it was called with the same key before."""
        text = json.dumps(key, sort_keys=True, default=str)
        path = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"
        if path.is_file():
            return json.loads(path.read_text())["value"]
        value = make()
        path.write_text(json.dumps({"key": text, "value": value}))
        return value

    def add(
        self, row: str, key: Sequence[Any], make: Callable[[int], Scores], *, once: bool = False
    ) -> None:
        """Scores of a row of the table for every seed, or for the first one alone.

        Args:
            row: what it is called.
            key: what the scores depend on beside the seed.
            make: gives them for a seed.
            once: take the first seed alone.
        """
        for seed in self.seeds[:1] if once else self.seeds:
            started = time.monotonic()
            scores = self.once([*key, seed], functools.partial(make, seed))
            seconds = time.monotonic() - started
            told = ", ".join(f"{k} {v:.4f}" for k, v in scores.items())
            print(f"[{seconds:5.0f} s] seed {seed}, {row}: {told}", flush=True)
            columns = self.rows.setdefault(row, {})
            for name, value in scores.items():
                columns.setdefault(name, []).append(value)

    def add_arm(self, row: str, arm: Arm, score: Callable[[Trained], Scores], tag: str) -> None:
        """Trains an arm with every seed and scores it.

        Args:
            row: what it is called in the table.
            arm: what to train.
            score: of a trained arm.
            tag: says what `score` does, and what the config does not say of the arm.
        """
        trainer = functools.cache(lambda: Trainer(self.task, arm))

        def scores(seed: int) -> Scores:
            trained = trainer().train(seed)
            return {**score(trained), **trained.metrics}

        config = config_of(self.task, arm.config, arm.changes).to_json_best_effort()
        self.add(row, [config, arm.steps, tag], scores)

    def teacher(self, steps: int) -> tuple[str, FineTune, Variables]:
        """A small supervised ViT: the file of its weights, its method and its variables.

        Its class token is classified, as in the towers that methods expect.
        """
        task, told = self.task, self.task.teaching
        path = self.folder / f"teacher_{steps}.safetensors"
        classes = told.labels.shape[1] if told.labels.ndim == 2 else int(told.labels.max()) + 1
        multi = told.labels.ndim == 2
        kind: dict[str, Any] = {"pool": "cls", "family": "vit", "lr": TEACHER_LR}
        method, *_ = classifier(task, classes, multi=multi, steps=steps, **kind)
        if not path.is_file():
            _, variables = train_classifier(
                task, told, steps, TEACHER_SEED, classes=classes, **kind
            )
            layout = method.layout()
            write_state_dict(path, layout.save(jax.tree.map(np.asarray, variables["params"])))
        like = {"image": jnp.zeros((1, *task.shape))}
        shapes = jax.eval_shape(lambda: method.init(jax.random.key(0), like))["params"]
        params = method.layout().load(read_state_dict(path), shapes)
        return str(path), method, {"params": params}

    def tower(self, path: str) -> dict[str, Any]:
        """The changes of a config that make the teacher its teacher."""
        settings = tower_settings(
            "tiny",
            path,
            width=WIDTH,
            depth=DEPTH,
            heads=HEADS,
            patch_size=self.task.patch,
            image_size=self.task.side,
            mean=MEAN,
            std=STD,
        )
        return {f"model.teacher.{name}": value for name, value in settings.items()}

    def write(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the result: the rows, and what else there is to say."""
        rows = {
            row: {name: spread(values) for name, values in columns.items()}
            for row, columns in self.rows.items()
        }
        task = self.task
        settings = {
            "seeds": list(self.seeds),
            "encoder": f"ViT, width {WIDTH}, depth {DEPTH}, {HEADS} heads, patch {task.patch}",
            "images": {
                "source": task.name,
                "side": task.side,
                **{
                    name: len(getattr(task, name).images)
                    for name in ("unlabelled", "few", "probe", "test", "teaching")
                },
            },
        }
        return self.report.write(
            self.options.output, {"settings": settings, **figures, "scores": rows}
        )


def step_times(task: Task, arms: dict[str, Arm], rounds: int) -> dict[str, Any]:
    """Milliseconds of a step of some arms, timed in turns; each is compiled ahead of time."""
    runs, states = {}, {}
    for name, arm in arms.items():
        experiment = experiment_of(task, arm)
        shapes = experiment.batch_shapes()
        compiled = experiment.compiled_step(shapes)
        states[name] = experiment.initial_state(shapes)
        size = shapes["image"].shape
        images = np.random.default_rng(0).integers(0, 256, size).astype(np.uint8)

        def run(name: str = name, compiled: Any = compiled, images: Any = images) -> None:
            states[name], metrics = compiled(states[name], {"image": images})
            jax.block_until_ready(metrics)

        runs[name] = run
    seconds = alternate(runs, rounds, warmup=3)
    return {name: summary([1000 * value for value in values]) for name, values in seconds.items()}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and half the range, beside the values themselves."""
    return {
        "mean": statistics.mean(values),
        "spread": (max(values) - min(values)) / 2,
        "values": list(values),
    }


def arguments(
    name: str, doc: str | None, steps: int, given: list[str] | None
) -> argparse.Namespace:
    """The command line that all these experiments have."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps of every arm")
    parser.add_argument("--teacher-steps", type=int, default=3000)
    parser.add_argument(
        "--full",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take the full Fashion-MNIST, or else the images that come with the package",
    )
    parser.add_argument("--rounds", type=int, default=30, help="of timed steps")
    parser.add_argument("--ablations", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--workdir", type=Path, default=Path("runs/experiments/toy"))
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json")
    options = parser.parse_args(given)
    options.given = given
    return options
