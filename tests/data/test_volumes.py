"""Volumes: crops and centres, and where a crop's centre comes from."""

import pickle

import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.data import open_source, train_batches
from mim_jax.data.volumes import (
    ArrayVolume,
    VolumeCentre,
    VolumeCrops,
    drawn_voxel,
    volume_centre,
    volume_crops,
)

PLAIN = dict(flip=0.0, rotate=0.0, scale_probability=0.0, shift_probability=0.0)


def numbered(shape=(10, 9, 8)) -> ArrayVolume:
    """Every voxel has a number of its own, from 1 on."""
    return ArrayVolume(np.arange(1, np.prod(shape) + 1, dtype=np.uint16).reshape(shape))


def test_every_crop_is_a_part_of_the_volume_around_its_centre():
    volume = numbered()
    crops = VolumeCrops((4, 4, 4), views=20, foreground=1.0, **PLAIN)
    given = crops({"image": volume}, np.random.default_rng(0))["image"]
    assert given.shape == (20, 4, 4, 4, 1) and given.dtype == np.uint16
    starts = set()
    for crop in given[..., 0]:
        (start,) = np.argwhere(volume.voxels == crop[0, 0, 0])
        box = tuple(slice(a, a + 4) for a in start)
        np.testing.assert_array_equal(crop, volume.voxels[box])
        starts.add(tuple(start))
    assert len(starts) > 10


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_centres_are_in_the_foreground_as_often_as_asked(share):
    voxels = np.zeros((20, 20, 20), np.uint16)
    voxels[2:4, 2:4, 2:4] = 9  # one voxel in a thousand
    crops = VolumeCrops((1, 1, 1), views=400, foreground=share, **PLAIN)
    given = crops({"image": ArrayVolume(voxels)}, np.random.default_rng(0))["image"]
    assert abs(np.mean(given > 0) - share) < 0.07


def test_voxels_of_the_foreground_are_drawn_equally_often():
    voxels = np.zeros((6, 6, 6), np.uint8)
    voxels[0, 0, :3] = 1
    rng = np.random.default_rng(0)
    depths = [drawn_voxel(ArrayVolume(voxels), True, rng)[2] for _ in range(600)]
    np.testing.assert_allclose(np.bincount(depths), [200, 200, 200], atol=45)
    everything = ArrayVolume(np.ones((3, 3, 3), np.uint8))
    assert np.all(drawn_voxel(everything, False, rng) < 3), "where there is none, any voxel"


def test_classes_are_cut_flipped_and_turned_with_their_image():
    volume = numbered((8, 8, 8))
    classes = ArrayVolume((volume.voxels % 200).astype(np.uint8))
    crops = VolumeCrops((5, 5, 4), views=30, centre="segmentation", flip=0.5, rotate=0.5,
                        scale_probability=0.0, shift_probability=0.0)  # fmt: skip
    given = crops({"image": volume, "segmentation": classes}, np.random.default_rng(1))
    np.testing.assert_array_equal(given["image"][..., 0] % 200, given["segmentation"])
    assert given["segmentation"].dtype == np.uint8
    # Along the first axis, numbers grow or fall by 64, or by 8 in crops that were turned.
    image = given["image"][..., 0].astype(int)
    assert set(image[:, 1, 0, 0] - image[:, 0, 0, 0]) == {-64, -8, 8, 64}


def test_samples_are_scaled_and_shifted_within_bounds():
    half = ArrayVolume(np.full((4, 4, 4), 30000, np.uint16))
    crops = VolumeCrops((4, 4, 4), views=200, foreground=1.0, **{**PLAIN, "scale_probability": 1.0})
    values = crops({"image": half}, np.random.default_rng(0))["image"][:, 0, 0, 0, 0] / 30000
    assert 0.9 <= values.min() < 0.92 and 1.08 < values.max() <= 1.1
    crops = VolumeCrops((4, 4, 4), views=200, foreground=1.0, **{**PLAIN, "shift_probability": 1.0})
    values = crops({"image": half}, np.random.default_rng(0))["image"][:, 0, 0, 0, 0] - 30000.0
    assert -6554 <= values.min() < -6000 and 6000 < values.max() <= 6554


def test_a_small_volume_is_filled_up_with_zeros():
    volume = numbered((3, 9, 2))
    given = VolumeCentre((5, 5, 4))({"image": volume})["image"][..., 0]
    np.testing.assert_array_equal(given[:3, :, :2], volume.voxels[:, 2:7])
    assert not given[3:].any() and not given[:, :, 2:].any()


def test_crops_of_a_volume_lie_together_in_a_batch_and_repeat_themselves():
    source = open_source("synthetic:abdomens")
    crops = VolumeCrops((12, 12, 12), views=4)
    first, again = (
        next(train_batches(source, crops, batch_size=8, seed=3, num_steps=1, threads=threads))
        for threads in (1, 3)
    )
    assert first["image"].shape == (8, 12, 12, 12, 1)
    assert first["index"].tolist() == [first["index"][0]] * 4 + [first["index"][4]] * 4
    assert np.any(first["image"][0] != first["image"][1])
    np.testing.assert_array_equal(first["image"], again["image"])


def test_the_config_describes_crops_and_centre():
    config = configs.load("unetr:tiny", {"data.volume.centre": "segmentation"})
    assert volume_crops(config.data).size == (24, 24, 24)
    example = open_source("synthetic:abdomens", "test")[0]
    assert set(volume_centre(config.data)(example)) == {"image", "segmentation"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(size=(4, 4)), r"data.image_size is \(4, 4\); for volumes give height, width and"),
        (dict(size=(4, 6, 4)), r"set data.volume.rotate to 0"),
        (dict(views=0), "data.volume.views is 0"),
        (dict(flip=2.0), "data.volume.flip is 2.0; it is a probability"),
        (dict(centre="organ"), "data.volume.centre is 'organ'; known are image, segmentation"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        VolumeCrops(**{"size": (4, 4, 4), **settings})


def test_a_missing_or_unlike_segmentation_is_named():
    crops = VolumeCrops((2, 2, 2), centre="segmentation")
    with pytest.raises(ValueError, match=r"a.nii has no segmentation"):
        crops({"image": numbered(), "name": "a.nii"}, np.random.default_rng(0))
    example = {"image": numbered(), "segmentation": numbered((2, 2, 2)), "name": "a.nii"}
    with pytest.raises(ValueError, match=r"segmentation of a.nii has \(2, 2, 2\) voxels"):
        crops(example, np.random.default_rng(0))


def test_abdomens_have_four_organs_two_of_which_look_alike():
    source = pickle.loads(pickle.dumps(open_source("synthetic:abdomens", "test")))
    assert len(source) == 72 and len(open_source("synthetic:abdomens", "train[:64]")) == 64
    greys = []
    for index in range(12):
        example = source[index]
        voxels, classes = (example[name].voxels for name in ("image", "segmentation"))
        assert voxels.shape == (24, 24, 24) and voxels.dtype == np.uint16
        assert set(np.unique(classes)) == {0, 1, 2, 3, 4}
        greys.append([voxels[classes == organ].mean() / 65535 for organ in range(1, 5)])
        np.testing.assert_array_equal(voxels, source[index]["image"].voxels)
    np.testing.assert_allclose(np.mean(greys, 0), [0.5, 0.6, 0.6, 0.8], atol=0.04)
    with pytest.raises(ValueError, match="a side of at least 12 voxels"):
        open_source("synthetic:abdomens:tall")
