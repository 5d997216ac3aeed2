"""Detection of forged images, domain by domain: area under the ROC curve and equal error rate.

The protocol of detectors that several collections train, such as GM-DF (Lai et al., 2025): each
domain is scored by itself, those of the training as well as others.
"""

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Protocol, runtime_checkable

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn.metrics import roc_auc_score, roc_curve

from mim_jax.data.domains import FAKE, REAL, UNSEEN, domain_members
from mim_jax.data.on_device import normalize
from mim_jax.evaluation.features import HostBatch, check_unnormalized, collect, mesh_of, place
from mim_jax.evaluation.labelled_data import domain_crops
from mim_jax.method import Batch, Method, Variables

THRESHOLD = 0.5
"""Of the score, above which an image counts as fake in the accuracy."""


@runtime_checkable
class Detector(Hashable, Protocol):
    """A method that tells forged images."""

    def scores(self, variables: Variables, batch: Batch) -> jax.Array:
        """Probability that an image is fake, float32 `[batch]`.

        Args:
            variables: of the method.
            batch: `image` `[batch, height, width, channels]`, normalized, and `domain` int
                `[batch]`, the number of each image's domain in the training, or `UNSEEN`.
        """
        ...


def detection(
    method: Method, variables: Variables, config: ml_collections.ConfigDict
) -> dict[str, float]:
    """`detection_scores` of the test split of each domain that the config names.

    The domains are the sources of the mixture `evaluate.source`, or of that of the training if it
    is empty; another source is one domain. A domain of the training is known by the name that
    `data.source` calls it by, and any other is unseen, see `domain_numbers`.

    Args:
        method: a `Detector`.
        variables: of the method, on any devices.
        config: a complete config; read are `evaluate` and `data`.

    Returns:
        `auc`, `eer` and `accuracy`, the means over domains, and each with the name of a domain
        behind it, such as `auc/folder:celeb_df`; all in [0, 1].

    Raises:
        ValueError: a method without scores, data without labels, or a domain whose classes are not
            real and fake or of which one has no example.
        FileNotFoundError: if the data are not there.
    """
    detector = check_detector(method)
    batches, names = domain_crops(config, config.evaluate.test_split)
    numbers = np.array(domain_numbers(names, config.data.source), np.int32)
    mesh = mesh_of(variables)
    forward = _forward(detector, tuple(config.data.mean), tuple(config.data.std), mesh)

    def scored(batch: HostBatch) -> np.ndarray:
        image, domain = check_unnormalized(batch["image"]), batch["domain"]
        given = {"image": image, "domain": numbers[domain]}
        scores = np.asarray(forward(variables, place(given, mesh)), np.float32)[: len(image)]
        return np.stack([scores, domain], axis=1)  # exact: there are few domains

    rows, labels = collect(batches, scored)
    assert labels is not None, "domains have labels"
    scores, domains = rows[:, 0], rows[:, 1].astype(int)
    found = {
        name: detection_scores(scores[domains == number], labels[domains == number])
        for number, name in enumerate(names)
    }
    return with_means(found)


def detection_scores(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How well scores tell fake images from real ones.

    Args:
        scores: `[images]`, probabilities of being fake.
        labels: integers `[images]`, 0 real and 1 fake.

    Returns:
        `auc`, the share of pairs of a real and a fake image in which the fake one has the higher
        score, where equal scores count half; `eer`, see `equal_error_rate`; and `accuracy` at
        `THRESHOLD`.

    Raises:
        ValueError: scores that are not finite, or labels of one class alone.
    """
    if not np.isfinite(scores).all():
        raise ValueError("scores of images are not finite; has the training diverged?")
    labels = np.asarray(labels)
    real, fake = ((labels == label).sum() for label in (REAL, FAKE))
    if not real or not fake or real + fake < len(labels):
        raise ValueError(
            f"of {len(labels)} images {real} are real (0) and {fake} fake (1); detection needs "
            "both, and nothing else."
        )
    return {
        "auc": float(roc_auc_score(labels, scores)),
        "eer": equal_error_rate(scores, labels),
        "accuracy": float(np.mean((scores > THRESHOLD) == (labels == FAKE))),
    }


def equal_error_rate(scores: np.ndarray, labels: np.ndarray) -> float:
    """The rate of real images taken for fake where it equals that of fake ones taken for real.

    The ROC curve is a polygon through the rates at every threshold; the result is read where it
    crosses the line of equal rates.

    Args:
        scores: `[images]`, higher for fake.
        labels: integers `[images]`, 0 real and 1 fake, both there.
    """
    false_alarms, hits, _ = roc_curve(labels, scores, pos_label=FAKE)
    misses = 1 - hits
    # Misses less false alarms fall from 1 to -1 along the curve.
    after = int(np.argmax(misses <= false_alarms))
    gap = (misses - false_alarms)[after - 1 : after + 1]
    share = gap[0] / (gap[0] - gap[1])
    return float(false_alarms[after - 1] + share * (false_alarms[after] - false_alarms[after - 1]))


def with_means(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Scores of domains under `SCORE/DOMAIN`, behind their means over domains, `SCORE`.

    Args:
        scores: of each domain, by the same names.
    """
    names = next(iter(scores.values()))
    means = {name: float(np.mean([own[name] for own in scores.values()])) for name in names}
    each = {f"{name}/{domain}": own[name] for name in names for domain, own in scores.items()}
    return {**means, **each}


def domain_numbers(names: tuple[str, ...], training: str) -> list[int]:
    """The number that each domain has in the training, by its name, or `UNSEEN`.

    Args:
        names: of the domains.
        training: the mixture that was trained on, or the single source.

    Raises:
        ValueError: a mixture that is not understood.
        FileNotFoundError: the JSON file of a mixture is not there.
    """
    known = [member.source for member in domain_members(training)]
    return [known.index(name) if name in known else UNSEEN for name in names]


def check_detector(method: Method) -> Detector:
    """The method itself; raises `ValueError` if it does not tell forged images."""
    if not isinstance(method, Detector):
        raise ValueError(
            f"the protocol 'detection' needs a method that tells forged images, such as gm_df, not "
            f"{type(method).__name__}."
        )
    return method


@functools.lru_cache(maxsize=8)
def _forward(
    detector: Detector, mean: tuple[float, ...], std: tuple[float, ...], mesh: Mesh | None
) -> Callable[[Variables, Batch], jax.Array]:
    """The compiled forward pass; kept, so that another evaluation compiles nothing."""

    def forward(variables: Variables, batch: Batch) -> jax.Array:
        return detector.scores(variables, {**batch, "image": normalize(batch["image"], mean, std)})

    # Replicated results can be read by every process.
    return jax.jit(forward, out_shardings=NamedSharding(mesh, PartitionSpec()) if mesh else None)
