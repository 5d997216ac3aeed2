"""Whole data sets of generated faces: so many people, so many images of each (Vec2Face, 2025)."""

import collections
import dataclasses
import json
import pathlib
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from safetensors.numpy import load_file, save_file

from mim_jax.data import EvaluationCrop, Source, evaluation_batches, open_source
from mim_jax.data.image_writer import encode_image
from mim_jax.data.shard_writer import convert, progress_bar
from mim_jax.data.sources import SubsetSource
from mim_jax.generation.attribute_search import Attribute, AttributeSearch
from mim_jax.generation.identities import SHARES, SIGMAS, ordered_noise, perturb, sample_identities

FORMATS = ("folder", "array_record")
SUFFIXES = ("png", "jpg")

PLAN, IDENTITIES, CARD = "generation.json", "identities.safetensors", "README.md"
"""Files beside the images: what was asked for, the vectors of the people, the data card."""

CHECKED_IMAGES = 5
"""Images of each person that the search for known people looks at."""

CHECKED_BATCH = 50
"""Images of a forward pass there."""

_UNFINISHED = ".unfinished"
_KEPT_IDENTITIES = 4  # of which the images are in memory: one is written while the next is made

Variables = Mapping[str, Any]


@runtime_checkable
class FaceGenerator(Protocol):
    """What a method must be able to do."""

    def generate(self, variables: Variables, vectors: jax.Array, rng: jax.Array) -> jax.Array:
        """Images `[n, height, width, channels]` in [-1, 1] of vectors `[n, size]`."""
        ...

    def face_features(self, variables: Variables, images: jax.Array) -> jax.Array:
        """Vectors `[n, size]` of such images."""
        ...


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be generated; together with the model it decides every pixel.

    Attributes:
        identities: number of people.
        images_per_identity: of each.
        seed: of everything random.
        threshold: largest cosine of the vectors of two people.
        sigmas: standard deviations of the noise on a person's vector.
        shares: of a person's images that get them. (The authors draw them over all images, so that
            a person has about these shares; here everyone has them, and can be made alone.)
        model: what generates, for the data card and to tell one data set from another.
        known: whose people the new ones are drawn like, likewise; "" for nobody's.
        format: one of `FORMATS`.
        suffix: one of `SUFFIXES`, of the images in a folder.
    """

    identities: int
    images_per_identity: int = 50
    seed: int = 0
    threshold: float = 0.3
    sigmas: tuple[float, ...] = SIGMAS
    shares: tuple[float, ...] = SHARES
    model: str = ""
    known: str = ""
    format: str = "folder"
    suffix: str = "png"

    def check(self) -> None:
        """Raises `ValueError` for a value that cannot be, with the field's name."""
        for field in ("identities", "images_per_identity"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}.")
        for field, known in (("format", FORMATS), ("suffix", SUFFIXES)):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"{field} is {getattr(self, field)!r}; known are {', '.join(known)}."
                )
        ordered_noise(jnp.zeros((1, 1)), self.sigmas, self.shares, jnp.zeros(1, int))


def check_generator(method: Any) -> FaceGenerator:
    """The method itself; raises `ValueError` if it cannot generate faces."""
    if not isinstance(method, FaceGenerator):
        raise ValueError(
            f"{type(method).__name__} cannot generate images; take a run of a method that can, "
            "such as vec2face."
        )
    return method


def generate_dataset(
    method: Any,
    variables: Variables,
    folder: pathlib.Path,
    plan: Plan,
    *,
    known: np.ndarray | None = None,
    size: int = 512,
    attributes: Sequence[Attribute] = (),
    console: Console | None = None,
) -> float | None:
    """Generates a data set in a folder; a call that was cut short goes on where it stopped.

    A person's images depend on the model, the seed and the person's number alone. They appear
    under their names when all of them are written, so nothing is ever doubled, lost or half there.
    `open_source` reads the result, by `folder:PATH` or `array_record:PATH`; the label of an image
    is the number of the person.

    Args:
        method: a `FaceGenerator`.
        variables: of the method.
        folder: is made if it is not there.
        plan: what to generate.
        known: mean vectors of real people, `[people, size]`: the new ones are drawn from their
            distribution, and are compared with them afterwards. None draws from a normal
            distribution.
        size: of the vectors, without `known`.
        attributes: what the images should have; the vector of every person is moved until they do,
            see `mim_jax.generation.attribute_search`.
        console: shows a progress bar.

    Returns:
        The largest cosine of a generated person to a known one; None without known ones.

    Raises:
        ValueError: a method that cannot generate, a bad plan, or a folder with something else.
    """
    generator = check_generator(method)
    plan.check()
    variables = jax.device_put(variables)
    _begin(folder, plan)
    people = GeneratedFaces(
        generator, variables, _vectors(folder, plan, known, size), plan, attributes
    )
    if plan.format == "array_record":
        convert(people, folder, threads=_KEPT_IDENTITIES, console=console)
    else:
        _write_folder(people, folder, plan, console)
    nearest = None
    if known is not None:
        written = open_source(f"{plan.format}:{folder}", channels=people.channels)
        nearest = nearest_known(generator, variables, written, plan, known)
    _write(folder / CARD, data_card(plan, nearest))
    return nearest


class GeneratedFaces:
    """The images of a plan as a source, made person by person when they are asked for.

    Attributes: as for `mim_jax.data.sources.Source`.
    """

    multi_label = False

    def __init__(
        self,
        generator: FaceGenerator,
        variables: Variables,
        vectors: np.ndarray,
        plan: Plan,
        attributes: Sequence[Attribute] = (),
    ) -> None:
        """Prepare to generate people with the given vectors `[identities, size]`."""
        self.name = f"generated:{json.dumps(dataclasses.asdict(plan), sort_keys=True)}"
        self.num_classes: int | None = plan.identities
        self.class_names: tuple[str, ...] | None = tuple(
            person_name(i) for i in range(plan.identities)
        )
        self._plan, self._vectors, self._variables = plan, vectors, variables
        self._made: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()

        def images(variables: Variables, vector: jax.Array, identity: jax.Array) -> jax.Array:
            rng = jax.random.fold_in(jax.random.key(plan.seed), identity)
            for_noise, for_masks, for_search = jax.random.split(rng, 3)
            rows = vector[None]
            if attributes:
                search = AttributeSearch(
                    lambda v, call: generator.generate(
                        variables, v, jax.random.fold_in(for_search, call)
                    ),
                    lambda shown: generator.face_features(variables, shown),
                    tuple(attributes),
                )
                rows = search.run(rows)[0]
            rows = jnp.repeat(rows, plan.images_per_identity, axis=0)
            rows = perturb(for_noise, rows, plan.sigmas, plan.shares)
            shown = (generator.generate(variables, rows, for_masks) + 1) / 2 * 255
            return jnp.clip(jnp.round(shown), 0, 255).astype(jnp.uint8)

        self._images = jax.jit(images)

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.images_of(0).shape[-1]

    def __len__(self) -> int:
        return self._plan.identities * self._plan.images_per_identity

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `image` and `label`."""
        identity, number = divmod(index, self._plan.images_per_identity)
        return {"image": self.images_of(identity)[number], "label": identity}

    def images_of(self, identity: int) -> np.ndarray:
        """Return all images of one person, uint8 `[images, height, width, channels]`."""
        with self._lock:
            if identity not in self._made:
                made = self._images(self._variables, self._vectors[identity], identity)
                self._made[identity] = np.asarray(made)
            while len(self._made) > _KEPT_IDENTITIES:
                self._made.popitem(last=False)
            return self._made[identity]


def person_name(identity: int) -> str:
    """The name of a person's folder, in the order of the numbers."""
    return f"{identity:06d}"


def mean_vectors(
    generator: FaceGenerator, variables: Variables, batches: Iterable[Mapping[str, np.ndarray]]
) -> np.ndarray:
    """The mean vector of every person, float32 `[people, size]`, by the face model.

    Args:
        generator: has the face model.
        variables: of the method.
        batches: with `image` uint8 or uint16 of the size of the model, `label` and perhaps
            `valid`, as `mim_jax.data.evaluation_batches` gives them.
    """
    apply = jax.jit(lambda variables, images: generator.face_features(variables, images))
    sums: dict[int, np.ndarray] = {}
    counts: collections.Counter[int] = collections.Counter()
    for batch in batches:
        images, labels = batch["image"], batch["label"]
        scaled = images.astype(np.float32) / (np.iinfo(images.dtype).max / 2) - 1
        vectors = np.asarray(apply(variables, scaled), np.float64)
        for row in np.flatnonzero(batch.get("valid", np.ones(len(images), bool))):
            label = int(labels[row])
            sums[label] = sums.get(label, 0) + vectors[row]
            counts[label] += 1
    return np.stack([sums[label] / counts[label] for label in sorted(sums)]).astype(np.float32)


def nearest_known(
    generator: FaceGenerator, variables: Variables, written: Source, plan: Plan, known: np.ndarray
) -> float:
    """The largest cosine between a generated person and a known one, by mean vectors.

    Args:
        generator: has the face model.
        variables: of the method.
        written: the images of the plan.
        plan: what they are.
        known: mean vectors, `[people, size]`.
    """
    each = min(CHECKED_IMAGES, plan.images_per_identity)
    firsts = np.arange(plan.identities)[:, None] * plan.images_per_identity + np.arange(each)
    height, width = written[0]["image"].shape[:2]
    batches = evaluation_batches(
        SubsetSource(written, written.name, firsts.ravel()),
        EvaluationCrop((height, width), crop_ratio=1.0),
        batch_size=CHECKED_BATCH,
    )
    found = mean_vectors(generator, variables, batches)
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (found, known)]
    return max(float((row @ units[1].T).max()) for row in units[0])


def data_card(plan: Plan, nearest: float | None) -> str:
    """The README of a data set as Markdown."""
    if nearest is None:
        check = "No training identities were at hand, so the people here were not compared to any."
    else:
        check = (
            "The largest cosine between the mean vectors of a person here and a training identity "
            f"is {nearest:.3f} (first {CHECKED_IMAGES} images of each person here)."
        )
    shares = ", ".join(f"{100 * s:g} % of {x:g}" for x, s in zip(plan.sigmas, plan.shares))
    return f"""\
# Generated faces

**All faces here are synthetic.** They were generated by a model from random vectors; none is a
picture of a real person.

| | |
|---|---|
| people | {plan.identities:,} |
| images of each | {plan.images_per_identity} |
| model | {plan.model or "not told"} |
| seed | {plan.seed} |
| vectors drawn like those of | {plan.known or "nobody: from a normal distribution"} |
| largest cosine of two sampled vectors | {plan.threshold:g} |
| noise on a person's vector | {shares} |
| to read it | `mim_jax.data.open_source("{plan.format}:FOLDER")` |

## Leakage of identities

A generator may reproduce people that it was trained on: the authors of Vec2Face found such identity
leakage in early releases of their data sets and issued them anew. {check}
Check again, with a face model of your own, before the data set is passed on.

`{PLAN}` holds the settings, `{IDENTITIES}` the vectors of the people.
"""


def _begin(folder: pathlib.Path, plan: Plan) -> None:
    """Writes the plan into the folder, or finds it there.

    Raises:
        ValueError: if the folder holds something else.
    """
    content = json.dumps(dataclasses.asdict(plan), indent=1) + "\n"
    file = folder / PLAN
    if not (folder / IDENTITIES).is_file():  # nothing was generated yet
        others = [path for path in folder.glob("[!.]*") if path != file]
        if others:
            raise ValueError(f"{folder} is not empty; give another output folder.")
        folder.mkdir(parents=True, exist_ok=True)
        _write(file, content)
    if file.read_text() != content:
        raise ValueError(
            f"{folder} holds another data set, or one that is not finished; its settings are in "
            f"{file}. Give the same ones to go on with it, or another output folder."
        )


def _vectors(folder: pathlib.Path, plan: Plan, known: np.ndarray | None, size: int) -> np.ndarray:
    """The vectors of the people, drawn once and kept."""
    file = folder / IDENTITIES
    if not file.is_file():
        vectors = sample_identities(
            np.random.default_rng(plan.seed),
            plan.identities,
            features=known,
            size=size,
            threshold=plan.threshold,
        )
        unfinished = folder / f".{IDENTITIES}"
        save_file({"vectors": vectors}, unfinished)
        unfinished.replace(file)
    return load_file(file)["vectors"]


def _write_folder(
    people: GeneratedFaces, folder: pathlib.Path, plan: Plan, console: Console | None
) -> None:
    """A folder for each person, moved to its place when it is whole."""
    unfinished = folder / _UNFINISHED
    with progress_bar(console) as progress:
        bar = progress.add_task(f"writing {folder}", total=len(people))
        for identity in range(plan.identities):
            name = person_name(identity)
            if not (folder / name).is_dir():
                shutil.rmtree(unfinished, ignore_errors=True)
                (unfinished / name).mkdir(parents=True)
                for number, image in enumerate(people.images_of(identity)):
                    data = encode_image(image, lossless=plan.suffix == "png")
                    (unfinished / name / f"{number:03d}.{plan.suffix}").write_bytes(data)
                (unfinished / name).replace(folder / name)
            progress.advance(bar, plan.images_per_identity)
    shutil.rmtree(unfinished, ignore_errors=True)


def _write(path: pathlib.Path, content: str) -> None:
    """Writes a file that is whole whenever it is there."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(content)
    unfinished.replace(path)
