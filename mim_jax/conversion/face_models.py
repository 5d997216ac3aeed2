"""Reads the frozen networks that Vec2Face learns with: a face model, and LPIPS."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.conversion.files import TORCH_SUFFIXES, read_state_dict
from mim_jax.layout.vec2face import iresnet_layout, lpips_layout
from mim_jax.models.iresnet import IResNet
from mim_jax.models.lpips import LPIPS

PACKAGED = {"tiny": Path(__file__).parent / "assets" / "tiny_face_model.safetensors"}
"""Face models of the package by the name that stands in place of a path."""

UNUSED = r"(classifier|lin|lins)\..*"
"""What files of VGG16 and LPIPS hold beside the network or a second time."""


def read_iresnet(path: str | Path, model: IResNet) -> dict[str, Any]:
    """All variables of a face model: `params` and `batch_stats`.

    Args:
        path: a file with a state dict in InsightFace's names, or a name in `PACKAGED`.
        model: the network.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it does not fit the network.
    """
    images = jnp.zeros((1, *model.image_size, model.channels))
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
    return iresnet_layout(model).load(read_state_dict(PACKAGED.get(str(path), path)), like)


def read_lpips(path: str | Path, model: LPIPS) -> dict[str, Any]:
    """Parameters of LPIPS.

    Args:
        path: a file with the whole state dict of LPIPS, or a folder with two files: VGG16 in
            torchvision's names, and the heads (`vgg.pth` of LPIPS).
        model: the network.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if weights are missing or do not fit.
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        known = (".safetensors", *TORCH_SUFFIXES)
        files = sorted(file for file in path.iterdir() if file.name.endswith(known))
    state: dict[str, np.ndarray] = {}
    for file in files:
        state |= read_state_dict(file)
    layout = lpips_layout(model)
    slices = {  # torchvision numbers all layers in one sequence
        match[1]: rule.key.rpartition(".")[0]
        for rule in layout.rules
        if (match := re.fullmatch(r"net\.slice\d\.(\d+)\.weight", rule.key))
    }

    def renamed(key: str) -> str:
        match = re.fullmatch(r"features\.(\d+)\.(weight|bias)", key)
        return f"{slices[match[1]]}.{match[2]}" if match and match[1] in slices else key

    fixed = {table.key: table.value for table in layout.constants}
    given = {renamed(k): v for k, v in state.items() if not re.fullmatch(UNUSED, k)}
    images = jnp.zeros((1, 32, 32, 3))
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), images, images))["params"]
    return layout.load({**fixed, **given}, like)
