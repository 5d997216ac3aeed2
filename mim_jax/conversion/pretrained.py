"""Loads the parts of a method that start from weights of their own: `Method.pretrained`."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from mim_jax.conversion.dvae import dvae_layout, read_dvae
from mim_jax.conversion.face_models import read_iresnet, read_lpips
from mim_jax.conversion.towers import read_text_tower, read_tower
from mim_jax.method import Method, Pretrained
from mim_jax.models.dvae import DVAEEncoder
from mim_jax.models.iresnet import IResNet
from mim_jax.models.lpips import LPIPS
from mim_jax.models.text import TextTower
from mim_jax.models.tower import Tower
from mim_jax.models.vit import ViT, adopted
from mim_jax.training.state import TrainState
from mim_jax.training.tree import differences, flatten, unflatten


def load_pretrained(
    method: Method, state: TrainState, *, required: bool = True
) -> tuple[TrainState, list[str]]:
    """Puts the weights that a method starts from into a new state.

    Args:
        method: declares its parts in `pretrained`.
        state: at step 0.
        required: refuse an empty path, rather than leave the part at its initial values.

    Returns:
        The state, laid out as before, and notes for the user.

    Raises:
        FileNotFoundError: if there is nothing at a path.
        ValueError: if a required path is empty; or weights are missing, too many or wrongly
            shaped, with the full list.
    """
    old = flatten(state.params)
    notes = []
    for part in method.pretrained:
        if not part.path and not required:
            continue
        if not part.path:
            raise ValueError(
                f"{part.field} is empty: this method needs the weights of a trained model for "
                f"{part.target!r}. Give a .safetensors or .pth file, a folder of Hugging Face, or "
                "the folder of a run."
            )
        start = f"{part.target}/"
        wanted = {k.removeprefix(start): v for k, v in old.items() if k.startswith(start)}
        wanted = {
            name: leaf
            for name, leaf in wanted.items()
            if not any(re.match(pattern, name) for pattern in part.fresh)
        }
        given = _read(part, wanted)
        problems = differences(given, wanted, part.path)
        if problems:
            raise ValueError(
                f"the weights of {part.path} do not fit {part.target!r}:\n  "
                + "\n  ".join(problems)
                + f"\nThey are named by {part.field}; the fields beside it describe the model."
            )
        for name, value in given.items():
            old[start + name] = jax.device_put(value, wanted[name].sharding)
        notes.append(f"{part.target}: {len(given)} arrays from {part.path}")
    return dataclasses.replace(state, params=unflatten(old)), notes


def _read(part: Pretrained, wanted: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A part's parameters by path inside the part."""
    module: nn.Module = part.module
    if isinstance(module, (Tower, ViT)):
        receiver = module.encoder if isinstance(module, Tower) else module
        prefix = "encoder/" if isinstance(module, ViT) else ""
        tower, params = read_tower(
            part.path,
            projection=receiver is not module,
            given={"width": receiver.width, "heads": receiver.transformer.heads},
        )
        found = {}
        for name in wanted:
            path = prefix + name
            inside = path.startswith("encoder/")
            value = adopted(path, params, tower.encoder, receiver) if inside else params.get(path)
            if value is not None:
                found[name] = value
        return found
    if isinstance(module, TextTower):
        return read_text_tower(part.path)[1]
    if isinstance(module, (DVAEEncoder, IResNet, LPIPS)):
        try:
            if isinstance(module, IResNet):
                return flatten(read_iresnet(part.path, module))
            if isinstance(module, LPIPS):
                return flatten(read_lpips(part.path, module))
            return flatten(dvae_layout(module).load(read_dvae(part.path), unflatten(dict(wanted))))
        except ValueError as error:
            raise ValueError(f"{part.path}, named by {part.field}: {error}") from error
    raise TypeError(f"{type(module).__name__} has no reader of weights.")
