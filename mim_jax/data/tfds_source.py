"""A TensorFlow Datasets data set as a source, read from ArrayRecord without TensorFlow."""

import difflib
import os
import re
from collections.abc import Sequence
from typing import Any

from mim_jax.data.decode import check_channels, choose_backend
from mim_jax.data.records import Record, decoded
from mim_jax.data.stages import stage

_DATA_DIR_OPTION = re.compile(r"^(?P<name>[^?]+)(?:\?data_dir=(?P<data_dir>.+))?$")


class TfdsSource:
    """Images of a TFDS data set; TFDS hands over the encoded bytes, they are decoded here.

    Attributes:
        name: as given to `open_source`, with the split.
        num_classes: from the `label` feature, None if there is none.
        class_names: from the `label` feature, None if there is none.
        channels: of the decoded images.
    """

    def __init__(
        self,
        name: str,
        records: Sequence[dict[str, Any]],
        class_names: tuple[str, ...] | None,
        num_classes: int | None,
        channels: int,
        bits: int,
        backend: str,
    ) -> None:
        self.name = name
        self.num_classes = num_classes
        self.class_names = class_names
        self.channels = channels
        self._records = records
        self._bits = bits
        self._backend = backend

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `image` `[height, width, channels]` and, if labelled, `label`.

        Raises:
            UnreadableImage: the image cannot be decoded; names the record.
        """
        record = self.record(index)
        with stage("decode"):
            return decoded(
                record, record["name"], self.num_classes, self.channels, self._bits, self._backend
            )

    def record(self, index: int) -> Record:
        """Return one example with its image undecoded."""
        with stage("read"):
            stored = self._records[index]
        name = f"{self.name}, record {index}"
        record: Record = {"image": bytes(stored["image"]), "name": name}
        if self.num_classes is not None:
            record["label"] = int(stored["label"])
        return record


def open_tfds(
    name: str,
    split: str,
    *,
    channels: int | None = None,
    bits: int = 8,
    backend: str = "auto",
) -> TfdsSource:
    """Return a split of a data set that was prepared in the ArrayRecord format.

    Nothing is downloaded: preparing a data set is a step of its own, done once, not by every
    process of a run.

    Args:
        name: `NAME[/CONFIG][:VERSION]`, optionally with `?data_dir=FOLDER`; without it TFDS looks
            in `$TFDS_DATA_DIR`, else in `~/tensorflow_datasets`.
        split: passed to TFDS as it is, with slices.
        channels: of the decoded images; None for the data set's own number.
        bits: 8 or 16, of the decoded images.
        backend: `opencv`, `pillow` or `auto`.

    Raises:
        ImportError: tensorflow-datasets is not installed.
        FileNotFoundError: no such data set, or not prepared; says how to prepare it.
        ValueError: a malformed name, an unknown split, or no usable `image` feature.
    """
    match = _DATA_DIR_OPTION.match(name)
    if match is None:
        raise ValueError(
            f"'tfds:{name}' is not understood; write tfds:NAME[/CONFIG][:VERSION], optionally "
            "followed by ?data_dir=FOLDER"
        )
    data_set, data_dir = match["name"], match["data_dir"] or os.environ.get("TFDS_DATA_DIR")
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"'tfds:{name}' needs the package tensorflow-datasets (TensorFlow itself is not "
            f"needed): pip install tensorflow-datasets ({error})"
        ) from error

    builder = _builder(tfds, data_set, data_dir)
    features = builder.info.features
    if "image" not in features:
        raise ValueError(f"'tfds:{name}' has no feature 'image'; it has {', '.join(features)}")
    image_feature = features["image"]
    if not isinstance(image_feature, tfds.features.Image):
        raise ValueError(
            f"'tfds:{name}': the feature 'image' is {type(image_feature).__name__}, not an Image"
        )
    if channels is None:
        channels = 1 if image_feature.shape[-1] == 1 else 3
    check_channels(channels)
    records = _records(tfds, builder, data_set, split)
    names, num_classes = None, None
    if "label" in features and isinstance(features["label"], tfds.features.ClassLabel):
        names, num_classes = features["label"].names, features["label"].num_classes
    return TfdsSource(
        name=f"tfds:{data_set}:{split}",
        records=records,
        class_names=tuple(names) if names else None,
        num_classes=num_classes,
        channels=channels,
        bits=bits,
        backend=choose_backend(backend),
    )


def _builder(tfds: Any, data_set: str, data_dir: str | None) -> Any:
    try:
        return tfds.builder(data_set, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = difflib.get_close_matches(
            data_set.split("/")[0].split(":")[0], tfds.list_builders(with_community_datasets=False)
        )
        hint = f"; did you mean {' or '.join(known)}?" if known else "."
        raise FileNotFoundError(
            f"TFDS knows no data set {data_set!r} and finds none prepared in "
            f"{data_dir or '~/tensorflow_datasets'}{hint} Another folder is given as "
            "?data_dir=FOLDER or the environment variable TFDS_DATA_DIR"
        ) from error


def _records(tfds: Any, builder: Any, data_set: str, split: str) -> Sequence[dict[str, Any]]:
    if not builder.info.splits:
        raise FileNotFoundError(
            f"the data set 'tfds:{data_set}' is not prepared in {builder.data_dir}. Prepare it "
            f"once with 'tfds build {data_set} --file_format=array_record', or name the folder "
            "that holds it with ?data_dir=FOLDER or the environment variable TFDS_DATA_DIR"
        )
    # Undecoded images: TFDS would decode them with its own choice of channels and orientation.
    decoders = {"image": tfds.decode.SkipDecoding()}
    try:
        records: Sequence[dict[str, Any]] = builder.as_data_source(split=split, decoders=decoders)
    except NotImplementedError as error:
        raise FileNotFoundError(
            f"the data set 'tfds:{data_set}' is prepared in {builder.data_dir}, but in a format "
            "without random access. Convert it once with 'python -m tensorflow_datasets.scripts."
            "convert_format --to_file_format=array_record', or prepare it again with 'tfds build "
            f"{data_set} --file_format=array_record'"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"'tfds:{data_set}' has no split {split!r}; it has {', '.join(builder.info.splits)} "
            f"({error})"
        ) from error
    return records
