"""Towers of other libraries with random weights: every layer computes what theirs does."""

import functools
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.conversion.files import read_state_dict, write_state_dict
from mim_jax.conversion.towers import read_text_tower, read_tower, settings_of
from mim_jax.models.positions import sincos_positions
from mim_jax.models.tower import TOWERS, see, tower_settings
from mim_jax.tower_layout import text_layout, tower_layout
from mim_jax.training.tree import unflatten
from tests.conversion.libraries import need_timm, need_transformers

SIZES = dict(
    hidden_size=16,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=12,
    patch_size=4,
)
OTHER = dict(
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=3,
    image_size=10,
    patch_size=5,
    num_channels=1,
)
TEXT = dict(
    hidden_size=12,
    intermediate_size=30,
    num_hidden_layers=2,
    num_attention_heads=3,
    vocab_size=31,
    max_position_embeddings=7,
    eos_token_id=29,
    bos_token_id=0,
    pad_token_id=1,
    projection_dim=10,
)
BEIT = dict(use_mean_pooling=True, drop_path_rate=0.0)


class Kind(NamedTuple):
    """A model class of transformers, its config class with fields, and what we call it."""

    model: str
    config: str
    fields: dict
    family: str
    naming: str
    key: str = ""


KINDS = {
    "clip": Kind(
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        SIZES | dict(projection_dim=9),
        "clip",
        "hf-clip",
    ),
    "clip-other": Kind("CLIPVisionModel", "CLIPVisionConfig", OTHER, "clip", "hf-clip-flat"),
    "openclip": Kind(
        "CLIPVisionModel",
        "CLIPVisionConfig",
        SIZES | dict(hidden_act="gelu"),
        "openclip",
        "hf-clip-flat",
    ),
    "siglip": Kind("SiglipVisionModel", "SiglipVisionConfig", SIZES, "siglip", "hf-siglip-flat"),
    # 13 pixels are three patches of 4, and one pixel that no patch sees.
    "siglip-floor": Kind(
        "SiglipVisionModel",
        "SiglipVisionConfig",
        SIZES | dict(image_size=13),
        "siglip",
        "hf-siglip-flat",
    ),
    "vit": Kind("ViTModel", "ViTConfig", SIZES, "vit", "hf-vit"),
    "vit-other": Kind("ViTForImageClassification", "ViTConfig", OTHER, "vit", "hf-vit", "vit."),
    "mae": Kind("ViTMAEModel", "ViTMAEConfig", SIZES, "mae", "hf-vit"),
    "dinov2": Kind("Dinov2Model", "Dinov2Config", SIZES | dict(mlp_ratio=3), "dinov2", "hf-dinov2"),
    "dinov2-registers": Kind(
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        OTHER | dict(num_register_tokens=3),
        "dinov2",
        "hf-dinov2",
    ),
    "beit-shared": Kind(
        "BeitForMaskedImageModeling",
        "BeitConfig",
        SIZES | BEIT | dict(use_shared_relative_position_bias=True, vocab_size=5),
        "beit",
        "hf-beit",
        "beit.",
    ),
    "beit-blocks": Kind(
        "BeitModel",
        "BeitConfig",
        OTHER | BEIT | dict(use_relative_position_bias=True),
        "beit_finetuned",
        "hf-beit",
    ),
}


def randomized(torch, model):
    """The model with random parameters, none of them 0 or 1; fixed tables stay as they are."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        one_dimensional = name.endswith("weight") and parameter.ndim == 1
        noise = 0.3 * torch.randn(parameter.shape, generator=generator)
        parameter.data = noise + (1.0 if one_dimensional else 0.0)
    for name, parameter in model.named_parameters():
        if name == "embeddings.position_embeddings" and not parameter.requires_grad:
            grid = math.isqrt(parameter.shape[1] - 1)
            table = sincos_positions((grid, grid), parameter.shape[-1], leading_tokens=1)
            parameter.data = torch.from_numpy(table)[None]
    return model.eval()


@functools.cache
def model_of(name):
    torch, transformers = need_transformers()
    kind = KINDS[name]
    config = getattr(transformers, kind.config)(**kind.fields)
    config._attn_implementation = "eager"
    return randomized(torch, getattr(transformers, kind.model)(config))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")

    @functools.cache
    def folder(name):
        model_of(name).save_pretrained(root / name)
        return root / name

    return folder


def images_for(tower, seed=0):
    shape = (2, *tower.encoder.image_size, tower.encoder.channels)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def seen_by(tower, params, images):
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda p, x: see(tower, p, x))(unflatten(params), jnp.asarray(images))


def theirs(name, images):
    import torch

    with torch.no_grad():
        pixels = torch.from_numpy(np.array(images.transpose(0, 3, 1, 2), order="C"))
        model = model_of(name)
        options = dict(output_hidden_states=True, output_attentions=True)
        if name == "mae":
            model.config.mask_ratio = 0.0
            grid = (model.config.image_size // model.config.patch_size) ** 2
            options["noise"] = torch.arange(grid, dtype=torch.float32).expand(len(images), -1)
        return model(pixels, **options)


def close(ours, other, what=""):
    np.testing.assert_allclose(np.asarray(ours), other.numpy(), rtol=1e-4, atol=1e-4, err_msg=what)


@pytest.mark.parametrize("name", KINDS)
def test_every_layer_computes_what_transformers_does(name, folders):
    tower, params = read_tower(str(folders(name)))
    images = images_for(tower)
    seen, output = seen_by(tower, params, images), theirs(name, images)
    assert len(output.hidden_states) == 1 + tower.encoder.transformer.depth
    for number, (ours, other) in enumerate(zip(seen.blocks, output.hidden_states[1:])):
        close(ours, other, f"block {number}")
    if tower.encoder.class_token:
        last = output.attentions[-1].mean(1)[:, 0, tower.encoder.prefix_tokens :]
        close(seen.class_attention, last, "attention")
    pooled = {
        "clip": "image_embeds",
        "openclip": "pooler_output",
        "siglip": "pooler_output",
        "siglip-floor": "pooler_output",
        "beit-blocks": "pooler_output",
        "clip-other": "pooler_output",
        "dinov2": "pooler_output",
        "dinov2-registers": "pooler_output",
    }
    if name in pooled:
        close(seen.pooled, output[pooled[name]], "pooled")
    if name in ("vit", "mae", "siglip", "siglip-floor", "dinov2", "dinov2-registers"):
        close(seen.tokens, output.last_hidden_state, "tokens")


@pytest.mark.parametrize("name", KINDS)
def test_layout_gives_the_file_back_exactly(name, folders):
    kind = KINDS[name]
    tower, params = read_tower(str(folders(name)))
    table = tower_layout(tower, kind.naming, "tower", kind.key)
    state = table.save({"tower": unflatten(params)})
    given = read_state_dict(folders(name) / "model.safetensors")
    if name == "beit-shared":  # its norm lies beside the encoder there
        given |= {f"beit.{k}": v for k, v in given.items() if k.startswith("layernorm.")}
    for key, value in state.items():
        np.testing.assert_array_equal(value, given[key], err_msg=key)
    rest = set(given) - set(state)
    assert all(re.search("pooler|classifier|mask_token|lm_head|^layernorm", key) for key in rest)


@pytest.mark.parametrize("name", KINDS)
def test_folder_tells_all_settings(name, folders):
    kind, settings = KINDS[name], settings_of(str(folders(name)))
    fields = kind.fields
    assert settings["family"] == kind.family
    assert settings["image_size"] == (fields["image_size"],) * 2
    assert settings["patch_size"] == (fields["patch_size"],) * 2
    assert settings["heads"] == fields["num_attention_heads"]
    assert settings["channels"] == fields.get("num_channels", 3)
    assert settings["registers"] == fields.get("num_register_tokens", 0)
    assert settings["outputs"] == (9 if name == "clip" else 0)
