"""Writes the weights of a model for others: official checkpoint, transformers, timm."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from mim_jax.conversion import check
from mim_jax.conversion.card import card_path, model_card
from mim_jax.conversion.files import write_state_dict
from mim_jax.conversion.formats import Format, Model, State, split_biases
from mim_jax.conversion.huggingface import CLASSIFIER_FOLDER, MAE_FOLDER, VIT_FOLDER
from mim_jax.conversion.monai import MONAI_FILE
from mim_jax.conversion.timm_models import TIMM_FILE
from mim_jax.conversion.weights import read_weights
from mim_jax.layout import Layout
from mim_jax.method import Method, parameter_shapes
from mim_jax.training.tree import flatten, unflatten


def _official_refusal(model: Model) -> str:
    if model.method.layout() is None:
        return f"method {model.config.method!r} has no official checkpoint format."
    return ""


def _official_table(model: Model) -> Layout:
    table = model.method.layout()
    assert table is not None
    return table


def _write_official(path: Path, state: State, model: Model) -> None:
    write_state_dict(path, state)


def _official_usage(path: Path) -> str:
    if path.suffix == ".safetensors":
        load = f'from safetensors.torch import load_file\nstate = load_file("{path}")'
    else:
        load = f'import torch\nstate = torch.load("{path}", weights_only=True)["model"]'
    return f"{load}\nmodel.load_state_dict(state)  # the paper's own class, of the sizes above"


OFFICIAL = Format(
    "official",
    "the paper's own code",
    _official_refusal,
    _official_table,
    _write_official,
    _official_usage,
)

FORMATS = {
    kind.name: kind
    for kind in (OFFICIAL, MAE_FOLDER, VIT_FOLDER, CLASSIFIER_FOLDER, TIMM_FILE, MONAI_FILE)
}


def export_variables(
    method: Method,
    config: ml_collections.ConfigDict,
    variables: Mapping[str, Any],
    output: Path,
    format: str = "official",
    *,
    step: int | None = None,
    run_library: bool = True,
) -> str:
    """Writes weights and a model card, reads them back, and checks what they compute.

    Args:
        method: what was trained.
        config: of the run, complete.
        variables: of the method, on the host or on devices of this process.
        output: a file, or a folder for the formats of transformers.
        format: a name in `FORMATS`.
        step: of the checkpoint, for the card.
        run_library: where the library that reads the format is installed, compare its own forward
            pass as well; this imports PyTorch.

    Returns:
        Notes on what was written, what was left out and what was checked.

    Raises:
        ValueError: if the format is unknown or cannot hold the model, or what was written does
            not give back the same values.
    """
    output = Path(output)
    variables = jax.device_get(variables)
    model = Model(method, config, flatten(variables["params"]))
    kind = find_format(format, model)
    held = kind.held(model) if kind is not OFFICIAL else _officially_held(model)
    table = kind.table(model)
    params = unflatten({path: model.params[path] for path in held})
    own = table.joined({**variables, "params": params})
    state = table.save(own)
    kind.write(output, state, model)
    loaded = table.load(split_biases(read_weights(output).state, table), own)
    again = flatten(loaded)
    for path, value in sorted(flatten(own).items()):
        if not np.array_equal(again[path], value):
            raise ValueError(f"{output} does not give {path} back exactly; do not use it.")
    apart = table.parted(loaded)
    params = unflatten({**model.params, **flatten(apart["params"])})
    merged = {**variables, **apart, "params": params}
    exact = check.in_float32(config, type(method))
    notes = [
        *_left_out(model, held),
        *_checks(kind, exact, config, variables, merged, output, run_library),
    ]
    card = card_path(output)
    card.write_text(model_card(kind, model, output, step=step, held=held, notes=notes))
    first = f"wrote {len(state)} arrays to {output}; read back exactly"
    return "\n".join([first, *notes, f"model card: {card}"])


def check_formats(names: Iterable[str], method: Method, config: ml_collections.ConfigDict) -> None:
    """Raises `ValueError` for a format that is unknown or cannot hold a method, before training."""
    names = list(names)
    if names:
        model = Model(method, config, flatten(parameter_shapes(method)))
        for name in names:
            find_format(name, model)


def find_format(name: str, model: Model) -> Format:
    """A format by name that can hold a model.

    Raises:
        ValueError: if there is none of that name, or it cannot; the message lists those that can.
    """
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; known are {', '.join(FORMATS)}.")
    reason = FORMATS[name].refusal(model)
    if reason:
        others = [other.name for other in FORMATS.values() if not other.refusal(model)]
        hint = f" Formats that can: {', '.join(others)}." if others else ""
        raise ValueError(f"format {name!r} cannot hold this model: {reason}{hint}")
    return FORMATS[name]


def _officially_held(model: Model) -> set[str]:
    """All parameters, but for frozen networks that the paper's own checkpoint does not hold."""
    known = {rule.path for rule in _official_table(model).rules}
    frozen = model.method.frozen
    return {
        path
        for path in model.params
        if path in known or not any(re.search(pattern, path) for pattern in frozen)
    }


def _left_out(model: Model, held: set[str]) -> list[str]:
    """A note on each part that an output lacks, and the formats that would hold it."""
    parts: dict[str, set[str]] = {}
    for path in sorted(set(model.params) - held):
        parts.setdefault(path.partition("/")[0], set()).add(path)
    notes = []
    for part, paths in parts.items():
        formats = [kind.name for kind in FORMATS.values() if paths <= kind.held(model)]
        travels = f"it travels by {', '.join(formats)}" if formats else "no format holds it"
        notes.append(f"left out: {part} ({len(paths)} arrays); {travels}")
    return notes


def _checks(
    kind: Format,
    method: Method,
    config: ml_collections.ConfigDict,
    variables: Mapping[str, Any],
    again: Mapping[str, Any],
    output: Path,
    run_library: bool,
) -> list[str]:
    """Notes on the checks that were made.

    Raises:
        ValueError: if one fails.
    """
    images = check.fixed_images(method, config)
    if images is None:
        return ["not checked: features, since the method takes no plain images"]
    difference = check.feature_difference(method, variables, again, images)
    _require(difference, "features", output)
    notes = [
        f"checked: features of {len(images)} fixed images from the weights read back, largest "
        f"difference {difference:.1e} of the largest value"
    ]
    if kind.forward is None:
        return notes
    if not run_library:
        return [*notes, f"not checked: the forward pass of {kind.reader}"]
    noise = check.fixed_noise(method)
    try:
        theirs = kind.forward(output, images, noise)
    except ImportError as error:
        return [*notes, f"not checked: the forward pass of {kind.reader} ({error})"]
    ours = check.outputs(method, variables, images, noise)
    difference = check.largest_difference(ours, theirs)
    _require(difference, f"{kind.reader}'s forward pass", output)
    library = check.library_version(kind.reader.partition(".")[0])
    return [
        *notes,
        f"checked: {', '.join(theirs)} by {kind.reader} ({library}), largest difference "
        f"{difference:.1e} of the largest value",
    ]


def _require(difference: float, what: str, output: Path) -> None:
    if not difference <= check.TOLERANCE:
        raise ValueError(
            f"{output}: {what} differs by {difference:.3g} of the largest value, more than "
            f"{check.TOLERANCE:g}; do not use it."
        )
