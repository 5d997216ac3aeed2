"""Reads towers of any known naming: files, folders of Hugging Face, runs of ours."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mim_jax import config as configs
from mim_jax.conversion.files import read_state_dict
from mim_jax.conversion.formats import State
from mim_jax.conversion.huggingface import read_arrays
from mim_jax.layout.towers import NAMINGS, TEXT_NAMINGS, Naming, text_layout, tower_layout
from mim_jax.method import method_class
from mim_jax.models.positions import sincos_positions
from mim_jax.models.text import TextTower
from mim_jax.models.tower import FAMILIES, TOWERS, Tower, build_tower
from mim_jax.models.transformer import Transformer, restacked
from mim_jax.models.vit import VIT_SIZES, ViT
from mim_jax.training.checkpoints import is_run, read_variables
from mim_jax.training.tree import flatten

PACKAGED = {"tiny": Path(__file__).parent / "assets" / "tiny_tower.safetensors"}
"""Towers that come with the package, by the path that names them."""

TOLD = (
    *("family", "width", "depth", "heads", "mlp_ratio", "patch_size", "image_size", "channels"),
    *("registers", "outputs", "position_grid", "pool", "epsilon", "norm_epsilon", "logit_cap"),
    *("mean", "std"),
)
"""Fields of `tower_settings` that weights tell."""

HEADS = {size["width"]: size["heads"] for size in VIT_SIZES.values()} | {
    1152: 16,
    1408: 16,
    1664: 16,
}
"""Attention heads of published widths; all others that are known have 64 channels a head."""

ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""Names of activations in transformers and timm, and ours."""


class _Found(NamedTuple):
    """A tower in a file: its arrays, what they are called, and its settings."""

    state: State
    naming: str
    key: str
    settings: dict[str, Any]


def read_tower(
    path: str, *, projection: bool = True, given: Mapping[str, Any] | None = None
) -> tuple[Tower, dict[str, np.ndarray]]:
    """A tower of the sizes that weights have, and its parameters by path.

    Args:
        path: a file, a model folder, the folder of a run, or a name in `PACKAGED`.
        projection: read what lies behind the encoder too.
        given: fields of `tower_settings` that decide where the weights leave a choice: `family`,
            and `heads` of a tower of the given `width`.

    Returns:
        The tower, its blocks not stacked, and its parameters: `encoder/...`, `projection/...`.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: if the weights are of no known kind; or missing, too many or wrongly shaped,
            with the full list.
    """
    if is_run(path):
        return _read_run(path)
    found = _find(path, given or {})
    settings = found.settings
    if not projection:
        settings = settings | {"outputs": 0}
        if settings["pool"] in ("", "attention"):
            settings["pool"] = "token" if FAMILIES[settings["family"]].pool == "attention" else ""
    tower = _built(settings)
    table = tower_layout(tower, found.naming, "tower", found.key)
    if found.key:  # of a larger model, the rest of which is no matter here
        table = dataclasses.replace(table, unused=(*table.unused, rf"(?!{re.escape(found.key)}).*"))
    return tower, _loaded(path, table, found.state, tower, _images(tower))


def settings_of(path: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What weights tell of the fields of `tower_settings`, see `TOLD`.

    Args:
        path: see `read_tower`.
        given: the fields as they are so far. They decide where the weights leave a choice: the
            family, where others have the same parameters; epsilon and statistics, where no file
            beside the weights tells them; and the image size, unless it is that of another
            published tower.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: if the weights are of no known kind.
    """
    given = given or {}
    settings = _run_settings(*_opened(path)) if is_run(path) else _find(path, given).settings
    patch, size = settings["patch_size"], tuple(given.get("image_size", ()))
    wanted = bool(size) and size != settings["image_size"] and not _published(given, settings)
    if not wanted:
        return settings
    if FAMILIES[settings["family"]].encoder.get("positions", "sincos").startswith("sincos"):
        grid = tuple(whole // side for whole, side in zip(settings["image_size"], patch))
        settings["position_grid"] = settings["position_grid"] or grid
    return settings | {"image_size": size}


def read_text_tower(path: str) -> tuple[TextTower, dict[str, np.ndarray]]:
    """CLIP's text tower of the sizes that weights have, and its parameters by path.

    Args:
        path: a file or a model folder; image weights in it are passed over.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: if there is no text tower; or weights are missing, too many or wrongly shaped,
            with the full list.
    """
    state, config = _weights(path)
    theirs = config.get("text_config", config)
    for naming in TEXT_NAMINGS:
        inside = "text_model." if naming == "hf-clip" else ""
        own = naming == "openai"
        table = f"{inside}{'' if own else 'embeddings.'}token_embedding.weight"
        if table in state:
            break
    else:
        raise ValueError(f"{path} holds no text tower of CLIP, neither OpenAI's nor transformers'.")
    stack = f"{inside}{'transformer.resblocks' if own else 'encoder.layers'}"
    vocabulary, width = state[table].shape
    heads = theirs.get("num_attention_heads") or _heads(path, width, {})
    hidden = state.get(f"{stack}.0.mlp.{'c_fc' if own else 'fc1'}.weight", np.empty((4 * width, 0)))
    positions = "positional_embedding" if own else f"{inside}embeddings.position_embedding.weight"
    projection = state.get("text_projection" if own else "text_projection.weight")
    end = theirs.get("eos_token_id", 2)  # a wrong 2 in old files stands for the largest id
    tower = TextTower(
        vocabulary,
        len(state[positions]) if positions in state else theirs.get("max_position_embeddings", 77),
        width,
        Transformer(
            _depth(state, stack),
            heads,
            mlp_ratio=len(hidden) / width,
            activation=_activation(path, theirs.get("hidden_act", "quick_gelu")),
            epsilon=theirs.get("layer_norm_eps", 1e-5),
            causal=True,
        ),
        outputs=0 if projection is None else projection.shape[1 if own else 0],
        end_token=None if end == 2 or end is None or end >= vocabulary else end,
    )
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return tower, _loaded(path, text_layout(tower, naming, "tower"), state, tower, ids)


def _loaded(path: str, table: Any, state: State, module: Any, inputs: Any) -> dict[str, Any]:
    """Parameters of a module by path, read by a table whose path is "tower"."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)["params"]
    try:
        return flatten(table.load(state, {"tower": shapes})["tower"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _images(tower: Tower) -> jax.ShapeDtypeStruct:
    encoder = tower.encoder
    return jax.ShapeDtypeStruct((1, *encoder.image_size, encoder.channels), jnp.float32)


def _built(settings: Mapping[str, Any]) -> Tower:
    """The tower of `settings`, in float32."""
    return build_tower(ml_collections.ConfigDict({**settings, "compute_dtype": ""}), "float32")


def _published(given: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether the image size of some settings is only that of another published tower."""

    def kind(settings: Mapping[str, Any]) -> tuple[Any, ...]:
        patch, image = settings["patch_size"], settings["image_size"]
        pairs = [(x, x) if isinstance(x, int) else tuple(x) for x in (patch, image)]
        return settings["family"], *pairs

    if kind(given)[:2] == kind(found)[:2]:
        return False
    return any(kind(tower) == kind(given) for tower in TOWERS.values())


def _weights(path: str) -> tuple[State, dict[str, Any]]:
    """Arrays by key, and what a file beside them says; `{}` if there is none.

    Of transformers it is `config.json`, with mean and std of its image processor; of timm the
    JSON file beside the weights.
    """
    where = PACKAGED.get(path, Path(path))
    if where.is_dir():
        return read_arrays(where), _config(where / "config.json")
    state = read_state_dict(where)
    for beside in (where.with_suffix(".json"), where.with_name("config.json")):
        config = _config(beside)
        if {"model_type", "architecture", "vision_config"} & set(config):
            return state, config
    return state, {}


def _config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    config = json.loads(file.read_text())
    beside = file.with_name("preprocessor_config.json")
    if beside.is_file():
        config |= {k: v for k, v in json.loads(beside.read_text()).items() if k[:6] == "image_"}
    return config


def _about(path: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a file beside weights tells: heads, image_size, channels, epsilon, activation, ..."""
    about: dict[str, Any] = {}
    if "architecture" in config:
        arguments, given = config.get("model_args", {}), config.get("pretrained_cfg", {})
        about = {
            "heads": arguments.get("num_heads"),
            "image_size": arguments.get("img_size") or given.get("input_size", ())[1:],
            "activation": arguments.get("act_layer"),
            "mean": given.get("mean"),
            "std": given.get("std"),
        }
        if "quickgelu" in config["architecture"]:
            about["activation"] = "quick_gelu"
    elif config:
        theirs = {**config, **config.get("vision_config", {})}
        names = {
            "heads": "num_attention_heads",
            "image_size": "image_size",
            "epsilon": "layer_norm_eps",
            "activation": "hidden_act",
            "mean": "image_mean",
            "std": "image_std",
        }
        about = {ours: theirs.get(name) for ours, name in names.items()}
    about = {name: value for name, value in about.items() if value}
    if "activation" in about:
        about["activation"] = _activation(path, about["activation"])
    if "image_size" in about:
        size = about["image_size"]
        about["image_size"] = (size, size) if isinstance(size, int) else tuple(size)
    return about


def _activation(path: str, name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"{path}: its activation is {name!r}; known are {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def _find(path: str, given: Mapping[str, Any]) -> _Found:
    """Recognizes the tower in a file or model folder."""
    state, config = _weights(path)
    about = _about(path, config)
    name, key = _recognized(path, state)
    naming = NAMINGS[name]
    inside = key + naming.level
    if name == "hf-beit" and f"{inside}{naming.norm}.weight" not in state:
        # The model of masked images has its norm beside the encoder.
        outer = {k: f"{inside}{k}" for k in state if k.startswith(f"{naming.norm}.")}
        state = {outer.get(k, k): value for k, value in state.items()}
    kernel = state[f"{inside}{naming.patch}.weight"]
    width, channels = kernel.shape[:2]
    patch = (int(kernel.shape[2]), int(kernel.shape[3]))
    state, grid = _with_positions(path, state, naming, inside, patch, about, given)
    family = _family(path, state, name, inside, about, given, grid)
    hidden = state.get(f"{inside}{naming.blocks}.0.{naming.names.fc1}.weight")
    registers = state.get(f"{inside}{naming.registers}") if naming.registers else None
    projection = state.get(f"{key}{naming.projection}") if naming.projection else None
    return _Found(
        state,
        name,
        key,
        {
            "family": family,
            "width": width,
            "depth": _depth(state, inside + naming.blocks),
            "heads": about.get("heads") or _heads(path, width, given, _biases(state, inside)),
            "mlp_ratio": 4.0 if hidden is None else len(hidden) / width,
            "patch_size": patch,
            "image_size": about.get("image_size")
            or tuple(side * count for side, count in zip(patch, grid)),
            "channels": channels,
            "registers": 0 if registers is None else registers.shape[1],
            "outputs": 0
            if projection is None
            else projection.shape[1 if naming.transposed_projection else 0],
            "position_grid": (),
            "pool": _pool(state, naming, inside, family),
            "norm_epsilon": 0.0,
            "logit_cap": 0.0,
            **_numbers(family, about, given),
        },
    )


def _recognized(path: str, state: State) -> tuple[str, str]:
    """Naming and prefix of the tower in a state dict."""
    for name, naming in NAMINGS.items():
        marker = f"{naming.level}{naming.patch}.weight"
        prefixes = [key.removesuffix(marker) for key in state if key.endswith(marker)]
        # The shortest: `encoder.` rather than `alignment_encoder.`.
        for prefix in sorted(prefixes, key=lambda prefix: (len(prefix), prefix)):
            start = prefix + naming.level
            own = (key.removeprefix(start) for key in state if key.startswith(start))
            if prefix[-1:] in ("", ".") and any(re.fullmatch(naming.tells, key) for key in own):
                return name, prefix
    raise ValueError(
        f"{path} holds no image tower of a known kind (CLIP, SigLIP, DINO, DINOv2, MAE, BEiT, or a "
        f"ViT of timm or transformers); it has the keys {', '.join(sorted(state)[:5])}, ..."
    )


def _depth(state: State, stack: str) -> int:
    found = [re.match(rf"{re.escape(stack)}\.(\d+)\.", key) for key in state]
    return max((int(match[1]) for match in found if match), default=-1) + 1


def _heads(path: str, width: int, given: Mapping[str, Any], table: Any = None) -> int:
    """Attention heads, which the shapes of a fused projection do not tell."""
    if table is not None:
        return table.shape[1]
    if given.get("heads", 0) > 0 and given.get("width") == width:
        return given["heads"]
    heads = HEADS.get(width, width // 64 if width % 64 == 0 else 0)
    if not heads:
        raise ValueError(
            f"{path}: nothing tells the attention heads of a tower of width {width}; set "
            "model.teacher.width and model.teacher.heads, or put the JSON file of the model beside "
            "the weights."
        )
    return heads


def _biases(state: State, inside: str) -> np.ndarray | None:
    """A table of relative positions, `[offsets, heads]`, if there is one."""
    names = (k for k in sorted(state) if k.endswith("relative_position_bias_table"))
    return next((state[name] for name in names if name.startswith(inside)), None)


def _with_positions(
    path: str,
    state: State,
    naming: Naming,
    inside: str,
    patch: tuple[int, int],
    about: Mapping[str, Any],
    given: Mapping[str, Any],
) -> tuple[State, tuple[int, int]]:
    """The state with a position for the class token and none for registers, and the grid."""
    name = f"{inside}{naming.positions}"
    leading = int(f"{inside}{naming.class_token}" in state) if naming.class_token else 0
    tokens = state.get(f"{inside}{naming.registers}") if naming.registers else None
    registers = 0 if tokens is None else tokens.shape[1]
    table, biases = state.get(name), _biases(state, inside)
    sizes = [about.get("image_size", ()), tuple(given.get("image_size", ()))]
    known = [tuple(size // side for size, side in zip(s, patch)) for s in sizes if s]
    if biases is not None:
        known += [(side, side) for side in range(1, 65)]
        grid = next((g for g in known if math.prod(2 * n - 1 for n in g) + 3 == len(biases)), None)
    elif table is not None:
        rows = table.shape[-2]
        # timm may give registers positions, which are added to them, or the class token none.
        choices = (leading, leading + registers, 0) if naming is NAMINGS["timm"] else (leading,)
        squares = [(extra, math.isqrt(max(rows - extra, 0))) for extra in choices]
        fitting = [(extra, grid) for extra in choices for grid in known]
        fitting += [(extra, (side, side)) for extra, side in squares]
        extra, grid = next(
            ((extra, grid) for extra, grid in fitting if math.prod(grid) == rows - extra > 0),
            (leading, None),
        )
        if grid is not None and extra != leading:
            table = table.reshape(rows, -1).astype(np.float32)
            start = table[:leading] if extra else np.zeros((leading, table.shape[1]), np.float32)
            patches = table[extra:]
            state = {**state, name: np.concatenate([start, patches])[None]}
            if extra and tokens is not None:
                state[f"{inside}{naming.registers}"] = tokens + table[None, leading:extra]
    else:
        grid = next(iter(known), (1, 1))  # the missing table is reported with all else
    if grid is None:
        raise ValueError(
            f"{path}: {name if biases is None else 'its table of relative positions'} is of no "
            "square grid; set model.teacher.image_size, or put the JSON file of the model beside "
            "the weights."
        )
    return state, (grid[0], grid[1])


def _family(
    path: str,
    state: State,
    naming: str,
    inside: str,
    about: Mapping[str, Any],
    given: Mapping[str, Any],
    grid: tuple[int, int],
) -> str:
    """The family, of those whose parameters these are: the given one, or the most usual."""
    parts = NAMINGS[naming]
    own = {key.removeprefix(inside) for key in state if key.startswith(inside)}
    if parts.pre_norm and any(key.startswith(f"{parts.pre_norm}.") for key in own):
        families = ["openclip", "clip"] if naming == "timm" else ["clip", "openclip"]
    elif naming in ("hf-beit", "beit"):
        shared = parts.shared_bias in own
        families = ["beit" if shared else "beit_finetuned"]
        if parts.positions in own:
            families = ["cae"]
    elif not parts.class_token or parts.class_token not in own:
        families = ["siglip"]
    elif any(re.fullmatch(r".*\.(lambda1|gamma)", key) for key in own):
        families = ["dinov2"]
    else:
        families = ["vit", "dino"]
        table = state.get(f"{inside}{parts.positions}")
        if table is not None and _is_fixed(table, grid):
            families.insert(0, "mae")
    activation = about.get("activation")
    fitting = [f for f in families if activation in (None, _activation_of(f))]
    if not fitting:
        raise ValueError(
            f"{path}: no {' or '.join(families)} tower has the activation {activation!r}."
        )
    return given["family"] if given.get("family") in fitting else fitting[0]


def _activation_of(family: str) -> str:
    return FAMILIES[family].blocks.get("activation", "gelu")


def _is_fixed(table: np.ndarray, grid: tuple[int, int]) -> bool:
    """Whether positions are the sine-cosine table of MAE."""
    width = table.shape[-1]
    if width % 4:
        return False
    fixed = sincos_positions(grid, width, leading_tokens=1)
    return fixed.size == table.size and bool(
        np.abs(table.reshape(fixed.shape) - fixed).max() < 1e-4
    )


def _pool(state: State, naming: Naming, inside: str, family: str) -> str:
    """The pool, or "" if it is that of the family."""
    pool = "token"
    if naming.mean_norm and f"{inside}{naming.mean_norm}.weight" in state:
        own = f"{inside}{naming.norm}.weight" in state
        pool = "token" if own else "mean"
    elif naming.pool and any(key.startswith(f"{inside}{naming.pool}.") for key in state):
        pool = "attention"
    return "" if pool == FAMILIES[family].pool else pool


def _numbers(family: str, about: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Epsilon and statistics, as far as they are not those of the family."""
    usual = FAMILIES[family]
    kept = given if given.get("family") == family else {}
    found = {
        name: about.get(name, kept.get(name, default))
        for name, default in (("epsilon", 0.0), ("mean", ()), ("std", ()))
    }
    if found["epsilon"] == usual.blocks.get("epsilon", 1e-6):
        found["epsilon"] = 0.0
    for name, value in zip(("mean", "std"), usual.statistics):
        given_value = tuple(found[name])
        same = len(given_value) == len(value) and np.allclose(given_value, value, atol=1e-4)
        found[name] = () if same else given_value
    return found


def _opened(run: str) -> tuple[ViT, ml_collections.ConfigDict, dict[str, np.ndarray], str]:
    """Encoder, config, parameters by path and method of a run."""
    variables, about = read_variables(run)
    config = configs.resolve(configs.from_json(about["config"]), "cpu")
    encoder = method_class(about["method"]).build(config).encoder
    if encoder is None:
        raise ValueError(f"{run} is a run of {about['method']!r}, which has no ViT encoder.")
    return encoder, config, flatten(variables["params"]), about["method"]


def _read_run(run: str) -> tuple[Tower, dict[str, np.ndarray]]:
    """The encoder of a run as a tower. A norm of the mean of the patches is its final norm."""
    opened = _opened(run)
    tower = _built(_run_settings(*opened))
    encoder, _, params, _ = opened
    if not encoder.final_norm:
        params |= {f"encoder/norm/{leaf}": params[f"fc_norm/{leaf}"] for leaf in ("scale", "bias")}
    shapes = jax.eval_shape(tower.init, jax.random.key(0), _images(tower))["params"]
    found = {}
    for name in flatten(shapes):
        value = restacked(name, params, encoder.transformer, tower.encoder.transformer)
        if value is None:
            raise ValueError(f"{run} has no {name}.")
        found[name] = value
    return tower, found


def _run_settings(
    encoder: ViT, config: ml_collections.ConfigDict, params: Mapping[str, Any], method: str
) -> dict[str, Any]:
    """The settings of a run's encoder; its family is one that computes the same."""
    blocks = encoder.transformer
    if not encoder.final_norm and "fc_norm/scale" not in params:
        raise ValueError(f"a run of {method!r} has no norm after its encoder, as towers have.")
    settings: dict[str, Any] = {
        "width": encoder.width,
        "depth": blocks.depth,
        "heads": blocks.heads,
        "mlp_ratio": blocks.mlp_ratio,
        "patch_size": tuple(encoder.patch_size),
        "image_size": tuple(encoder.image_size),
        "channels": encoder.channels,
        "registers": encoder.registers,
        "outputs": 0,
        "position_grid": tuple(encoder.position_grid or ()),
        "pool": "token" if encoder.final_norm else "mean",
        "epsilon": blocks.epsilon,
        "norm_epsilon": encoder.norm_epsilon or 0.0,
        "logit_cap": blocks.logit_cap or 0.0,
        "mean": tuple(config.data.mean),
        "std": tuple(config.data.std),
    }
    wanted = _essence(encoder)
    for family in FAMILIES:
        settings["family"] = family
        if _essence(_built(settings).encoder) == wanted:
            return settings
    raise ValueError(f"no family of towers computes what the encoder of {method!r} does: {wanted}.")


def _essence(encoder: ViT) -> dict[str, Any]:
    """What decides what an encoder computes, with all else left out."""
    elsewhere = ("parent", "name", "transformer", "final_norm")
    speed = ("parent", "name", "scan", "remat", "dtype", "attention", "drop_path")

    def fields(module: Any, without: tuple[str, ...]) -> dict[str, Any]:
        return {
            field.name: getattr(module, field.name)
            for field in dataclasses.fields(module)
            if field.name not in without
        }

    blocks = fields(encoder.transformer, speed)
    blocks["layer_scale"] = blocks["layer_scale"] is not None  # its initial value is no matter
    return fields(encoder, elsewhere) | blocks
