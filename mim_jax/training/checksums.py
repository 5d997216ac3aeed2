"""Checksums of the files of a checkpoint, so that a damaged one is known before it is used.

What reads checkpoints finds files that are missing or cut short, but a changed byte in the values
of a parameter passes unnoticed.
"""

import hashlib
import json
import os
from pathlib import Path

_PREFIX, _SUFFIX = "checksums.", ".json"


def seal(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Writes sizes and checksums of the files of a folder beside them.

    Args:
        folder: complete, and not changed any more.
        part: number of this process; each looks at its share of the files.
        parts: number of processes.
    """
    content = {}
    for name in _files(folder)[part::parts]:
        path = folder / name
        content[name] = [path.stat().st_size, _digest(path)]
    target = folder / f"{_PREFIX}{part}{_SUFFIX}"
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=0))
    os.replace(temporary, target)


def damage(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the files of a folder, one text for each; empty if nothing is known to be.

    Args:
        folder: perhaps sealed, by any number of processes.
        part: number of this process; sizes are compared for all files, checksums for its share.
        parts: number of processes.
    """
    sealed: dict[str, tuple[int, str]] = {}
    for path in sorted(folder.glob(f"{_PREFIX}*{_SUFFIX}")):
        try:
            sealed |= {name: (size, digest) for name, (size, digest) in _read(path).items()}
        except (ValueError, TypeError) as error:
            return [f"{path.name} is no list of checksums: {error}"]
    problems = []
    for name, (size, _) in sealed.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != size:
            problems.append(f"{name} has {path.stat().st_size:,} bytes instead of {size:,}")
    if problems:
        return problems
    return [
        f"{name} has other bytes than were written"
        for name in sorted(sealed)[part::parts]
        if _digest(folder / name) != sealed[name][1]
    ]


def _files(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(_PREFIX)
    )


def _read(path: Path) -> dict[str, list]:
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}")
    return content


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
