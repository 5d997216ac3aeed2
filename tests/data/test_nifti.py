"""NIfTI scans: orientation, spacing, window, parts, folders, and files that cannot be used."""

import gzip
import itertools
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from nibabel.testing import data_path
from scipy import ndimage

from mim_jax.data import open_source, train_batches
from mim_jax.data.nifti import NiftiOptions, NiftiVolume, unpacked
from mim_jax.data.samples import UnreadableImage
from mim_jax.data.volumes import VolumeCrops

KEEP = NiftiOptions(spacing=(0, 0, 0), window=(0, 65535))
WHOLE = (slice(None),) * 3


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIM_JAX_VOLUME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path, array, affine=None, code=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, np.eye(4))
    image.set_qform(np.eye(4), 0)
    image.set_sform(np.eye(4) if affine is None else affine, code)
    nib.save(image, path)
    return path


def read_all(volume):
    return volume.read(tuple(slice(0, side) for side in volume.shape))


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3)))[::2])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1)])
def test_axes_run_to_the_right_to_the_front_and_up(tmp_path, axes, signs):
    array = np.random.default_rng(0).integers(0, 60000, (5, 6, 7), dtype=np.uint16)
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[list(axes)] * signs
    volume = NiftiVolume(write(tmp_path / "a.nii", array, affine), KEEP)
    theirs = nib.as_closest_canonical(nib.load(tmp_path / "a.nii")).get_fdata()
    np.testing.assert_array_equal(read_all(volume), theirs)
    box = (slice(1, 3), slice(2, 5), slice(0, 4))
    np.testing.assert_array_equal(volume.read(box), theirs[box])
    points = np.array([[0, 0, 0], [1, 3, 4], [4, 2, 1]])
    np.testing.assert_array_equal(volume.at(points), theirs[tuple(points.T)])


def test_samples_are_interpolated_to_the_spacing_and_windowed(tmp_path):
    array = np.random.default_rng(0).normal(0, 300, (9, 10, 8)).astype(np.float32)
    path = write(tmp_path / "a.nii", array, np.diag([2.0, 1.0, 3.0, 1.0]))
    volume = NiftiVolume(path, NiftiOptions())
    assert volume.shape == (round(8 * 2 / 1.5) + 1, round(9 / 1.5) + 1, round(7 * 3 / 1.5) + 1)
    assert volume.spacing == pytest.approx((1.5, 1.5, 1.5))
    steps = np.array([0.75, 1.5, 0.5])
    places = np.meshgrid(*(np.arange(n) * s for n, s in zip(volume.shape, steps)), indexing="ij")
    between = ndimage.map_coordinates(array, places, order=1, mode="nearest")
    expected = np.clip((between + 175) / 425, 0, 1) * 65535
    np.testing.assert_allclose(read_all(volume), expected, atol=1.5)
    box = (slice(2, 9), slice(3, 5), slice(1, 12))
    np.testing.assert_array_equal(volume.read(box), read_all(volume)[box])


def test_classes_are_those_of_the_closest_voxel(tmp_path):
    array = np.random.default_rng(0).integers(0, 14, (6, 6, 6), dtype=np.uint8)
    path = write(tmp_path / "a.nii.gz", array, np.diag([2.0, 2.0, 2.0, 1.0]))
    volume = NiftiVolume(path, NiftiOptions(), classes=True)
    nearest = np.rint(np.minimum(np.arange(volume.shape[0]) * 0.75, 5)).astype(int)
    np.testing.assert_array_equal(read_all(volume), array[np.ix_(nearest, nearest, nearest)])


def test_a_crop_of_a_large_scan_takes_no_more_memory_than_itself(tmp_path):
    array = np.random.default_rng(0).integers(-200, 300, (160, 160, 120), dtype=np.int16)
    write(tmp_path / "scans" / "a.nii.gz", array, np.diag([1.0, 1.0, 2.0, 1.0]))
    source = open_source(f"nifti:{tmp_path / 'scans'}")  # unpacks
    crops = VolumeCrops((32, 32, 32), views=2)
    crops(source[0], np.random.default_rng(0))
    tracemalloc.start()
    crops(source[0], np.random.default_rng(1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.3 * array.nbytes, f"{peak} bytes for crops of {32**3 * 4}"


def test_a_compressed_file_is_unpacked_once_and_again_when_it_changes(tmp_path, cache):
    path = write(tmp_path / "a.nii.gz", np.ones((4, 4, 4), np.int16))
    first = unpacked(path)
    assert unpacked(path) == first and [first] == list(cache.iterdir())
    assert first.read_bytes() == gzip.decompress(path.read_bytes())
    write(path, np.ones((4, 4, 5), np.int16))
    assert unpacked(path) != first


def test_without_a_cache_compressed_files_give_the_same(tmp_path, monkeypatch):
    array = np.random.default_rng(0).integers(0, 60000, (5, 6, 7), dtype=np.uint16)
    path = write(tmp_path / "a.nii.gz", array)
    monkeypatch.setenv("MIM_JAX_VOLUME_CACHE", "")
    np.testing.assert_array_equal(read_all(NiftiVolume(path, KEEP)), array)
    assert NiftiVolume(path, KEEP).at(np.array([[1, 2, 3]])) == array[1, 2, 3]


def test_a_real_scan_of_nibabel_gives_crops():
    path = data_path / "anatomical.nii"
    volume = NiftiVolume(path, NiftiOptions(spacing=(3, 3, 3), window=(0, 20000)))
    theirs = nib.as_closest_canonical(nib.load(path))
    assert volume.spacing == pytest.approx((3, 3, 3))
    ratios = np.array(nib.affines.voxel_sizes(theirs.affine)) / 3
    expected = ndimage.map_coordinates(
        theirs.get_fdata(),
        np.meshgrid(*(np.arange(n) / r for n, r in zip(volume.shape, ratios)), indexing="ij"),
        order=1,
        mode="nearest",
    )
    expected = np.clip(expected / 20000, 0, 1) * 65535
    np.testing.assert_allclose(read_all(volume), expected, atol=1.5)
    given = VolumeCrops((16, 16, 16))({"image": volume}, np.random.default_rng(0))["image"]
    assert given.shape == (8, 16, 16, 16, 1) and given.std() > 0


def test_a_series_is_refused_and_one_volume_of_it_is_not(tmp_path):
    with pytest.raises(UnreadableImage, match=r"example4d.nii.gz: it has 4 axes, .* three"):
        NiftiVolume(data_path / "example4d.nii.gz")
    path = write(tmp_path / "a.nii", np.ones((4, 5, 6, 1), np.int16))
    volume = NiftiVolume(path, KEEP)
    assert read_all(volume).shape == volume.shape == (4, 5, 6)
    assert volume.at(np.array([[1, 1, 1]])) == 1


def test_a_file_without_affine_is_refused_unless_its_axes_are_vouched_for(tmp_path):
    path = write(tmp_path / "a.nii", np.ones((4, 5, 6), np.int16), code=0)
    with pytest.raises(UnreadableImage, match=r"a.nii: it has no affine .* add assume_ras=1"):
        NiftiVolume(path)
    assert NiftiVolume(path, NiftiOptions(assume_ras=True, spacing=(0, 0, 0))).shape == (4, 5, 6)
    with pytest.raises(UnreadableImage, match="singular"):
        NiftiVolume(
            write(tmp_path / "b.nii", np.ones((4, 5, 6), np.int16), np.diag([1.0, 1.0, 0.0, 1.0]))
        )


def test_segmentations_lie_beside_scans_or_as_nnunet_has_them(tmp_path):
    array = np.ones((4, 4, 4), np.uint8)
    write(tmp_path / "own" / "train" / "a.nii", array)
    write(tmp_path / "own" / "test" / "b.nii", array)
    write(tmp_path / "own" / "segmentation" / "train" / "a.nii.gz", array)
    source = open_source(f"nifti:{tmp_path / 'own'}")
    assert source[0]["segmentation"].at(np.array([[0, 0, 0]])) == 1
    assert "segmentation" not in open_source(f"nifti:{tmp_path / 'own'}", "test")[0]
    write(tmp_path / "flat" / "sub" / "a.nii", array)
    write(tmp_path / "flat" / "segmentation" / "sub" / "a.nii", array)
    flat = open_source(f"nifti:{tmp_path / 'flat'}")
    assert len(flat) == 1 and "segmentation" in flat[0]
    with pytest.raises(FileNotFoundError, match=r"no sub-folder for the split 'test'"):
        open_source(f"nifti:{tmp_path / 'flat'}", "test")
    write(tmp_path / "nn" / "imagesTr" / "c_0000.nii.gz", array)
    write(tmp_path / "nn" / "labelsTr" / "c.nii.gz", array)
    assert "segmentation" in open_source(f"nifti:{tmp_path / 'nn'}")[0]
    write(tmp_path / "nn" / "imagesTr" / "d_0000.nii.gz", array)
    with pytest.raises(ValueError, match=r"1 of 2 volumes have no segmentation .* d_0000"):
        open_source(f"nifti:{tmp_path / 'nn'}")
    without = open_source(f"nifti:{tmp_path / 'nn'}?exclude=d_0&spacing=2,2,2&window=0,9")
    assert len(without) == 1 and without[0]["image"].spacing == (2, 2, 2)


def test_a_truncated_scan_is_replaced_in_training(tmp_path):
    array = np.random.default_rng(0).integers(0, 200, (8, 8, 8), dtype=np.int16)
    for name in "abcd":
        write(tmp_path / f"{name}.nii.gz", array)
    packed = (tmp_path / "b.nii.gz").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(packed[: len(packed) // 2])
    source = open_source(f"nifti:{tmp_path}")
    crops = VolumeCrops((4, 4, 4), views=2)
    batch = next(train_batches(source, crops, batch_size=8, seed=0, num_steps=1))
    assert batch["unreadable"].sum() == 2 and batch["image"].std() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("spacing=1", "must be three numbers"),
        ("window=3,1", "the smaller first"),
        ("window=low,high", "window=low,high of nifti: is not understood"),
        ("colour=1", "unknown option 'colour' of nifti:; known are spacing, window, exclude"),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        open_source(f"nifti:{tmp_path}?{options}")


def test_fractions_are_no_classes(tmp_path):
    path = write(tmp_path / "a.nii", np.full((4, 4, 4), 0.5, np.float32))
    with pytest.raises(UnreadableImage, match=r"a.nii: a segmentation holds whole numbers"):
        read_all(NiftiVolume(path, KEEP, classes=True))
