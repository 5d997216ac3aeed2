import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from mim_jax.evaluation import knn
from mim_jax.evaluation.knn import knn_accuracy, knn_predictions


def random_data(seed: int, train: int = 200, test: int = 61, width: int = 12, classes: int = 5):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(train, width)).astype(np.float32),
        rng.integers(classes, size=train),
        rng.normal(size=(test, width)).astype(np.float32),
        rng.integers(classes, size=test),
    )


def clusters(seed: int, per_class: int = 30, classes: int = 5, width: int = 12):
    """Directions far apart with little noise, each vector of another length."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    points = np.eye(classes, width)[labels] + 0.05 * rng.normal(size=(len(labels), width))
    points *= rng.uniform(0.1, 10, size=(len(labels), 1))
    return points[::2], labels[::2], points[1::2], labels[1::2]


def votes(train, labels, queries, k, temperature, classes):
    """The definition, one query at a time in float64."""
    result = np.zeros((len(queries), classes))
    for i, query in enumerate(queries.astype(np.float64)):
        similarity = [query @ t / (np.linalg.norm(query) * np.linalg.norm(t)) for t in train]
        for j in np.argsort(similarity)[::-1][:k]:
            result[i, labels[j]] += np.exp(similarity[j] / temperature)
    return result


@pytest.mark.parametrize("k", [1, 5, 20])
def test_predictions_follow_the_definition(k):
    train, labels, queries, _ = random_data(0)
    expected = votes(train, labels, queries, k, 0.07, 5).argmax(axis=1)
    np.testing.assert_array_equal(knn_predictions(train, labels, queries, k=k), expected)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**16), temperature=st.sampled_from([0.05, 0.07, 1.0]))
def test_predictions_are_those_of_scikit_learn(seed, temperature):
    train, labels, queries, _ = random_data(seed)
    reference = KNeighborsClassifier(
        20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(train.astype(np.float64), labels)
    expected = reference.predict(queries.astype(np.float64))
    ours = knn_predictions(train, labels, queries, temperature=temperature)
    assert np.mean(ours == expected) > 0.98  # a tie within float32 may fall either way


def test_chunks_give_the_same_predictions(monkeypatch):
    train, labels, queries, _ = random_data(1)
    whole = knn_predictions(train, labels, queries)
    monkeypatch.setattr(knn, "MAX_QUERIES", 7)
    np.testing.assert_array_equal(knn_predictions(train, labels, queries), whole)


def test_separable_clusters_are_classified_perfectly():
    assert knn_accuracy(*clusters(0)) == 1.0


def test_random_labels_give_chance():
    train, labels, queries, truth = random_data(2, train=2000, test=1000)
    assert abs(knn_accuracy(train, labels, queries, truth) - 0.2) < 0.05


def test_all_training_examples_vote_where_there_are_fewer_than_k():
    train, labels, queries, _ = random_data(3, train=8)
    expected = votes(train, labels, queries, 8, 0.07, 5).argmax(axis=1)
    np.testing.assert_array_equal(knn_predictions(train, labels, queries, k=20), expected)


def test_length_of_features_does_not_matter():
    train, labels, queries, truth = random_data(4)
    scaled = queries * np.linspace(0.01, 100, len(queries))[:, None]
    assert knn_accuracy(train, labels, queries, truth) == knn_accuracy(
        train * 3, labels, scaled, truth
    )


def test_a_zero_vector_is_no_error():
    train, labels, queries, truth = random_data(5)
    queries[0] = 0
    train[0] = 0
    assert 0 <= knn_accuracy(train, labels, queries, truth) <= 1


def test_classes_that_only_the_test_split_has_are_never_predicted():
    train, labels, queries, truth = clusters(1)
    known = labels < 3
    assert knn_accuracy(train[known], labels[known], queries, truth) == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=0), "k must be at least 1"),
        (dict(temperature=0.0), "temperature must be above 0"),
        (dict(test_features=np.ones((61, 3))), "12 wide, test features 3"),
        (dict(test_labels=np.zeros(60, int)), r"must be \[examples, width\]"),
        (dict(train_labels=np.full(200, -1)), "labels go down to -1"),
        (dict(test_features=np.full((61, 12), np.nan)), "test features are not finite"),
    ],
)
def test_wrong_input_is_named(change, message):
    names = ("train_features", "train_labels", "test_features", "test_labels")
    arguments = {**dict(zip(names, random_data(6), strict=True)), **change}
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**arguments)
