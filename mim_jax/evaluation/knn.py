"""Weighted k-nearest-neighbour classifier (Wu et al., CVPR 2018, section 3.4; DINO, 2021)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

MAX_SIMILARITIES = 2**26
"""Similarities held at once, 256 MiB: decides how many queries are answered together."""

MAX_QUERIES = 1024


def knn_accuracy(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> float:
    """Share of test examples that their weighted nearest neighbours classify correctly, in [0, 1].

    Args:
        train_features: `[train examples, width]`.
        train_labels: integers `[train examples]` in `range(num_classes)`.
        test_features: `[test examples, width]`.
        test_labels: integers `[test examples]`.
        k: number of neighbours; all training examples where there are fewer.
        temperature: a neighbour's vote has the weight exp(cosine similarity / temperature).
        num_classes: None takes the largest label plus one.

    Raises:
        ValueError: arrays that do not fit together, negative labels, or a bad `k` or temperature.
    """
    check_features_and_labels(train_features, train_labels, test_features, test_labels)
    predicted = knn_predictions(
        train_features,
        train_labels,
        test_features,
        k=k,
        temperature=temperature,
        num_classes=num_classes,
    )
    return float(np.mean(predicted == test_labels))


def knn_predictions(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    *,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> np.ndarray:
    """The class with the largest weighted vote for each query, int32 `[test examples]`.

    Arguments and errors are those of `knn_accuracy`; of equal votes the lowest class wins.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}.")
    if num_classes is None:
        num_classes = int(np.max(train_labels)) + 1
    predict = functools.partial(
        _predictions,
        _unit_rows(jnp.asarray(train_features, jnp.float32)),
        jnp.asarray(train_labels, jnp.int32),
        temperature=temperature,
        k=min(k, len(train_features)),
        num_classes=num_classes,
    )
    chunk = min(max(MAX_SIMILARITIES // len(train_features), 1), MAX_QUERIES, len(test_features))
    predicted = [
        np.asarray(predict(_filled(test_features[start : start + chunk], chunk)))
        for start in range(0, len(test_features), chunk)
    ]
    return np.concatenate(predicted)[: len(test_features)]


def check_features_and_labels(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
) -> None:
    """Raises `ValueError` unless both splits are non-empty, labelled, finite and equally wide."""
    for name, features, labels in (
        ("train", train_features, train_labels),
        ("test", test_features, test_labels),
    ):
        if features.ndim != 2 or labels.shape != features.shape[:1] or not len(features):
            raise ValueError(
                f"{name} features {features.shape} and labels {labels.shape} must be "
                "[examples, width] and [examples], with at least one example."
            )
        if labels.min() < 0:
            raise ValueError(f"{name} labels go down to {labels.min()}; they must be 0 or more.")
        if not np.isfinite(features).all():
            raise ValueError(f"{name} features are not finite; has the training diverged?")
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"train features are {train_features.shape[1]} wide, test features "
            f"{test_features.shape[1]}; they must come from the same encoder and pool."
        )


@functools.partial(jax.jit, static_argnames=("k", "num_classes"))
def _predictions(
    train: jax.Array,
    labels: jax.Array,
    queries: jax.Array,
    *,
    temperature: float,
    k: int,
    num_classes: int,
) -> jax.Array:
    """Classes `[queries]` by neighbours among the unit vectors `train [examples, width]`."""
    # Rounded products would shift weights by percents, since the temperature magnifies them.
    similarity = jnp.matmul(_unit_rows(queries), train.T, precision=jax.lax.Precision.HIGHEST)
    nearest_similarity, nearest = jax.lax.top_k(similarity, k)  # [Q, k]
    weight = jnp.exp(nearest_similarity / temperature)
    is_class = labels[nearest][..., None] == jnp.arange(num_classes)  # [Q, k, classes]
    return jnp.argmax(jnp.sum(weight[..., None] * is_class, axis=1), axis=-1)


def _unit_rows(vectors: jax.Array) -> jax.Array:
    """Rows scaled to length 1; a zero row stays zero and is equally unlike everything."""
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _filled(rows: np.ndarray, size: int) -> np.ndarray:
    """Rows filled up with zeros, so that the last chunk needs no compilation of its own."""
    return np.pad(np.asarray(rows, np.float32), ((0, size - len(rows)), (0, 0)))
