import shutil

import pytest

from mim_jax.training.checksums import damage, seal


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "x" / "deep").mkdir(parents=True)
    for number in range(5):
        (tmp_path / "x" / "deep" / f"{number}.bin").write_bytes(bytes(range(100 + number)))
    return tmp_path / "x"


def test_whole_files_have_no_damage_whoever_sealed_and_looks(folder):
    for part in range(3):
        seal(folder, part, 3)
    assert [damage(folder, part, 2) for part in range(2)] == [[], []]
    assert damage(folder) == []


def test_a_folder_that_was_never_sealed_has_no_known_damage(folder):
    assert damage(folder) == []


def test_every_kind_of_damage_is_named(folder):
    seal(folder)
    kept = folder.parent / "kept"
    shutil.copytree(folder, kept)
    (folder / "deep" / "1.bin").unlink()
    assert damage(folder) == ["deep/1.bin is missing"]
    (folder / "deep" / "2.bin").write_bytes(b"short")
    assert damage(folder)[1] == "deep/2.bin has 5 bytes instead of 102"
    (kept / "deep" / "3.bin").write_bytes(bytes(103))
    assert damage(kept) == ["deep/3.bin has other bytes than were written"]
    # One of two looks at this file's bytes.
    assert sorted(len(damage(kept, part, 2)) for part in range(2)) == [0, 1]
    (kept / "checksums.0.json").write_text("[")
    assert damage(kept)[0].startswith("checksums.0.json is no list of checksums")
