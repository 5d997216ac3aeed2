"""Loads a config by file or name, fills defaults and checks every field.

A config file has `VARIANTS`, a tuple of names, and a function `get_config(variant) -> ConfigDict`
whose argument has a default. It lists only what its method changes; everything else comes from
`defaults`, which is the list of all fields.
"""

import difflib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

PACKAGE = Path(__file__).resolve().parent
CONFIG_FOLDER = next(
    folder for folder in (PACKAGE / "configs", PACKAGE.parent / "configs") if folder.is_dir()
)
"""Where named configs live: inside an installed wheel, or beside the package in a checkout."""

FREE_FIELDS = ("model", "optimizer.groups", "sharding.rules")
"""Parts whose fields belong to the method or the user, so that `defaults` cannot list them."""

BATCHES = ("shuffled", "domains")
"""What batches are made of."""

CROPS = ("random_resized", "keep_ratio")
"""Training crops."""

EMBEDDED_DATA: dict[str, Any] = dict(
    source="embedded",
    image_size=(28, 28),
    channels=1,
    mean=(0.2861,),
    std=(0.3530,),
    crop_area=(0.5, 1.0),
)
"""`config.data` of configs that train on the images of the package."""

COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Types of matrix products."""


def defaults() -> ml_collections.ConfigDict:
    """All fields with their default values."""
    return ml_collections.ConfigDict(
        dict(
            method="",
            # Read by the method's `build`; each config file lists its method's fields.
            model=dict(),
            seed=0,
            # Type of matrix products; "auto" is bfloat16 on accelerators and float32 on CPU.
            compute_dtype="auto",
            # Examples per optimizer step, over all devices and micro-batches.
            batch_size=256,
            # Micro-batches per optimizer step: more of them need less memory.
            accumulate=1,
            epochs=100.0,
            # Total steps; 0 derives them from `epochs`.
            steps=0,
            # Consecutive non-finite steps (each is skipped) after which the run stops.
            max_nonfinite=10,
            # Weights to start from: an official .pth or .safetensors file, or a run of ours.
            init_from="",
            data=dict(
                # "embedded", "fashion_mnist", "folder:PATH", "tfds:NAME" or another of the README.
                source="embedded",
                split="train",
                # "shuffled" takes each epoch in a new order; "domains" gives equal blocks of a few
                # sources of a mixture, each half real and half fake, and tells the `domain`.
                batches="shuffled",
                # Of "domains": blocks of a batch, each of another source.
                domains_per_batch=2,
                # Height and width; of volumes, height, width and depth.
                image_size=(224, 224),
                channels=3,
                # 8 or 16 bits a sample; 16 keeps what scanners and satellites measure.
                bits=8,
                # Mean and standard deviation of each channel, for values in [0, 1].
                mean=(0.485, 0.456, 0.406),
                std=(0.229, 0.224, 0.225),
                # Training crop: "random_resized" cuts a random box; "keep_ratio" keeps the middle,
                # sometimes zoomed or stretched (`rkrc` of timm).
                crop="random_resized",
                # Of both: share of the area, aspect ratio.
                crop_area=(0.2, 1.0),
                crop_aspect=(3 / 4, 4 / 3),
                # A second rendering of the same crop for a network that makes targets, such as
                # (112, 112): the batch entry target_image; () for none.
                target_size=(),
                # "bicubic", "bilinear" or "lanczos".
                target_interpolation="bicubic",
                # Largest random change of brightness, contrast and saturation before the crop; a
                # fourth number turns the hue, by a share of the circle up to 0.5.
                color_jitter=(0.0, 0.0, 0.0),
                flip=True,
                # RandAugment after the crop, such as "rand-m9-mstd0.5-inc1"; "" for none.
                augment="",
                # "opencv", "pillow" or "auto" (OpenCV if it is installed).
                backend="auto",
                # Worker processes that decode and crop; 0 uses threads of this process.
                workers=0,
                # Largest share of unreadable images before the run stops.
                max_unreadable=0.01,
                # Sources of the kind "volume" only; see `mim_jax.data.volumes.VolumeCrops`.
                volume=dict(
                    # Crops of a volume that stand together in a batch.
                    views=8,
                    # How often the centre of a crop is a voxel of the foreground.
                    foreground=0.75,
                    # What tells foreground: "image" (values above 0) or "segmentation" (classes
                    # above 0), with which the classes of the voxels are read as well.
                    centre="image",
                    # How often each axis is flipped, and the first two are turned.
                    flip=0.5,
                    rotate=0.3,
                    # Largest change of the samples, v * (1 + scale) and v + shift, and how often.
                    scale=0.1,
                    scale_probability=0.1,
                    shift=0.1,
                    shift_probability=0.1,
                ),
                # Sources of the kind "table" only.
                table=dict(
                    # Share of the columns whose values are replaced in a corrupted row.
                    corruption=0.3,
                    # For fine-tuning: corrupt the row itself, with the augmented images only.
                    corrupt_input=False,
                    # "none", "random_values", "random_columns", "most_important" or
                    # "least_important": what is missing, in training and evaluation.
                    missing="none",
                    # Share of the values or columns that is missing.
                    missing_rate=0.0,
                    # How often an image is augmented at all, and not just resized; then, how often
                    # its colours are jittered, it is turned grey, blurred, rotated and flipped.
                    # Where these flip, `data.flip` should be False.
                    augment_probability=0.95,
                    jitter_probability=0.8,
                    grey_probability=0.2,
                    blur_probability=0.5,
                    rotation_probability=0.5,
                    flip_probability=0.5,
                    # Smallest and largest standard deviation of the blur, in pixels.
                    blur_sigma=(0.1, 2.0),
                    # Largest rotation to either side, in degrees.
                    rotation=0.0,
                ),
            ),
            optimizer=dict(
                # "adamw", "adam" (its decay is part of the gradient) or "lars".
                name="adamw",
                # Learning rate at batch size 256; the rate is base_lr * batch_size / 256.
                base_lr=1.5e-4,
                # Learning rate as it is; 0 derives it from base_lr.
                lr=0.0,
                b1=0.9,
                b2=0.95,
                eps=1e-8,
                weight_decay=0.05,
                # Decay also biases, norm scales and other 1-D parameters.
                decay_all=False,
                # LARS only.
                momentum=0.9,
                trust_coefficient=1e-3,
                # Largest norm of the gradient; 0 turns clipping off. Groups that have the same are
                # clipped together, one with clip_alone by itself.
                clip_norm=0.0,
                clip_alone=False,
                # The same rate from the first step to the last.
                constant_rate=False,
                # Settings of this list for a group that the method declares, by its name.
                groups=dict(),
            ),
            schedule=dict(
                warmup_epochs=40.0,
                min_lr=0.0,
                # Change the rate between epochs only, and reach it in the warm-up's last epoch.
                by_epoch=False,
            ),
            # Devices along each axis; -1 takes what is left.
            mesh=dict(data=-1, fsdp=1, tensor=1),
            sharding=dict(
                # "replicated", "fsdp" or "fsdp+tensor".
                strategy="replicated",
                # Rules (path pattern, spec) that come before the strategy's own.
                rules=(),
            ),
            # What the end of training writes below the run's folder, see `mim-jax convert`.
            export=dict(formats=()),
            checkpoint=dict(
                every_steps=1000,
                # Newest checkpoints to keep, beside the best and the periodic ones.
                keep=2,
                # Keep a checkpoint for good every this many steps; 0 keeps none.
                keep_every_steps=0,
                # Metric of the evaluation whose best checkpoint is kept; "" keeps none.
                best_metric="",
                asynchronous=True,
                # Write checksums of its files into each checkpoint, which reads them once more.
                checksums=True,
                # Stop after so many checkpoints in a row that could not be written.
                max_failed=10,
            ),
            log=dict(
                every_steps=50,
                # Pictures at this interval and at the end; 0 turns them off.
                pictures_every_steps=0,
                tensorboard=True,
                wandb=False,
                # Without a sign of life for so long, the run prints what all its threads are at,
                # again and again, and goes on; 0 turns it off.
                watchdog_seconds=1800.0,
                # Then ends itself with exit code 70, for a scheduler that starts it again; 0 never
                # does. Should be well above the time of a step, a save and a restore; compilation
                # and evaluation may take longer.
                watchdog_exit_seconds=0.0,
            ),
            evaluate=dict(
                # Evaluate at this interval; 0 evaluates at the end only.
                every_epochs=0.0,
                # Protocols at the end of training, see `mim-jax evaluate --help`; () for none.
                protocols=(),
                # Labelled data; "" takes data.source.
                source="",
                train_split="train",
                test_split="test",
                # "method" takes the paper's representation, "mean" the mean of the patch tokens.
                pool="method",
                # File of pairs for "verification", see its `read_pairs`; "" draws them by label.
                pairs="",
                # Share of the image kept by the evaluation crop.
                crop_ratio=0.875,
                # Of neighbouring windows, where whole volumes are segmented.
                overlap=0.5,
                batch_size=256,
            ),
            # Losses of the unchanged config at some steps, which `mim-jax verify` trains up to.
            reference=dict(
                steps=(),
                loss=(),
                # Largest relative difference at each step.
                band=(),
            ),
        )
    )


def known_configs() -> list[str]:
    """Names of the configs that come with the package."""
    return sorted(path.stem for path in CONFIG_FOLDER.glob("*.py") if not path.stem.startswith("_"))


def find(name: str) -> tuple[Path, str | None]:
    """Path and variant of a config given as `mae`, `mae:tiny`, `file.py` or `file.py:tiny`.

    Raises:
        ValueError: if there is no such config; the message lists the known ones.
    """
    stem, _, variant = name.partition(":")
    if stem.endswith(".py"):
        path = Path(stem)
        if not path.is_file():
            raise ValueError(f"config file {stem} does not exist.")
        return path, variant or None
    path = CONFIG_FOLDER / f"{stem}.py"
    if path.is_file():
        return path, variant or None
    names = known_configs()
    near = difflib.get_close_matches(stem, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"unknown config {stem!r}; known are {', '.join(names)}, or give a path that ends in .py."
        + hint
    )


def load(name: str, overrides: Mapping[str, Any] | None = None) -> ml_collections.ConfigDict:
    """A complete, checked config.

    Args:
        name: see `find`.
        overrides: values by dotted field name, such as `{"data.source": "folder:x"}`.

    Raises:
        ValueError: for an unknown config, variant or field, or a value of the wrong type.
    """
    path, variant = find(name)
    spec = importlib.util.spec_from_file_location(f"mim_jax_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    absent = [name for name in ("VARIANTS", "get_config") if not hasattr(module, name)]
    if absent:
        raise ValueError(
            f"config file {path} defines no {' and no '.join(absent)}; it needs "
            "get_config(variant) and VARIANTS, as configs/mae.py has them."
        )
    known = list(module.VARIANTS)
    if variant is None:
        given = module.get_config()
    elif variant in known:
        given = module.get_config(variant)
    else:
        near = difflib.get_close_matches(variant, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"config {path} has no variant {variant!r}; known are {known}.{hint}")
    config = complete(given)
    if overrides:
        override(config, overrides)
    return config


def complete(given: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The defaults, changed by a config file's fields.

    Raises:
        ValueError: for a field that `defaults` does not have, or a value of the wrong type.
    """
    config = defaults()
    for field in FREE_FIELDS:
        parent, _, leaf = field.rpartition(".")
        part = config[parent] if parent else config
        source = given.get(parent, {}) if parent else given
        if leaf in source:
            part[leaf] = source[leaf]
    override(config, leaves(given))
    return config.lock()


def override(config: ml_collections.ConfigDict, values: Mapping[str, Any]) -> None:
    """Sets fields by dotted name, in place.

    Raises:
        ValueError: for an unknown field, with the nearest known one, or a value of another type.
    """
    for field, value in values.items():
        check_field(config, field)
        parent, _, leaf = field.rpartition(".")
        part = _descend(config, parent)
        old = part[leaf]
        value = _converted(value, old)
        if not _has_type_of(old, value):
            raise ValueError(
                f"config field {field!r} is {value!r} ({type(value).__name__}); expected "
                f"{type(old).__name__}, such as {old!r}."
            )
        part[leaf] = value


def _converted(value: Any, old: Any) -> Any:
    """`value`, with an int as a float and a list as a tuple where `old` has them."""
    if isinstance(old, float) and type(value) is int:
        return float(value)
    if isinstance(old, tuple) and isinstance(value, (tuple, list)):
        return tuple(_converted(item, old[0]) if old else item for item in value)
    return value


def _has_type_of(old: Any, value: Any) -> bool:
    """Whether two values have the same type, and tuples the same type of items."""
    if type(old) is not type(value):
        return False
    if isinstance(old, tuple) and len({type(item) for item in old}) == 1:
        return all(_has_type_of(old[0], item) for item in value)
    return True


def check_field(config: ml_collections.ConfigDict, field: str) -> None:
    """Raises `ValueError` with the nearest known field if a config lacks a dotted field."""
    known = leaves(config)
    if field not in known:
        near = difflib.get_close_matches(field, known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else f" Known are: {', '.join(known)}."
        raise ValueError(f"the config has no field {field!r}.{hint}")


def _descend(config: ml_collections.ConfigDict, parent: str) -> ml_collections.ConfigDict:
    """The part of a config by dotted name; the whole for an empty name."""
    for name in filter(None, parent.split(".")):
        config = config[name]
    return config


def leaves(config: ml_collections.ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Values by dotted field name."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def to_json(config: ml_collections.ConfigDict) -> str:
    """The config as indented JSON, one field a line."""
    return json.dumps(config.to_dict(), indent=2, default=list)


def from_json(content: str | Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A config that `to_json` wrote, as text or as what JSON makes of it."""
    fields = json.loads(content) if isinstance(content, str) else content
    return complete(ml_collections.ConfigDict(_tuples(fields)))


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, at any depth."""
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value


def check_choices(model: ml_collections.ConfigDict, choices: Mapping[str, Sequence[str]]) -> None:
    """Raises `ValueError` if a field of `config.model` is none of the names known for it.

    Args:
        model: `config.model`.
        choices: known names by field.
    """
    for field, known in choices.items():
        if model[field] not in known:
            raise ValueError(f"model.{field} is {model[field]!r}; known are {', '.join(known)}.")


def resolve(config: ml_collections.ConfigDict, platform: str) -> ml_collections.ConfigDict:
    """A copy in which values that depend on the machine are filled in, checked across fields.

    Args:
        config: a complete config.
        platform: the JAX backend, such as "cpu", "gpu" or "tpu".

    Raises:
        ValueError: for an unknown compute type, or statistics of another number of channels.
    """
    config = config.copy_and_resolve_references()
    if config.compute_dtype not in COMPUTE_DTYPES:
        raise ValueError(
            f"compute_dtype is {config.compute_dtype!r}; known are {', '.join(COMPUTE_DTYPES)}."
        )
    for field in ("mean", "std"):
        if len(config.data[field]) != config.data.channels:
            raise ValueError(
                f"data.{field} is {config.data[field]}, but data.channels is "
                f"{config.data.channels}; give one value for each channel."
            )
    if config.data.bits not in (8, 16):
        raise ValueError(f"data.bits is {config.data.bits}; samples have 8 or 16.")
    if config.data.augment and config.data.bits == 16:
        raise ValueError(
            f"data.augment {config.data.augment!r} needs images of 8 bits; set it to '', or "
            "data.bits to 8."
        )
    if any(config.data.color_jitter) and config.data.bits == 16:
        raise ValueError(
            f"data.color_jitter {config.data.color_jitter} needs images of 8 bits; set it to "
            "(0, 0, 0), or data.bits to 8."
        )
    if config.data.batches not in BATCHES:
        raise ValueError(
            f"data.batches is {config.data.batches!r}; known are {', '.join(BATCHES)}."
        )
    if config.data.crop not in CROPS:
        raise ValueError(f"data.crop is {config.data.crop!r}; known are {', '.join(CROPS)}.")
    size = config.data.target_size
    if config.data.crop == "keep_ratio" and size:
        raise ValueError(
            "data.crop 'keep_ratio' gives one rendering of an image, but data.target_size asks for "
            "two; set it to (), or data.crop to 'random_resized'."
        )
    if size and not (len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        raise ValueError(
            f"data.target_size is {size}; give height and width in pixels, or () for none."
        )
    if config.data.augment and size:
        raise ValueError(
            f"data.augment {config.data.augment!r} would change only one of the two renderings "
            "that data.target_size asks for; set it to '', or data.target_size to ()."
        )
    if config.compute_dtype == "auto":
        config.compute_dtype = "float32" if platform == "cpu" else "bfloat16"
    return config
