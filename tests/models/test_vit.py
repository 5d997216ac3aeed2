import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mim_jax.models.positions import bicubic_matrix, resize_positions, sincos_positions
from mim_jax.models.transformer import Transformer
from mim_jax.models.vit import (
    VIT_SIZES,
    PatchEmbed,
    ViT,
    resize_patch_kernel,
    resize_patch_outputs,
    vit_size,
)
from mim_jax.targets import patchify
from mim_jax.training.tree import flatten, unflatten
from tests.models.test_transformer import assert_uniform

ENCODER = ViT((8, 12), (4, 2), channels=2, width=8, transformer=Transformer(2, 2))
TOKENS = 12


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


IMAGES = draw(2, 8, 12, 2)


@functools.cache
def variables() -> dict:
    return jax.device_get(jax.jit(ENCODER.init)(jax.random.key(0), IMAGES))


_apply = jax.jit(ENCODER.apply)


def encode(images: np.ndarray, keep_ids: np.ndarray | None = None) -> np.ndarray:
    return np.asarray(_apply(variables(), images, keep_ids)[0])


def test_neither_image_nor_patch_need_be_square():
    assert ENCODER.grid == (2, 6)
    assert encode(IMAGES).shape == (2, 1 + TOKENS, 8)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_encoder_never_sees_removed_patches(seed):
    random = np.random.default_rng(seed)
    keep_ids = np.stack([random.permutation(TOKENS)[:5] for _ in range(2)]).astype(np.int32)
    removed = np.ones((2, TOKENS), bool)
    np.put_along_axis(removed, keep_ids, False, axis=1)
    removed_pixels = removed.reshape(2, 2, 6).repeat(4, axis=1).repeat(2, axis=2)[..., None]
    other = np.where(removed_pixels, 1e3 * draw(*IMAGES.shape, seed=seed), IMAGES)
    np.testing.assert_array_equal(encode(other, keep_ids), encode(IMAGES, keep_ids))
    # The pixels do matter where they are visible.
    assert np.any(encode(other) != encode(IMAGES))


def test_kept_tokens_carry_the_positions_they_came_from():
    order = np.random.default_rng(0).permutation(TOKENS).astype(np.int32)
    shuffled = encode(IMAGES, np.stack([order, order]))
    np.testing.assert_allclose(shuffled[:, 1:], encode(IMAGES)[:, 1 + order], atol=1e-5)


def test_the_class_token_comes_first_and_has_no_position():
    bare = ENCODER.copy(transformer=Transformer(0, 2))
    params = {k: v for k, v in variables()["params"].items() if k != "transformer"}
    tokens = np.asarray(bare.apply({"params": params}, IMAGES)[0])
    embed = PatchEmbed(8, (4, 2), 2).apply(
        {"params": params["patch_embed"]}, patchify(jnp.asarray(IMAGES), (4, 2))
    )
    before_norm = np.concatenate(
        [np.tile(params["cls_token"], (2, 1, 1)), embed + sincos_positions((2, 6), 8)], axis=1
    )
    mean, variance = before_norm.mean(-1, keepdims=True), before_norm.var(-1, keepdims=True)
    np.testing.assert_allclose(tokens, (before_norm - mean) / np.sqrt(variance + 1e-6), atol=1e-4)


def test_patch_embedding_is_the_strided_convolution():
    params = variables()["params"]["patch_embed"]
    ours = PatchEmbed(8, (4, 2), 2).apply({"params": params}, patchify(jnp.asarray(IMAGES), (4, 2)))
    convolution = jax.lax.conv_general_dilated(
        IMAGES,
        params["kernel"],
        window_strides=(4, 2),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(
        ours, convolution.reshape(2, TOKENS, 8) + params["bias"], rtol=1e-5, atol=1e-5
    )


def test_block_outputs_come_before_the_final_norm():
    tokens, outputs = ENCODER.apply(variables(), IMAGES)
    assert [output.shape for output in outputs] == [(2, 1 + TOKENS, 8)] * 2
    last = np.asarray(outputs[-1])
    mean, variance = last.mean(-1, keepdims=True), last.var(-1, keepdims=True)
    np.testing.assert_allclose(tokens, (last - mean) / np.sqrt(variance + 1e-6), atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 8, 8, 2), (2, 8, 12, 3), (2, 12, 8, 2), (8, 12, 2)])
def test_images_of_another_size_are_an_error_that_names_both(shape):
    with pytest.raises(ValueError) as error:
        jax.eval_shape(ENCODER.init, jax.random.key(0), jnp.zeros(shape))
    assert "[batch, 8, 12, 2]" in str(error.value)
    assert str(shape) in str(error.value)


def test_patches_of_another_size_are_an_error_that_names_both():
    with pytest.raises(ValueError, match=r"have 10 values.*has 16"):
        jax.eval_shape(PatchEmbed(8, (4, 2), 2).init, jax.random.key(0), jnp.zeros((1, 3, 10)))


def test_an_image_that_patches_do_not_tile_is_an_error():
    with pytest.raises(ValueError, match="not divisible by patch_size"):
        _ = ENCODER.copy(patch_size=(3, 2)).grid


def test_bfloat16_compute_keeps_float32_parameters():
    encoder = ENCODER.copy(transformer=Transformer(2, 2, dtype=jnp.bfloat16))
    output, shapes = jax.eval_shape(encoder.init_with_output, jax.random.key(0), IMAGES)
    assert output[0].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_positions_are_not_parameters():
    paths = set(flatten(variables()["params"]))
    outside = {path for path in paths if not path.startswith("transformer/")}
    assert outside == {
        "cls_token",
        "norm/bias",
        "norm/scale",
        "patch_embed/bias",
        "patch_embed/kernel",
    }


def test_initial_patch_embedding_and_class_token_follow_the_official_code():
    width, values = 256, 4 * 4 * 3
    encoder = ViT((8, 8), (4, 4), channels=3, width=width, transformer=Transformer(0, 1))
    params = jax.device_get(encoder.init(jax.random.key(1), jnp.zeros((1, 8, 8, 3))))["params"]
    assert_uniform(params["patch_embed"]["kernel"], np.sqrt(6 / (values + width)))
    bias, bound = params["patch_embed"]["bias"], 1 / np.sqrt(values)
    assert 0.9 * bound < np.abs(bias).max() <= bound
    np.testing.assert_allclose(bias.std(), bound / np.sqrt(3), rtol=0.15)
    cls_token = params["cls_token"]
    np.testing.assert_allclose(cls_token.std(), 0.02, rtol=0.2)  # 4.5 deviations of 256 draws
    assert abs(cls_token.mean()) < 4.5 * 0.02 / np.sqrt(width)


def test_named_sizes_are_those_of_the_paper():
    assert vit_size("base") == dict(width=768, depth=12, heads=12)
    assert vit_size("large") == dict(width=1024, depth=24, heads=16)
    assert vit_size("huge") == dict(width=1280, depth=32, heads=16)


def test_given_numbers_take_precedence_over_a_named_size():
    assert vit_size("base", width=96, depth=0, heads=0) == dict(width=96, depth=12, heads=12)
    assert vit_size("", width=8, depth=2, heads=1) == dict(width=8, depth=2, heads=1)


def test_an_unknown_size_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match=f"'huuge'; known are {', '.join(VIT_SIZES)}"):
        vit_size("huuge")


def test_a_size_without_name_needs_every_number():
    with pytest.raises(ValueError, match=r"set model\.size to one of .*, or model\.depth"):
        vit_size("", width=8, depth=0, heads=2)


def test_learned_positions_start_as_the_fixed_table_and_get_a_gradient():
    learned = ENCODER.clone(positions="learned")
    params = learned.init(jax.random.key(0), IMAGES)["params"]
    np.testing.assert_array_equal(params["positions"], ENCODER.position_table())
    fixed = {name: value for name, value in params.items() if name != "positions"}
    ours, theirs = (
        m.apply({"params": p}, IMAGES)[0] for m, p in ((learned, params), (ENCODER, fixed))
    )
    np.testing.assert_array_equal(ours, theirs)
    gradient = jax.grad(lambda p: learned.apply({"params": p}, IMAGES)[0][..., 0].sum())(params)
    assert np.all(np.abs(gradient["positions"]).max(axis=1) > 0)


def test_positions_of_another_grid_are_resized_to_the_models_own():
    spread = ENCODER.clone(position_grid=(4, 12))
    wanted = resize_positions(sincos_positions((4, 12), 8, leading_tokens=1), (4, 12), (2, 6))
    np.testing.assert_array_equal(spread.position_table(), wanted)
    assert not np.allclose(wanted, ENCODER.position_table())


def test_without_final_norm_the_output_is_that_of_the_last_block():
    params = {k: v for k, v in variables()["params"].items() if k != "norm"}
    tokens, blocks = ENCODER.clone(final_norm=False).apply({"params": params}, IMAGES)
    np.testing.assert_array_equal(tokens, blocks[-1])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99), st.sampled_from([(4, 6), (8, 8), (5, 3)]))
def test_a_larger_kernel_gives_the_same_product_on_the_resized_patch(seed, size):
    random = np.random.default_rng(seed)
    kernel, patch = random.normal(size=(4, 3, 2, 5)), random.normal(size=(4, 3, 2))
    rows, columns = bicubic_matrix(4, size[0]), bicubic_matrix(3, size[1])
    larger = np.einsum("ia,jb,abc->ijc", rows, columns, patch)
    resized = resize_patch_kernel(kernel, size, 2)
    before, after = np.tensordot(patch, kernel, 3), np.tensordot(larger, resized, 3)
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-3)


def test_a_grey_kernel_gives_what_three_equal_channels_gave():
    kernel, grey = draw(4, 4, 3, 5), draw(4, 4, 1)
    ours = np.tensordot(grey, resize_patch_kernel(kernel, (4, 4), 1), 3)
    wanted = np.tensordot(np.repeat(grey, 3, axis=2), kernel, 3)
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [2, 4, 12])
def test_more_channels_keep_the_output_of_equal_ones(channels):
    kernel, grey = draw(4, 4, 1, 5), draw(4, 4, 1)
    resized = resize_patch_kernel(kernel, (4, 4), channels)
    ours = np.tensordot(np.repeat(grey, channels, axis=2), resized, 3)
    np.testing.assert_allclose(ours, np.tensordot(grey, kernel, 3), rtol=1e-4, atol=1e-5)


def test_predicted_pixels_are_resized_as_pictures():
    values = draw(3, 4 * 4 * 3)
    grey = resize_patch_outputs(values, ((4, 4), 3), ((4, 4), 1))
    np.testing.assert_allclose(grey, values.reshape(3, 16, 3).mean(axis=2), atol=1e-6)
    constant = resize_patch_outputs(np.ones((3, 4 * 4 * 1)), ((4, 4), 1), ((7, 2), 5))
    np.testing.assert_allclose(constant, np.ones((3, 7 * 2 * 5)), atol=1e-6)
    same = resize_patch_outputs(values, ((4, 4), 3), ((4, 4), 3))
    np.testing.assert_array_equal(same, values)


def draw_params(encoder: ViT) -> dict:
    """Random parameters, those of the plain encoder where both have them."""
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), IMAGES)["params"]
    given = flatten(variables()["params"])
    return unflatten(
        {
            path: given[path]
            if path in given and given[path].shape == leaf.shape
            else draw(*leaf.shape, seed=4)
            for path, leaf in flatten(shapes).items()
        }
    )


def before_blocks(encoder: ViT, params: dict, images: np.ndarray = IMAGES) -> np.ndarray:
    """Tokens that the first block gets."""
    bare = encoder.clone(transformer=Transformer(0, 2), final_norm=False)
    params = {k: v for k, v in params.items() if k not in ("transformer", "norm")}
    return np.asarray(bare.apply({"params": params}, images)[0])


def test_registers_stand_between_class_token_and_patches_without_positions():
    encoder = ENCODER.clone(registers=3)
    params = draw_params(encoder)
    tokens, plain = before_blocks(encoder, params), before_blocks(ENCODER, variables()["params"])
    assert (encoder.prefix_tokens, tokens.shape) == (4, (2, 4 + TOKENS, 8))
    np.testing.assert_array_equal(tokens[:, 1:4], np.tile(params["registers"], (2, 1, 1)))
    np.testing.assert_array_equal(tokens[:, [0, *range(4, 4 + TOKENS)]], plain)


def test_without_class_token_only_patches_are_left():
    encoder = ENCODER.clone(class_token=False)
    tokens = before_blocks(encoder, draw_params(encoder))
    np.testing.assert_array_equal(tokens, before_blocks(ENCODER, variables()["params"])[:, 1:])
    assert encoder.position_table().shape == (TOKENS, 8)


def test_pre_norm_normalizes_what_the_first_block_gets():
    encoder = ENCODER.clone(pre_norm=True)
    params = draw_params(encoder)
    x = before_blocks(ENCODER, variables()["params"]).astype(np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    expected = x * params["pre_norm"]["scale"] + params["pre_norm"]["bias"]
    np.testing.assert_allclose(before_blocks(encoder, params), expected, rtol=1e-4, atol=1e-4)


def test_patch_embedding_may_have_no_bias():
    encoder = ENCODER.clone(patch_bias=False)
    params = draw_params(encoder)
    assert set(params["patch_embed"]) == {"kernel"}
    plain = variables()["params"]
    difference = before_blocks(ENCODER, plain) - before_blocks(encoder, params)
    expected = np.broadcast_to(plain["patch_embed"]["bias"], (2, TOKENS, 8))
    np.testing.assert_allclose(difference[:, 1:], expected, atol=1e-5)


def test_pixels_that_fill_no_patch_are_left_out_only_where_that_is_asked_for():
    encoder = ENCODER.clone(image_size=(11, 13), floor_grid=True)
    images = np.pad(IMAGES, ((0, 0), (0, 3), (0, 1), (0, 0)), constant_values=9.0)
    assert encoder.grid == (2, 6)
    ours = np.asarray(encoder.apply(variables(), images)[0])
    np.testing.assert_allclose(ours, encode(IMAGES), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="11"):
        ENCODER.clone(image_size=(11, 13)).grid  # noqa: B018  # computed on access


def test_shared_bias_acts_as_the_same_bias_in_every_block():
    shared = ENCODER.clone(shared_position_bias=True)
    params = draw_params(shared)
    table = params["position_bias"]["table"]
    own = ENCODER.clone(transformer=Transformer(2, 2, position_bias=ENCODER.grid))
    blocks = {
        name: {**block, "attention": {**block["attention"], "position_bias": {"table": table}}}
        for name, block in params["transformer"].items()
    }
    each = {k: v for k, v in params.items() if k != "position_bias"} | {"transformer": blocks}
    ours, theirs = (m.apply({"params": p}, IMAGES)[0] for m, p in ((shared, params), (own, each)))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not np.allclose(ours, encode(IMAGES))


def test_final_norm_may_have_an_epsilon_of_its_own():
    rough = ENCODER.clone(norm_epsilon=10.0)
    tokens, blocks = rough.apply(variables(), IMAGES)
    x, norm = np.asarray(blocks[-1], np.float64), variables()["params"]["norm"]
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 10.0)
    expected = expected * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(tokens, expected, rtol=1e-4, atol=1e-5)


def test_unknown_positions_are_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="positions is 'rotary'; known are sincos, sincos_row"):
        ENCODER.clone(positions="rotary").position_table()
