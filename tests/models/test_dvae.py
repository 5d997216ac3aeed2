import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.models.dvae import STRIDE, DVAEEncoder, logit_laplace_map, token_ids

TINY = DVAEEncoder(hidden=8, blocks_per_group=1, vocabulary=12, channels=1)


@functools.cache
def params() -> dict:
    return jax.jit(TINY.init)(jax.random.key(0), jnp.zeros((1, 16, 24, 1)))["params"]


def images(seed: int = 0, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random((2, 16, 24, channels), np.float32)


def test_every_square_of_pixels_gets_a_token_of_the_vocabulary():
    ids = np.asarray(token_ids(TINY, params(), images()))
    assert ids.shape == (2, (16 // STRIDE) * (24 // STRIDE))
    assert ids.dtype == np.int32
    assert ids.min() >= 0 and ids.max() < 12


def test_the_map_of_pixels_keeps_clear_of_both_ends():
    np.testing.assert_allclose(logit_laplace_map(jnp.asarray([0.0, 0.5, 1.0])), [0.1, 0.5, 0.9])


def test_logits_are_float32_whatever_the_compute_type():
    half = TINY.clone(dtype=jnp.bfloat16)
    call = functools.partial(half.apply, {"params": params()}, capture_intermediates=True)
    logits, collected = jax.eval_shape(call, images())
    assert logits.dtype == jnp.float32
    captured = collected["intermediates"]
    assert captured["group_4"]["__call__"][0].dtype == jnp.bfloat16
    assert captured["output"]["__call__"][0].dtype == jnp.float32


def test_half_precision_names_nearly_the_same_tokens():
    half = TINY.clone(dtype=jnp.float16)
    given = images()
    mapped = logit_laplace_map(given)
    exact = TINY.apply({"params": params()}, mapped)
    rounded = half.apply({"params": params()}, mapped)
    assert np.any(np.asarray(exact) != rounded)
    np.testing.assert_allclose(rounded, exact, atol=2e-3 * float(jnp.abs(exact).max()))


def test_the_residual_branch_weighs_one_over_the_squared_number_of_blocks():
    doubled = jax.tree.map(lambda x: x, params())
    block = dict(doubled["group_4"]["block_1"]["conv_4"])
    block["kernel"] = 2 * block["kernel"]
    doubled["group_4"] = {"block_1": {**doubled["group_4"]["block_1"], "conv_4": block}}

    def group(given):
        _, found = TINY.apply({"params": given}, images(), capture_intermediates=True)
        part = found["intermediates"]["group_4"]["block_1"]
        return part["__call__"][0], part["conv_4"]["__call__"][0]

    (before, branch), (after, _) = group(params()), group(doubled)
    np.testing.assert_allclose(after - before, branch / 16, atol=1e-6)


def test_a_grey_image_is_seen_in_colours_by_a_tokenizer_of_colours():
    colours = TINY.clone(channels=3)
    given = jax.jit(colours.init)(jax.random.key(1), jnp.zeros((1, 16, 24, 3)))["params"]
    grey = images()
    expected = token_ids(colours, given, np.repeat(grey, 3, axis=-1))
    np.testing.assert_array_equal(token_ids(colours, given, grey), expected)


@pytest.mark.parametrize("shape", [(1, 16, 20, 1), (1, 16, 24, 2)])
def test_images_that_do_not_fit_are_an_error_with_the_sizes(shape):
    with pytest.raises(ValueError, match=f"multiples of 8, got 16 x {shape[2]} x {shape[3]}"):
        TINY.apply({"params": params()}, jnp.zeros(shape))
