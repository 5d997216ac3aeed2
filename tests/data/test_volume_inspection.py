import pathlib

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mim_jax.cli import main
from mim_jax.data import open_source
from mim_jax.data.volume_inspection import (
    inspect_volumes,
    middle_planes,
    volume_facts_table,
    volume_sheet,
)
from mim_jax.data.volumes import ArrayVolume

nib = pytest.importorskip("nibabel")


class Few:
    """Volumes of two sizes; one half of the voxels is 0, the other 65535."""

    name = "few"
    kind = "volume"
    num_classes = None
    class_names = None

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, ArrayVolume]:
        voxels = np.zeros((4 + 2 * index, 6, 8), np.uint16)
        voxels[:, :3] = 65535
        return {"image": ArrayVolume(voxels), "segmentation": ArrayVolume(np.uint8(voxels > 0))}


def test_facts_are_those_of_the_voxels() -> None:
    facts = inspect_volumes(Few())
    assert (facts.count, facts.sampled, facts.unreadable) == (2, 2, ())
    assert facts.sizes == ((4, 5, 6), (6, 6, 6), (8, 8, 8))
    assert facts.spacings is None
    # A sample of 8,192 voxels: four standard errors are 0.022.
    np.testing.assert_allclose((facts.mean, facts.std), 0.5, atol=0.022)
    np.testing.assert_allclose(facts.at_ends, 0.5, atol=0.022)
    assert facts.class_shares == pytest.approx((facts.at_ends[0], facts.at_ends[1]))


def test_a_broken_scan_is_named_and_spacings_are_told(tmp_path: pathlib.Path) -> None:
    for number in range(3):
        scan = nib.Nifti1Image(np.full((4, 5, 6), 100, np.int16), np.diag([2, 2, 3, 1]))
        nib.save(scan, tmp_path / f"{number}.nii")
    (tmp_path / "2.nii").write_bytes(b"broken")
    source = open_source(f"nifti:{tmp_path}?spacing=0,0,0", "train")
    facts = inspect_volumes(source)
    assert facts.sampled == 2 and facts.class_shares is None
    assert facts.spacings == ((2.0, 2.0, 2.0), (2.0, 2.0, 2.0), (3.0, 3.0, 3.0))
    (reason,) = facts.unreadable
    assert str(tmp_path / "2.nii") in reason
    console = Console(width=160)
    with console.capture() as capture:
        console.print(volume_facts_table(facts))
    assert reason[:60] in capture.get() and "2 / 2 / 2" in capture.get()


def test_planes_have_front_and_head_at_the_top() -> None:
    voxels = np.zeros((3, 5, 7), np.uint16)
    voxels[1, 4, 3], voxels[1, 2, 6] = 1, 2
    planes = middle_planes(ArrayVolume(voxels))
    assert {name: plane.shape for name, plane in planes.items()} == {
        "axial": (5, 3),
        "coronal": (7, 3),
        "sagittal": (7, 5),
    }
    assert planes["axial"][0, 1] == 1
    assert planes["coronal"][0, 1] == 2
    assert planes["sagittal"][3, 4] == 1 and planes["sagittal"][0, 2] == 2


def test_the_command_prints_facts_and_draws_planes(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.png"
    source = "synthetic:abdomens"
    assert main(["data", "inspect", f"--source={source}", f"--output={sheet}", "--sample=4"]) == 0
    shown = capsys.readouterr().out
    assert "24 / 24 / 24" in shown and "share of the voxels of each class" in shown
    np.testing.assert_array_equal(Image.open(sheet), volume_sheet(open_source(source, "train")))
