"""Evaluation protocols by name, and the baselines that give their numbers a meaning."""

import difflib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import ml_collections
import numpy as np

from mim_jax.evaluation.attentive_probe import attentive_probe_accuracy
from mim_jax.evaluation.classification import check_classifier, classification
from mim_jax.evaluation.detection import check_detector, detection
from mim_jax.evaluation.dice import check_segmenter, dice
from mim_jax.evaluation.features import extract_features, raw_pixels
from mim_jax.evaluation.knn import knn_accuracy
from mim_jax.evaluation.labelled_data import centre_crops, domain_source, labelled_source
from mim_jax.evaluation.linear_probe import lars_probe_accuracy, linear_accuracy
from mim_jax.evaluation.patch_probe import patch_global, patch_local
from mim_jax.evaluation.verification import verification
from mim_jax.method import Method, Variables

FEATURE_PROTOCOLS: dict[str, Callable[..., float]] = {
    "knn": knn_accuracy,
    "linear": linear_accuracy,
}
"""Accuracies of (train features, train labels, test features, test labels)."""

NETWORK_PROTOCOLS: dict[str, Callable[..., float | dict[str, float]]] = {
    "linear_lars": lars_probe_accuracy,
    "attentive": attentive_probe_accuracy,
    "patch_local": patch_local,
    "patch_global": patch_global,
    "classification": classification,
    "dice": dice,
    "verification": verification,
    "detection": detection,
}
"""Accuracies, or several scores by name, of (method, variables, config)."""

CHECKS: dict[str, Callable[[Method], object]] = {
    "classification": check_classifier,
    "dice": check_segmenter,
    "detection": check_detector,
}
"""Of protocols that not every method can do: raises `ValueError` for those that cannot."""

OWN_PREDICTIONS = tuple(CHECKS)
"""Protocols that score what a method says itself; an untrained one guesses."""

OTHER_LABELS = ("dice",)
"""Protocols that need no label of an example: they compare with what else it has."""

PROTOCOLS: dict[str, str] = {
    "knn": "weighted 20-nearest-neighbour classifier on frozen features",
    "linear": "logistic regression on frozen features, for small data",
    "linear_lars": "the MAE paper's linear probe: LARS, augmentation, 90 epochs",
    "attentive": "the CAE paper's probe: one query attends to all tokens of the frozen encoder",
    "patch_local": "recall of the class of every patch from its frozen token (Locality Alignment)",
    "patch_global": "recall of the classes of an image from its frozen patch tokens, likewise",
    "classification": "accuracies, AUROC and cross-entropy of a classifier's own predictions",
    "verification": "whether two faces are of one person, in ten folds as on LFW",
    "dice": "Dice coefficients of segmented volumes, by sliding windows",
    "detection": "area under the ROC curve and equal error rate of forged images, by domain",
}
"""What each protocol is, by name."""

RAW_PIXELS_SIDE = 32
"""Larger images are shrunk to this side for the raw-pixel baseline, which must fit in memory."""

_log = logging.getLogger(__name__)


class FeatureSplits(NamedTuple):
    """Features `[examples, width]` and labels `[examples]` of both splits."""

    train_features: np.ndarray
    train_labels: np.ndarray
    test_features: np.ndarray
    test_labels: np.ndarray


def evaluate(
    method: Method,
    variables: Variables,
    config: ml_collections.ConfigDict,
    protocols: Sequence[str] | None = None,
) -> dict[str, float]:
    """Top-1 accuracy in [0, 1] by each protocol, on the labelled data that the config names.

    Features are extracted once for all protocols that use them. A protocol with several scores
    gives each under its own name, such as `classification/top1`.

    Args:
        method: gives the features.
        variables: of the method, on any devices.
        config: a complete config; read are `evaluate`, `data` and `seed`.
        protocols: names in `PROTOCOLS`; None takes `config.evaluate.protocols`.

    Raises:
        ValueError: for an unknown protocol, one that the method cannot do, or data without labels.
        FileNotFoundError: if the data are not there.
    """
    names = check_protocols(config.evaluate.protocols if protocols is None else protocols, method)
    accuracies: dict[str, float] = {}
    if not set(names).isdisjoint(FEATURE_PROTOCOLS):
        splits = _encoded(method, variables, config)
        accuracies |= _feature_accuracies(splits, names)
    scores: dict[str, float] = {}
    for name in names:
        if name in NETWORK_PROTOCOLS:
            started = time.monotonic()
            new = _by_name(name, NETWORK_PROTOCOLS[name](method, variables, config))
            _report(new, started)
            scores |= new
        else:
            scores[name] = accuracies[name]
    return scores


def compare_with_baselines(
    method: Method,
    variables: Variables,
    config: ml_collections.ConfigDict,
    protocols: Sequence[str] | None = None,
    *,
    untrained_variables: Variables,
) -> dict[str, dict[str, float]]:
    """Accuracies of a trained encoder beside those of the same encoder at its start.

    Args:
        method: gives the features.
        variables: trained.
        config: as for `evaluate`.
        protocols: as for `evaluate`.
        untrained_variables: the initial ones of the same run.

    Returns:
        By row "trained", "untrained" and "raw pixels", what `evaluate` gives; the last row has
        only the protocols that work on any features, and larger images are shrunk for it.

    Raises:
        ValueError: as for `evaluate`.
        FileNotFoundError: as for `evaluate`.
    """
    names = check_protocols(config.evaluate.protocols if protocols is None else protocols, method)
    rows = {"trained": evaluate(method, variables, config, names)}
    of_features = [name for name in names if name not in OWN_PREDICTIONS]
    if of_features:
        rows["untrained"] = evaluate(method, untrained_variables, config, of_features)
    if not set(names).isdisjoint(FEATURE_PROTOCOLS):
        rows["raw pixels"] = _feature_accuracies(_raw_pixels(config), names)
    return rows


def check_protocols(names: Iterable[str], method: Method | None = None) -> tuple[str, ...]:
    """The names themselves, each once.

    Raises:
        ValueError: for an unknown one, with the known ones and the nearest; or for one that a
            given method cannot do.
    """
    names = tuple(dict.fromkeys((names,) if isinstance(names, str) else names))
    for name in names:
        if name not in PROTOCOLS:
            near = difflib.get_close_matches(name, PROTOCOLS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"unknown evaluation protocol {name!r}; known are {', '.join(PROTOCOLS)}.{hint}"
            )
    if method is not None:
        for name in CHECKS.keys() & names:
            CHECKS[name](method)
    return names


def check_labels(config: ml_collections.ConfigDict) -> None:
    """Looks before training whether the protocols of a config find labels after it.

    Raises:
        ValueError: if a protocol needs labels that the data do not have, or domains of both
            classes.
        FileNotFoundError: if the data are not there.
    """
    if set(config.evaluate.protocols) - set(OTHER_LABELS):
        for split in (config.evaluate.train_split, config.evaluate.test_split):
            labelled_source(config, split)
    if "detection" in config.evaluate.protocols:
        domain_source(config, config.evaluate.test_split)


def _feature_accuracies(splits: FeatureSplits, names: Iterable[str]) -> dict[str, float]:
    """Accuracies by those of the named protocols that need nothing but features."""
    accuracies = {}
    for name in names:
        if name in FEATURE_PROTOCOLS:
            started = time.monotonic()
            accuracies[name] = FEATURE_PROTOCOLS[name](*splits)
            _report({name: accuracies[name]}, started)
    return accuracies


def _encoded(
    method: Method, variables: Variables, config: ml_collections.ConfigDict
) -> FeatureSplits:
    """Features of both splits by an encoder."""
    train, test = (
        extract_features(
            method,
            variables,
            centre_crops(config, split),
            mean=config.data.mean,
            std=config.data.std,
            pool=config.evaluate.pool,
        )
        for split in (config.evaluate.train_split, config.evaluate.test_split)
    )
    return _splits(train, test)


def _raw_pixels(config: ml_collections.ConfigDict) -> FeatureSplits:
    """Pixels of both splits, cut as the encoder sees them."""
    train, test = (
        raw_pixels(centre_crops(config, split, largest_side=RAW_PIXELS_SIDE))
        for split in (config.evaluate.train_split, config.evaluate.test_split)
    )
    return _splits(train, test)


def _splits(
    train: tuple[np.ndarray, np.ndarray | None], test: tuple[np.ndarray, np.ndarray | None]
) -> FeatureSplits:
    assert train[1] is not None and test[1] is not None, "centre_crops gives labels"
    return FeatureSplits(train[0], train[1], test[0], test[1])


def _by_name(protocol: str, result: float | Mapping[str, float]) -> dict[str, float]:
    """The scores of a protocol; a single one has the protocol's name."""
    if isinstance(result, Mapping):
        return {f"{protocol}/{name}": score for name, score in result.items()}
    return {protocol: result}


def _report(scores: Mapping[str, float], started: float) -> None:
    told = ", ".join(f"{name} {score:.4f}" for name, score in scores.items())
    _log.info("%s in %.1f s", told, time.monotonic() - started)
