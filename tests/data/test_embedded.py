import importlib.resources

import numpy as np
import pytest

from mim_jax.data import make_embedded
from mim_jax.data.embedded import file_names, read_embedded
from mim_jax.data.fashion_mnist import fashion_mnist_folder, read_fashion_mnist

ASSETS = importlib.resources.files("mim_jax.data") / "assets"
needs_full_set = pytest.mark.skipif(
    not (fashion_mnist_folder() / "train-images-idx3-ubyte.gz").is_file(),
    reason="the full Fashion-MNIST is not installed",
)


@pytest.mark.parametrize(("split", "per_class"), [("train", 400), ("test", 100)])
def test_classes_are_balanced_and_alternate(split: str, per_class: int) -> None:
    images, labels = read_embedded(split)
    assert images.shape == (10 * per_class, 28, 28, 1) and images.dtype == np.uint8
    assert labels.dtype == np.int32
    assert np.bincount(labels).tolist() == [per_class] * 10
    assert labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert images.min() == 0 and images.max() == 255


def test_no_image_comes_twice() -> None:
    images = np.concatenate(
        [read_embedded(split)[0].reshape(-1, 784) for split in ("train", "test")]
    )
    assert len({image.tobytes() for image in images}) == len(images)


def test_files_are_small_and_carry_their_licence() -> None:
    sizes = [len((ASSETS / n).read_bytes()) for s in ("train", "test") for n in file_names(s)]
    assert max(sizes) < 1_000_000 and sum(sizes) < 2_000_000
    licence = (ASSETS / "FASHION_MNIST_LICENSE.txt").read_text("utf-8")
    assert "The MIT License" in licence and "Zalando" in licence


@needs_full_set
@pytest.mark.parametrize("split", ["train", "test"])
def test_images_are_those_of_the_full_set(split: str) -> None:
    images, labels = read_embedded(split)
    full_images, full_labels = read_fashion_mnist(split)
    label_of = {
        image.tobytes(): label for image, label in zip(full_images, full_labels, strict=True)
    }
    assert [label_of[image.tobytes()] for image in images] == labels.tolist()


@needs_full_set
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_script_makes_the_same_images_again(split: str) -> None:
    images, _ = read_embedded(split)
    by_class = images[..., 0].reshape(-1, 10, 28, 28).swapaxes(0, 1)
    np.testing.assert_array_equal(make_embedded.chosen_images(split), by_class)


@needs_full_set
def test_the_script_makes_the_same_files_again() -> None:
    for name, content in make_embedded.files_of_split("test").items():
        assert content == (ASSETS / name).read_bytes()


def test_unknown_split_is_an_error() -> None:
    with pytest.raises(ValueError, match="has the splits 'train' and 'test', not 'all'"):
        read_embedded("all")
