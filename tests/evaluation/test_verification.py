import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold

from mim_jax.data import open_source
from mim_jax.evaluation.protocols import evaluate
from mim_jax.evaluation.verification import (
    FALSE_ACCEPT_RATES,
    label_pairs,
    read_pairs,
    verification,
    verification_scores,
)
from tests.evaluation.toy import Toy, toy_config, toy_variables


def people(seed: int, noise: float, count: int = 20, each: int = 8, size: int = 16):
    """Vectors around a direction for each person, of all lengths, and labels."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(count), each)
    vectors = rng.normal(size=(count, size))[labels] + noise * rng.normal(size=(len(labels), size))
    return vectors * rng.uniform(0.1, 10, (len(labels), 1)), labels


def reference(vectors, pairs, same):
    """InsightFace's evaluation, one fold and one threshold at a time."""
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    first, second = units[pairs[:, 0]], units[pairs[:, 1]]
    distances = np.sum(np.square(first - second), axis=1)
    thresholds = np.arange(0, 4, 0.01)
    accuracies = []
    for train, test in KFold(n_splits=10, shuffle=False).split(pairs):
        on_train = [np.mean((distances[train] < t) == same[train]) for t in thresholds]
        threshold = thresholds[np.argmax(on_train)]
        accuracies.append(np.mean((distances[test] < threshold) == same[test]))
    return np.mean(accuracies), np.std(accuracies), distances


@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
def test_accuracy_is_that_of_the_standard_protocol(noise):
    vectors, labels = people(0, noise)
    pairs, same = label_pairs(labels, 605)  # folds of two lengths
    scores = verification_scores(vectors, pairs, same)
    mean, deviation, distances = reference(vectors, pairs, same)
    assert scores["accuracy"] == pytest.approx(mean, abs=1e-12)
    assert scores["accuracy_std"] == pytest.approx(deviation, abs=1e-12)
    assert scores["auc"] == pytest.approx(roc_auc_score(same, -distances))
    for rate in FALSE_ACCEPT_RATES:
        accepted = [
            np.mean(distances[same] <= t)
            for t in np.sort(distances)
            if np.mean(distances[~same] <= t) <= rate
        ]
        assert scores[f"tar_at_far_{rate:g}"] == pytest.approx(max(accepted, default=0))


def test_perfect_vectors_give_one_and_random_ones_chance():
    vectors, labels = people(1, 0.01)
    pairs, same = label_pairs(labels, 600)
    scores = verification_scores(vectors, pairs, same)
    assert scores == {**dict.fromkeys(scores, 1.0), "accuracy_std": 0.0}
    noise = np.random.default_rng(2).normal(size=(400, 16))
    pairs, same = label_pairs(np.arange(400) // 4, 1200)
    assert abs(verification_scores(noise, pairs, same)["accuracy"] - 0.5) < 0.06


def test_pairs_are_distinct_balanced_and_fixed_by_the_seed():
    labels = np.random.default_rng(0).permutation(np.arange(60) // 5)
    pairs, same = label_pairs(labels, 100)
    assert len(pairs) == 100 and same[:4].tolist() == [True, False, True, False]
    np.testing.assert_array_equal(labels[pairs[:, 0]] == labels[pairs[:, 1]], same)
    assert len({tuple(sorted(pair)) for pair in pairs.tolist()}) == 100
    np.testing.assert_array_equal(pairs, label_pairs(labels, 100)[0])
    assert (pairs != label_pairs(labels, 100, seed=1)[0]).any()
    assert len(label_pairs(labels, 10**6)[0]) == 2 * 12 * 10, "all there are of one person"


@pytest.mark.parametrize("labels", [np.zeros(5, int), np.arange(5)])
def test_labels_without_both_kinds_of_pairs_are_named(labels):
    with pytest.raises(ValueError, match="needs two identities, and two images of one"):
        label_pairs(labels, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(vectors=np.ones((160, 2, 2))), r"must be \[images, size\]"),
        (dict(vectors=np.full((160, 4), np.nan)), "not finite"),
        (dict(same=np.ones(100, bool)), "100 pairs of one person and 0 of two"),
        (dict(pairs=np.zeros((9, 2), int), same=np.arange(9) < 4), "do not make 10 folds"),
    ],
)
def test_wrong_input_is_named(change, message):
    vectors, labels = people(3, 0.1)
    pairs, same = label_pairs(labels, 100)
    with pytest.raises(ValueError, match=message):
        verification_scores(**{"vectors": vectors, "pairs": pairs, "same": same, **change})


@dataclasses.dataclass(frozen=True)
class ToyFaces(Toy):
    """A toy whose face vectors are a few coarse pixels."""

    def face_features(self, variables, images):
        return jax.image.resize(images, (len(images), 7, 7, 1), "linear").reshape(len(images), -1)


def test_vectors_are_those_for_faces_where_the_method_has_them():
    config = toy_config()
    plain = evaluate(Toy(), toy_variables(), config, ["verification"])
    faces = evaluate(ToyFaces(), toy_variables(), config, ["verification"])
    assert "verification/accuracy" in plain and list(plain) == list(faces)
    assert 0.6 < faces["verification/accuracy"] != plain["verification/accuracy"]
    source = open_source("embedded", "test[:90]")
    images = np.stack([source[i]["image"] for i in range(90)]).astype(np.float32) / 255
    images = (images - config.data.mean[0]) / config.data.std[0]
    config.evaluate.crop_ratio = 1.0
    found = verification(ToyFaces(), toy_variables(), config)
    vectors = ToyFaces().face_features({}, jnp.asarray(images))
    expected = verification_scores(np.asarray(vectors), *label_pairs(source.labels, 6000))
    assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=0.005)


@pytest.fixture
def lfw(tmp_path):
    rng = np.random.default_rng(0)
    for person in ("Ann_Example", "Bob", "Cy"):
        (tmp_path / "faces" / person).mkdir(parents=True)
        for number in range(1, 5):
            pixels = rng.integers(255, size=(28, 28), dtype=np.uint8)
            name = f"{person}_{number:04d}.png"
            Image.fromarray(pixels).save(tmp_path / "faces" / person / name)
    return tmp_path


def named(source, pairs):
    return [tuple(source.path(i).rpartition("/")[2] for i in pair) for pair in pairs]


def test_lfws_own_file_of_pairs_is_read(lfw):
    (lfw / "pairs.txt").write_text("10\t1\nAnn_Example\t1\t4\nBob\t2\tCy\t3\n")
    source = open_source(f"folder:{lfw / 'faces'}")
    pairs, same = read_pairs(lfw / "pairs.txt", source)
    assert named(source, pairs) == [
        ("Ann_Example_0001.png", "Ann_Example_0004.png"),
        ("Bob_0002.png", "Cy_0003.png"),
    ]
    assert same.tolist() == [True, False]


@pytest.mark.parametrize("separator", [",", " ", ", "])
def test_pairs_of_paths_are_read(lfw, separator):
    lines = [("Bob/Bob_0001.png", "Bob/Bob_0002.png", "1"), ("Cy/Cy_0001.png", "Bob_0002.png", "0")]
    (lfw / "pairs.csv").write_text("\n".join(map(separator.join, lines)) + "\n\n")
    source = open_source(f"folder:{lfw / 'faces'}")
    pairs, same = read_pairs(lfw / "pairs.csv", source)
    assert named(source, pairs) == [
        ("Bob_0001.png", "Bob_0002.png"),
        ("Cy_0001.png", "Bob_0002.png"),
    ]
    assert same.tolist() == [True, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Bob/Bob_0001.png,Dan/x.png,1\n", r"line 1, .*has no image 'Dan/x.png'"),
        ("Bob 1 2\nBob 1\n", r"line 2, 'Bob 1': it is neither"),
        ("a,b,same\n", "it is neither"),
    ],
)
def test_bad_lines_are_named(lfw, text, message):
    (lfw / "pairs.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pairs(lfw / "pairs.txt", open_source(f"folder:{lfw / 'faces'}"))


def test_a_file_of_pairs_needs_a_folder_and_has_to_be_there(lfw):
    source = open_source(f"folder:{lfw / 'faces'}")
    with pytest.raises(FileNotFoundError, match=r"no file of pairs .*pairs.csv"):
        read_pairs(lfw / "pairs.csv", source)
    (lfw / "pairs.txt").write_text("Bob 1 2\n")
    with pytest.raises(ValueError, match="no whole folder"):
        read_pairs(lfw / "pairs.txt", open_source("embedded"))


def test_the_protocol_takes_the_pairs_of_a_file(lfw):
    lines = [f"{p} {i} {j}" for p in ("Bob", "Cy") for i in range(1, 5) for j in range(1, i)]
    lines += [f"Bob {i} Cy {j}" for i in range(1, 5) for j in range(1, 4)]
    (lfw / "pairs.txt").write_text("\n".join(lines))
    config = toy_config(
        **{
            "evaluate.source": f"folder:{lfw / 'faces'}",
            "evaluate.test_split": "train",
            "evaluate.pairs": str(lfw / "pairs.txt"),
        }
    )
    scores = verification(Toy(), toy_variables(), config)
    assert set(scores) >= {"accuracy", "accuracy_std", "auc", "tar_at_far_0.01"}
