"""Encoders for volumes as MONAI's UNETR has them."""

from pathlib import Path

from mim_jax.conversion.files import write_state_dict
from mim_jax.conversion.formats import Format, Model, State, beyond_plain, no_encoder
from mim_jax.layout import Layout
from mim_jax.layout.unetr import vit_layout


def _refusal(model: Model) -> str:
    reason = no_encoder(model)
    if reason:
        return reason
    if len(model.encoder.patch_size) != 3:
        return "its encoder takes images, and MONAI's UNETR takes volumes."
    if not model.encoder.final_norm:
        return "its encoder does not normalize its output, which MONAI's does."
    # The class token is left out, and MONAI's own epsilon is 1e-5: both are noted in the paper.
    known = ("volumes", "class_token", "epsilon", "norm_epsilon")
    return beyond_plain(model, "MONAI's ViT", known)


def _table(model: Model) -> Layout:
    return vit_layout(model.encoder)


def _write(path: Path, state: State, model: Model) -> None:
    write_state_dict(path, state)


def _usage(path: Path) -> str:
    if path.suffix == ".safetensors":
        load = f'from safetensors.torch import load_file\nstate = load_file("{path}")'
    else:
        load = f'import torch\nstate = torch.load("{path}", weights_only=True)["model"]'
    return f"{load}\nunetr.load_state_dict(state, strict=False)  # monai.networks.nets.UNETR"


MONAI_FILE = Format("monai-vit", "MONAI's UNETR", _refusal, _table, _write, _usage)
"""The ViT of a UNETR, without class token; its keys begin with `vit.`."""
