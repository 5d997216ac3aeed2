"""Reads weights of any known format, in one naming: that of the MAE code, which timm shares."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mim_jax.conversion import huggingface, timm_models
from mim_jax.conversion.files import read_state_dict
from mim_jax.conversion.formats import State
from mim_jax.models.transformer import LAYER_NORM_EPSILON


class Weights(NamedTuple):
    """Weights as they were found.

    Attributes:
        state: arrays by key. Those of transformers are renamed; those of an official checkpoint
            of another family keep the names of their paper.
        format: "official", "timm", "hf-mae", "hf-vit" or "hf-classifier".
        sizes: what shapes do not tell, where a file beside the weights does: `heads`,
            `decoder_heads`, `image_size`; see `Method.sized_like`.
        notes: for the user: what differs from our models, and what was not read.
    """

    state: State
    format: str
    sizes: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def read_weights(path: str | Path) -> Weights:
    """Weights from a file, or from a model folder of Hugging Face transformers.

    Args:
        path: a `.safetensors`, `.pth`, `.pt` or `.bin` file, or a folder with `config.json`.

    Raises:
        FileNotFoundError: if there is nothing at the path, or a folder lacks a file.
        ValueError: if a file is of another kind, or the model of a kind that none of ours is.
    """
    path = Path(path)
    if path.is_dir():
        return _from_folder(path)
    state = read_state_dict(path)
    if not timm_models.is_timm(state):
        return Weights(state, "official", {})
    arguments = timm_models.read_arguments(path)
    sizes: dict[str, Any] = {}
    if arguments:
        sizes = {"heads": arguments["num_heads"], "image_size": tuple(arguments["img_size"])}
    return Weights(state, "timm", sizes)


def _from_folder(folder: Path) -> Weights:
    theirs, config = huggingface.read_folder(folder)
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu":
        raise ValueError(f"{folder}: hidden_act is {activation!r}; our models compute 'gelu'.")
    notes = []
    epsilon = config.get("layer_norm_eps", 1e-12)
    if epsilon != LAYER_NORM_EPSILON:
        notes.append(
            f"{folder} has layer_norm_eps {epsilon}; our models compute with {LAYER_NORM_EPSILON}"
        )
    pooler = sorted(key for key in theirs if key.startswith(huggingface.POOLER))
    if pooler:
        notes.append(f"not read: {', '.join(pooler)}")
    state = huggingface.from_huggingface({k: v for k, v in theirs.items() if k not in pooler})
    sizes: dict[str, Any] = {
        "heads": config["num_attention_heads"],
        "image_size": _pair(config["image_size"]),
    }
    if "mask_token" in state:
        sizes["decoder_heads"] = config["decoder_num_attention_heads"]
    kinds = {"mask_token": "hf-mae", "head.weight": "hf-classifier"}
    kind = next((name for key, name in kinds.items() if key in state), "hf-vit")
    return Weights(state, kind, sizes, tuple(notes))


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return height, width
