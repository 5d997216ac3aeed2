"""What a format of exported weights is, and the tables of a ViT that most of them share."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from mim_jax import layout
from mim_jax.method import Method
from mim_jax.models.transformer import LAYER_NORM_EPSILON
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


SPLIT = ("attn.q_bias", "attn.v_bias")
"""Biases of a block whose keys have none, in a table; a file has one bias for all three."""


def encoder_table(model: Model) -> layout.Layout:
    """A ViT as timm and the MAE code name it, whatever its paper's own checkpoint looks like.

    Positions of registers, which timm has, are zero. See `full_biases` for biases of queries and
    values alone.
    """
    encoder = model.encoder
    names = layout.TIMM
    if encoder.transformer.qkv_bias == "query_value":
        names = names._replace(qkv_bias=SPLIT)
    rules = list(layout.vit_rules("encoder", encoder, names=names))
    constants = list(layout.vit_constants(encoder))
    if encoder.registers:
        spread = _with_register_positions(encoder)
        rules = [
            dataclasses.replace(r, transform=spread) if r.key == "pos_embed" else r for r in rules
        ]
        constants = [dataclasses.replace(c, value=spread.save(c.value[0])) for c in constants]
    return layout.Layout(tuple(rules), tuple(constants))


def _with_register_positions(encoder: ViT) -> layout.Transform:
    """Positions `[1 + tokens, width]` and timm's `[1, 1 + registers + tokens, width]`."""
    leading, registers = int(encoder.class_token), encoder.registers

    def load(theirs: np.ndarray) -> np.ndarray:
        return np.delete(theirs[0], range(leading, leading + registers), axis=0)

    def save(ours: np.ndarray) -> np.ndarray:
        zeros = np.zeros((registers, ours.shape[1]), ours.dtype)
        return np.concatenate([ours[:leading], zeros, ours[leading:]])[None]

    return layout.Transform(load, save)


def full_biases(state: Mapping[str, np.ndarray]) -> State:
    """A state dict with one bias for query, key and value; the key's is zero if it has none."""
    full: State = {}
    for key, value in state.items():
        block, _, name = key.rpartition("attn.")
        if f"attn.{name}" == SPLIT[0]:
            parts = (value, np.zeros_like(value), state[block + SPLIT[1]])
            full[f"{block}attn.qkv.bias"] = np.concatenate(parts)
        elif f"attn.{name}" != SPLIT[1]:
            full[key] = value
    return full


def split_biases(state: Mapping[str, np.ndarray], table: layout.Layout) -> State:
    """The inverse of `full_biases`, for the blocks for which a table asks for it."""
    split = dict(state)
    for key in (rule.key for rule in table.rules if rule.key.endswith(SPLIT[0])):
        block = key.removesuffix(SPLIT[0])
        if f"{block}attn.qkv.bias" not in split:
            continue  # an official file that keeps them apart itself
        query, zero, value = np.split(split.pop(f"{block}attn.qkv.bias"), 3)
        if not np.any(zero):
            split |= {key: query, block + SPLIT[1]: value}
    return split


def beyond_plain(model: Model, reader: str, known: Iterable[str] = ()) -> str:
    """What an encoder does that another ViT does not, as a refusal; empty if there is nothing.

    Args:
        model: with an encoder.
        reader: the other, such as "timm's ViT".
        known: of the names below, what the other can do.
    """
    encoder = model.encoder
    blocks = encoder.transformer
    norms = {blocks.epsilon, encoder.norm_epsilon or blocks.epsilon}
    features = {
        "volumes": (len(encoder.patch_size) != 2, "takes volumes"),
        "logit_cap": (blocks.logit_cap is not None, "bounds its attention logits"),
        "position_bias": (
            blocks.position_bias is not None or encoder.shared_position_bias,
            "adds a bias of relative positions to its attention",
        ),
        "layer_scale": (blocks.layer_scale is not None, "scales its branches by learned factors"),
        "pre_norm": (encoder.pre_norm, "normalizes the tokens before its first block"),
        "class_token": (not encoder.class_token, "has no class token"),
        "registers": (encoder.registers > 0, "has register tokens"),
        "patch_bias": (
            encoder.patch_bias == encoder.pre_norm,
            f"has {'a' if encoder.patch_bias else 'no'} bias in its patch embedding",
        ),
        "positions": (encoder.positions == "none", "has no positions"),
        "activation": (
            blocks.activation != "gelu",
            f"has the activation {blocks.activation!r}",
        ),
        "epsilon": (
            norms != {LAYER_NORM_EPSILON},
            f"has LayerNorms of epsilon {max(norms):g}, not {LAYER_NORM_EPSILON:g}",
        ),
        "norm_epsilon": (len(norms) > 1, "has a final LayerNorm of an epsilon of its own"),
        "head_width": (
            blocks.head_width not in (None, encoder.width // blocks.heads),
            "has attention heads of a width of their own",
        ),
        "causal": (blocks.causal, "hides later tokens from earlier ones"),
        "floor_grid": (
            encoder.covered_size != tuple(encoder.image_size),
            "leaves pixels at the border out",
        ),
    }
    found = [text for name, (is_so, text) in features.items() if is_so and name not in set(known)]
    return f"its encoder {' and '.join(found)}, which {reader} does not." if found else ""


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
