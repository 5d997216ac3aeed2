import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.conversion.face_models import read_iresnet
from mim_jax.data import open_source
from mim_jax.evaluation.face_recognition import (
    TINY_FACE_MODEL,
    arcface_logits,
    face_vectors,
    train_face_model,
)
from mim_jax.evaluation.verification import label_pairs, verification_scores
from mim_jax.models.iresnet import IResNet


def faces(split):
    source = open_source("synthetic:faces", split)
    return np.stack([source[i]["image"] for i in range(len(source))]), source.labels


def test_logits_widen_the_angle_to_the_true_class_alone():
    rng = np.random.default_rng(0)
    vectors, centres = rng.normal(size=(6, 5)), rng.normal(size=(4, 5))
    labels = np.arange(6) % 4
    found = arcface_logits(jnp.array(vectors), jnp.array(centres), jnp.array(labels), 0.3, 16.0)
    for i in range(6):
        for j in range(4):
            cosine = vectors[i] @ centres[j]
            cosine /= np.linalg.norm(vectors[i]) * np.linalg.norm(centres[j])
            angle = np.arccos(cosine) + (0.3 if labels[i] == j else 0.0)
            assert angle < np.pi
            np.testing.assert_allclose(found[i, j], 16 * np.cos(angle), rtol=1e-4, atol=1e-4)


def test_the_true_logit_falls_with_the_angle_everywhere():
    angles = np.linspace(0.01, np.pi - 0.01, 200)
    vectors = jnp.array(np.stack([np.cos(angles), np.sin(angles)], 1))
    labels = jnp.zeros(200, jnp.int32)
    logits = arcface_logits(vectors, jnp.array([[1.0, 0.0]]), labels, 0.5, 1.0)
    assert (np.diff(logits[:, 0]) < 0).all()


@pytest.fixture(scope="module")
def small():
    return IResNet((28, 28), 3, blocks=(1, 1, 1), widths=(8, 8, 16), outputs=16)


def test_a_trained_model_verifies_people_that_it_never_saw(small):
    (images, labels), (others, truth) = faces("train[:900]"), faces("test[:300]")
    pairs, same = label_pairs(truth, 1000)
    trained = train_face_model(small, images, labels, epochs=3, seed=1)
    untrained = small.init(jax.random.key(0), jnp.zeros((1, 28, 28, 3)))
    found, before = (
        verification_scores(face_vectors(small, variables, others), pairs, same)["auc"]
        for variables in (trained, untrained)
    )
    assert found > before + 0.1
    np.testing.assert_array_equal(trained["params"]["vector_norm"]["scale"], 1.0)


def test_vectors_do_not_depend_on_the_batch(small):
    images, _ = faces("test[:23]")
    variables = small.init(jax.random.key(0), jnp.zeros((1, 28, 28, 3)))
    whole = face_vectors(small, variables, images, batch_size=23)
    np.testing.assert_allclose(face_vectors(small, variables, images, batch_size=10), whole, 1e-4)


@pytest.mark.parametrize(("rows", "identities"), [(10, 5), (100, 1)])
def test_too_little_data_are_named(small, rows, identities):
    images, labels = np.zeros((rows, 28, 28, 3), np.uint8), np.arange(rows) % identities
    with pytest.raises(ValueError, match=f"{rows} images of {identities} identities"):
        train_face_model(small, images, labels)


def test_the_packaged_model_verifies_people_that_it_never_saw():
    variables = read_iresnet("tiny", TINY_FACE_MODEL)
    images, labels = faces("test[:600]")
    pairs, same = label_pairs(labels, 2000)
    scores = verification_scores(face_vectors(TINY_FACE_MODEL, variables, images), pairs, same)
    assert scores["accuracy"] > 0.98 and scores["tar_at_far_0.01"] > 0.95
