import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from mim_jax.models.positions import bicubic_matrix
from mim_jax.models.tower import (
    FAMILIES,
    TOWERS,
    AttentionPool,
    build_tower,
    check_grid,
    see,
    tower_settings,
)
from mim_jax.models.transformer import Transformer

SMALL = dict(size="tiny", width=8, depth=2, heads=2, patch_size=4, image_size=8)


def built(name="clip_b16", dtype="float32", **changes):
    settings = tower_settings(name, **{**SMALL, **changes})
    return build_tower(ml_collections.ConfigDict(settings), dtype)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def seen(name="clip_b16", **changes):
    tower = built(name, **changes)
    images = jnp.asarray(draw(2, 8, 8, 3))
    shapes = jax.eval_shape(tower.init, jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda leaf: draw(*leaf.shape, seed=1), shapes)
    return tower, params, images, jax.jit(functools.partial(see, tower))(params, images)


@pytest.mark.parametrize("name", TOWERS)
def test_every_published_tower_can_be_built(name):
    tower = build_tower(ml_collections.ConfigDict(tower_settings(name)), "float32")
    settings = TOWERS[name]
    patch, image = settings["patch_size"], settings["image_size"]
    assert tower.encoder.grid == (image // patch, image // patch)
    assert len(tower.mean) == len(tower.std) == settings.get("channels", 3)


def test_so400m_has_the_hidden_width_of_the_paper():
    tower = build_tower(ml_collections.ConfigDict(tower_settings("siglip_so400m")), "float32")
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(tower.init, jax.random.key(0), images)["params"]
    assert shapes["encoder"]["transformer"]["blocks_0"]["mlp"]["fc1"]["kernel"].shape[1] == 4304


def test_projection_takes_all_tokens_to_the_space_of_texts():
    _, params, _, found = seen(outputs=5)
    expected = np.asarray(found.tokens) @ params["projection"]["kernel"]
    np.testing.assert_allclose(found.projected, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.pooled, found.projected[:, 0])


def test_without_class_token_the_mean_represents_an_image_and_nothing_attends():
    _, _, _, found = seen("siglip_b16", pool="token")
    np.testing.assert_allclose(found.pooled, found.tokens.mean(axis=1), rtol=1e-5, atol=1e-6)
    assert not np.any(found.class_attention)
    assert found.class_attention.shape == (2, 4)


def test_mean_of_the_patches_is_normalized_by_the_final_norm():
    tower, params, _, found = seen("dinov2_b14", patch_size=4, registers=2, pool="mean")
    x = np.asarray(found.blocks[-1], np.float64)[:, 3:].mean(axis=1)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    norm = params["encoder"]["norm"]
    np.testing.assert_allclose(found.pooled, x * norm["scale"] + norm["bias"], rtol=1e-4, atol=1e-4)
    assert tower.encoder.prefix_tokens == 3
    np.testing.assert_array_equal(found.patches(found.tokens), found.tokens[:, 3:])
    assert found.class_attention.shape == (2, 4)


def test_attention_pool_weighs_tokens_by_the_probe():
    pool = AttentionPool(Transformer(1, 2))
    tokens = draw(2, 5, 8)
    shapes = jax.eval_shape(pool.init, jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda leaf: draw(*leaf.shape, seed=2), shapes)
    ours = pool.apply({"params": params}, tokens)
    order = np.random.default_rng(0).permutation(5)
    shuffled = pool.apply({"params": params}, tokens[:, order])
    np.testing.assert_allclose(shuffled, ours, rtol=1e-4, atol=1e-4)  # it has no positions
    assert not np.allclose(pool.apply({"params": params}, tokens[:, :4]), ours)


def test_what_a_frozen_tower_sees_carries_no_gradient():
    tower, params, images, _ = seen()

    def total(params, images):
        found = see(tower, params, images)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(found))

    for gradient in jax.tree.leaves(jax.jit(jax.grad(total, (0, 1)))(params, images)):
        assert not np.any(gradient)


def test_images_are_resized_before_they_are_normalized_anew():
    tower = built(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    images = draw(2, 12, 10, 3)
    mean, std = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.3, 0.25])
    rows, columns = bicubic_matrix(12, 8), bicubic_matrix(10, 8)
    expected = np.einsum("ih,jw,bhwc->bijc", rows, columns, images)
    expected = (expected * std + mean - tower.mean) / np.array(tower.std)
    ours = tower.inputs(jnp.asarray(images), mean, std)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_images_of_the_towers_own_statistics_and_size_stay_as_they_are():
    tower = built()
    images = jnp.asarray(draw(2, 8, 8, 3))
    np.testing.assert_array_equal(tower.inputs(images, tower.mean, tower.std), images)


def test_grey_images_are_repeated_for_a_tower_of_colours():
    tower = built()
    ours = tower.inputs(jnp.asarray(draw(2, 8, 8, 1)), (0.5,), (0.25,))
    shares = np.asarray(ours) * tower.std + np.array(tower.mean)
    np.testing.assert_allclose(shares, np.repeat(draw(2, 8, 8, 1) * 0.25 + 0.5, 3, -1), atol=1e-5)


def test_images_of_other_channels_are_refused():
    with pytest.raises(ValueError, match="teacher sees 3 channels, but the images have 4"):
        built().inputs(jnp.zeros((2, 8, 8, 4)), (0.5,) * 4, (0.5,) * 4)


def test_grid_that_is_not_the_students_is_refused_with_both_and_the_mend():
    tower = built(patch_size=14, image_size=224)
    check_grid(tower, (16, 16))
    with pytest.raises(
        ValueError, match=r"16 x 16 .*14 x 14; set model\.teacher\.image_size to"
    ) as e:
        check_grid(tower, (14, 14))
    assert "(196, 196)" in str(e.value)
    check_grid(built(patch_size=14, image_size=196), (14, 14))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(family="clap"), "family is 'clap'; known are mae, vit"),
        (dict(width=0), "width is 0: give its weights by"),
        (dict(pool="median"), "pool is 'median'; known are token, mean, attention"),
        (dict(image_size=9), "9"),
    ],
)
def test_settings_that_make_no_tower_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings = tower_settings("clip_b16", **SMALL) | changes
        if isinstance(settings["image_size"], int):
            settings["image_size"] = (settings["image_size"],) * 2
        build_tower(ml_collections.ConfigDict(settings), "float32")


def test_settings_of_a_tower_take_precedence_over_those_of_its_family():
    tower = built(epsilon=1e-3, mean=(0.0,) * 3, std=(1.0,) * 3, logit_cap=30.0)
    blocks = tower.encoder.transformer
    assert (blocks.epsilon, blocks.logit_cap, tower.std) == (1e-3, 30.0, (1.0,) * 3)
    family = FAMILIES["clip"]
    assert built().encoder.transformer.epsilon == family.blocks["epsilon"]
    assert built().mean == family.statistics[0]
    assert built(dtype="bfloat16").encoder.transformer.dtype == jnp.bfloat16
    own = built(dtype="bfloat16", compute_dtype="float32")
    assert own.encoder.transformer.dtype == jnp.float32
