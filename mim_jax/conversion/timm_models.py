"""timm's `VisionTransformer`: a state dict, and a JSON file with the arguments it was built by."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mim_jax.conversion.check import import_library
from mim_jax.conversion.files import write_state_dict
from mim_jax.conversion.formats import (
    Format,
    Model,
    State,
    beyond_plain,
    full_biases,
    no_encoder,
    preprocessing,
    vit_table,
)

ARCHITECTURE = "vit_base_patch16_224"
"""An entry point of timm for `VisionTransformer`; the arguments replace everything of its name."""

KEYS = re.compile(
    r"cls_token|reg_token|pos_embed|(patch_embed\.proj|fc_norm|norm_pre|norm|head"
    r"|blocks\.\d+\.(norm1|attn\.qkv|attn\.proj|norm2|mlp\.fc1|mlp\.fc2))\.(weight|bias)"
    r"|blocks\.\d+\.ls[12]\.gamma"
)
"""All keys of the models that have our blocks."""


def is_timm(keys: Iterable[str]) -> bool:
    """Whether keys are those of a `VisionTransformer`, and nothing else."""
    keys = set(keys)
    return "pos_embed" in keys and all(KEYS.fullmatch(key) for key in keys)


def read_arguments(path: Path) -> dict[str, Any]:
    """The constructor arguments beside a state dict, empty if there are none."""
    beside = path.with_suffix(".json")
    content = json.loads(beside.read_text()) if beside.is_file() else {}
    arguments = content.get("model_args", {}) if isinstance(content, dict) else {}
    return dict(arguments)


def constructor_arguments(model: Model) -> dict[str, Any]:
    """Arguments of timm's `VisionTransformer` for a model of ours."""
    encoder = model.encoder
    blocks = encoder.transformer
    pool = "avg" if model.averages_patches else "token" if encoder.final_norm else ""
    if pool == "token" and not encoder.class_token:
        pool = "avg"
    further: dict[str, Any] = {}  # what a plain ViT does not have
    if blocks.layer_scale is not None:
        further["init_values"] = blocks.layer_scale
    if encoder.registers:
        further["reg_tokens"] = encoder.registers
    if encoder.pre_norm:
        further["pre_norm"] = True
    if blocks.activation != "gelu":
        further["act_layer"] = blocks.activation
    return {
        "img_size": list(encoder.image_size),
        "patch_size": list(encoder.patch_size),
        "in_chans": encoder.channels,
        "num_classes": model.classes,
        "global_pool": pool,
        "embed_dim": encoder.width,
        "depth": blocks.depth,
        "num_heads": blocks.heads,
        "mlp_ratio": blocks.mlp_ratio,
        "qkv_bias": blocks.qkv_bias != "none",
        "class_token": encoder.class_token,
        "no_embed_class": False,
        "fc_norm": model.averages_patches,
        # timm takes it for the norm of either place.
        "final_norm": encoder.final_norm or model.averages_patches,
        **further,
    }


def _write(path: Path, state: State, model: Model) -> None:
    """The state dict, and beside it a JSON file in the form of timm's own `config.json`."""
    given = preprocessing(model)
    arguments = constructor_arguments(model)
    content = {
        "architecture": ARCHITECTURE,
        "num_classes": model.classes,
        "num_features": model.encoder.width,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [given["channels"], *given["image_size"]],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": model.config.evaluate.crop_ratio,
            "mean": given["mean"],
            "std": given["std"],
            "num_classes": model.classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    write_state_dict(path, full_biases(state))
    path.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")


def _forward(path: Path, images: np.ndarray, noise: np.ndarray) -> dict[str, np.ndarray]:
    torch, timm = import_library("torch"), import_library("timm")
    arguments = read_arguments(path)
    model = timm.create_model(ARCHITECTURE, checkpoint_path=str(path), **arguments).eval()
    with torch.no_grad():
        tokens = model.forward_features(
            torch.from_numpy(np.array(images.transpose(0, 3, 1, 2), order="C"))
        )
        found = {"tokens": tokens.numpy()}
        if arguments["num_classes"]:
            found["logits"] = model.forward_head(tokens).numpy()
    return found


def _usage(path: Path) -> str:
    return (
        "import json, timm\n"
        f'arguments = json.load(open("{path.with_suffix(".json")}"))["model_args"]\n'
        f'model = timm.create_model("{ARCHITECTURE}", checkpoint_path="{path}", **arguments)'
    )


KNOWN = ("layer_scale", "registers", "pre_norm", "class_token", "activation")
"""What timm's `VisionTransformer` can do beside a plain ViT, see `beyond_plain`."""


def _refusal(model: Model) -> str:
    return no_encoder(model) or beyond_plain(model, "timm's ViT", KNOWN)


TIMM_FILE = Format("timm", "timm", _refusal, vit_table, _write, _usage, _forward)
