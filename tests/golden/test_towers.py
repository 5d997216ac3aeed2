"""Teachers of the official codes: CLIP towers of three methods, and their view of images."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.layout.towers import tower_layout
from mim_jax.models.positions import resize_positions
from mim_jax.models.tower import Tower, build_tower, see, tower_settings
from tests.golden.cases import Case, assert_close, case_params, images_nhwc

TEACHERS = {"maskalign": "clip_model.", "mr_mae": "teacher."}
"""Prefix of the teacher's keys in the cases of a method."""


def with_teachers(method: str, kind: str = "") -> list:
    return [
        pytest.param(method, *p.values, id=f"{method}-{p.id}", marks=p.marks)
        for p in case_params(method, kind)
    ]


@functools.cache
def read(path) -> Case:
    return Case(path)


def tower_of(t: dict, outputs: int = 0) -> Tower:
    family = {"quick_gelu": "clip", "gelu": "openclip"}[t.get("hidden_act", "quick_gelu")]
    settings = tower_settings(
        "clip_b16",
        family=family,
        size="base",
        width=t["hidden_size"],
        depth=t["num_hidden_layers"],
        heads=t["num_attention_heads"],
        mlp_ratio=t["intermediate_size"] / t["hidden_size"],
        patch_size=t["patch_size"],
        image_size=t["image_size"],
        outputs=outputs,
        epsilon=t.get("layer_norm_eps", 1e-5),
    )
    return build_tower(ml_collections.ConfigDict(settings), "float32")


def load(tower: Tower, state: dict, naming: str, key: str) -> dict:
    images = jnp.zeros((1, *tower.encoder.image_size, tower.encoder.channels))
    shapes = jax.eval_shape(tower.init, jax.random.key(0), images)["params"]
    table = tower_layout(tower, naming, "teacher", key)
    given = {name: value for name, value in state.items() if name.startswith(key)}
    params = table.load(given, {"teacher": shapes})
    again = table.save(params)
    assert set(again) == set(given) - set(table.left_out(given))
    for name, value in again.items():
        np.testing.assert_array_equal(value, given[name], err_msg=name)
    return params["teacher"]


@functools.cache
def seen_in(method, path):
    case = read(path)
    tower = tower_of(case.cfg["teacher"])
    params = load(tower, case.group("param"), "hf-clip", TEACHERS[method])
    images = jnp.asarray(images_nhwc(case["in/imgs"]))
    data = configs.defaults().data
    inputs = tower.inputs(images, data.mean, data.std)
    with jax.default_matmul_precision("highest"):
        return inputs, jax.jit(functools.partial(see, tower))(params, inputs)


CASES = [*with_teachers("maskalign"), *with_teachers("mr_mae"), *with_teachers("mr_mae", "mrmcmae")]


@pytest.mark.parametrize(("method", "path"), CASES)
def test_teacher_sees_what_the_official_code_shows_it(method, path):
    inputs, _ = seen_in(method, path)
    assert_close(inputs, images_nhwc(read(path)["out/teacher_input"]), "teacher_input")


@pytest.mark.parametrize(("method", "path"), CASES)
def test_every_layer_and_the_class_attention_match(method, path):
    case, (_, seen) = read(path), seen_in(method, path)
    prefix = 1
    if "out/teacher_hidden" in case:
        hidden = case["out/teacher_hidden"]
        assert len(seen.blocks) == len(hidden) - 1  # the first are the embeddings
        for number, (ours, golden) in enumerate(zip(seen.blocks, hidden[1:])):
            assert_close(ours, golden, f"layer {number}")
        weights = case["out/teacher_attention_last"].mean(1)[:, 0, prefix:]
        assert_close(seen.class_attention, weights, "attention")
    if "out/teacher_tokens" in case:
        assert_close(seen.patches(seen.blocks[-1]), case["out/teacher_tokens"], "tokens")
        assert_close(seen.class_attention, case["out/teacher_cls_attention"], "attention")


@pytest.mark.parametrize("path", case_params("maskalign"))
def test_both_bicubic_resizes_match(path):
    case = read(path)
    old, new = (
        (math.isqrt(len(case[name])),) * 2 for name in ("in/large_pos", "out/large_pos_resized")
    )
    resized = resize_positions(case["in/large_pos"], old, new)
    assert_close(resized, case["out/large_pos_resized"], "positions")
    images = images_nhwc(case["in/resize_imgs"])
    golden = images_nhwc(case["out/resize_imgs_bicubic"])
    settings = tower_settings("clip_b16", size="tiny", patch_size=2, image_size=golden.shape[1:3])
    tower = build_tower(ml_collections.ConfigDict(settings), "float32")
    assert_close(tower.inputs(jnp.asarray(images), tower.mean, tower.std), golden, "images")


@pytest.mark.parametrize("path", case_params("cae", "clip"))
def test_all_tokens_of_openais_tower_match(path):
    case = read(path)
    state, cfg = case.group("param"), case.cfg
    hidden = len(state["visual.transformer.resblocks.0.mlp.c_fc.bias"])
    teacher = {
        "hidden_size": cfg["width"],
        "num_hidden_layers": cfg["layers"],
        "num_attention_heads": cfg["heads"],
        "intermediate_size": hidden,
        "patch_size": cfg["patch_size"],
        "image_size": cfg["input_resolution"],
        "layer_norm_eps": cfg["ln_eps"],
    }
    tower = tower_of(teacher, cfg["output_dim"])
    params = load(tower, state, "openai", "")
    images = jnp.asarray(images_nhwc(case["in/images"]))
    with jax.default_matmul_precision("highest"):
        seen = jax.jit(functools.partial(see, tower))(params, images)
    assert_close(seen.projected, case["out/features"], "features")
