import pathlib

import pytest

from mim_jax.data.shards import shard_paths


def touch(folder: pathlib.Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def names(pattern: pathlib.Path | str, split: str = "train") -> list[str]:
    paths = shard_paths(str(pattern), split, lambda name: name.endswith(".tar"), "tar")
    return [pathlib.Path(path).name for path in paths]


def test_a_file_is_its_own_only_shard(tmp_path: pathlib.Path) -> None:
    touch(tmp_path, "a.tar", "b.tar")
    assert names(tmp_path / "b.tar") == ["b.tar"]


def test_a_name_with_the_signs_of_a_pattern_may_be_a_file(tmp_path: pathlib.Path) -> None:
    touch(tmp_path, "a@2.tar", "b[1].tar")
    assert names(tmp_path / "a@2.tar") == ["a@2.tar"]
    assert names(tmp_path / "b[1].tar") == ["b[1].tar"]


def test_a_folder_gives_its_shards_by_name(tmp_path: pathlib.Path) -> None:
    touch(tmp_path, "b.tar", "a.tar", "notes.txt")
    assert names(tmp_path) == ["a.tar", "b.tar"]


def test_paths_are_absolute(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.tar")
    monkeypatch.chdir(tmp_path)
    paths = shard_paths("a.tar", "train", lambda name: True, "tar")
    assert paths == (str(tmp_path / "a.tar"),)


def test_braces_name_each_shard(tmp_path: pathlib.Path) -> None:
    touch(tmp_path, *(f"{kind}-{number:03d}.tar" for kind in "ab" for number in range(12)))
    assert names(tmp_path / "a-{009..011}.tar") == ["a-009.tar", "a-010.tar", "a-011.tar"]
    both = ["a-000.tar", "a-001.tar", "b-000.tar", "b-001.tar"]
    assert names(tmp_path / "{a,b}-{000..001}.tar") == both
    assert names(tmp_path / "{a,b}-00[01].tar") == both


def test_a_count_names_each_shard(tmp_path: pathlib.Path) -> None:
    shards = [f"x-{number:05d}-of-00003.tar" for number in range(3)]
    touch(tmp_path, *shards)
    assert names(tmp_path / "x@3.tar") == shards


def test_a_glob_finds_what_is_there_by_name(tmp_path: pathlib.Path) -> None:
    touch(tmp_path, "x-1.tar", "x-0.tar", "y.tar")
    assert names(tmp_path / "x-*.tar") == ["x-0.tar", "x-1.tar"]


@pytest.mark.parametrize("pattern", ["x-{000..003}.tar", "x-{000,001,002,003}.tar"])
def test_missing_shards_are_counted_and_the_first_is_named(
    tmp_path: pathlib.Path, pattern: str
) -> None:
    touch(tmp_path, "x-000.tar", "x-002.tar")
    with pytest.raises(
        FileNotFoundError, match=r"2 of 4 tar shards are missing, the first is .*x-001"
    ):
        names(tmp_path / pattern)


@pytest.mark.parametrize("pattern", ["", "x-*", "x@4.tar"])
def test_part_of_a_numbered_series_is_an_error(tmp_path: pathlib.Path, pattern: str) -> None:
    touch(tmp_path, *(f"x-{number:05d}-of-00004.tar" for number in (0, 1, 3)))
    with pytest.raises(FileNotFoundError, match=r"1 of 4 .*missing, the first is .*x-00002-of"):
        names(tmp_path / pattern)
    on_purpose = tmp_path / "x-{00000..00001}-of-00004.tar"
    assert len(names(on_purpose)) == 2


def test_a_glob_that_matches_nothing_is_an_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tar shard matches .*x-\*"):
        names(tmp_path / "x-*")


def test_a_missing_file_is_an_error_with_the_nearest_name(tmp_path: pathlib.Path) -> None:
    touch(tmp_path, "train.tar")
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*did you mean .*/train\.tar"):
        names(tmp_path / "trian.tar")
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        names(tmp_path / "nowhere" / "train.tar")


def test_a_folder_without_shards_says_what_it_holds(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="is empty"):
        names(tmp_path)
    touch(tmp_path, *(f"{letter}.txt" for letter in "abcdefghij"))
    with pytest.raises(FileNotFoundError, match=r"no tar shard; it holds a\.txt, .* and 2 more"):
        names(tmp_path)


@pytest.mark.parametrize("braces", ["{3..1}", "{a}", "{}", "{a..c}"])
def test_braces_that_are_not_understood_are_an_error(tmp_path: pathlib.Path, braces: str) -> None:
    with pytest.raises(ValueError, match=r"are not understood; write \{000\.\.127\}"):
        names(tmp_path / f"x-{braces}.tar")


def test_the_split_may_be_a_part_of_the_path(tmp_path: pathlib.Path) -> None:
    touch(tmp_path, "x-train-0.tar", "x-val-0.tar")
    assert names(tmp_path / "x-{split}-*.tar", "val") == ["x-val-0.tar"]


def test_the_split_may_be_a_sub_folder(tmp_path: pathlib.Path) -> None:
    touch(tmp_path / "val", "x.tar")
    assert names(tmp_path, "val") == ["x.tar"]


def test_shards_without_splits_are_the_split_train(tmp_path: pathlib.Path) -> None:
    touch(tmp_path, "x.tar")
    assert names(tmp_path, "train") == names(tmp_path, "all") == ["x.tar"]
    with pytest.raises(FileNotFoundError, match=r"has no split 'val'.*\{split\}.*'train\[90%:\]'"):
        names(tmp_path, "val")


def test_a_list_names_shards_of_several_folders_in_its_order(tmp_path: pathlib.Path) -> None:
    touch(tmp_path / "b", "x.tar", "y.tar")
    touch(tmp_path, "z.tar", *(f"s-{n:05d}-of-00002.tar" for n in range(2)))
    lines = ["# what to train on", "z.tar", "", "b/*.tar  ", "./s@2.tar", str(tmp_path / "b/x.tar")]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    shards = ["z.tar", "x.tar", "y.tar", "s-00000-of-00002.tar", "s-00001-of-00002.tar", "x.tar"]
    assert names(tmp_path / "train.txt") == shards
    assert names(tmp_path / "{split}.txt") == shards


def test_a_shard_that_a_list_names_in_vain_is_an_error_with_its_line(
    tmp_path: pathlib.Path,
) -> None:
    touch(tmp_path, "a.tar", "b.tar")
    (tmp_path / "train.txt").write_text("# two\na.tar\n\nc.tar\nb.tar\n")
    with pytest.raises(FileNotFoundError, match=r"train\.txt, line 4: there is no .*c\.tar"):
        names(tmp_path / "train.txt")
    (tmp_path / "train.txt").write_text("a.tar\nx{0.tar\n{b}.tar\n")
    with pytest.raises(FileNotFoundError, match=r"train\.txt, line 2: "):
        names(tmp_path / "train.txt")
    (tmp_path / "train.txt").write_text("a.tar\n{b}.tar\n")
    with pytest.raises(ValueError, match=r"train\.txt, line 2: the braces \{b\} are not"):
        names(tmp_path / "train.txt")


def test_an_empty_list_is_an_error(tmp_path: pathlib.Path) -> None:
    (tmp_path / "train.txt").write_text("# none yet\n")
    with pytest.raises(FileNotFoundError, match=r"train\.txt lists no tar shard; write one"):
        names(tmp_path / "train.txt")
