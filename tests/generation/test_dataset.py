import dataclasses
import os
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mim_jax.data import open_source
from mim_jax.generation import dataset
from mim_jax.generation.attribute_search import Attribute
from mim_jax.generation.dataset import Plan, generate_dataset, mean_vectors, person_name
from tests.generation.stub import SIZE, VARIABLES, Stub

PLAN = Plan(identities=7, images_per_identity=5, seed=3, threshold=0.6, model="stub")


def generate(folder, plan=PLAN, **options):
    return generate_dataset(Stub(), VARIABLES, folder, plan, size=SIZE, **options)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def images_of(folder, kind="folder"):
    source = open_source(f"{kind}:{folder}")
    return np.stack([source[i]["image"] for i in range(len(source))])


@pytest.mark.parametrize("kind", ["folder", "array_record"])
def test_the_result_is_a_labelled_source_of_all_people(tmp_path, kind):
    generate(tmp_path / "out", dataclasses.replace(PLAN, format=kind))
    for name in (f"{kind}:{tmp_path / 'out'}", str(tmp_path / "out")):
        source = open_source(name)
        assert (len(source), source.num_classes) == (35, 7)
        assert source.class_names == tuple(person_name(i) for i in range(7))
        assert [source[i]["label"] for i in range(35)] == [i // 5 for i in range(35)]
        assert source[0]["image"].shape == (2, 2, 3)


def test_both_formats_hold_the_same_images(tmp_path):
    for kind in ("folder", "array_record"):
        generate(tmp_path / kind, dataclasses.replace(PLAN, format=kind))
    first, second = (images_of(tmp_path / kind, kind) for kind in ("folder", "array_record"))
    np.testing.assert_array_equal(first, second)
    assert len(np.unique(first.reshape(35, -1), axis=0)) == 35


def test_the_seed_decides_everything(tmp_path):
    generate(tmp_path / "a")
    generate(tmp_path / "b")
    generate(tmp_path / "c", dataclasses.replace(PLAN, seed=4))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert (images_of(tmp_path / "a") != images_of(tmp_path / "c")).any()


def test_images_of_a_person_show_the_vector_and_no_two_people_are_alike(tmp_path):
    generate(tmp_path / "out", dataclasses.replace(PLAN, images_per_identity=20))
    vectors = load_file(tmp_path / "out" / dataset.IDENTITIES)["vectors"]
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert np.tril(units @ units.T, -1).max() < PLAN.threshold
    images = images_of(tmp_path / "out").reshape(7, 20, -1) / 127.5 - 1
    found = np.arctanh(np.clip(images, -0.99, 0.99))
    found /= np.linalg.norm(found, axis=-1, keepdims=True)
    cosines = np.einsum("pid,qd->piq", found, units)
    assert (cosines.argmax(axis=-1) == np.arange(7)[:, None]).mean() > 0.95
    assert found.std(axis=1).min() > 0.01


def test_jpeg_files_are_a_choice(tmp_path):
    generate(tmp_path / "out", dataclasses.replace(PLAN, suffix="jpg"))
    names = sorted(p.name for p in (tmp_path / "out" / "000002").iterdir())
    assert names == [f"{i:03d}.jpg" for i in range(5)]
    assert (tmp_path / "out" / "000002" / "000.jpg").read_bytes()[:2] == b"\xff\xd8"


def test_a_second_call_changes_nothing_and_another_plan_is_refused(tmp_path):
    generate(tmp_path)
    before = files(tmp_path)
    generate(tmp_path)
    assert files(tmp_path) == before
    with pytest.raises(ValueError, match="holds another data set"):
        generate(tmp_path, dataclasses.replace(PLAN, seed=9))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        generate(tmp_path / "other")


def test_attributes_move_the_vectors(tmp_path):
    bright = Attribute(lambda images: jnp.abs(0.2 - images.mean(axis=(1, 2, 3))), 0.1)
    generate(tmp_path / "plain")
    generate(tmp_path / "bright", attributes=(bright,))
    plain, moved = (
        np.abs(images_of(tmp_path / name).reshape(7, -1).mean(axis=1) / 127.5 - 1.2).mean()
        for name in ("plain", "bright")
    )
    assert moved < plain


def test_the_card_tells_that_all_is_synthetic_and_how_near_known_people_are(tmp_path):
    assert generate(tmp_path / "alone") is None
    card = (tmp_path / "alone" / "README.md").read_text()
    assert "All faces here are synthetic" in card and "identity\nleakage" in card
    assert "not compared to any" in card and "| model | stub |" in card and "| seed | 3 |" in card
    vectors = load_file(tmp_path / "alone" / dataset.IDENTITIES)["vectors"]
    # A person of the training data comes out again.
    written = open_source(f"folder:{tmp_path / 'alone'}")
    nearest = dataset.nearest_known(Stub(), VARIABLES, written, PLAN, vectors[2:3])
    assert nearest > 0.95
    assert dataset.nearest_known(Stub(), VARIABLES, written, PLAN, -vectors[2:3]) < 0.9
    known = np.random.default_rng(0).normal(size=(30, SIZE))
    told = generate(tmp_path / "checked", known=known)
    assert f"is {told:.3f}" in (tmp_path / "checked" / "README.md").read_text()


def test_mean_vectors_leave_out_rows_that_are_no_examples():
    images = np.full((4, 2, 2, 3), 128, np.uint8)
    images[1], images[2] = 200, 10
    valid = np.array([True, True, True, False])
    batch = dict(image=images, label=np.array([5, 5, 1, 1]), valid=valid)
    means = mean_vectors(Stub(), VARIABLES, [batch])
    expected = Stub().face_features(VARIABLES, images / 127.5 - 1)
    np.testing.assert_allclose(means[0], expected[2], rtol=1e-5)
    np.testing.assert_allclose(means[1], (expected[0] + expected[1]) / 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(identities=0), "identities must be at least 1"),
        (dict(images_per_identity=0), "images_per_identity must be at least 1"),
        (dict(format="zip"), "format is 'zip'; known are folder, array_record"),
        (dict(shares=(0.5, 0.1, 0.1)), "add up to 1"),
    ],
)
def test_a_bad_plan_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        generate(tmp_path / "out", dataclasses.replace(PLAN, **changes))


def test_a_method_that_cannot_generate_is_refused(tmp_path):
    with pytest.raises(ValueError, match="object cannot generate images"):
        generate_dataset(object(), VARIABLES, tmp_path / "out", PLAN)
    assert not (tmp_path / "out").exists()


KILLED = Plan(identities=600, images_per_identity=6, seed=1, threshold=0.95)


def started(folder, kind):
    code = (
        "import pathlib, dataclasses\n"
        "from mim_jax.generation.dataset import generate_dataset\n"
        "from tests.generation.stub import SIZE, VARIABLES, Stub\n"
        "from tests.generation.test_dataset import KILLED\n"
        f"plan = dataclasses.replace(KILLED, format={kind!r})\n"
        f"generate_dataset(Stub(), VARIABLES, pathlib.Path({str(folder)!r}), plan, size=SIZE)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment)


def test_kills_neither_double_nor_lose_an_image(tmp_path):
    generate(tmp_path / "whole", KILLED)
    killed = tmp_path / "killed"
    for goal in (1, 300):
        process = started(killed, "folder")
        deadline = time.monotonic() + 120
        while process.poll() is None and len(list(killed.glob("0*"))) < goal:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(list(killed.glob("0*"))) < KILLED.identities, "it finished before the kill"
        for person in killed.glob("0*"):
            assert len(list(person.iterdir())) == 6
    assert started(killed, "folder").wait() == 0
    assert files(killed) == files(tmp_path / "whole")
    assert not [p for p in killed.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("kind", ["folder", "array_record"])
def test_what_was_stopped_by_an_error_goes_on_to_the_same_result(tmp_path, monkeypatch, kind):
    plan = dataclasses.replace(PLAN, format=kind)
    generate(tmp_path / "whole", plan)
    images_of = dataset.GeneratedFaces.images_of

    def stops(people, identity):
        if identity == 4:
            raise KeyboardInterrupt
        return images_of(people, identity)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(dataset.GeneratedFaces, "images_of", stops)
        generate(tmp_path / "stopped", plan)
    assert not (tmp_path / "stopped" / dataset.CARD).exists()
    generate(tmp_path / "stopped", plan)
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
