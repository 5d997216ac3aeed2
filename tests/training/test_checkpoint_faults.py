"""Checkpoints that are damaged, and disks that are full."""

import os
import shutil
import subprocess
import time

import numpy as np
import pytest

from mim_jax.training.checkpoints import DAMAGED, FOLDER, SaveFailed, read_variables
from mim_jax.training.tree import flatten
from tests.training.runs import losses_of, run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run of six steps, with checkpoints of the steps 3 and 6."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    return folder


def values_of(folder, step):
    """The largest file of a checkpoint's variables: it holds their values."""
    files = (folder / FOLDER / str(step) / "variables").rglob("*")
    return max(files, key=lambda file: file.stat().st_size if file.is_file() else 0)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def remove(path):
    path.unlink()


def assert_same_end(folder, whole):
    assert losses_of(folder) == losses_of(whole)
    expected = flatten(read_variables(whole)[0])
    for path, value in flatten(read_variables(folder)[0]).items():
        np.testing.assert_array_equal(value, expected[path], path)


@pytest.mark.parametrize("harm", [flip, cut, remove])
def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_it_goes_on(copy, whole, harm):
    harm(values_of(copy, 6))
    with pytest.raises(ValueError, match=r"step 6 .*is damaged.*Others are of steps \[3\]"):
        read_variables(copy)
    _, output = run(copy)
    assert "the checkpoint of step 6 is damaged" in output and "resumed from step 3 of 6" in output
    assert sorted(path.name for path in (copy / DAMAGED).iterdir()) == ["6"]
    assert_same_end(copy, whole)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(copy):
    for step in (3, 6):
        remove(values_of(copy, step))
    with pytest.raises(ValueError, match=r"all checkpoints of .* are damaged, steps \[6, 3\]"):
        run(copy)
    assert sorted(path.name for path in (copy / DAMAGED).iterdir()) == ["3", "6"]


def test_without_checksums_there_are_none(tmp_path):
    run(tmp_path, **{"checkpoint.checksums": False, "steps": 3})
    assert not list((tmp_path / FOLDER).rglob("checksums*"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a size that holds one tiny checkpoint and no second."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and os.geteuid() == 0
    if not mounted or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root and its permission")
    yield folder
    for _ in range(50):
        if not subprocess.run(["umount", str(folder)], capture_output=True).returncode:
            return
        time.sleep(0.1)


def test_training_goes_on_while_the_disk_is_full_and_saves_when_it_is_not(small_disk, whole):
    ballast = small_disk / "ballast"
    space = shutil.disk_usage(small_disk).free

    def on_step(step):
        if step == 1:
            ballast.write_bytes(bytes(space - 2**17))
        if step == 5:
            ballast.unlink()

    _, output = run(small_disk / "run", on_step=on_step, **{"checkpoint.asynchronous": False})
    assert "the checkpoint of step 3 could not be written" in output
    assert "none is saved yet" in output and "Training goes on" in output
    assert os.listdir(small_disk / "run" / FOLDER) == ["6"]
    assert_same_end(small_disk / "run", whole)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_at_the_end_is_an_error_that_names_the_last_checkpoint(
    small_disk, asynchronous
):
    space = shutil.disk_usage(small_disk).free

    def on_step(step):
        if step == 5:
            (small_disk / "ballast").write_bytes(bytes(space - 600 * 2**10))

    with pytest.raises(SaveFailed, match=r"step 6 could not be written.*last one saved is step 3"):
        run(small_disk / "run", on_step=on_step, **{"checkpoint.asynchronous": asynchronous})
    read_variables(small_disk / "run", 3)
