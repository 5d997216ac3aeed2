"""Towers of other libraries with random weights: every layer computes what theirs does."""

import copy
import functools
import json
import math
import re
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.conversion.files import read_state_dict, write_state_dict
from mim_jax.conversion.towers import PACKAGED, read_text_tower, read_tower, settings_of
from mim_jax.data.embedded import read_embedded
from mim_jax.layout.towers import text_layout, tower_layout
from mim_jax.models.positions import sincos_positions
from mim_jax.models.tower import TOWERS, build_tower, see, tower_settings
from mim_jax.training.tree import flatten, unflatten
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


@functools.cache
def text_model():
    torch, transformers = need_transformers()
    config = transformers.CLIPTextConfig(**TEXT)
    config._attn_implementation = "eager"
    return randomized(torch, transformers.CLIPTextModelWithProjection(config))


IDS = np.array([[0, 5, 29, 1, 30], [0, 7, 3, 12, 29]])
"""Two texts; in the first the end, 29, is neither last nor the largest id."""


def read_by(tower, params, ids=IDS):
    with jax.default_matmul_precision("highest"):
        return jax.jit(tower.apply)({"params": unflatten(params)}, jnp.asarray(ids))


def test_every_layer_of_the_text_tower_computes_what_transformers_does(tmp_path):
    model = text_model()
    model.save_pretrained(tmp_path)
    tower, params = read_text_tower(str(tmp_path))
    ours = read_by(tower, params)
    import torch

    with torch.no_grad():
        output = model(torch.from_numpy(IDS), output_hidden_states=True)
    for number, (block, other) in enumerate(zip(ours.blocks, output.hidden_states[1:])):
        close(block, other, f"block {number}")
    close(ours.tokens, output.last_hidden_state)
    close(ours.pooled, output.text_embeds)
    state = text_layout(tower, "hf-clip", "tower").save({"tower": unflatten(params)})
    given = read_state_dict(tmp_path / "model.safetensors")
    assert set(state) == set(given)
    for key, value in state.items():
        np.testing.assert_array_equal(value, given[key], err_msg=key)


@functools.cache
def openai_clip():
    """A CLIP as OpenAI's code builds it, as far as its text tower goes, with random weights."""
    torch, _ = need_transformers()
    nn = torch.nn
    width, heads, length, vocabulary, outputs = 64, 1, 6, 20, 8

    class QuickGELU(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(1.702 * x)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(width, heads)
            self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.mlp = nn.Sequential()
            self.mlp.add_module("c_fc", nn.Linear(width, 2 * width))
            self.mlp.add_module("gelu", QuickGELU())
            self.mlp.add_module("c_proj", nn.Linear(2 * width, width))

        def forward(self, x):
            mask = torch.full((len(x), len(x)), float("-inf")).triu_(1)
            y = self.ln_1(x)
            x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
            return x + self.mlp(self.ln_2(x))

    class Clip(nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer = nn.Module()
            self.transformer.resblocks = nn.Sequential(Block(), Block())
            self.token_embedding = nn.Embedding(vocabulary, width)
            self.positional_embedding = nn.Parameter(torch.empty(length, width))
            self.ln_final = nn.LayerNorm(width)
            self.text_projection = nn.Parameter(torch.empty(width, outputs))
            self.logit_scale = nn.Parameter(torch.empty(()))

        def forward(self, ids):
            x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
            x = self.transformer.resblocks(x.permute(1, 0, 2)).permute(1, 0, 2)
            x = self.ln_final(x)
            return x[torch.arange(len(x)), ids.argmax(-1)] @ self.text_projection

    return randomized(torch, Clip())


def test_text_tower_in_openais_names_computes_what_their_code_does(tmp_path):
    import torch

    model = openai_clip()
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    tower, params = read_text_tower(str(tmp_path / "clip.pt"))
    ids = np.array([[3, 19, 0, 4], [1, 2, 7, 19]])
    with torch.no_grad():
        close(read_by(tower, params, ids).pooled, model(torch.from_numpy(ids)))
    state = text_layout(tower, "openai", "tower").save({"tower": unflatten(params)})
    for key, value in state.items():
        np.testing.assert_array_equal(value, model.state_dict()[key].numpy(), err_msg=key)


def test_archive_as_openai_released_it_is_read_without_its_code(tmp_path):
    import torch

    model = openai_clip()
    ids = torch.tensor([[3, 19, 0, 4]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is of the past
        torch.jit.trace(copy.deepcopy(model).half().float(), ids).save(tmp_path / "ViT-B-16.pt")
    state = read_state_dict(tmp_path / "ViT-B-16.pt")
    assert set(state) == set(model.state_dict())
    for key, value in state.items():
        np.testing.assert_array_equal(value, model.state_dict()[key].half().float(), err_msg=key)
    tower, _ = read_text_tower(str(tmp_path / "ViT-B-16.pt"))
    assert (tower.width, tower.transformer.depth, tower.outputs) == (64, 2, 8)


def test_whole_clip_gives_both_towers_whichever_names_it_has(tmp_path, folders):
    vision, params = read_tower(str(folders("clip")))
    text_model().save_pretrained(tmp_path / "text")
    text, of_text = read_text_tower(str(tmp_path / "text"))
    images = images_for(vision)
    for naming in ("openai", "hf-clip"):
        state = {
            **tower_layout(vision, naming, "tower").save({"tower": unflatten(params)}),
            **text_layout(text, naming, "tower").save({"tower": unflatten(of_text)}),
            "logit_scale": np.float32(4.6),
        }
        path = tmp_path / f"{naming}.safetensors"
        write_state_dict(path, state)
        beside = json.loads((folders("clip") / "config.json").read_text())
        ends = json.loads((tmp_path / "text" / "config.json").read_text())
        content = {"model_type": "clip", "vision_config": beside, "text_config": ends}
        path.with_suffix(".json").write_text(json.dumps(content))
        again, both = read_tower(str(path))
        assert again == vision
        assert_equal(both, params)
        assert_equal(read_text_tower(str(path))[1], of_text)
        assert read_text_tower(str(path))[0] == text
    assert seen_by(vision, params, images).pooled.shape == (2, 9)


def assert_equal(ours, other):
    assert set(ours) == set(other)
    for name, value in other.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


TIMM = {
    "supervised": dict(),
    "registers": dict(reg_tokens=2, init_values=0.1),
    "no-class-position": dict(reg_tokens=2, init_values=0.1, no_embed_class=True),
    "clip": dict(pre_norm=True, act_layer="quick_gelu"),
    "average": dict(global_pool="avg"),
}


@pytest.mark.parametrize("name", TIMM)
def test_files_of_timm_compute_what_timm_does(name, tmp_path):
    torch, timm = need_timm()
    sizes = dict(img_size=12, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    arguments = {**sizes, **TIMM[name]}
    model = randomized(torch, timm.models.VisionTransformer(**arguments))
    path = tmp_path / "vit.safetensors"
    write_state_dict(path, {k: v.numpy() for k, v in model.state_dict().items()})
    about = {"architecture": "vit_base_patch16_224", "model_args": arguments}
    path.with_suffix(".json").write_text(json.dumps(about))
    tower, params = read_tower(str(path))
    images = images_for(tower)
    seen = seen_by(tower, params, images)
    pixels = torch.from_numpy(np.array(images.transpose(0, 3, 1, 2), order="C"))
    with torch.no_grad():
        tokens = model.forward_features(pixels)
        pooled = model.forward_head(tokens, pre_logits=True)
    if name == "average":
        close(seen.blocks[-1], tokens)
        close(seen.pooled, pooled)
    else:
        close(seen.tokens, tokens)


PLAIN = tower_settings(
    "vit_b16", size="tiny", width=64, depth=2, heads=1, patch_size=4, image_size=12
)


@functools.cache
def plain():
    """A ViT in timm's names, which nothing beside it explains."""
    import ml_collections

    tower = build_tower(ml_collections.ConfigDict(PLAIN), "float32")
    images = jnp.zeros((1, 12, 12, 3))
    shapes = flatten(jax.eval_shape(tower.init, jax.random.key(0), images)["params"])
    random = np.random.default_rng(0)
    params = {k: random.normal(0, 0.1, v.shape).astype(np.float32) for k, v in shapes.items()}
    return tower, params, tower_layout(tower, "timm", "tower").save({"tower": unflatten(params)})


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("prefix", ["", "module.encoder."])
def test_file_alone_tells_the_sizes(suffix, prefix, tmp_path):
    if suffix == ".pth":
        pytest.importorskip("torch")
    tower, params, state = plain()
    path = tmp_path / f"vit{suffix}"
    more = {"decoder.weight": np.ones(3, np.float32)} if prefix else {}
    write_state_dict(path, {f"{prefix}{k}": v for k, v in state.items()} | more)
    again, read = read_tower(str(path))
    assert again == tower
    assert_equal(read, params)
    fields = ("width", "depth", "heads", "patch_size", "image_size", "mlp_ratio", "family")
    settings = settings_of(str(path))
    assert {name: settings[name] for name in fields} == {name: PLAIN[name] for name in fields}


def test_family_of_the_config_decides_where_weights_leave_a_choice(tmp_path):
    _, _, state = plain()
    write_state_dict(tmp_path / "vit.safetensors", state)
    path = str(tmp_path / "vit.safetensors")
    assert settings_of(path)["family"] == "vit"
    assert settings_of(path, {**PLAIN, "family": "dino"})["family"] == "dino"
    assert settings_of(path, {**PLAIN, "family": "clip"})["family"] == "vit"


def test_image_size_is_the_configs_unless_it_is_only_another_towers(tmp_path):
    _, _, state = plain()
    write_state_dict(tmp_path / "vit.safetensors", state)
    path = str(tmp_path / "vit.safetensors")
    published = tower_settings("clip_b16")
    assert settings_of(path, published)["image_size"] == (12, 12)
    chosen = {**published, "image_size": (20, 20)}
    assert settings_of(path, chosen)["image_size"] == (20, 20)
    assert settings_of(path, {**PLAIN, "image_size": (8, 8)})["image_size"] == (8, 8)


def test_missing_unexpected_and_misshapen_weights_are_all_listed(tmp_path):
    _, _, state = plain()
    state = {k: v for k, v in state.items() if k not in ("norm.bias", "blocks.1.mlp.fc2.bias")}
    state["blocks.0.attn.proj.weight"] = np.zeros((64, 3), np.float32)
    state["blocks.0.extra"] = state["stranger"] = np.zeros(2, np.float32)
    write_state_dict(tmp_path / "vit.safetensors", state)
    with pytest.raises(ValueError) as error:
        read_tower(str(tmp_path / "vit.safetensors"))
    for line in (
        "missing: norm.bias",
        "missing: blocks.1.mlp.fc2.bias",
        "unexpected: blocks.0.extra",
        "unexpected: stranger",
        "blocks.0.attn.proj.weight: shape (64, 3) in the file, (64, 64) in the model",
    ):
        assert line in str(error.value)


def test_weights_of_no_known_kind_are_refused_by_name(tmp_path):
    write_state_dict(tmp_path / "a.safetensors", {"fc.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(ValueError, match=r"no image tower of a known kind.*fc\.weight"):
        read_tower(str(tmp_path / "a.safetensors"))
    with pytest.raises(ValueError, match="no text tower"):
        read_text_tower(str(tmp_path / "a.safetensors"))
    with pytest.raises(FileNotFoundError, match="there is no checkpoint file"):
        read_tower(str(tmp_path / "absent.safetensors"))


def test_heads_that_nothing_tells_must_be_set(tmp_path):
    _, _, state = plain()
    narrow = {key: _first(value, 64, 40) for key, value in state.items()}
    write_state_dict(tmp_path / "vit.safetensors", narrow)
    with pytest.raises(ValueError, match=r"attention heads.*model\.teacher\.heads"):
        settings_of(str(tmp_path / "vit.safetensors"))
    given = {"width": 40, "heads": 5}
    assert settings_of(str(tmp_path / "vit.safetensors"), given)["heads"] == 5


def _first(value, old, new):
    """A part of an array, in which every axis is shortened from a multiple of `old` to `new`."""
    return value[
        tuple(slice(size // old * new if size % old == 0 else size) for size in value.shape)
    ]


def test_tiny_tower_of_the_package_is_what_its_settings_say():
    tower, params = read_tower("tiny")
    settings = TOWERS["tiny"]
    assert tower.encoder.width == settings["width"]
    assert (tower.mean, tower.std) == (settings["mean"], settings["std"])
    assert PACKAGED["tiny"].stat().st_size < 500_000
    images, labels = read_embedded("test")
    images = tower.inputs(jnp.asarray(images[:200] / 255), (0.0,), (1.0,))
    pooled = np.asarray(seen_by(tower, params, images).pooled)
    state = read_state_dict(PACKAGED["tiny"])
    logits = pooled @ state["head.weight"].astype(np.float32).T + state["head.bias"]
    assert (logits.argmax(1) == labels[:200]).mean() > 0.8
