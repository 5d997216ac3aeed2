"""The files of a sharded data set: from a folder, a glob, braces, `name@8`, or a list of them."""

import difflib
import fnmatch
import functools
import glob
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from mim_jax import object_store

LIST_SUFFIX = ".txt"
"""Of a file that lists shards."""

WHOLE = ("train", "all")
"""What the split of a data set is called that is not parted into splits."""

_THREADS_LOOKING = 16  # a network disk answers one question in a millisecond
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_COUNT = re.compile(r"@(\d+)(?=\.|$)")
_NUMBERED = re.compile(r"(?P<head>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<tail>.*)")
_GLOB_CHARACTERS = re.compile(r"[*?\[]")


def shard_paths(
    pattern: str, split: str, is_shard: Callable[[str], bool], kind: str
) -> tuple[str, ...]:
    """Return the absolute paths of the shards of a split, in the order of the pattern.

    A pattern is a file; a folder, whose shards are taken in the order of their names; or a path
    with any of

    - `{000..127}` and `{a,b}`: each of these, all of which must be there;
    - `name@8`: `name-00000-of-00008` to `name-00007-of-00008`, likewise;
    - `*`, `?`, `[abc]`: what is there, in the order of the names;
    - `{split}`: the split that is asked for.

    A file `*.txt` lists shards, one such path a line, relative to the folder of the list or
    absolute, and in the order of the lines; empty lines and those that begin with `#` are passed
    over. The list and its shards are files of this machine.

    A pattern may begin with `gs://` or `s3://`, and then has `*`, `?` and `[abc]` in its last part
    only.

    Without `{split}`, the split is the sub-folder of that name. If there is none, all shards
    together are the split `train` (or `all`).

    A folder or a glob that finds only a part of the shards numbered `00000-of-00008` and so on is
    an error; to read a part on purpose, name it by braces.

    Args:
        pattern: see above.
        split: a split name without slice.
        is_shard: says of the name of a file in a folder whether it is a shard.
        kind: of the shards, for messages: `ArrayRecord` or `tar`.

    Raises:
        FileNotFoundError: no shard, some shards missing, or no such split; of a list, it names the
            line.
        ValueError: braces that are not understood.
    """
    parted = "{split}" in pattern
    url = object_store.object_url(pattern.replace("{split}", split))
    path = pathlib.Path(pattern.replace("{split}", split)).expanduser()
    if url:
        found, parted = _remote(url, None if parted else split, is_shard, kind)
    elif path.is_dir():
        if not parted and (path / split).is_dir():
            path, parted = path / split, True
        found = sorted(str(path / name) for name in os.listdir(path) if is_shard(name))
        if not found:
            raise FileNotFoundError(_empty_folder_message(path, kind))
        _check_whole(found)
    elif path.suffix == LIST_SUFFIX and path.is_file():
        found = _listed(path, kind)
    else:
        found = _matching(str(path), kind)
    if not parted and split not in WHOLE:
        raise FileNotFoundError(
            f"{pattern} has no split {split!r}: its shards are one whole, called 'train'. Put the "
            "shards of each split into a sub-folder of its name, write {split} into the path, or "
            "take slices: 'train[:90%]' for training and 'train[90%:]' for the rest"
        )
    return tuple(name if url else os.path.abspath(name) for name in found)


def _listed(file: pathlib.Path, kind: str) -> list[str]:
    """Return the shards that the lines of a file name.

    Raises:
        FileNotFoundError: a line that names no shard, or no such line at all.
        ValueError: braces that are not understood.
    """
    lines = [(number, line.strip()) for number, line in enumerate(file.read_text().split("\n"), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not lines:
        raise FileNotFoundError(f"{file} lists no {kind} shard; write one path a line")

    def matching(numbered: tuple[int, str]) -> list[str]:
        number, line = numbered
        try:
            return _matching(str(file.parent / pathlib.Path(line).expanduser()), kind)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"{file}, line {number}: {error}") from error

    with ThreadPoolExecutor(_THREADS_LOOKING) as pool:
        return [path for paths in pool.map(matching, lines) for path in paths]


def _matching(pattern: str, kind: str) -> list[str]:
    """Return the files that a pattern names.

    Raises:
        FileNotFoundError: one that it names is missing, or a glob that matches nothing.
    """
    if os.path.isfile(pattern):
        return [pattern]
    named = [name for choice in _choices(pattern) for name in _numbered(choice)]
    found: list[str] = []
    missing: list[str] = []
    for name in named:
        if _GLOB_CHARACTERS.search(name):
            matches = sorted(filter(os.path.isfile, glob.glob(name)))
            _check_whole(matches)
            found += matches
        else:
            (found if os.path.isfile(name) else missing).append(name)
    if missing:
        raise FileNotFoundError(_missing_message(missing, len(named), kind))
    if not found:
        raise FileNotFoundError(f"no {kind} shard matches {pattern!r}; check the path")
    return found


def _remote(
    url: str, split: str | None, is_shard: Callable[[str], bool], kind: str
) -> tuple[list[str], bool]:
    """Return the shards in an object store, and whether they are of the split alone.

    Args:
        url: a pattern, `{split}` replaced.
        split: the sub-folder to look for; None to look for none.
        is_shard: see `shard_paths`.
        kind: see `shard_paths`.
    """
    below = list(object_store.files(url))
    if below:
        inner = [name for name in below if split and name.startswith(f"{split}/")]
        names = [name.removeprefix(f"{split}/") for name in inner] or below
        folder = f"{url}/{split}" if inner else url
        found = [f"{folder}/{name}" for name in names if "/" not in name and is_shard(name)]
        if not found:
            raise FileNotFoundError(f"{folder} holds no {kind} shard; it holds {names[0]}")
        _check_whole(found)
        return found, split is None or bool(inner)
    names_in = functools.cache(object_store.names_in)
    named = [name for choice in _choices(url) for name in _numbered(choice)]
    found, missing = [], list[str]()
    for name in named:
        folder, base = os.path.split(name)
        if _GLOB_CHARACTERS.search(folder):
            raise ValueError(f"{url}: '*', '?' and '[' may stand in the last part only")
        if _GLOB_CHARACTERS.search(base):
            matches = [f"{folder}/{other}" for other in fnmatch.filter(names_in(folder), base)]
            _check_whole(matches)
            found += matches
        else:
            (found if base in names_in(folder) else missing).append(name)
    if missing:
        message = f"{len(missing)} of {len(named)} {kind} shards are missing"
        raise FileNotFoundError(f"{message}, the first is {missing[0]}")
    if not found:
        raise FileNotFoundError(f"no {kind} shard matches {url!r}; check the path")
    return found, split is None


def _choices(pattern: str) -> Iterator[str]:
    """Yield the pattern with each of the choices in its braces, the last one running fastest."""
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    head, tail = pattern[: match.start()], pattern[match.end() :]
    for choice in _choices_of(match[1]):
        for rest in _choices(tail):
            yield head + choice + rest


def _choices_of(braces: str) -> Sequence[str]:
    """Return `008, 009, 010` for `008..010`, and `a, b` for `a,b`."""
    ends = _RANGE.fullmatch(braces)
    if ends is not None and int(ends[1]) <= int(ends[2]):
        return [f"{number:0{len(ends[1])}d}" for number in range(int(ends[1]), int(ends[2]) + 1)]
    if "," in braces:
        return braces.split(",")
    raise ValueError(
        f"the braces {{{braces}}} are not understood; write {{000..127}} (rising), {{a,b}} or "
        "{split}"
    )


def _numbered(name: str) -> list[str]:
    """Return all `name-00000-of-00008` for `name@8`; the name itself if it has no `@`."""
    folder, base = os.path.split(name)
    match = _COUNT.search(base)
    if match is None:
        return [name]
    head, tail, count = base[: match.start()], base[match.end() :], int(match[1])
    shards = (f"{head}-{number:05d}-of-{count:05d}{tail}" for number in range(count))
    return [os.path.join(folder, shard) for shard in shards]


def _check_whole(paths: Sequence[str]) -> None:
    """Raise `FileNotFoundError` if of the shards numbered `-of-N` there are fewer than N."""
    numbers: dict[tuple[str, str, str], set[int]] = {}
    for path in paths:
        match = _NUMBERED.fullmatch(path)
        if match is not None:
            series = numbers.setdefault((match["head"], match["count"], match["tail"]), set())
            series.add(int(match["number"]))
    for (head, count, tail), found in numbers.items():
        missing = sorted(set(range(int(count))) - found)
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {int(count)} shards are missing, the first is "
                f"{head}-{missing[0]:05d}-of-{count}{tail}; to read a part on purpose, name it by "
                "braces such as {00000..00003}"
            )


def _missing_message(missing: Sequence[str], count: int, kind: str) -> str:
    if count > 1:
        return f"{len(missing)} of {count} {kind} shards are missing, the first is {missing[0]}"
    path = pathlib.Path(missing[0])
    beside = os.listdir(path.parent) if path.parent.is_dir() else []
    nearest = difflib.get_close_matches(path.name, beside, n=1)
    hint = f"; did you mean {str(path.parent / nearest[0])!r}?" if nearest else ""
    return f"there is no file or folder {missing[0]!r}{hint}"


def _empty_folder_message(folder: pathlib.Path, kind: str) -> str:
    names = sorted(os.listdir(folder))
    if not names:
        return f"the folder {folder} is empty"
    return f"the folder {folder} holds no {kind} shard; it holds {', '.join(names[:8])}" + (
        f" and {len(names) - 8} more" if len(names) > 8 else ""
    )
