import importlib.util
import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from benchmarks import data_loading
from mim_jax.data import RandomResizedCrop


@pytest.fixture
def small_kinds(monkeypatch):
    monkeypatch.setattr(data_loading, "KINDS", {"web": (30, 40), "camera": (130, 160)})
    monkeypatch.setattr(data_loading, "SHORT_SIDE", 20)


@pytest.fixture
def same_cores_afterwards():
    if not hasattr(os, "sched_getaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, cores)


def test_main_measures_loaders_and_decoders_of_both_kinds(
    tmp_path, small_kinds, same_cores_afterwards
):
    path = tmp_path / "result.json"
    counts = ["--images", "4", "--camera-images", "3", "--batch-size", "2", "--rounds", "1"]
    data_loading.main([*counts, "--size", "16", "--output", str(path)])
    result = json.loads(path.read_text())
    for kind, files in (("web", 4), ("camera", 3)):
        figures = result[kind]
        assert figures["files"] == files and figures["kilobytes_per_file"] > 0
        assert figures["loaders"]["PyTorch way"]["speed over PyTorch way"] == 1
        assert figures["decoders"]["OpenCV"]["speed over OpenCV"] == 1
        for entry in (*figures["loaders"].values(), *figures["decoders"].values()):
            assert entry["images_per_second"] > 0
    assert result["machine"]["cores"] == 1


def test_files_are_the_same_in_every_run(tmp_path, small_kinds):
    for name in ("first", "second"):
        data_loading.write_images(tmp_path / name, "web", 2)
    for path in (tmp_path / "first").rglob("*.jpg"):
        twin = tmp_path / "second" / path.relative_to(tmp_path / "first")
        assert path.read_bytes() == twin.read_bytes()
    with Image.open(tmp_path / "first" / "small" / "00000.jpg") as image:
        assert image.size == (27, 20)


def test_all_loaders_give_images_of_the_same_size(tmp_path, small_kinds):
    data_loading.write_images(tmp_path, "web", 2)
    folder = tmp_path / "full"
    assert np.shape(next(data_loading.pytorch_way(folder, 16, 2)())) == (2, 3, 16, 16)
    integers = next(data_loading.ours(folder, 16, 2, "opencv")())["image"]
    assert integers.shape == (2, 16, 16, 3) and integers.dtype == np.uint8
    floats = next(data_loading.ours_float32(folder, 16, 2)())
    assert floats.shape == (2, 16, 16, 3) and floats.dtype == np.float32


@pytest.mark.parametrize("shape", [(40, 40), (100, 140), (300, 200)])
def test_decoders_see_the_same_part_of_an_image(shape):
    # Smooth, so that only a crop of another place could differ much.
    rows, columns = np.linspace(0, 255, shape[0]), np.linspace(0, 255, shape[1])
    image = np.stack(np.broadcast_arrays(rows[:, None], columns, 128.0), axis=-1)
    file = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(file, "JPEG", quality=95)
    for seed in range(4):
        crops = {
            name: decode(file.getvalue(), np.random.default_rng(seed)).astype(float)
            for name, decode in data_loading.decoders(16).items()
        }
        for name, crop in crops.items():
            assert np.abs(crop - crops["OpenCV"]).mean() < 4, name


@pytest.mark.parametrize(
    "box, factor", [((0, 0, 224, 900), 1), ((0, 0, 448, 500), 2), ((0, 0, 2000, 1800), 8)]
)
def test_scale_keeps_the_crop_as_large_as_the_result(box, factor):
    assert data_loading._factor(box, (224, 224)) == factor


def test_the_pytorch_way_works_without_torch(tmp_path, small_kinds, monkeypatch):
    data_loading.write_images(tmp_path, "web", 3)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    batches = list(data_loading.pytorch_way(tmp_path / "full", 16, 2)())
    assert [np.shape(batch) for batch in batches] == [(2, 3, 16, 16)]


def test_the_pillow_dataset_gives_the_pixels_of_our_pillow_crop(tmp_path, small_kinds):
    data_loading.write_images(tmp_path, "web", 1)
    dataset = data_loading.PillowDataset(tmp_path / "full", 16)
    ours = RandomResizedCrop((16, 16), backend="pillow")
    random = np.random.default_rng(0)
    pixels = ours(np.asarray(Image.open(dataset.paths[0])), random)
    if random.random() < 0.5:
        pixels = pixels[:, ::-1]
    expected = (pixels / np.float32(255) - data_loading.MEAN) / data_loading.STD
    np.testing.assert_allclose(dataset[0], expected.transpose(2, 0, 1), rtol=1e-5, atol=1e-6)
