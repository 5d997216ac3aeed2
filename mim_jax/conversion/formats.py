"""What a format of exported weights is, and the tables of a ViT that most of them share."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from mim_jax import layout
from mim_jax.method import Method
from mim_jax.models.vit import ViT

State = dict[str, np.ndarray]
"""Arrays by key."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to export.

    Attributes:
        method: what was trained.
        config: of the run, complete.
        params: parameters by path, as NumPy arrays; shapes are enough to ask for a refusal.
    """

    method: Method
    config: ml_collections.ConfigDict
    params: Mapping[str, np.ndarray]

    @property
    def encoder(self) -> ViT:
        """The ViT below "encoder/"; formats without one have refused before they ask."""
        encoder = self.method.encoder
        assert encoder is not None
        return encoder

    @property
    def classes(self) -> int:
        """Outputs of the classifier, 0 without one."""
        head = self.params.get("head/bias")
        return 0 if head is None else head.shape[0]

    @property
    def averages_patches(self) -> bool:
        """Whether the classifier sees the normalized mean of the patch tokens."""
        return "fc_norm/scale" in self.params


@dataclasses.dataclass(frozen=True)
class Format:
    """One way to write weights.

    Attributes:
        name: as `mim-jax convert --format` takes it.
        reader: what reads it.
        refusal: why it cannot hold a model, as a sentence; empty if it can.
        table: between our parameters and keys in the naming of the MAE code and timm. Only an
            official table must know every parameter; what others leave out is reported.
        write: writes `(output, state, model)`, a state dict of the table's keys.
        usage: Python code that loads a given output.
        forward: what the reader's own code computes from an output, by name, see
            `mim_jax.conversion.check.Outputs`; None if there is no such code to install.
    """

    name: str
    reader: str
    refusal: Callable[[Model], str]
    table: Callable[[Model], layout.Layout]
    write: Callable[[Path, State, Model], None]
    usage: Callable[[Path], str]
    forward: Callable[[Path, np.ndarray, np.ndarray], dict[str, np.ndarray]] | None = None

    def held(self, model: Model) -> set[str]:
        """Paths of the parameters that an output of this format would hold."""
        if self.refusal(model):
            return set()
        return {rule.path for rule in self.table(model).rules} & set(model.params)


def encoder_table(model: Model) -> layout.Layout:
    """A ViT as timm and the MAE code name it, whatever its paper's own checkpoint looks like."""
    encoder = model.encoder
    return layout.Layout(tuple(layout.vit_rules("encoder", encoder)), layout.vit_constants(encoder))


def vit_table(model: Model) -> layout.Layout:
    """`encoder_table`, and the classifier if there is one."""
    table = encoder_table(model)
    rules = list(table.rules)
    if model.averages_patches:
        rules += layout.layer_norm_rules("fc_norm", "fc_norm")
    if model.classes:
        rules += layout.linear_rules("head", "head")
    return dataclasses.replace(table, rules=tuple(rules))


def no_encoder(model: Model) -> str:
    """The refusal of a method without a ViT."""
    if model.method.encoder is None:
        return f"method {model.config.method!r} has no ViT encoder."
    return ""


def preprocessing(model: Model) -> dict[str, Any]:
    """What turns samples into the model's input: size, and range, mean and std of the samples."""
    data = model.config.data
    return {
        "image_size": tuple(data.image_size),
        "channels": data.channels,
        "largest": 2 ** data.get("bits", 8) - 1,
        "mean": [float(value) for value in data.mean],
        "std": [float(value) for value in data.std],
    }
