import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.experiments import vec2face
from mim_jax.training.state import TrainState

SIZE = 64  # of a vector


@pytest.fixture
def few_faces(monkeypatch):
    random = np.random.default_rng(0)

    def few(split):
        names = np.repeat(np.arange(4) + (0 if split == "train" else 4), 8)
        images = random.integers(0, 256, (32, 28, 28, 3), dtype=np.uint8)
        vectors = random.normal(size=(32, SIZE)).astype(np.float32)
        return vec2face.Faces(images, names, random.uniform(-45, 45, 32), vectors)

    splits = {split: few(split) for split in ("train", "test")}
    monkeypatch.setattr(vec2face, "faces", splits.__getitem__)
    return splits


class Told:
    """In place of a generator: an image is its vector, or says what it was trained with."""

    def __init__(self, steps, leads):
        self.method = None

    def train(self, seed, identity):
        return identity

    def images(self, variables, vectors, seed):
        images = np.zeros((len(vectors), 28, 28, 3), np.float32)
        images.reshape(len(vectors), -1)[:, :SIZE] = vectors if variables else -vectors
        return images

    @staticmethod
    def features(variables, images):
        return images.reshape(len(images), -1)[:, :SIZE]

    def search(self, variables, vectors, rng):
        return vectors, self.images(variables, vectors, 0), 7, 1


@pytest.fixture
def told(few_faces, monkeypatch):
    def sample(random, count, **_):
        return np.eye(SIZE, dtype=np.float32)[:count]

    monkeypatch.setattr(vec2face, "Generator", Told)
    monkeypatch.setattr(vec2face, "sample_identities", sample)
    monkeypatch.setattr(vec2face, "YawNetwork", TurnedBy)
    monkeypatch.setattr(vec2face, "JUDGE", Blank())
    monkeypatch.setattr(vec2face, "judge_of", lambda images, labels, seed: None)
    monkeypatch.setattr(vec2face, "verified", lambda judge: {"accuracy": 0.5, "auc": 0.5})
    monkeypatch.setattr(
        vec2face,
        "face_vectors",
        lambda model, judge, images: images.reshape(len(images), -1)[:, :9],
    )
    worth = {"200 generated people": {"auc": 0.9}, "50 generated people": {"auc": 0.8}}
    monkeypatch.setattr(vec2face, "usefulness", lambda *_: worth)


class Blank:
    """In place of a face model."""

    def init(self, rng, images):
        return {}


class TurnedBy:
    """In place of a network for the yaw."""

    def __init__(self, images, yaw, seed):
        pass

    def r2(self, images, yaw):
        return 0.75

    def __call__(self, images):
        return jnp.full(len(images), -20.0)


def test_every_claim_is_judged_for_every_seed_and_the_ablation_by_its_own_weight(told, tmp_path):
    path = tmp_path / "result.json"
    vec2face.main(["--seeds", "2", "--ablation-seeds", "1", "--output", str(path)])
    result = json.loads(path.read_text())
    full = result["full"]
    np.testing.assert_allclose(full["identity"]["cosine"]["values"], 1, rtol=1e-5)
    np.testing.assert_allclose(result["without identity loss"]["cosine"]["values"], -1, rtol=1e-5)
    assert abs(full["identity"]["cosine, shuffled"]["mean"]) < 0.2
    assert full["separability"]["share of pairs below 0.4"]["values"] == [1, 1]
    assert full["attribute search"]["degrees after"]["mean"] == 20
    noisy = full["perturbation"]
    assert [*noisy] == ["0", "0.3", "0.5", "0.7", "1", "1.5"]
    assert noisy["0"]["pixel variance"]["mean"] < 1e-12
    fulfilled = result["seeds that fulfil a claim"]
    assert fulfilled.pop("4, attribute search") == 0  # the head turned by nothing
    assert fulfilled.pop("3, perturbation") in (0, 1, 2)
    assert set(fulfilled.values()) == {2}
    assert path.with_suffix(".png").is_file()


def test_monotonic_wants_falling_cosines_and_rising_variances():
    rows = {
        "0": {"cosine": 0.9, "pixel variance": 0.1},
        "1": {"cosine": 0.8, "pixel variance": 0.2},
    }
    assert vec2face.monotonic(rows)
    assert not vec2face.monotonic(dict(reversed(rows.items())))
    assert not vec2face.monotonic({**rows, "2": {"cosine": 0.7, "pixel variance": 0.2}})


def test_fewer_people_train_the_judge_for_equally_many_steps(few_faces, monkeypatch):
    given = []
    monkeypatch.setattr(
        vec2face, "train_face_model", lambda *_, epochs, seed: given.append((epochs, seed))
    )
    for count in (32, 16, 8):
        vec2face.judge_of(few_faces["train"].images[:count], np.zeros(count), 5)
    first = vec2face.JUDGE_EPOCHS
    assert given == [(first, 5), (2 * first, 5), (4 * first, 5)]


def test_a_yaw_network_tells_a_turn_that_pixels_show():
    yaw = np.linspace(-45, 45, 200)
    images = np.zeros((200, 4, 4, 3), np.uint8)
    images[:, 0] = (128 + yaw * 2)[:, None, None]
    network = vec2face.YawNetwork(images, yaw, seed=0)
    assert network.r2(images, yaw) > 0.8
    assert network.r2(images, -yaw) < 0


def test_training_takes_every_picture_with_its_vector_and_the_weight_of_the_identity(
    few_faces, monkeypatch
):
    built = []

    def initial(method, optimizer, rng, like):
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, {"sum": jnp.zeros(SIZE)}, {}, (), zero, zero)

    def with_face_model(method, state):
        assert [part.path for part in method.pretrained] == ["tiny"]
        return state, []

    def make_step(method, optimizer, schedules, prepare, *, seed):
        built.append(method)
        assert {*schedules} >= {"discriminator"}

        def step(state, batch):
            assert batch["image"].dtype == jnp.uint8
            pixels = jnp.mean(batch["image"].astype(jnp.float32), axis=(1, 2, 3))
            moved = method.weights.identity * jnp.sum(pixels[:, None] * batch["feature"], axis=0)
            return state.replace(params={"sum": state.params["sum"] + moved}), {}

        return step

    monkeypatch.setattr(vec2face, "init_state", initial)
    monkeypatch.setattr(vec2face, "load_pretrained", with_face_model)
    monkeypatch.setattr(vec2face, "make_train_step", make_step)
    leads: Any = None  # that the search calls
    generator = vec2face.Generator(4, leads)
    found = [generator.train(seed, weight)["params"]["sum"] for seed, weight in ((0, 1), (1, 0.5))]
    data = few_faces["train"]
    assert 2 * len(data.images) == 4 * vec2face.BATCH  # two passes
    whole = 2 * data.images.mean(axis=(1, 2, 3)) @ data.vectors
    np.testing.assert_allclose(found[0], whole, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(found[1], whole / 2, rtol=1e-3, atol=1e-2)
    assert len(built) == 1, "both arms share what is compiled"
    assert built[0].discriminator is not None
