"""How well a classifier does: predictions on a split, and the scores that papers report."""

import functools
import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn.metrics import average_precision_score, roc_auc_score, top_k_accuracy_score

from mim_jax.data.on_device import normalize
from mim_jax.evaluation.confusion import confusion, confusion_picture
from mim_jax.evaluation.features import HostBatch, check_unnormalized, collect, mesh_of, place
from mim_jax.evaluation.labelled_data import centre_crops, labelled_source
from mim_jax.method import Batch, Input, Method, Variables

MOST_NAMED = 10
"""Classes that a warning lists by name."""

_log = logging.getLogger(__name__)


@runtime_checkable
class Classifier(Hashable, Protocol):
    """A method that names the class of an image."""

    inputs: Mapping[str, Input]

    def logits(self, variables: Variables, images: jax.Array, /, **others: jax.Array) -> jax.Array:
        """Logits `[batch, classes]` of normalized images `[batch, height, width, channels]`.

        By their names come what else `inputs` has, such as a table, but for the label.
        """
        ...


def classification(
    method: Method, variables: Variables, config: ml_collections.ConfigDict
) -> dict[str, float]:
    """`classification_scores` of a classifier on the test split that the config names.

    Args:
        method: a `Classifier`.
        variables: of the method, on any devices.
        config: a complete config; read are `evaluate` and `data`.

    Raises:
        ValueError: a method without logits, data without labels, or with more classes than logits.
        FileNotFoundError: if the data are not there.
    """
    split = config.evaluate.test_split
    source, _ = labelled_source(config, split)
    logits, labels = predict(method, variables, config, split)
    return classification_scores(logits, labels, source.class_names)


def draw_confusion(
    method: Method, variables: Variables, config: ml_collections.ConfigDict
) -> np.ndarray | None:
    """The confusion matrix of a classifier on the config's test split as a picture.

    Returns:
        uint8 `[height, width, 3]`, or None for data with several labels an image, which have no
        such matrix.
    """
    split = config.evaluate.test_split
    source, _ = labelled_source(config, split)
    logits, labels = predict(method, variables, config, split)
    if labels.ndim > 1:
        return None
    return confusion_picture(confusion(logits, labels), source.class_names, caption=source.name)


def predict(
    method: Method, variables: Variables, config: ml_collections.ConfigDict, split: str
) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of every valid example of a split, in order.

    Args:
        method: a `Classifier`.
        variables: of the method; where they lie on a mesh, a batch is spread over its devices.
        config: a complete config; read are `evaluate` and `data`.
        split: of the labelled data, such as `config.evaluate.test_split`.

    Returns:
        Logits float32 `[examples, classes]`, and labels int32 `[examples]`, or `[examples,
        classes]` of 0 and 1 where an image has any number of classes.

    Raises:
        ValueError: a method without logits, or data without labels.
        FileNotFoundError: if the data are not there.
    """
    mesh = mesh_of(variables)
    classifier = check_classifier(method)
    forward = _forward(classifier, tuple(config.data.mean), tuple(config.data.std), mesh)

    def logits_of(batch: HostBatch) -> np.ndarray:
        check_unnormalized(batch["image"])
        names = {"image", *classifier.inputs} - {"label"}
        inputs = {name: batch[name] for name in batch if name in names}
        logits = forward(variables, place(inputs, mesh))
        return np.asarray(logits, np.float32)[: len(batch["image"])]

    logits, labels = collect(centre_crops(config, split), logits_of)
    assert labels is not None, "centre_crops gives labels"
    return logits, labels


def check_classifier(method: Method) -> Classifier:
    """The method itself; raises `ValueError` if it gives no logits."""
    if not isinstance(method, Classifier):
        raise ValueError(
            "the protocol 'classification' needs a classifier, such as the method finetune; "
            f"{type(method).__name__} gives features only. Take knn, linear or linear_lars."
        )
    return method


def classification_scores(
    logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str] | None = None
) -> dict[str, float]:
    """What papers report of a classifier.

    Classes of which the labels hold no example, or nothing else, have no AUROC, and those without
    an example no average precision: the means are over the others, and a warning names them.

    Args:
        logits: `[examples, classes]`.
        labels: integers `[examples]`; or 0 and 1, `[examples, classes]`, where an image has any
            number of classes.
        class_names: in the order of the labels, for the warning.

    Returns:
        For single labels `top1`, `top5` (with more than 5 classes), `auroc` (mean over the
        classes, each against all others) and `cross_entropy`. For several labels
        `mean_average_precision`, `auroc` and `cross_entropy` (mean over examples and classes). All
        but the cross-entropy are in [0, 1]; a mean over no class is left out.

    Raises:
        ValueError: arrays that do not fit together, labels that are no classes, or logits that
            are not finite.
    """
    _check(logits, labels)
    scores_of = _scores_of_single_labels if labels.ndim == 1 else _scores_of_several_labels
    return scores_of(logits.astype(np.float64), labels, class_names)


def _scores_of_single_labels(
    logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str] | None
) -> dict[str, float]:
    classes = np.arange(logits.shape[1])
    one_hot = labels[:, None] == classes
    # The logarithm keeps the order of probabilities that are all but 0 or 1.
    log_probability = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    scores = {"top1": float(np.mean(np.argmax(logits, axis=1) == labels))}
    if len(classes) > 5:
        scores["top5"] = float(top_k_accuracy_score(labels, logits, k=5, labels=classes))
    scores |= _auroc(one_hot, log_probability, class_names)
    return {**scores, "cross_entropy": float(-np.mean(log_probability[one_hot]))}


def _scores_of_several_labels(
    logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str] | None
) -> dict[str, float]:
    precision = _mean_over(
        "mean_average_precision",
        average_precision_score,
        labels,
        logits,
        labels.sum(axis=0) > 0,
        class_names,
    )
    # Of a sigmoid: -t log p - (1 - t) log(1 - p) = log(1 + exp(x)) - t x.
    cross_entropy = np.mean(np.logaddexp(0, logits) - labels * logits)
    auroc = _auroc(labels, logits, class_names)
    return {**precision, **auroc, "cross_entropy": float(cross_entropy)}


def _auroc(
    one_hot: np.ndarray, ranked: np.ndarray, class_names: Sequence[str] | None
) -> dict[str, float]:
    positives = one_hot.sum(axis=0)
    defined = (positives > 0) & (positives < len(one_hot))
    return _mean_over("auroc", roc_auc_score, one_hot, ranked, defined, class_names)


def _mean_over(
    name: str,
    score: Callable[[np.ndarray, np.ndarray], float],
    one_hot: np.ndarray,
    ranked: np.ndarray,
    defined: np.ndarray,
    class_names: Sequence[str] | None,
) -> dict[str, float]:
    """The mean of a score over the classes where it is defined, under its name if there are any."""
    left_out = np.flatnonzero(~defined)
    if len(left_out):
        _log.warning(
            "%s is undefined for %d of %d classes, which the labels do not tell from the others: "
            "%s; it is the mean over the rest",
            name,
            len(left_out),
            len(defined),
            _listed(left_out, class_names),
        )
    if not defined.any():
        return {}
    kept = np.flatnonzero(defined)
    return {name: float(np.mean([score(one_hot[:, k], ranked[:, k]) for k in kept]))}


def _listed(classes: Iterable[int], class_names: Sequence[str] | None) -> str:
    """Names of classes, the first few."""
    names = [class_names[k] if class_names else str(k) for k in classes]
    return ", ".join(names[:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")


def _check(logits: np.ndarray, labels: np.ndarray) -> None:
    """Raises `ValueError` unless the labels are classes of the logits, and all are finite."""
    if logits.ndim != 2 or not len(logits) or labels.shape not in (logits.shape[:1], logits.shape):
        raise ValueError(
            f"logits {logits.shape} and labels {labels.shape} must be [examples, classes] and "
            "[examples] or [examples, classes], with at least one example."
        )
    if not np.isfinite(logits).all():
        raise ValueError("logits are not finite; has the training diverged?")
    largest = 1 if labels.ndim == 2 else logits.shape[1] - 1
    if labels.min() < 0 or labels.max() > largest:
        raise ValueError(
            f"labels range from {labels.min()} to {labels.max()}; with logits {logits.shape} they "
            f"must be 0 to {largest}. Does the classifier belong to these data?"
        )


@functools.lru_cache(maxsize=8)
def _forward(
    method: Classifier, mean: tuple[float, ...], std: tuple[float, ...], mesh: Mesh | None
) -> Callable[[Variables, Batch], jax.Array]:
    """The compiled forward pass; kept, so that a second split or evaluation compiles nothing."""

    def forward(variables: Variables, batch: Batch) -> jax.Array:
        others = {name: value for name, value in batch.items() if name != "image"}
        return method.logits(variables, normalize(batch["image"], mean, std), **others)

    # Replicated results can be read by every process.
    return jax.jit(forward, out_shardings=NamedSharding(mesh, PartitionSpec()) if mesh else None)
