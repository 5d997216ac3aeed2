"""Any source to ArrayRecord shards with a manifest, in pieces that survive an interruption."""

import collections
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgpack
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mim_jax.data.array_record import MANIFEST, MANIFEST_VERSION, read_manifest
from mim_jax.data.decode import UnreadableImage, choose_backend, decode_image
from mim_jax.data.image_writer import encode_image
from mim_jax.data.probe import probe_image
from mim_jax.data.records import Record, place_of, record_of
from mim_jax.data.resize import resized
from mim_jax.data.sources import Source
from mim_jax.data.splits import split_name_and_bounds

EXAMPLES_PER_SHARD = 10_000
"""By default: about 1 GB of the photographs of ImageNet, 100 MB of them at 256 pixels."""

# Images are compressed already. In groups of one, a record is read without its neighbours.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_MAX_DEFAULT_THREADS = 16
# So many examples for each thread are read ahead of the one that is written.
_AHEAD = 4


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion wrote.

    Attributes:
        folder: with the shards and the manifest.
        shards: number of files of this split.
        examples: written to them.
        unreadable: names of the images that were left out.
    """

    folder: pathlib.Path
    shards: int
    examples: int
    unreadable: tuple[str, ...]


def convert(
    source: Source,
    folder: pathlib.Path,
    split: str = "train",
    *,
    short_side: int | None = None,
    shards: int | None = None,
    threads: int | None = None,
    console: Console | None = None,
) -> Conversion:
    """Write a source as one split of a data set in ArrayRecord shards.

    Image files keep their bytes. With `short_side`, larger images are shrunk (turned upright by
    their EXIF orientation) and written anew: as JPEG of quality 95 with 8 bits and 1 or 3
    channels, as PNG with 16 bits or 4 channels, else as `.npy`; smaller ones keep their bytes.
    Images of sources without files (such as `embedded`) become PNG. Every image is decoded once:
    unreadable ones are left out, and the manifest names them.

    A shard appears under its name only when it is whole. After an interruption the same call goes
    on with the shards that are missing, and the result is the same to the byte.

    Args:
        source: what to write, in its order.
        folder: is made if it is not there; it may hold other splits.
        split: what to call the examples.
        short_side: in pixels, of images that are larger; None to keep the size.
        shards: number of files; None for one for every 10,000 examples.
        threads: that decode and resize; None for one per CPU core up to 16.
        console: shows a progress bar.

    Raises:
        ValueError: a bad number, no readable image, another conversion in this folder, or one
            whose classes differ.
    """
    if threads is None:
        threads = min(os.cpu_count() or 1, _MAX_DEFAULT_THREADS)
    if shards is None:
        shards = -(-len(source) // EXAMPLES_PER_SHARD)
    _check_arguments(source, split, short_side, shards, threads)
    folder.mkdir(parents=True, exist_ok=True)
    plan = {
        "source": source.name,
        "examples": len(source),
        "shards": shards,
        "short_side": short_side,
    }
    manifest = _manifest_for(source, folder / MANIFEST)
    if split in manifest["splits"]:
        return _earlier_conversion(folder, split, plan, manifest["splits"][split])
    unfinished = _unfinished_folder(folder, split, plan)
    parts = []
    with progress_bar(console) as progress, ThreadPoolExecutor(threads) as pool:
        bar = progress.add_task(f"writing {folder}", total=len(source))
        for number in range(shards):
            rows = range(number * len(source) // shards, (number + 1) * len(source) // shards)
            name = f"{split}-{number:05d}-of-{shards:05d}.array_record"
            facts = unfinished / f"{name}.json"
            if not ((folder / name).is_file() and facts.is_file()):
                packed = _packed_in_order(pool, source, rows, short_side, _AHEAD * threads)
                shown = _counting(packed, lambda: progress.advance(bar))
                part = _write_shard(shown, unfinished / name, source)
                _write_json(facts, {"file": name, **part})
                (unfinished / name).replace(folder / name)
            parts.append(json.loads(facts.read_text()))
            progress.update(bar, completed=rows.stop)
    described = _described(parts, plan, source)
    if not sum(shard["examples"] for shard in described["shards"]):
        raise ValueError(f"none of the {len(source)} images of {source.name} can be read")
    manifest = _manifest_for(source, folder / MANIFEST)
    manifest["splits"][split] = described
    _write_json(folder / MANIFEST, manifest)
    shutil.rmtree(unfinished)
    return _conversion(folder, described)


def _check_arguments(
    source: Source, split: str, short_side: int | None, shards: int, threads: int
) -> None:
    if not len(source):
        raise ValueError(f"{source.name} has no examples to convert")
    kind = getattr(source, "kind", "image")
    if kind != "image":
        raise ValueError(
            f"{source.name} has examples of the kind {kind!r}, but shards hold images and labels "
            "alone; train on it as it is"
        )
    if split_name_and_bounds(split) != (split, None):
        raise ValueError(f"write to the name of a split, without a slice, got {split!r}")
    if not 1 <= shards <= len(source):
        raise ValueError(
            f"shards must be between 1 and {len(source)}, the number of examples, got {shards}"
        )
    if short_side is not None and short_side < 1:
        raise ValueError(f"short_side must be at least 1 pixel, got {short_side}")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")


def _manifest_for(source: Source, path: pathlib.Path) -> dict[str, Any]:
    """Return the manifest in a folder, or the beginning of one.

    Raises:
        ValueError: the classes of the source are others than those of the manifest.
    """
    classes = {
        "class_names": None if source.class_names is None else list(source.class_names),
        "num_classes": source.num_classes,
        "multi_label": bool(getattr(source, "multi_label", False)),
    }
    if not path.is_file():
        return {"version": MANIFEST_VERSION, **classes, "splits": {}}
    manifest = read_manifest(path)
    differing = [key for key, value in classes.items() if manifest[key] != value]
    if differing:
        raise ValueError(
            f"{path.parent} holds a data set with other {' and '.join(differing)} than "
            f"{source.name}; give another output folder"
        )
    return manifest


def _earlier_conversion(
    folder: pathlib.Path, split: str, plan: dict[str, Any], described: dict[str, Any]
) -> Conversion:
    """Return the conversion that made a split, if it was this one; a repeated call does nothing."""
    if described.get("plan") != plan:
        raise ValueError(
            f"{folder} holds the split {split!r} already, made from {described.get('plan')}; "
            "give another output folder or another name for the split"
        )
    return _conversion(folder, described)


def _unfinished_folder(folder: pathlib.Path, split: str, plan: dict[str, Any]) -> pathlib.Path:
    """Return the hidden folder of the shards in the making, as an earlier call left it.

    Raises:
        ValueError: the earlier call had other arguments.
    """
    unfinished = folder / f".unfinished-{split}"
    file = unfinished / "plan.json"
    if not file.is_file():
        unfinished.mkdir(exist_ok=True)
        _write_json(file, plan)
    earlier = json.loads(file.read_text())
    if earlier != plan:
        raise ValueError(
            f"{folder} holds an unfinished conversion of {earlier}, not of {plan}; finish that one "
            f"with the same arguments, or delete {folder}"
        )
    return unfinished


def _packed_in_order(
    pool: ThreadPoolExecutor, source: Source, rows: range, short_side: int | None, ahead: int
) -> Iterator["_Packed"]:
    """Yield the examples of `rows` in order, made by the threads of `pool`."""
    pending: collections.deque[Future[_Packed]] = collections.deque()
    try:
        for index in rows:
            if len(pending) == ahead:
                yield pending.popleft().result()
            pending.append(pool.submit(_packed, source, index, short_side))
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def _counting(items: Iterator["_Packed"], step: Callable[[], None]) -> Iterator["_Packed"]:
    for item in items:
        yield item
        step()


@dataclasses.dataclass(frozen=True)
class _Packed:
    """One example as it is written; `data` is None if it is unreadable, and `name` says why."""

    data: bytes | None
    name: str
    labels: tuple[int, ...] = ()


def _packed(source: Source, index: int, short_side: int | None) -> _Packed:
    try:
        # Files in their own channels and bits, whatever the source would make of them.
        record = record_of(source, index)
        if record is None:
            record = source[index]
            image = _shrunk(record["image"], short_side)
            data = encode_image(image, lossless=True)
        else:
            data = _checked_or_shrunk(record["image"], short_side, place_of(source, index, record))
    except UnreadableImage as error:
        return _Packed(None, str(error))
    label = record.get("label")
    if isinstance(label, np.ndarray):
        label = np.flatnonzero(label).tolist()
    stored: Record = {"image": data}
    if label is not None:
        stored["label"] = label
    name = record.get("name", "")
    if name:
        stored["name"] = name
    labels = tuple(label) if isinstance(label, list) else () if label is None else (label,)
    return _Packed(msgpack.packb(stored), name, labels)


def _checked_or_shrunk(data: bytes, short_side: int | None, place: str) -> bytes:
    """Return the bytes of an image file, or of its image shrunk.

    Raises:
        UnreadableImage: the image cannot be decoded; names `place`.
    """
    try:
        facts = probe_image(data)
        image = decode_image(data, facts.channels, choose_backend(), facts.bits)
    except UnreadableImage as error:
        raise UnreadableImage(f"{place}: {error}") from error
    shrunk = _shrunk(image, short_side)
    return data if shrunk is image else encode_image(shrunk, lossless=False)


def _shrunk(image: np.ndarray, short_side: int | None) -> np.ndarray:
    """Return an image with its shorter side at `short_side`; itself if that is no larger."""
    height, width = image.shape[:2]
    if short_side is None or min(height, width) <= short_side:
        return image
    factor = short_side / min(height, width)
    return resized(image, (round(height * factor), round(width * factor)))


def _write_shard(examples: Iterator[_Packed], path: pathlib.Path, source: Source) -> dict[str, Any]:
    """Write one shard, over what an interruption may have left, and return facts about it."""
    from array_record.python.array_record_module import ArrayRecordWriter

    class_counts = [0] * (source.num_classes or 0)
    unreadable = []
    written = 0
    writer = ArrayRecordWriter(str(path), _WRITER_OPTIONS)
    for example in examples:
        if example.data is None:
            unreadable.append(example.name)
            continue
        writer.write(example.data)
        written += 1
        for label in example.labels if class_counts else ():
            class_counts[label] += 1
    writer.close()
    return {"examples": written, "class_counts": class_counts, "unreadable": unreadable}


def _described(
    parts: Sequence[dict[str, Any]], plan: dict[str, Any], source: Source
) -> dict[str, Any]:
    """Return the entry of a split in the manifest."""
    counts = np.sum([part["class_counts"] for part in parts], axis=0, dtype=int).tolist()
    return {
        "shards": [{key: part[key] for key in ("file", "examples")} for part in parts],
        "class_counts": counts if source.num_classes else None,
        "unreadable": [name for part in parts for name in part["unreadable"]],
        "plan": plan,
    }


def _conversion(folder: pathlib.Path, described: dict[str, Any]) -> Conversion:
    return Conversion(
        folder=folder,
        shards=len(described["shards"]),
        examples=sum(shard["examples"] for shard in described["shards"]),
        unreadable=tuple(described["unreadable"]),
    )


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Write a file that is whole whenever it is there."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)


def progress_bar(console: Console | None) -> Progress:
    """A bar with a count and the time left; without a console it shows nothing."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=console is None,
    )
