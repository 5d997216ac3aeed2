import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.evaluation import evaluate, labelled_data
from mim_jax.evaluation.patch_probe import (
    HEADS,
    IGNORED,
    PatchHead,
    macro_recall,
    patch_global_recall,
    patch_local_recall,
)
from tests.evaluation.toy import Toy, toy_config, toy_variables

CLASSES, TOKENS, WIDTH = 3, 6, 8


def scenes(seed: int, examples: int = 96):
    """Tokens that tell the class of their own patch, and that class."""
    centres = np.random.default_rng(7).normal(size=(CLASSES, WIDTH)) * 2
    random = np.random.default_rng(seed)
    labels = random.integers(CLASSES, size=(examples, TOKENS))
    return centres[labels] + 0.3 * random.normal(size=(examples, TOKENS, WIDTH)), labels


def shifted_scenes(seed: int, examples: int = 96):
    """Tokens that tell the class of the patch before theirs."""
    tokens, labels = scenes(seed, examples)
    return np.roll(tokens, 1, axis=1), labels


def present(labels: np.ndarray) -> np.ndarray:
    return (labels[..., None] == np.arange(CLASSES)).any(axis=1).astype(int)


@pytest.mark.parametrize("head", HEADS)
def test_classes_that_tokens_tell_are_found(head):
    (train, labels), (test, truth) = scenes(0), scenes(1, 50)
    assert patch_local_recall(train, labels, test, truth, head=head) > 0.97


def test_a_block_finds_what_lies_in_another_token_and_a_linear_head_does_not():
    (train, labels), (test, truth) = shifted_scenes(0, 512), shifted_scenes(1, 64)
    recall = {
        head: patch_local_recall(train, labels, test, truth, head=head, lr=1e-2, epochs=40)
        for head in HEADS
    }
    assert recall["block"] > 0.8
    assert recall["linear"] < 0.45  # chance is 1/3


def test_tokens_that_tell_nothing_give_chance():
    (train, labels), (test, truth) = scenes(0), scenes(1)
    random = np.random.default_rng(2)
    train, test = (random.normal(size=x.shape) for x in (train, test))
    assert abs(patch_local_recall(train, labels, test, truth) - 1 / CLASSES) < 0.1


@pytest.mark.parametrize("head", HEADS)
def test_classes_of_the_image_are_found_from_its_patches(head):
    (train, labels), (test, truth) = scenes(0, 256), scenes(1)
    arrays = (train, present(labels), test, present(truth))
    assert patch_global_recall(*arrays, head=head) > 0.85


def test_one_class_for_each_image_is_accepted_too():
    labels, truth = (scenes(seed)[1][:, :1].repeat(TOKENS, axis=1) for seed in (0, 1))
    centres = np.random.default_rng(7).normal(size=(CLASSES, WIDTH)) * 2
    arrays = (centres[labels], labels[:, 0], centres[truth], truth[:, 0])
    assert patch_global_recall(*arrays) == 1.0


def test_patches_without_a_class_neither_teach_nor_count():
    (train, labels), (test, truth) = scenes(0), scenes(1)
    hidden = np.random.default_rng(3).random(labels.shape) < 0.5
    wrong, missing = labels.copy(), labels.copy()
    wrong[hidden] = (labels[hidden] + 1) % CLASSES
    missing[hidden] = IGNORED
    seen = truth.copy()
    seen[:, 0] = IGNORED
    changed = test.copy()
    changed[:, 0] = 100.0
    recall = patch_local_recall(train, missing, test, seen)
    assert recall > 0.97 > patch_local_recall(train, wrong, test, seen)
    assert recall == patch_local_recall(train, missing, changed, seen)


def test_recall_is_the_mean_over_the_classes_that_there_are():
    truth = np.array([0, 0, 0, 0, 2])
    assert macro_recall(truth, np.array([0, 0, 1, 1, 2])) == pytest.approx((0.5 + 1) / 2)
    several = np.array([[1, 0, 1], [1, 0, 0]])
    assert macro_recall(several, np.array([[1, 1, 0], [0, 1, 0]])) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="no example of any class"):
        macro_recall(np.zeros((2, 3), int), np.zeros((2, 3), int))


def test_same_seed_gives_the_same_recall_and_scale_plays_no_part():
    (train, labels), (test, truth) = scenes(0), scenes(1)
    train, test = train + 2 * np.roll(train, 2, 0), test + 2 * np.roll(test, 2, 0)
    first = patch_local_recall(train, labels, test, truth, epochs=5)
    assert first == patch_local_recall(train, labels, test, truth, epochs=5)
    scaled = patch_local_recall(train * 100 + 5, labels, test * 100 + 5, truth, epochs=5)
    assert abs(first - scaled) < 0.01


def test_the_block_head_is_locality_alignment_s_pool():
    head = PatchHead(5, "block", pooled=True)
    params = head.init(jax.random.key(0), jnp.zeros((2, TOKENS, WIDTH)))["params"]
    assert params["pool"]["positions"].shape == (TOKENS, WIDTH)
    attention = params["pool"]["transformer"]["blocks_0"]["attention"]
    assert set(attention["qkv"]) == {"kernel"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(train_labels=np.zeros((96, 5), int)), r"train labels are \(96, 5\)"),
        (dict(test_labels=np.full((96, TOKENS), -2)), "test labels .* range from -2"),
        (dict(train_labels=np.full((96, TOKENS), -1)), "train labels .* to -1"),
        (dict(test_tokens=np.zeros((96, TOKENS, 3))), "must be .* of the same encoder"),
        (dict(train_tokens=np.full((96, TOKENS, WIDTH), np.nan)), "tokens are not finite"),
        (dict(head="conv"), "head is 'conv'; known are linear, block"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    (train, labels), (test, truth) = scenes(0), scenes(1)
    given = dict(train_tokens=train, train_labels=labels, test_tokens=test, test_labels=truth)
    with pytest.raises(ValueError, match=message):
        patch_local_recall(**{**given, **changes})


@pytest.mark.parametrize(
    ("train_labels", "message"),
    [
        (np.zeros((96, 4), int), r"test labels are \(96, 3\).*the same in both splits"),
        (np.full((96, CLASSES), 2), "train labels range from 2 to 2; they must be 0 or 1"),
    ],
)
def test_labels_of_images_that_do_not_fit_are_named(train_labels, message):
    (train, _), (test, truth) = scenes(0), scenes(1)
    with pytest.raises(ValueError, match=message):
        patch_global_recall(train, train_labels, test, present(truth))


def test_protocols_give_a_score_for_each_head():
    scores = evaluate(Toy(), toy_variables(), toy_config(), ["patch_global"])
    assert list(scores) == ["patch_global/linear", "patch_global/block"]
    assert all(score > 0.3 for score in scores.values())  # chance is 0.1


@dataclasses.dataclass
class WithPatches:
    """A source that takes the brightness of a patch for its class."""

    source: object

    def __getattr__(self, name):
        return getattr(self.source, name)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.source[index]

    def patch_labels(self, grid):
        images = np.stack([self[i]["image"] for i in range(len(self))])[..., 0] / 255
        rows, columns = grid
        cells = images.reshape(len(images), rows, 28 // rows, columns, 28 // columns)
        return (cells.mean(axis=(2, 4)) > 0.3).astype(int).reshape(len(images), -1)


def test_a_source_may_know_the_classes_of_patches(monkeypatch):
    find = labelled_data.labelled_source

    def with_patches(config, split):
        source, classes = find(config, split)
        return WithPatches(source), classes

    monkeypatch.setattr(labelled_data, "labelled_source", with_patches)
    config = toy_config(**{"evaluate.crop_ratio": 1.0})
    scores = evaluate(Toy(), toy_variables(), config, ["patch_local"])
    assert scores["patch_local/linear"] > 0.8
    with pytest.raises(ValueError, match=r"evaluate.crop_ratio is 0.5, which cuts"):
        evaluate(
            Toy(), toy_variables(), toy_config(**{"evaluate.crop_ratio": 0.5}), ["patch_local"]
        )


def test_labels_of_images_alone_are_a_clear_error():
    with pytest.raises(ValueError, match="none for each patch, which the protocol 'patch_local'"):
        evaluate(Toy(), toy_variables(), toy_config(), ["patch_local"])
