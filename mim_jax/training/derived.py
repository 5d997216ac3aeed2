"""Settings that a config leaves open, derived from the data, the weights and the devices.

A field is open where it has the value in `OPEN`. `mae:adapt` leaves all of them open; any config
may leave some, and whatever is set on the command line stays.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from mim_jax import config as configs
from mim_jax.conversion.initial import read_donor
from mim_jax.conversion.towers import TOLD, settings_of
from mim_jax.data import Source, open_source
from mim_jax.data.domains import DomainSource, domain_members
from mim_jax.data.inspection import SourceFacts, inspect_source
from mim_jax.data.table import TableSource
from mim_jax.method import Method, method_class
from mim_jax.methods.mae import MAE

OPEN: dict[str, Any] = {
    "data.split": "",
    "data.channels": 0,
    "data.bits": 0,
    "data.mean": (),
    "data.std": (),
    "data.image_size": (),
    "model.patch_size": (),
    "model.position_grid": (),
    "model.categories": (),
    "model.continuous": 0,
    "model.domains": 0,
    "model.num_classes": 0,
    "model.labels": "",
    "model.decoder_width": 0,
    "model.decoder_depth": 0,
    "model.decoder_heads": 0,
    "batch_size": 0,
    "epochs": 0.0,
    "schedule.warmup_epochs": -1.0,
    "optimizer.base_lr": 0.0,
    "evaluate.protocols": ("auto",),
    "evaluate.train_split": "",
    "evaluate.test_split": "",
}
"""Fields that can be derived, with the value that leaves them open."""

COLUMN_FIELDS = ("model.categories", "model.continuous")
"""What the schema of a table tells of its columns."""

DOMAINS = "model.domains"

MIXTURE = "mix:"
"""What the name of a mixture begins with."""

SIZE_FIELDS = ("model.width", "model.depth", "model.heads")
"""Open together, where `model.size` is empty and they are 0."""

TOWER_FIELDS = ("path", "family")
"""A part of `config.model` that has both describes a tower, see `tower_settings`. Its weights tell
all else, wherever its path is not empty."""

FEWEST_PATCHES = 7
"""Along a side: with fewer there is little to mask."""

IMAGES_SEEN = {"cpu": 200_000, "accelerator": 50_000_000}
"""Images over the whole training, from which the number of epochs follows."""


@dataclasses.dataclass(frozen=True)
class Derived:
    """One setting: the field, its value, and the reason."""

    field: str
    value: Any
    reason: str


def derive(
    config: ml_collections.ConfigDict, run: Path, devices: Sequence[jax.Device] | None = None
) -> tuple[ml_collections.ConfigDict, list[Derived]]:
    """A copy of a config in which nothing is open, and what was filled in.

    A run that goes on takes what it wrote to its `config.json`, whatever the data are now.

    Args:
        config: complete, perhaps with open fields.
        run: folder of the run.
        devices: that will train; all by default.

    Raises:
        ValueError: if the data or the weights do not fit what is set.
        FileNotFoundError: if they are not there.
    """
    config = config.copy_and_resolve_references()
    fields = open_fields(config)
    if not fields:
        return config, []
    before = run / "config.json"
    if before.is_file():
        values = configs.leaves(configs.from_json(before.read_text()))
        return _filled(config, {field: values[field] for field in fields if field in values}), []
    derivation = _Derivation(config, fields, list(devices or jax.devices()))
    derivation.run()
    return derivation.config, derivation.settings


def open_fields(config: ml_collections.ConfigDict) -> list[str]:
    """Fields of a config that `derive` fills in."""
    values = configs.leaves(config)
    found = [f for f, value in OPEN.items() if f in values and values[f] == value]
    if not values["init_from"] and "model.position_grid" in found:
        found.remove("model.position_grid")  # the model's own grid, as `()` says
    if values.get("model.decoder_width") and values.get("model.decoder_heads"):
        # Someone has described the decoder, and it has no blocks (CAE v2).
        found = [field for field in found if field != "model.decoder_depth"]
    if not values.get("model.size", "?") and all(values.get(f) == 0 for f in SIZE_FIELDS):
        found += SIZE_FIELDS
    for tower in _towers(config):
        found += [f"{tower}.{field}" for field in TOLD if f"{tower}.{field}" in values]
    return found


def _towers(config: ml_collections.ConfigDict) -> list[str]:
    """Parts of a config whose weights tell their sizes, by dotted name."""
    parts = {f"model.{name}": part for name, part in config.model.items()}
    return [
        name
        for name, part in parts.items()
        if isinstance(part, ml_collections.ConfigDict)
        and all(field in part for field in TOWER_FIELDS)
        and part.path
    ]


def complete_without_data(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A copy of a config in which stands what can be told without a look at the data.

    Towers have the sizes that their weights tell, and there are as many domains as the mixture
    names: the same model as `derive` gives, where nothing else is open.

    Raises:
        FileNotFoundError: if there is nothing at the path of a tower, or of the file of a mixture.
        ValueError: if the weights are of no known kind, or the mixture is not understood.
    """
    config = config.copy_and_resolve_references()
    if DOMAINS in open_fields(config) and config.data.source.startswith(MIXTURE):
        config.model.domains = len(domain_members(config.data.source))
    return _filled(config, {told.field: told.value for told in _told_by_towers(config)})


def _told_by_towers(config: ml_collections.ConfigDict) -> list[Derived]:
    """What the weights of towers tell of a config, where it has these values as well."""
    told = []
    for tower in _towers(config):
        given = config.model[tower.removeprefix("model.")]
        for field, value in settings_of(given.path, given.to_dict()).items():
            if field in given:
                told.append(Derived(f"{tower}.{field}", value, f"of {given.path}"))
    return told


def complete_from_weights(
    config: ml_collections.ConfigDict, path: str
) -> ml_collections.ConfigDict:
    """A copy of a config in which weights have told what they tell, for conversion without data.

    Those of towers their sizes, and those of a classifier its number of classes.

    Args:
        config: complete, perhaps with open fields.
        path: the weights to convert.

    Raises:
        ValueError: if the number of classes is open, and the weights have no classifier; or those
            of a tower are of no known kind.
        FileNotFoundError: if there is nothing at a path.
    """
    config = complete_without_data(config)
    if "model.num_classes" not in open_fields(config):
        return config
    config.model.num_classes = 1
    donor = read_donor(path, method_class(config.method).build(configs.resolve(config, "cpu")))
    if "params/head/bias" not in donor.variables:
        raise ValueError(f"{path} has no classifier to tell model.num_classes: set it.")
    config.model.num_classes = len(donor.variables["params/head/bias"])
    return config


def check_domains(config: ml_collections.ConfigDict, source: Source) -> None:
    """Raises `ValueError` if a source has another number of domains than `model.domains` says.

    Args:
        config: with nothing open.
        source: that it trains on.
    """
    domains = configs.leaves(config).get(DOMAINS)
    if domains is not None and isinstance(source, DomainSource) and len(source.names) != domains:
        raise ValueError(
            f"{DOMAINS} is {domains}, but {source.name!r} has {len(source.names)} domains: "
            f"{', '.join(source.names)}; set {DOMAINS} to 0, which takes their number."
        )


def _filled(
    config: ml_collections.ConfigDict, values: Mapping[str, Any]
) -> ml_collections.ConfigDict:
    """The config with values by dotted field; an open tuple takes items of any type."""
    for field, value in values.items():
        parent, _, leaf = field.rpartition(".")
        part = config[parent] if parent else config
        with part.ignore_type():
            part[leaf] = tuple(value) if isinstance(value, (tuple, list)) else value
    return config


class _Derivation:
    """One pass over the open fields, each of which may look at those before it."""

    def __init__(
        self, config: ml_collections.ConfigDict, fields: list[str], devices: list[jax.Device]
    ) -> None:
        self.config = config
        self.fields = fields
        self.devices = devices
        self.on_cpu = devices[0].platform == "cpu"
        self.settings: list[Derived] = []

    def run(self) -> None:
        """Fills in everything."""
        given = configs.leaves(self.config)
        told = {setting.field: setting for setting in _told_by_towers(self.config)}
        for field, setting in told.items():
            if given[field] != setting.value:
                self.set(field, setting.value, setting.reason)
        if set(COLUMN_FIELDS) & set(self.fields):
            self._columns()
        if DOMAINS in self.fields:
            self._domains()
        known = {*told, *COLUMN_FIELDS, DOMAINS}
        open_ones = [field for field in self.fields if field not in known]
        if not open_ones:
            return
        if open_ones == ["model.position_grid"]:
            self._weights()  # they alone tell it, so no data are looked at
            return
        facts = self._facts()
        if "patch_size" not in self.config.model:  # a hybrid encoder, whose sizes are given
            self._labels(facts)
            return
        self._images(facts)
        self._labels(facts)
        self._model()
        if self.config.init_from:
            self._weights()
        self._training(facts)

    def set(self, field: str, value: Any, reason: str) -> None:
        """Fills one field in, if it is open."""
        if field in self.fields:
            _filled(self.config, {field: value})
            self.settings = [s for s in self.settings if s.field != field]
            self.settings.append(Derived(field, value, reason))

    def _source(self) -> Source:
        data = self.config.data
        if not data.source:
            raise ValueError("this config has no data of its own: give a folder with --data.")
        return open_source(data.source, data.split or "train", backend=data.backend)

    def _facts(self) -> SourceFacts:
        return inspect_source(self._source(), channels=self.config.data.channels or None)

    def _columns(self) -> None:
        source = self._source()
        if not isinstance(source, TableSource):
            raise ValueError(
                f"the data source {source.name!r} has no table, but this method needs one: set "
                "data.source to a CSV or Parquet file that names images."
            )
        counts, continuous = source.schema.category_counts, source.schema.num_continuous
        self.set("model.categories", counts, "values of the categorical columns of the table")
        self.set("model.continuous", continuous, "numerical columns of the table")

    def _domains(self) -> None:
        name = self.config.data.source
        if not name.startswith(MIXTURE):
            raise ValueError(
                f"the data source {name!r} is no mixture, but this method trains on several "
                "domains: set data.source to mix:1*FIRST+1*SECOND, or model.domains to their "
                "number."
            )
        self.set(DOMAINS, len(domain_members(name)), "sources of the mixture")

    def _images(self, facts: SourceFacts) -> None:
        looked = f"{facts.sampled} images looked at"
        self.set("data.channels", facts.channels, f"most of {looked}")
        self.set("data.bits", facts.bits, f"largest of {looked}")
        self.set("data.mean", _rounded(facts.mean), looked)
        # A constant image has no deviation to divide by.
        self.set("data.std", _rounded(max(std, 1e-3) for std in facts.std), looked)
        self._size(min(facts.heights[1], facts.widths[1]))

    def _size(self, short: int) -> None:
        """Patches, and an image size of whole patches, from the median short side in pixels."""
        reason = f"the median short side is {short} pixels"
        side = min(224, short)
        if "model.patch_size" in self.fields:
            patch = max((p for p in (2, 4, 8, 16) if side // p >= FEWEST_PATCHES), default=2)
            self.set("model.patch_size", (patch, patch), f"at least {FEWEST_PATCHES} on a side")
        patch_size = self.config.model.patch_size
        size = tuple(max(round(side / p), FEWEST_PATCHES) * p for p in patch_size)
        self.set("data.image_size", size, reason)

    def _labels(self, facts: SourceFacts) -> None:
        labelled = facts.num_classes is not None
        if labelled:
            self.set("model.num_classes", facts.num_classes, "classes of the data")
            self.set("model.labels", "multi" if facts.multi_label else "single", "of the data")
        protocols = ("knn", "linear") if labelled and not facts.multi_label else ()
        reason = "the data have labels" if protocols else "the data have no single labels"
        self.set("evaluate.protocols", protocols, reason)
        if "evaluate.test_split" in self.fields:
            self._test_split()
        else:
            self.set("data.split", "train", "evaluate.test_split is set")
            self.set("evaluate.train_split", "train", "evaluate.test_split is set")

    def _test_split(self) -> None:
        """The data's own test images, or else the last tenth of the images.

        Pre-training may see the last tenth, as it does not see their labels; a classifier may not.
        """
        data = self.config.data
        for split in ("validation", "val", "test"):
            try:
                open_source(data.source, split)
            except (ValueError, OSError):
                continue
            self.set("data.split", "train", f"the data have a split {split}")
            self.set("evaluate.train_split", "train", f"the data have a split {split}")
            self.set("evaluate.test_split", split, "the data have it")
            return
        self.set("evaluate.train_split", "train[:90%]", "the data have no test split")
        if "num_classes" not in self.config.model:
            self.set("evaluate.test_split", "train[90%:]", "trained on, without their labels")
            return
        self.set("evaluate.test_split", "train[90%:]", "not trained on")
        self.set("data.split", "train[:90%]", "the rest is for testing")

    def _model(self) -> None:
        size = (192, 6, 3) if self.on_cpu else (768, 12, 12)
        reason = "half a ViT-Ti, for a CPU" if self.on_cpu else "ViT-B"
        for field, value in zip(SIZE_FIELDS, size, strict=True):
            self.set(field, value, reason)
        decoder = (96, 2, 3) if self.on_cpu else (512, 8, 16)
        for part, value in zip(("width", "depth", "heads"), decoder, strict=True):
            self.set(f"model.decoder_{part}", value, reason)

    def _weights(self) -> None:
        """What the weights to start from fix: the model's sizes, and the grid of positions."""
        config, path = self.config, self.config.init_from
        donor = read_donor(path, self._method(config)).method
        encoder = donor.encoder
        if encoder is None:
            return
        reason = f"of {path}"
        blocks = encoder.transformer
        sizes = (encoder.width, blocks.depth, blocks.heads)
        for field, value in zip(SIZE_FIELDS, sizes, strict=True):
            self.set(field, value, reason)
        if SIZE_FIELDS[0] in self.fields:
            config.model.mlp_ratio = blocks.mlp_ratio
        if isinstance(donor, MAE) and "model.decoder_width" in self.fields:
            decoder = donor.model.decoder
            sizes = (decoder.width, decoder.transformer.depth, decoder.transformer.heads)
            for part, value in zip(("width", "depth", "heads"), sizes, strict=True):
                self.set(f"model.decoder_{part}", value, reason)
        self._size_of_weights(encoder.image_size, encoder.patch_size, reason)
        if "model.position_grid" in self.fields:
            grid = tuple(
                size // patch
                for size, patch in zip(config.data.image_size, config.model.patch_size)
            )
            if grid != encoder.grid and not encoder.learned_positions:
                spread = encoder.position_grid or encoder.grid
                self.set("model.position_grid", spread, f"{reason}, resized to {grid}")

    def _size_of_weights(
        self, image_size: tuple[int, ...], patch_size: tuple[int, ...], reason: str
    ) -> None:
        """The patches of the weights, and as much of their image size as the data fill."""
        config = self.config
        if "model.patch_size" in self.fields:
            wanted = config.data.image_size
            self.set("model.patch_size", patch_size, reason)
            size = tuple(
                min(whole, max(math.ceil(side / patch), FEWEST_PATCHES) * patch)
                for whole, side, patch in zip(image_size, wanted, patch_size)
            )
            self.set("data.image_size", size, f"at most {image_size} {reason}")

    def _method(self, config: ml_collections.ConfigDict) -> Method:
        """The method as set so far; what is still open does not shape it."""
        config = config.copy_and_resolve_references()
        return method_class(config.method).build(configs.resolve(config, "cpu"))

    def _training(self, facts: SourceFacts) -> None:
        config = self.config
        batch = self._batch_size(facts.count)
        self.set("batch_size", batch, f"{len(self.devices)} x {self.devices[0].device_kind}")
        seen = IMAGES_SEEN["cpu" if self.on_cpu else "accelerator"]
        epochs = min(max(seen / facts.count, 1.0), 1600.0)
        reason = f"{seen:,} images in all, at most 1,600 epochs"
        self.set("epochs", float(f"{epochs:.3g}"), reason)
        self.set("schedule.warmup_epochs", min(40.0, config.epochs / 10), "a tenth, at most 40")
        width = config.model.width or 768
        narrow = min(max(768 / width, 1.0), 4.0)
        rate = 1.5e-4 * narrow * math.sqrt(max(4096 / config.batch_size, 1.0))
        if config.init_from:
            rate /= 2
        reason = "1.5e-4 for ViT-B and 4096 images, by the root of the batch and by width"
        self.set("optimizer.base_lr", float(f"{rate:.3g}"), reason)

    def _batch_size(self, count: int) -> int:
        """A power of two for each device that memory and the number of images allow."""
        pieces = len(self.devices)
        wanted = 64 if self.on_cpu else pieces * 2 ** int(math.log2(self._images_in_memory()))
        most = max(count // 8, 1)
        wanted = min(wanted, 4096, 2 ** int(math.log2(most)))
        return max(wanted // pieces, 1) * pieces

    def _images_in_memory(self) -> float:
        """How many images of the model one device may hold in training, roughly."""
        limit = (self.devices[0].memory_stats() or {}).get("bytes_limit", 16e9)
        model, data = self.config.model, self.config.data
        tokens = math.prod(s // p for s, p in zip(data.image_size, model.patch_size))
        width, depth = model.width or 768, model.depth or 12
        values = 40 * depth * width * tokens  # kept for the backward pass, of two bytes
        return max((0.6 * limit - 16 * 12 * depth * width**2) / (2 * values), 1.0)


def as_text(settings: Sequence[Derived]) -> str:
    """A line for each setting, as a flag that would set it, with the reason."""
    flags = [f"--config.{s.field}={_shown(s.value)}" for s in settings]
    width = max(map(len, flags), default=0)
    return "\n".join(f"  {f:<{width}}  {s.reason}" for f, s in zip(flags, settings))


def _rounded(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(float(f"{value:.4g}") for value in values)


def _shown(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, str) else str(value)
    return f'"{text}"' if isinstance(value, tuple) else text
