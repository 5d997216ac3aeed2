import logging

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from mim_jax import config as configs
from mim_jax.data import open_source
from mim_jax.evaluation.classification import classification, classification_scores, predict
from mim_jax.training.sharding import make_mesh, state_shardings
from tests.evaluation.toy import Toy, ToyClassifier, toy_config, toy_variables

few = settings(max_examples=20, deadline=None)


def random_case(seed: int, classes: int, examples: int = 40):
    """Logits with some skill, and single labels among which every class occurs."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(examples) % classes)
    logits = rng.normal(size=(examples, classes)) + 1.5 * np.eye(classes)[labels]
    return logits.astype(np.float32), labels


@few
@given(seed=st.integers(0, 1000), classes=st.sampled_from([2, 5, 6, 9]))
def test_scores_of_single_labels_are_those_of_scikit_learn(seed, classes):
    logits, labels = random_case(seed, classes)
    scores = classification_scores(logits, labels)
    probability = softmax(logits.astype(np.float64), axis=1)
    ranks = np.argsort(np.argsort(-logits, axis=1), axis=1)[np.arange(len(labels)), labels]
    assert scores["top1"] == np.mean(ranks == 0)
    assert ("top5" in scores) == (classes > 5)
    if classes > 5:
        assert scores["top5"] == np.mean(ranks < 5)
    if classes > 2:
        expected = roc_auc_score(labels, probability, multi_class="ovr", average="macro")
    else:
        expected = roc_auc_score(labels, probability[:, 1])
    np.testing.assert_allclose(scores["auroc"], expected)
    np.testing.assert_allclose(scores["cross_entropy"], log_loss(labels, probability))


@few
@given(seed=st.integers(0, 1000), classes=st.sampled_from([1, 3, 7]))
def test_scores_of_several_labels_are_those_of_scikit_learn(seed, classes):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (30, classes)).astype(np.int32)
    labels[:2] = [[0], [1]]
    logits = (rng.normal(size=labels.shape) + labels).astype(np.float32)
    scores = classification_scores(logits, labels)
    assert set(scores) == {"mean_average_precision", "auroc", "cross_entropy"}
    expected = average_precision_score(labels, logits, average="macro")
    np.testing.assert_allclose(scores["mean_average_precision"], expected)
    np.testing.assert_allclose(scores["auroc"], roc_auc_score(labels, logits, average="macro"))
    probability = expit(logits.astype(np.float64))
    expected = np.mean([log_loss(t, p, labels=[0, 1]) for t, p in zip(labels.T, probability.T)])
    np.testing.assert_allclose(scores["cross_entropy"], expected)


def test_a_perfect_classifier_has_perfect_scores_however_sure_it_is():
    labels = np.arange(60) % 6
    logits = 1e4 * np.eye(6, dtype=np.float32)[labels]
    scores = classification_scores(logits, labels)
    assert scores == {"top1": 1.0, "top5": 1.0, "auroc": 1.0, "cross_entropy": 0.0}


def test_sure_predictions_keep_their_ranks():
    """As probabilities in float32 these are all 1 or 0."""
    logits = np.asarray([[30, 0], [25, 0], [0, 25], [0, 20], [26, 0], [0, 30]], np.float32)
    labels = np.asarray([0, 1, 0, 1, 0, 1])
    expected = roc_auc_score(labels, logits[:, 1] - logits[:, 0])
    assert 0.5 < expected < 1
    assert classification_scores(logits, labels)["auroc"] == pytest.approx(expected)


def test_a_collapsed_classifier_scores_by_chance():
    labels = np.arange(70) % 7
    scores = classification_scores(np.zeros((70, 7), np.float32), labels)
    assert scores["top1"] == pytest.approx(1 / 7) and scores["top5"] == pytest.approx(5 / 7)
    assert scores["auroc"] == 0.5
    assert scores["cross_entropy"] == pytest.approx(np.log(7))


def test_classes_without_examples_are_left_out_and_named(caplog):
    logits, labels = random_case(0, 4)
    wider = np.concatenate([logits, np.full((40, 2), -50, np.float32)], axis=1)
    with caplog.at_level(logging.WARNING):
        scores = classification_scores(wider, labels, ("a", "b", "c", "d", "rare", "rarer"))
    assert scores["auroc"] == pytest.approx(classification_scores(logits, labels)["auroc"])
    assert "auroc is undefined for 2 of 6 classes" in caplog.text
    assert "rare, rarer; it is the mean over the rest" in caplog.text


def test_no_mean_is_given_over_no_class(caplog):
    with caplog.at_level(logging.WARNING):
        scores = classification_scores(np.eye(3, dtype=np.float32), np.zeros(3, int))
        several = classification_scores(np.zeros((3, 2), np.float32), np.zeros((3, 2), int))
    assert set(scores) == {"top1", "cross_entropy"}
    assert set(several) == {"cross_entropy"}


def test_a_class_that_every_image_has_counts_for_precision_but_not_for_auroc():
    labels = np.asarray([[1, 0], [1, 1], [1, 0]])
    scores = classification_scores(np.asarray([[1.0, 0], [0, 1], [2, 2]]), labels)
    assert scores["auroc"] == pytest.approx(0.5)
    assert scores["mean_average_precision"] == pytest.approx((1 + 0.5) / 2)


def test_a_warning_lists_only_the_first_classes(caplog):
    with caplog.at_level(logging.WARNING):
        classification_scores(np.zeros((2, 30), np.float32), np.asarray([0, 1]))
    assert "28 of 30 classes" in caplog.text and "11, ...; it is" in caplog.text


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((3, 4)), np.zeros(2, int), r"logits \(3, 4\) and labels \(2,\) must be"),
        (np.zeros((3, 4)), np.zeros((3, 2), int), r"labels \(3, 2\) must be"),
        (np.zeros((0, 4)), np.zeros(0, int), "at least one example"),
        (np.full((1, 4), np.nan), np.zeros(1, int), "logits are not finite"),
        (np.zeros((2, 4)), np.asarray([0, 4]), "labels range from 0 to 4; .* must be 0 to 3"),
        (np.zeros((2, 4)), np.asarray([-1, 2]), "labels range from -1 to 2"),
        (np.zeros((1, 2)), np.asarray([[0, 2]]), "must be 0 to 1"),
    ],
)
def test_arrays_that_make_no_scores_are_errors(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        classification_scores(logits, labels)


def direct_logits(config, variables, split: str):
    """Logits and labels of a split in one forward pass, without any of the machinery."""
    source = open_source("embedded", split)
    examples = [source[i] for i in range(len(source))]
    images = np.stack([e["image"] for e in examples]).astype(np.float32) / 255
    images = (images - config.data.mean) / config.data.std
    logits = ToyClassifier().logits(variables, images.astype(np.float32))
    return np.asarray(logits), np.asarray([e["label"] for e in examples])


def test_predictions_are_those_of_one_forward_pass_in_order():
    config, variables = toy_config(), toy_variables()
    logits, labels = predict(ToyClassifier(), variables, config, "test[:90]")
    expected, expected_labels = direct_logits(config, variables, "test[:90]")
    assert logits.dtype == np.float32 and logits.shape == (90, 10)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_array_equal(labels, expected_labels)


def test_variables_on_a_mesh_give_the_predictions_of_one_device():
    mesh = make_mesh(configs.ml_collections.ConfigDict(dict(data=4, fsdp=2, tensor=1)))
    variables = toy_variables()
    on_mesh = jax.device_put(variables, state_shardings(variables, ((r".*", ()),), mesh))
    config = toy_config(**{"evaluate.batch_size": 30})  # not divisible by 8 devices
    logits, labels = predict(ToyClassifier(), on_mesh, config, "test[:90]")
    expected, expected_labels = predict(ToyClassifier(), variables, config, "test[:90]")
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_array_equal(labels, expected_labels)


def test_forward_pass_is_compiled_once_for_all_batches_and_splits():
    config = toy_config(**{"evaluate.batch_size": 16})
    predict(ToyClassifier(), toy_variables(1), config, "test[:40]")
    before = len(Toy.traces)
    predict(ToyClassifier(), toy_variables(2), config, "train[:40]")
    assert len(Toy.traces) == before


def test_the_protocol_scores_the_test_split():
    config, variables = toy_config(), toy_variables()
    scores = classification(ToyClassifier(), variables, config)
    assert scores == pytest.approx(
        classification_scores(*direct_logits(config, variables, "test[:90]")), abs=1e-5
    )


def test_a_method_without_logits_is_named():
    with pytest.raises(ValueError, match=r"needs a classifier.*Toy gives features only"):
        predict(Toy(), toy_variables(), toy_config(), "test[:90]")
