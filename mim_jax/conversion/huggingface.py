"""Hugging Face transformers: `ViTMAEForPreTraining`, `ViTModel` and `ViTForImageClassification`.

A state dict is translated from key to key between the naming of their hub and that of the MAE code
and timm; only the fused query-key-value projection becomes three. Nothing here needs PyTorch,
except to run their code.
"""

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mim_jax.conversion.check import import_library
from mim_jax.conversion.files import read_state_dict, write_state_dict
from mim_jax.conversion.formats import (
    Format,
    Model,
    State,
    beyond_plain,
    encoder_table,
    full_biases,
    no_encoder,
    preprocessing,
    vit_table,
)
from mim_jax.layout import Layout
from mim_jax.methods.mae import MAE
from mim_jax.training.checkpoints import FOLDER

NAMES = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "blocks": "vit.encoder.layer",
    "norm": "vit.layernorm",
    "head": "classifier",
    "decoder_embed": "decoder.decoder_embed",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_blocks": "decoder.decoder_layers",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}
"""Parts of a model: name in the MAE code, name in transformers."""

BLOCK_NAMES = {
    "norm1": "layernorm_before",
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
"""Parts of a block, after its fused projection is split in three."""

WEIGHTS = "model.safetensors"

POOLER = "pooler."
"""A layer of `ViTModel` behind the class token, which no masked autoencoder has."""

CLASSES = ("ViTMAEForPreTraining", "ViTMAEModel", "ViTModel", "ViTForImageClassification")
"""What `config.json` may name as its architecture."""


def to_huggingface(state: Mapping[str, np.ndarray], prefix: str = "vit.") -> State:
    """A state dict in the naming of the MAE code and timm, in that of transformers.

    Args:
        state: arrays by key.
        prefix: of the encoder; `ViTModel` has none.

    Raises:
        KeyError: for a key that transformers has no name for.
    """
    renamed = {}
    for key, value in _split_projections(state).items():
        name = _renamed(key, NAMES, BLOCK_NAMES)
        if name is None:
            raise KeyError(f"transformers has no name for {key}.")
        renamed[prefix + name.removeprefix("vit.") if name.startswith("vit.") else name] = value
    return renamed


def from_huggingface(state: Mapping[str, np.ndarray]) -> State:
    """The inverse of `to_huggingface`, for both prefixes; keys it does not know stay as given."""
    names = {theirs: ours for ours, theirs in NAMES.items()}
    block_names = {theirs: ours for ours, theirs in BLOCK_NAMES.items()}
    renamed = {}
    for key, value in state.items():
        # transformers 5 saves the decoder's blocks under this name, and reads both.
        full = key.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers.")
        if full.startswith(("embeddings.", "encoder.", "layernorm.")):
            full = f"vit.{full}"
        renamed[_renamed(full, names, block_names) or key] = value
    return _fuse_projections(renamed)


def _renamed(key: str, names: Mapping[str, str], block_names: Mapping[str, str]) -> str | None:
    """A key in the other naming, or None if it has none there."""
    block = re.fullmatch(r"(.+?)\.(\d+)\.(.+)\.(weight|bias)", key)
    if block and block[1] in names and block[3] in block_names:
        return f"{names[block[1]]}.{block[2]}.{block_names[block[3]]}.{block[4]}"
    name, leaf = re.fullmatch(r"(.+?)(\.weight|\.bias)?", key, re.DOTALL).groups("")  # type: ignore[union-attr]
    return names[name] + leaf if name in names else None


def _split_projections(state: Mapping[str, np.ndarray]) -> State:
    """`attn.qkv` as `attn.q`, `attn.k` and `attn.v`; its rows are in this order."""
    split: State = {}
    for key, value in state.items():
        names = "qkv" if ".attn.qkv." in key else ("qkv",)
        pieces = np.split(value, len(names))
        split |= {key.replace(".qkv.", f".{name}."): p for name, p in zip(names, pieces)}
    return split


def _fuse_projections(state: Mapping[str, np.ndarray]) -> State:
    """The inverse of `_split_projections`; an incomplete projection stays as it is."""
    fused: State = {}
    for key, value in state.items():
        part = re.search(r"\.attn\.([qkv])\.", key)
        keys = [key.replace(part[0], f".attn.{name}.") for name in "qkv"] if part else []
        if part is None or not all(name in state for name in keys):
            fused[key] = value
        elif part[1] == "q":
            whole = np.concatenate([state[name] for name in keys])
            fused[key.replace(".attn.q.", ".attn.qkv.")] = whole
    return fused


def read_folder(folder: Path) -> tuple[State, dict[str, Any]]:
    """Arrays by key as they are in a model folder, and its `config.json`.

    Raises:
        FileNotFoundError: if the folder lacks one of them.
        ValueError: for an architecture that is not one of `CLASSES`.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} is a folder, but no run of ours (with checkpoints), and no model folder of "
            "transformers (with config.json)."
        )
    config = json.loads((folder / "config.json").read_text())
    architecture = ", ".join(config.get("architectures") or [])
    if architecture not in CLASSES:
        raise ValueError(
            f"{folder}/config.json names the architecture {architecture or 'none'!r}; known are "
            f"{', '.join(CLASSES)}."
        )
    return read_arrays(folder), config


def read_arrays(folder: Path) -> State:
    """Arrays by key of a model folder, in one file or several.

    Raises:
        FileNotFoundError: if the folder holds none.
    """
    index = folder / f"{WEIGHTS}.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = [name for name in (WEIGHTS, "pytorch_model.bin") if (folder / name).is_file()][:1]
    if not files:
        raise FileNotFoundError(f"{folder} holds neither {WEIGHTS} nor pytorch_model.bin.")
    state: State = {}
    for name in files:
        state |= read_state_dict(folder / name)
    return state


def _write(
    folder: Path, state: State, model: Model, *, config: Callable[[Model], dict], prefix: str
) -> None:
    """A model folder: weights, `config.json` and `preprocessor_config.json`."""
    if folder.suffix in (".safetensors", ".pth", ".pt", ".bin") or folder.is_file():
        raise ValueError(f"{folder}: this format is a folder; give --output a folder's name.")
    if (folder / FOLDER).is_dir():
        raise ValueError(
            f"{folder} is a run, with a config.json of its own; choose another --output."
        )
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"config.json": config(model), "preprocessor_config.json": _preprocessor(model)}
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    write_state_dict(folder / WEIGHTS, to_huggingface(full_biases(state), prefix))


def _preprocessor(model: Model) -> dict[str, Any]:
    given = preprocessing(model)
    height, width = given["image_size"]
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / given["largest"],
        "do_normalize": True,
        "image_mean": given["mean"],
        "image_std": given["std"],
    }


def _vit_config(model: Model, architecture: str) -> dict[str, Any]:
    """`config.json` of a plain ViT."""
    encoder = model.encoder
    blocks = encoder.transformer
    return {
        "architectures": [architecture],
        "model_type": "vit",
        "image_size": _side(encoder.image_size),
        "patch_size": _side(encoder.patch_size),
        "num_channels": encoder.channels,
        "hidden_size": encoder.width,
        "num_hidden_layers": blocks.depth,
        "num_attention_heads": blocks.heads,
        "intermediate_size": round(encoder.width * blocks.mlp_ratio),
        "hidden_act": "gelu",  # the exact one, by erf
        "layer_norm_eps": blocks.epsilon,
        "qkv_bias": blocks.qkv_bias != "none",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
    }


def _side(size: tuple[int, ...]) -> int | list[int]:
    """One number for a square, else height and width."""
    return size[0] if size[0] == size[1] else list(size)


def _mae_config(model: Model) -> dict[str, Any]:
    assert isinstance(model.method, MAE)
    decoder = model.method.model.decoder
    return _vit_config(model, "ViTMAEForPreTraining") | {
        "model_type": "vit_mae",
        "decoder_hidden_size": decoder.width,
        "decoder_num_hidden_layers": decoder.transformer.depth,
        "decoder_num_attention_heads": decoder.transformer.heads,
        "decoder_intermediate_size": int(decoder.width * decoder.transformer.mlp_ratio),
        "mask_ratio": model.config.model.mask_ratio,
        "norm_pix_loss": model.method.normalize_target,
    }


def _classifier_config(model: Model) -> dict[str, Any]:
    several = getattr(model.method, "labels", "single") == "multi"
    labels = {str(i): f"LABEL_{i}" for i in range(model.classes)}
    return _vit_config(model, "ViTForImageClassification") | {
        "id2label": labels,
        "label2id": {label: int(i) for i, label in labels.items()},
        "problem_type": f"{'multi' if several else 'single'}_label_classification",
    }


def _mae_refusal(model: Model) -> str:
    if not isinstance(model.method, MAE):
        return (
            f"method {model.config.method!r} is no MAE, so it has no decoder for "
            "ViTMAEForPreTraining."
        )
    for name, (height, width) in {
        "images": model.encoder.image_size,
        "patches": model.encoder.patch_size,
    }.items():
        if height != width:
            return f"ViTMAEForPreTraining takes square {name} only, not {height} x {width}."
    return beyond_plain(model, "ViTMAEForPreTraining", ("epsilon",))


def _vit_refusal(model: Model) -> str:
    if not no_encoder(model) and not model.encoder.final_norm:
        return (
            "transformers' ViT ends in a LayerNorm over all tokens, which this encoder does not "
            "have; its classifier averages the patch tokens first."
        )
    return no_encoder(model) or beyond_plain(model, "transformers' ViT", ("epsilon",))


def _classifier_refusal(model: Model) -> str:
    return _vit_refusal(model) or ("" if model.classes else "it has no classifier.")


def _mae_table(model: Model) -> Layout:
    table = model.method.layout()
    assert table is not None
    return table


@contextlib.contextmanager
def _loaded(folder: Path, name: str, **settings: Any) -> Iterator[tuple[Any, Any]]:
    """PyTorch, and a model as transformers loads it, both without gradients and progress bars.

    Raises:
        ImportError: if PyTorch or transformers cannot be imported.
        ValueError: if transformers finds an array missing or one too many.
    """
    torch, transformers = import_library("torch"), import_library("transformers")
    log = transformers.utils.logging
    shown = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        model, found = getattr(transformers, name).from_pretrained(
            folder, output_loading_info=True, local_files_only=True, **settings
        )
    finally:
        if shown:
            log.enable_progress_bar()
    problems = {kind: sorted(map(str, keys)) for kind, keys in found.items() if keys}
    if problems:
        raise ValueError(f"transformers does not load {folder} as a whole: {problems}.")
    with torch.no_grad():
        yield torch, model.eval()


def _channels_first(torch: Any, images: np.ndarray) -> Any:
    return torch.from_numpy(np.array(images.transpose(0, 3, 1, 2), order="C"))


def _mae_forward(folder: Path, images: np.ndarray, noise: np.ndarray) -> dict[str, np.ndarray]:
    with _loaded(folder, "ViTMAEForPreTraining") as (torch, model):
        pixels = _channels_first(torch, images)
        output = model(pixels, noise=torch.from_numpy(noise))
        # With nothing removed and ascending noise, tokens are those of whole images in order.
        model.config.mask_ratio = 0.0
        in_order = torch.arange(noise.shape[1]).expand(len(images), -1)
        tokens = model.vit(pixels, noise=in_order).last_hidden_state
        return {
            "tokens": tokens.numpy(),
            "prediction": output.logits.numpy(),
            "loss": output.loss.numpy(),
        }


def _vit_forward(folder: Path, images: np.ndarray, noise: np.ndarray) -> dict[str, np.ndarray]:
    with _loaded(folder, "ViTModel", add_pooling_layer=False) as (torch, model):
        return {"tokens": model(_channels_first(torch, images)).last_hidden_state.numpy()}


def _classifier_forward(
    folder: Path, images: np.ndarray, noise: np.ndarray
) -> dict[str, np.ndarray]:
    with _loaded(folder, "ViTForImageClassification") as (torch, model):
        pixels = _channels_first(torch, images)
        return {
            "tokens": model.vit(pixels).last_hidden_state.numpy(),
            "logits": model(pixels).logits.numpy(),
        }


def _usage(name: str, folder: Path, arguments: str = "") -> str:
    return (
        f"from transformers import {name}, AutoImageProcessor\n"
        f'model = {name}.from_pretrained("{folder}"{arguments})\n'
        f'processor = AutoImageProcessor.from_pretrained("{folder}")'
    )


MAE_FOLDER = Format(
    "hf-mae",
    "transformers.ViTMAEForPreTraining",
    _mae_refusal,
    _mae_table,
    functools.partial(_write, config=_mae_config, prefix="vit."),
    functools.partial(_usage, "ViTMAEForPreTraining"),
    _mae_forward,
)

VIT_FOLDER = Format(
    "hf-vit",
    "transformers.ViTModel",
    _vit_refusal,
    encoder_table,
    functools.partial(
        _write, config=functools.partial(_vit_config, architecture="ViTModel"), prefix=""
    ),
    functools.partial(_usage, "ViTModel", arguments=", add_pooling_layer=False"),
    _vit_forward,
)

CLASSIFIER_FOLDER = Format(
    "hf-classifier",
    "transformers.ViTForImageClassification",
    _classifier_refusal,
    vit_table,
    functools.partial(_write, config=_classifier_config, prefix="vit."),
    functools.partial(_usage, "ViTForImageClassification"),
    _classifier_forward,
)
