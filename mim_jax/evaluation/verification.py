"""Face verification: do two images show the same person? The protocol of LFW, in ten folds.

Huang et al., "Labeled Faces in the Wild", 2007. Two images are as far apart as their vectors at
length one; the threshold that tells best on nine folds is judged on the tenth.
"""

import csv
import functools
import os
import pathlib
from collections.abc import Callable, Hashable
from typing import Any, Protocol, runtime_checkable

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn.metrics import roc_auc_score, roc_curve

from mim_jax.data.on_device import normalize
from mim_jax.evaluation.features import (
    HostBatch,
    check_unnormalized,
    collect,
    extract_features,
    mesh_of,
    place,
)
from mim_jax.evaluation.labelled_data import centre_crops, labelled_source
from mim_jax.method import Method, Variables

FOLDS = 10

PAIRS = 6000
"""Drawn pairs, as many as LFW has; fewer where the data have fewer."""

FALSE_ACCEPT_RATES = (0.1, 0.01, 0.001)
"""At which true accept rates are told."""

THRESHOLDS = np.arange(0, 4, 0.01)
"""Of the squared distance, as InsightFace's evaluation tries them."""


@runtime_checkable
class FaceMethod(Hashable, Protocol):
    """A method with vectors that are made for faces."""

    def face_features(self, variables: Variables, images: jax.Array) -> jax.Array:
        """Vectors `[batch, size]` of normalized images `[batch, height, width, channels]`."""
        ...


def verification(
    method: Method, variables: Variables, config: ml_collections.ConfigDict
) -> dict[str, float]:
    """`verification_scores` of the test split that the config names.

    The vectors are `face_features` of the method, where it has them, else its pooled features. The
    pairs are those of the file `config.evaluate.pairs`, see `read_pairs`; without one, `PAIRS` of
    them are drawn by the labels, the same ones in every run.

    Args:
        method: gives the vectors.
        variables: of the method, on any devices.
        config: a complete config; read are `evaluate` and `data`.

    Raises:
        ValueError: data without labels, or pairs that the data do not have.
        FileNotFoundError: if the data or the file are not there.
    """
    split = config.evaluate.test_split
    source, _ = labelled_source(config, split)
    if config.evaluate.pairs:
        pairs, same = read_pairs(pathlib.Path(config.evaluate.pairs), source)
    vectors, labels = _vectors(method, variables, config, split)
    assert labels is not None, "centre_crops gives labels"
    if config.evaluate.pairs and len(vectors) != len(source):
        raise ValueError(
            f"{len(source) - len(vectors)} images of {source.name} cannot be read, so the pairs of "
            f"{config.evaluate.pairs} are not all there."
        )
    if not config.evaluate.pairs:
        pairs, same = label_pairs(labels, PAIRS)
    return verification_scores(vectors, pairs, same)


def verification_scores(
    vectors: np.ndarray, pairs: np.ndarray, same: np.ndarray
) -> dict[str, float]:
    """How well distances of vectors tell pairs of one person from pairs of two.

    The folds are consecutive. Of equally good thresholds the lowest is taken.

    Args:
        vectors: `[images, size]`, of any length.
        pairs: integers `[pairs, 2]`, rows of `vectors`.
        same: bool `[pairs]`, whether both are of one person.

    Returns:
        `accuracy` and its standard deviation over the folds `accuracy_std`, `auc`, and for each of
        `FALSE_ACCEPT_RATES` the share of same pairs accepted, `tar_at_far_0.01`; all in [0, 1].

    Raises:
        ValueError: arrays that do not fit together, vectors that are not finite, fewer pairs than
            folds, or pairs of one kind alone.
    """
    same = np.asarray(same, bool)
    if vectors.ndim != 2 or pairs.shape != (len(same), 2):
        raise ValueError(
            f"vectors {vectors.shape}, pairs {pairs.shape} and same {same.shape} must be [images, "
            "size], [pairs, 2] and [pairs]."
        )
    if not np.isfinite(vectors).all():
        raise ValueError("vectors of faces are not finite; has the training diverged?")
    if len(same) < FOLDS or same.all() or not same.any():
        raise ValueError(
            f"{same.sum()} pairs of one person and {(~same).sum()} of two do not make {FOLDS} "
            "folds; both kinds are needed."
        )
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    units = vectors / np.maximum(lengths, 1e-12)
    distances = np.sum((units[pairs[:, 0]] - units[pairs[:, 1]]) ** 2, axis=1)
    right = (distances[:, None] < THRESHOLDS) == same[:, None]  # [pairs, thresholds]
    accuracies = []
    for fold in np.array_split(np.arange(len(same)), FOLDS):
        best = np.argmax(np.delete(right, fold, axis=0).mean(axis=0))
        accuracies.append(right[fold, best].mean())
    false_accepts, true_accepts, _ = roc_curve(same, -distances, drop_intermediate=False)
    rates = {
        f"tar_at_far_{rate:g}": float(true_accepts[false_accepts <= rate].max())
        for rate in FALSE_ACCEPT_RATES
    }
    return {
        "accuracy": float(np.mean(accuracies)),
        "accuracy_std": float(np.std(accuracies)),
        "auc": float(roc_auc_score(same, -distances)),
        **rates,
    }


def label_pairs(labels: np.ndarray, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random pairs of images, no pair twice: in turn one of one person, and one of two.

    Args:
        labels: integers `[images]`, the identities.
        count: of pairs; fewer if there are not so many of each kind.
        seed: of the draw.

    Returns:
        Rows of `labels` `[pairs, 2]`, and bool `[pairs]`: whether both have one label.

    Raises:
        ValueError: labels of which no two are equal, or all.
    """
    labels = np.asarray(labels)
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(labels == identity) for identity in np.unique(labels)]
    equal = np.concatenate([rows[np.stack(np.triu_indices(len(rows), 1), 1)] for rows in members])
    unequal = len(labels) * (len(labels) - 1) // 2 - len(equal)
    half = min(count // 2, len(equal), unequal)
    if not half:
        raise ValueError(
            f"{len(labels)} images of {len(members)} identities do not give pairs of one person "
            "and pairs of two; verification needs two identities, and two images of one."
        )
    equal = equal[rng.permutation(len(equal))[:half]]
    drawn = np.empty((0, 2), int)
    while len(drawn) < half:
        more = np.sort(rng.integers(len(labels), size=(2 * half, 2)), axis=1)
        drawn = np.concatenate([drawn, more[labels[more[:, 0]] != labels[more[:, 1]]]])
        _, first = np.unique(drawn, axis=0, return_index=True)
        drawn = drawn[np.sort(first)]
    pairs = np.stack([equal, drawn[:half]], axis=1).reshape(-1, 2)
    return pairs, np.tile([True, False], half)


def read_pairs(path: pathlib.Path, source: Any) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of images of a folder, from a file.

    Either LFW's `pairs.txt` (`name 1 4` for two images of a person, `name 1 other 2` of two; the
    image is `name/name_0001` with any suffix; a first line with numbers is passed over), or lines
    `path,path,1` with paths below the folder, and 1 for the same person, else 0; commas may be
    spaces.

    Args:
        path: of the file.
        source: of the images, `folder:...`.

    Returns:
        Positions in the source `[pairs, 2]`, and bool `[pairs]`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: a source that is no folder, a line that is not understood, or an image that the
            folder does not have.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of pairs {path}, which evaluate.pairs names.")
    if not hasattr(source, "path"):
        raise ValueError(
            f"evaluate.pairs names files, but {source.name} is no whole folder of images; set "
            "evaluate.source to 'folder:PATH', and evaluate.test_split to a split without slice."
        )
    known: dict[str, int] = {}
    for index in range(len(source)):
        parts = pathlib.PurePath(source.path(index)).parts
        for depth in (1, 2, 3):
            known.setdefault("/".join(parts[-depth:]), index)
            known.setdefault(os.path.splitext("/".join(parts[-depth:]))[0], index)
    pairs, same = [], []
    with path.open(newline="") as file:
        for number, line in enumerate(file, 1):
            fields = next(csv.reader([line])) if "," in line else line.split()
            fields = [field.strip() for field in fields]
            if not any(fields) or (number == 1 and all(field.isdecimal() for field in fields)):
                continue
            try:
                first, second, together = _pair(fields)
                pairs.append((known[first], known[second]))
            except (ValueError, KeyError) as error:
                reason = (
                    f"{source.name} has no image {error.args[0]!r}"
                    if isinstance(error, KeyError)
                    else "it is neither a line of LFW's pairs.txt nor 'path,path,0 or 1'"
                )
                raise ValueError(f"{path}, line {number}, {line.strip()!r}: {reason}.") from error
            same.append(together)
    return np.array(pairs, int).reshape(-1, 2), np.array(same, bool)


def _pair(fields: list[str]) -> tuple[str, str, bool]:
    """The names of both images of a line, and whether they show one person."""
    if len(fields) == 4:
        return _lfw_name(*fields[:2]), _lfw_name(*fields[2:]), False
    if len(fields) == 3 and fields[1].isdecimal():
        return _lfw_name(*fields[:2]), _lfw_name(fields[0], fields[2]), True
    if len(fields) == 3 and fields[2] in ("0", "1"):
        return fields[0], fields[1], fields[2] == "1"
    raise ValueError(fields)


def _lfw_name(person: str, number: str) -> str:
    return f"{person}/{person}_{int(number):04d}"


def _vectors(
    method: Method, variables: Variables, config: ml_collections.ConfigDict, split: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Vectors and labels of all examples of a split."""
    data = config.data
    batches = centre_crops(config, split)
    if not isinstance(method, FaceMethod):
        pool = config.evaluate.pool
        return extract_features(method, variables, batches, mean=data.mean, std=data.std, pool=pool)
    mesh = mesh_of(variables)
    forward = _forward(method, tuple(data.mean), tuple(data.std), mesh)

    def vectors_of(batch: HostBatch) -> np.ndarray:
        images = check_unnormalized(batch["image"])
        vectors = forward(variables, place({"image": images}, mesh)["image"])
        return np.asarray(vectors, np.float32)[: len(images)]

    return collect(batches, vectors_of)


@functools.lru_cache(maxsize=8)
def _forward(
    method: FaceMethod, mean: tuple[float, ...], std: tuple[float, ...], mesh: Mesh | None
) -> Callable[[Variables, jax.Array], jax.Array]:
    """The compiled forward pass; kept, so that another evaluation compiles nothing."""

    def forward(variables: Variables, images: jax.Array) -> jax.Array:
        return method.face_features(variables, normalize(images, mean, std))

    # Replicated results can be read by every process.
    return jax.jit(forward, out_shardings=NamedSharding(mesh, PartitionSpec()) if mesh else None)
