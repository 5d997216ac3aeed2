"""Does a generator of faces from vectors keep the identity, and are its faces worth training on?

    python -m benchmarks.experiments.vec2face

Procedural faces of 28 x 28 pixels: 200 people with 30 pictures each train, 50 others test. The
frozen face model is the tiny one of the package, an ArcFace IResNet trained on the same 200 people
(`mim_jax.conversion.make_tiny_face_model`); it is the same for all seeds, and what differs between
them is the generator, its training and all that is sampled. Claims:

 1. identity: the face model's vector of an image that was generated from the vector of a held-out
    picture has a cosine to it above 0.6, far above that to the vector of another person. Since the
    generator learned against that very face model, another one (of half the width, trained on
    the real pictures) compares the generated images with the pictures too;
 2. separability: of 50 vectors sampled with cosines below 0.3, most pairs of images have vectors
    with a cosine below 0.4;
 3. perturbation: the larger the noise on a vector, the lower the cosine and the larger the
    variance of pixels;
 4. attribute search: the heads turn (by a small network that the search does not see; another one,
    of another half of the training pictures, leads it), and the cosine stays above 0.7;
 5. usefulness: a face model that saw nothing but generated people tells held-out real people apart
    better than by chance, and one of 200 generated people better than one of 50, in equally many
    steps. Beside them: the same model untrained, and trained on the 200 real people.

The ablation is without the term of the identity.

The 200 people of claim 5 are sampled with cosines below 0.4: in the 23 or so dimensions that the
training people span, no more than about 90 fit below 0.3. This was found with the training
pictures, before any generator was trained. Batch size, steps, and the widths of the
discriminator, which would take most of a step's time, were chosen by the time that they take; all
else is as in the config. Nothing was chosen by a result.
Result: benchmarks/results/vec2face.json and a picture of people.
"""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from sklearn.neural_network import MLPRegressor

from benchmarks.experiments.toy_task import spread
from benchmarks.measure import RESULTS, Report
from mim_jax import config as configs
from mim_jax.conversion.face_models import read_iresnet
from mim_jax.conversion.pretrained import load_pretrained
from mim_jax.data import open_source
from mim_jax.data.synthetic.faces import NUISANCE_FACTORS
from mim_jax.evaluation.face_recognition import TINY_FACE_MODEL, face_vectors, train_face_model
from mim_jax.evaluation.verification import PAIRS, label_pairs, verification_scores
from mim_jax.generation.attribute_search import AttributeSearch, pose
from mim_jax.generation.dataset import GeneratedFaces, Plan, mean_vectors
from mim_jax.generation.identities import perturb, sample_identities, separable
from mim_jax.method import Variables
from mim_jax.methods.vec2face import Vec2Face
from mim_jax.training.experiment import Experiment
from mim_jax.training.pictures import picture_grid
from mim_jax.training.state import init_state
from mim_jax.training.step import make_train_step

SIZES: dict[str, Any] = {
    "model.discriminator_widths": (8, 16, 16),
    "compute_dtype": "float32",
}
BATCH = 16

JUDGE = TINY_FACE_MODEL.clone(widths=(8, 16, 32))
"""The face model that real and generated people are worth something for."""

JUDGE_EPOCHS = 6
"""Over 200 people; over fewer, so many more that the steps are equally many."""

SIGMAS = (0.0, 0.3, 0.5, 0.7, 1.0, 1.5)
SHOWN_SIGMAS = (0.3, 0.7, 1.5)
SEPARATE, PEOPLE, FEW_PEOPLE = 50, 200, 50
IMAGES = 30
"""Of every generated person."""

VARIATIONS = 8
"""Of every person at every strength of the noise."""

HELD_OUT = 300
"""Pictures of test people that are generated again, equally many of each."""

SEARCHED = 32
YAW_DEGREES, WANTED_YAW = 45.0, 30.0
"""Of the factor 1, and of the attribute search."""

MAX_SEARCH_STEPS = 60

YAW_EPOCHS = 40

FULL, WITHOUT = "full", "without identity loss"
ARMS = {FULL: 1.0, WITHOUT: 0.0}
"""Weights of the identity."""


class Faces(NamedTuple):
    """A split in memory.

    Attributes:
        images: uint8 `[n, side, side, 3]`.
        labels: people `[n]`.
        yaw: in degrees, `[n]`.
        vectors: of the frozen face model, `[n, size]`.
    """

    images: np.ndarray
    labels: np.ndarray
    yaw: np.ndarray
    vectors: np.ndarray


@functools.cache
def faces(split: str) -> Faces:
    """All examples of a split."""
    source: Any = open_source("synthetic:faces", split)
    images = np.stack([source[i]["image"] for i in range(len(source))])
    number = NUISANCE_FACTORS.index("yaw")
    yaw = np.array([source.factors(i)[1][number] for i in range(len(source))])
    variables = read_iresnet("tiny", TINY_FACE_MODEL)
    vectors = face_vectors(TINY_FACE_MODEL, variables, images)
    return Faces(images, np.asarray(source.labels), YAW_DEGREES * yaw, vectors)


class YawNetwork:
    """Tells the turn of a head, in degrees, by one hidden layer on pixels."""

    def __init__(self, images: np.ndarray, yaw: np.ndarray, seed: int) -> None:
        """Learns from uint8 images."""
        net = MLPRegressor(hidden_layer_sizes=(32,), alpha=1e-2, random_state=seed)
        for _ in range(YAW_EPOCHS):
            net.partial_fit(self._rows(images), yaw / YAW_DEGREES)
        self._weights = [jnp.asarray(w, jnp.float32) for w in (*net.coefs_, *net.intercepts_)]

    @staticmethod
    def _rows(images: np.ndarray) -> np.ndarray:
        return (images.astype(np.float32) / 127.5 - 1).reshape(len(images), -1)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Degrees `[n]` of images in [-1, 1]."""
        first, second, first_bias, second_bias = self._weights
        hidden = jax.nn.relu(images.reshape(len(images), -1) @ first + first_bias)
        return YAW_DEGREES * (hidden @ second + second_bias)[:, 0]

    def r2(self, images: np.ndarray, yaw: np.ndarray) -> float:
        """Explained share of the variance."""
        guess = np.asarray(self(jnp.asarray(self._rows(images))))
        return float(1 - np.mean((guess - yaw) ** 2) / np.var(yaw))


class Generator:
    """Trains and runs generators; what is compiled serves all seeds and both arms."""

    def __init__(self, steps: int, leads: YawNetwork) -> None:
        """Builds the experiment; nothing is compiled before it is needed."""
        examples = len(faces("train").images)
        config = configs.load("vec2face:tiny", SIZES)
        config.update(steps=steps, batch_size=BATCH)
        config.model.discriminator_start = 2 * steps // 3
        config.schedule.warmup_epochs = steps / 10 / (examples // BATCH)
        self.experiment = experiment = Experiment.build(config, examples, jax.devices()[:1])
        method = experiment.method
        assert isinstance(method, Vec2Face)
        self.method, self.steps = method, steps
        like = {"image": jnp.zeros((1, *faces("train").images.shape[1:]))}
        self._initial = jax.jit(
            lambda seed: init_state(method, experiment.optimizer, jax.random.key(seed), like)
        )

        def step(state: Any, batch: Any, seed: jax.Array, identity: jax.Array) -> Any:
            weights = dataclasses.replace(
                method.weights,
                identity=identity,  # type: ignore[arg-type]  # a traced one will do
            )
            return make_train_step(
                dataclasses.replace(method, weights=weights),
                experiment.optimizer,
                experiment.schedules,
                experiment.prepare,
                seed=seed,  # type: ignore[arg-type]
            )(state, batch)

        def search(variables: Variables, vectors: jax.Array, rng: jax.Array) -> Any:
            found, images, ended = AttributeSearch(
                lambda v, call: method.generate(variables, v, jax.random.fold_in(rng, call)),
                lambda images: method.face_features(variables, images),
                (pose(leads, WANTED_YAW),),
                max_steps=MAX_SEARCH_STEPS,
            ).run(vectors)
            return found, images, ended.steps, ended.counted

        self._step = jax.jit(step, donate_argnums=0)
        self._generate = jax.jit(method.generate)
        self.search = jax.jit(search)
        self.features = jax.jit(method.face_features)

    def train(self, seed: int, identity: float) -> Variables:
        """Variables after training."""
        data, random = faces("train"), np.random.default_rng(seed)
        state, _ = load_pretrained(self.method, self._initial(seed))
        order = np.empty(0, int)
        for _ in range(self.steps):
            if len(order) < BATCH:
                order = random.permutation(len(data.images))
            rows, order = order[:BATCH], order[BATCH:]
            batch = {"image": data.images[rows], "feature": data.vectors[rows]}
            state, _ = self._step(state, batch, seed, jnp.float32(identity))
        if skipped := int(state.skipped):
            raise ValueError(f"{skipped} steps were not finite.")
        return state.variables

    def images(self, variables: Variables, vectors: np.ndarray, seed: int) -> np.ndarray:
        """Images in [-1, 1] of vectors, as many at a time as one compilation serves."""
        rows, parts = 100, []
        for start in range(0, len(vectors), rows):
            given = vectors[start : start + rows]
            filled = np.ones((rows, vectors.shape[1]), np.float32)
            filled[: len(given)] = given
            rng = jax.random.fold_in(jax.random.key(seed), start)
            parts.append(np.asarray(self._generate(variables, filled, rng))[: len(given)])
        return np.concatenate(parts)


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of rows."""
    lengths = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return np.sum(first * second, axis=-1) / np.maximum(lengths, 1e-12)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images in [-1, 1] as pixels."""
    return np.clip(np.round((images + 1) / 2 * 255), 0, 255).astype(np.uint8)


def people() -> np.ndarray:
    """Mean vectors of the training people."""
    data = faces("train")
    return np.stack([data.vectors[data.labels == i].mean(0) for i in np.unique(data.labels)])


Scores = dict[str, float]

FaceModel = dict[str, Any]
"""Variables of a face model."""


def identity(generator: Generator, variables: Variables, judge: FaceModel, seed: int) -> Scores:
    """Claim 1. Shuffled pairs are all pairs of two different people."""
    data = faces("test")
    rows = np.linspace(0, len(data.images) - 1, min(HELD_OUT, len(data.images))).astype(int)
    vectors, labels = data.vectors[rows], data.labels[rows]
    images = generator.images(variables, vectors, seed)
    ours = np.asarray(generator.features(variables, images))
    theirs = face_vectors(JUDGE, judge, to_uint8(images))
    true = face_vectors(JUDGE, judge, data.images[rows])
    other = labels[:, None] != labels[None, :]
    return {
        "cosine": float(cosines(ours, vectors).mean()),
        "cosine, shuffled": float(cosines(ours[:, None], vectors[None])[other].mean()),
        "cosine of the other face model": float(cosines(theirs, true).mean()),
        "cosine of the other face model, shuffled": float(
            cosines(theirs[:, None], true[None])[other].mean()
        ),
    }


def separability(generator: Generator, variables: Variables, seed: int) -> Scores:
    """Claim 2."""
    random = np.random.default_rng(seed)
    vectors = sample_identities(random, SEPARATE, features=people(), threshold=0.3)
    images = generator.images(variables, vectors, seed)
    found = np.asarray(generator.features(variables, images))
    pairs = cosines(found[:, None], found[None])[np.triu_indices(SEPARATE, 1)]
    return {
        "share of pairs below 0.4": float(np.mean(pairs < 0.4)),
        "mean cosine of pairs": float(pairs.mean()),
        "largest cosine of pairs": float(pairs.max()),
        f"people of {SEPARATE} without an earlier one above 0.4": separable(found, 0.4),
    }


def perturbation(
    generator: Generator, variables: Variables, seed: int
) -> dict[str, dict[str, float]]:
    """Claim 3, by sigma: the same noise, scaled."""
    random = np.random.default_rng(seed)
    vectors = sample_identities(random, SEPARATE, features=people(), threshold=0.3)
    rows = np.repeat(vectors, VARIATIONS, axis=0)
    result = {}
    for sigma in SIGMAS:
        moved = np.asarray(perturb(jax.random.key(seed), jnp.asarray(rows), (sigma,), (1.0,)))
        images = generator.images(variables, moved, seed)
        found = np.asarray(generator.features(variables, images))
        each = images.reshape(SEPARATE, VARIATIONS, *images.shape[1:])
        result[f"{sigma:g}"] = {
            "cosine": float(cosines(found, rows).mean()),
            "pixel variance": float(each.var(axis=1).mean()),
        }
    return result


def searched(
    generator: Generator, variables: Variables, judge: YawNetwork, seed: int
) -> tuple[Scores, np.ndarray]:
    """Claim 4, and images before and after, in [-1, 1]."""
    random = np.random.default_rng(seed)
    vectors = sample_identities(random, SEARCHED, features=people(), threshold=0.3)
    rng = jax.random.key(seed)
    before = np.asarray(generator.images(variables, vectors, seed))
    _, after, steps, counted = generator.search(variables, vectors, rng)

    def told(images: np.ndarray) -> tuple[float, float]:
        found = np.asarray(generator.features(variables, images))
        turned = np.abs(np.asarray(judge(jnp.asarray(images))))
        return float(turned.mean()), float(cosines(found, vectors).mean())

    (yaw, cosine), (new_yaw, new_cosine) = told(before), told(np.asarray(after))
    scores = {
        "degrees before": yaw,
        "degrees after": new_yaw,
        "cosine before": cosine,
        "cosine after": new_cosine,
        "steps": int(steps),
        "within all limits": int(counted),
    }
    return scores, np.stack([before, np.asarray(after)], axis=1)


def verified(variables: FaceModel) -> Scores:
    """How well a judge tells the held-out real people apart."""
    data = faces("test")
    pairs, same = label_pairs(data.labels, PAIRS)
    scores = verification_scores(face_vectors(JUDGE, variables, data.images), pairs, same)
    return {name: scores[name] for name in ("accuracy", "auc")}


def judge_of(images: np.ndarray, labels: np.ndarray, seed: int) -> FaceModel:
    """A face model trained on some people, by equally many steps for any number of them."""
    whole = len(faces("train").images)
    epochs = round(JUDGE_EPOCHS * whole / len(images))
    return train_face_model(JUDGE, images, labels, epochs=epochs, seed=seed)


def usefulness(generator: Generator, variables: Variables, seed: int) -> dict[str, Scores]:
    """Claim 5."""
    plan = Plan(PEOPLE, IMAGES, seed=seed, threshold=0.4)
    random = np.random.default_rng(seed)
    known = people()
    vectors = sample_identities(random, PEOPLE, features=known, threshold=plan.threshold)
    made = GeneratedFaces(generator.method, variables, vectors, plan)
    images = np.concatenate([made.images_of(person) for person in range(PEOPLE)])
    labels = np.repeat(np.arange(PEOPLE), IMAGES)
    result = {}
    for count in (PEOPLE, FEW_PEOPLE):
        rows = count * IMAGES
        judge = judge_of(images[:rows], labels[:rows], seed)
        result[f"{count} generated people"] = verified(judge)
    means = mean_vectors(generator.method, variables, [{"image": images, "label": labels}])
    nearest = cosines(means[:, None], known[None]).max(axis=1)
    result["nearest training person"] = {"mean cosine": float(nearest.mean())}
    return result


def draw(
    path: Path, generator: Generator, variables: Variables, turned: np.ndarray, seed: int
) -> None:
    """People of the test split and new ones, each with growing noise."""
    data, count = faces("test"), 7
    people_shown = np.unique(data.labels)[:count]
    pairs = np.stack([np.flatnonzero(data.labels == person)[:2] for person in people_shown])
    new = sample_identities(
        np.random.default_rng(seed), SEPARATE, features=people(), threshold=0.3
    )[: len(pairs)]

    def shown(vectors: np.ndarray, sigma: float) -> np.ndarray:
        rng = jax.random.key(seed)
        moved = perturb(rng, jnp.asarray(vectors), (sigma,), (1.0,))
        return to_uint8(generator.images(variables, np.asarray(moved), seed))

    vectors = data.vectors[pairs[:, 0]]
    columns = {"real": data.images[pairs[:, 0]], "real, again": data.images[pairs[:, 1]]}
    columns["from its vector"] = shown(vectors, 0.0)
    columns |= {f"noise {sigma:g}": shown(vectors, sigma) for sigma in SHOWN_SIGMAS}
    columns["new person"] = shown(new, 0.0)
    columns |= {f"new, noise {sigma:g}": shown(new, sigma) for sigma in SHOWN_SIGMAS}
    both = to_uint8(turned[: len(pairs)])
    columns["new, searched"] = both[:, 1]
    caption = (
        "Pictures of people that no training has seen, what is generated from the vector of the "
        "first one, and people that do not exist; with growing noise on the vector. "
        f"Searched: for a head turned by {WANTED_YAW:g} degrees."
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture_grid(columns, caption, scale=3)).save(path)


def collected(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Results of the same form, number by number as mean, spread and values."""
    return {
        name: collected([seed[name] for seed in seeds])
        if isinstance(value, Mapping)
        else spread([float(seed[name]) for seed in seeds])
        for name, value in seeds[0].items()
    }


def monotonic(by_sigma: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether cosines fall and variances rise with every sigma."""
    cosine, variance = (
        [row[name] for row in by_sigma.values()] for name in ("cosine", "pixel variance")
    )
    return bool(np.all(np.diff(cosine) < 0) and np.all(np.diff(variance) > 0))


def holds(result: Mapping[str, Any]) -> dict[str, bool]:
    """Which claims a seed fulfils."""
    found, turned, worth = (result[name] for name in ("identity", "attribute search", "usefulness"))
    many, few = (worth[f"{count} generated people"]["auc"] for count in (PEOPLE, FEW_PEOPLE))
    return {
        "1, identity": found["cosine"] > 0.6 and found["cosine"] > found["cosine, shuffled"] + 0.3,
        "2, separability": result["separability"]["share of pairs below 0.4"] > 0.5,
        "3, perturbation": monotonic(result["perturbation"]),
        "4, attribute search": turned["degrees after"] > turned["degrees before"]
        and turned["cosine after"] > 0.7,
        "5, above chance": many > 0.5,
        "5, above the untrained model": many > worth["untrained"]["auc"],
        "5, 200 people above 50": many > few,
    }


def main(arguments: list[str] | None = None) -> int:
    """Runs everything; the result is written after every seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ablation-seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of a generator")
    parser.add_argument("--output", type=Path, default=RESULTS / "vec2face.json")
    options = parser.parse_args(arguments)
    report = Report("experiments.vec2face", arguments)
    data, test, started = faces("train"), faces("test"), time.monotonic()

    def told(what: str, value: Any) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {what}: {value}", flush=True)

    halves = [YawNetwork(data.images[i::2], data.yaw[i::2], seed=i) for i in range(2)]
    yaw_r2 = [net.r2(test.images, test.yaw) for net in halves]
    told("yaw networks", yaw_r2)
    real = judge_of(data.images, data.labels, seed=0)
    blank = jax.jit(JUDGE.init)(jax.random.key(0), jnp.zeros((1, *data.images.shape[1:])))
    fixed = {"untrained": verified(dict(blank)), f"{PEOPLE} real people": verified(real)}
    told("face models", fixed)
    generator = Generator(options.steps, halves[0])
    picture = options.output.with_suffix(".png")
    results: list[dict[str, Any]] = []
    ablation: list[Scores] = []

    def write() -> None:
        every = [holds(result) for result in results]
        report.write(
            options.output,
            {
                "claims": "see the experiment's first lines",
                "seeds": len(results),
                "seeds of the ablation": len(ablation),
                "steps": options.steps,
                "batch size": BATCH,
                "seeds that fulfil a claim": {
                    name: sum(seed[name] for seed in every) for name in every[0]
                },
                "R^2 of the yaw networks on held-out people": yaw_r2,
                "full": collected(results),
                **({WITHOUT: collected(ablation)} if ablation else {}),
                "picture": picture.name,
            },
        )

    for seed in range(options.seeds):
        variables = generator.train(seed, ARMS[FULL])
        told(f"seed {seed}", "trained")
        result: dict[str, Any] = {"identity": identity(generator, variables, real, seed)}
        told(f"seed {seed}", result)
        result["separability"] = separability(generator, variables, seed)
        result["perturbation"] = perturbation(generator, variables, seed)
        result["attribute search"], turned = searched(generator, variables, halves[1], seed)
        if seed == 0:
            draw(picture, generator, variables, turned, seed)
        result["usefulness"] = {**usefulness(generator, variables, seed), **fixed}
        told(f"seed {seed}", result)
        results.append(result)
        write()
        if seed < options.ablation_seeds:
            without = generator.train(seed, ARMS[WITHOUT])
            ablation.append(identity(generator, without, real, seed))
            told(f"seed {seed}, {WITHOUT}", ablation[-1])
            write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
