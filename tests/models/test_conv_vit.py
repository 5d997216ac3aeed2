import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mim_jax.masking import complementary_views, enlarge_mask, random_masking
from mim_jax.models.conv_vit import (
    REMOVED,
    STAGES,
    ConvViT,
    VisibleCells,
    adopted,
    conv_vit_size,
    depthwise,
)
from mim_jax.models.positions import sincos_positions
from mim_jax.models.transformer import Transformer
from mim_jax.training.tree import flatten

SIDE = 16
GRID, TOKENS, KEPT = (4, 4), 16, 4
ENCODER = ConvViT(
    (64, 64), 2, widths=(4, 6, 8), depths=(1, 1), transformer=Transformer(1, 2), class_token=True
)
BATCH = 2


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


IMAGES = draw(BATCH, 64, 64, 2)
NOISE = jnp.asarray(np.random.default_rng(0).random((BATCH, TOKENS)), jnp.float32)
MASKING = random_masking(NOISE, KEPT)


@functools.cache
def params() -> dict:
    """None of them zero, so that no mistake can hide behind zeros."""
    given = jax.device_get(jax.jit(ENCODER.init)(jax.random.key(0), IMAGES)["params"])
    return jax.tree.map(lambda p: p + 0.1 * draw(*p.shape, seed=1), given)


@functools.cache
def compiled(**fields):
    encoder = ENCODER.clone(**fields)
    return jax.jit(functools.partial(encoder.apply, mutable=[STAGES]))


def encode(images, keep_ids=None, noise=None, **fields):
    """Tokens, outputs of the blocks, and outputs of the stages."""
    (tokens, outputs), sown = compiled(**fields)({"params": params()}, images, keep_ids, noise)
    return np.asarray(tokens), outputs, sown[STAGES]


def removed_pixels(mask) -> np.ndarray:
    return np.asarray(enlarge_mask(mask, GRID, SIDE))[..., None] == 1


@pytest.mark.parametrize("removed", ["skipped", "zeroed"])
def test_removed_pixels_change_no_visible_token_and_no_visible_cell_of_a_stage(removed):
    before, _, stages = encode(IMAGES, MASKING.keep_ids, removed=removed)
    other = np.where(removed_pixels(MASKING.mask), 100 * draw(*IMAGES.shape, seed=2), IMAGES)
    after, _, other_stages = encode(other, MASKING.keep_ids, removed=removed)
    np.testing.assert_array_equal(after, before)
    cells = VisibleCells.of(MASKING.keep_ids, GRID)
    for name in ("stage1", "stage2"):
        given, changed = stages[name], other_stages[name]
        if removed == "zeroed":
            given, changed = cells.pick(given), cells.pick(changed)
        np.testing.assert_array_equal(changed, given)


def test_convolutions_that_see_removed_patches_leak_them():
    other = np.where(removed_pixels(MASKING.mask), draw(*IMAGES.shape, seed=2), IMAGES)
    before, after = (encode(x, MASKING.keep_ids, removed="seen")[0] for x in (IMAGES, other))
    assert np.all(np.abs(before - after).max(axis=(1, 2)) > 1e-2)


def test_what_is_skipped_gives_the_tokens_and_stages_that_the_official_zeros_give():
    skipped, _, cells = encode(IMAGES, MASKING.keep_ids)
    zeroed, _, maps = encode(IMAGES, MASKING.keep_ids, removed="zeroed")
    np.testing.assert_allclose(skipped, zeroed, atol=2e-5)
    visible = VisibleCells.of(MASKING.keep_ids, GRID)
    for name in ("stage1", "stage2"):
        np.testing.assert_allclose(cells[name], visible.pick(maps[name]), atol=2e-5)


@pytest.mark.parametrize("removed", REMOVED)
def test_all_patches_visible_is_the_same_as_no_mask(removed):
    everything = jnp.broadcast_to(jnp.arange(TOKENS), (BATCH, TOKENS))
    whole, outputs, _ = encode(IMAGES)
    masked, masked_outputs, _ = encode(IMAGES, everything, removed=removed)
    np.testing.assert_allclose(masked, whole, atol=2e-5)
    np.testing.assert_allclose(masked_outputs[-1], outputs[-1], atol=2e-5)


@pytest.mark.parametrize("removed", ["skipped", "zeroed"])
def test_every_view_is_what_its_mask_gives_alone(removed):
    keep_ids = complementary_views(NOISE, 4).keep_ids
    together = encode(IMAGES, keep_ids, removed=removed)[0]
    for view in range(4):
        alone = encode(IMAGES, keep_ids[view::4], removed=removed)[0]
        np.testing.assert_allclose(together[view::4], alone, atol=2e-5)


def test_visible_tokens_come_in_the_order_of_their_ids():
    turned = MASKING.keep_ids[:, ::-1]
    given, changed = (encode(IMAGES, ids)[0] for ids in (MASKING.keep_ids, turned))
    np.testing.assert_allclose(changed[:, 1:][:, ::-1], given[:, 1:], atol=2e-5)
    np.testing.assert_allclose(changed[:, 0], given[:, 0], atol=2e-5)


def test_depthwise_convolution_and_its_gradients_are_those_of_a_grouped_convolution():
    x, kernel, weights = draw(2, 6, 9, 3), draw(5, 5, 1, 3, seed=1), draw(2, 6, 9, 3, seed=2)

    def grouped(x, kernel):
        sides = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=sides, feature_group_count=3
        )

    values, gradients = [], []
    for convolve in (depthwise, grouped):

        def loss(x, kernel, convolve=convolve):
            y = convolve(x, kernel)
            return jnp.sum(y * weights), y

        gradient, value = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x, kernel)
        values.append(value)
        gradients.append(gradient)
    np.testing.assert_allclose(*values, atol=1e-5)
    for ours, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_depthwise_kernels_gradient_is_right_where_devices_share_a_part_of_the_batch():
    # XLA gives that of a grouped convolution times the number of such devices.
    x, kernel = draw(4, 6, 6, 3), draw(5, 5, 1, 3, seed=1)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    gradient = jax.grad(lambda kernel, x: jnp.sum(depthwise(x, kernel) ** 2))
    sharded = jax.jit(gradient, in_shardings=(everywhere, rows))
    np.testing.assert_allclose(sharded(kernel, x), jax.jit(gradient)(kernel, x), rtol=1e-4)


def test_depthwise_convolution_adds_in_float32():
    x = jnp.full((1, 5, 5, 1), 1 + 2**-7, jnp.bfloat16)
    kernel = jnp.ones((5, 5, 1, 1), jnp.bfloat16)
    middle = depthwise(x, kernel)[0, 2, 2, 0]
    assert middle.dtype == jnp.bfloat16
    assert float(middle) == float(jnp.bfloat16(25 * (1 + 2**-7)))


def test_cells_are_spread_to_their_places_and_picked_again():
    maps = draw(BATCH, 8, 8, 3)
    visible = VisibleCells.of(MASKING.keep_ids, GRID)
    shown = np.asarray(enlarge_mask(1 - MASKING.mask, GRID, 2))[..., None]
    np.testing.assert_array_equal(visible.spread(visible.pick(maps)), maps * shown)
    np.testing.assert_array_equal(visible.mask(2, jnp.float32), shown)


def test_stages_are_at_a_quarter_and_an_eighth_of_the_image():
    _, outputs, stages = encode(IMAGES)
    assert stages["stage1"].shape == (BATCH, 16, 16, 4)
    assert stages["stage2"].shape == (BATCH, 8, 8, 6)
    assert [x.shape for x in outputs] == [(BATCH, 1 + TOKENS, 8)]


def test_class_token_has_no_position_and_gets_no_fusion():
    # Without blocks a token's output is its input.
    encoder = ENCODER.clone(transformer=Transformer(0, 1), final_norm=False)
    given = {"params": {k: v for k, v in params().items() if k not in ("transformer", "norm")}}
    tokens, _ = encoder.apply(given, IMAGES, MASKING.keep_ids)
    np.testing.assert_array_equal(tokens[:, 0], np.tile(params()["cls_token"][0], (BATCH, 1)))


def test_neither_image_nor_stage_sizes_are_fixed():
    encoder = ENCODER.clone(image_size=(24, 8), patch_sizes=(2, 2, 1), class_token=False)
    assert encoder.grid == (6, 2)
    keep_ids = jnp.array([[3, 11, 0]])
    shapes = jax.eval_shape(
        lambda: encoder.init_with_output(jax.random.key(0), jnp.ones((1, 24, 8, 2)), keep_ids)
    )
    assert shapes[0][0].shape == (1, 3, 8)


def test_positions_are_maes_table_without_class_token_and_may_be_learned():
    np.testing.assert_array_equal(ENCODER.position_table(), sincos_positions(GRID, 8))
    assert "positions" not in params()
    learned = ENCODER.clone(positions="learned")
    given = jax.jit(learned.init)(jax.random.key(0), IMAGES)["params"]
    np.testing.assert_array_equal(given["positions"], ENCODER.position_table())


def test_drop_path_grows_over_the_blocks_of_all_stages():
    encoder = dict(transformer=Transformer(1, 2, drop_path=0.5))
    sample = np.full((3, 2, BATCH), 0.9, np.float32)
    np.testing.assert_allclose(
        # Rates 0, 1/4 and 1/2: noise of 0.9 keeps every branch and scales it by 1 / (1 - rate).
        compiled(**encoder)({"params": scaled_branches()}, IMAGES, None, sample)[0][0],
        compiled()({"params": scaled_branches(4 / 3, 2)}, IMAGES, None, None)[0][0],
        atol=2e-5,
    )
    # Noise of 0.6 drops the last block (0.5 + 0.6 stays, 0.5 + 0.4 does not) of one sample alone.
    sample[2, :, 0] = 0.4
    dropped = np.asarray(compiled(**encoder)({"params": params()}, IMAGES, None, sample)[0][1][-1])
    kept = encode(IMAGES, None, np.full((3, 2, BATCH), 0.9, np.float32), **encoder)[1][-1]
    assert np.abs(dropped[0] - kept[0]).max() > 1e-2
    np.testing.assert_allclose(dropped[1], kept[1], atol=1e-6)


def scaled_branches(second: float = 1.0, third: float = 1.0) -> dict:
    """Parameters whose branches of the second and third block are scaled."""
    flat = dict(flatten(params()))
    last = {
        "stage2_blocks_0/conv2": second,
        "stage2_blocks_0/fc2": second,
        "transformer/blocks_0/attention/out": third,
        "transformer/blocks_0/mlp/fc2": third,
    }
    for layer, factor in last.items():
        for part in ("kernel", "bias"):
            flat[f"{layer}/{part}"] = flat[f"{layer}/{part}"] * factor
    nested: dict = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        functools.reduce(lambda tree, key: tree.setdefault(key, {}), parents, nested)[name] = value
    return nested


def test_rematerialization_changes_nothing():
    plain = encode(IMAGES, MASKING.keep_ids)[0]
    again = encode(IMAGES, MASKING.keep_ids, transformer=Transformer(1, 2, remat="full"))[0]
    np.testing.assert_allclose(again, plain, atol=1e-6)


def test_compute_type_is_that_of_the_blocks():
    encoder = ENCODER.clone(transformer=Transformer(1, 2, dtype=jnp.bfloat16))
    shapes = jax.eval_shape(encoder.apply, {"params": params()}, IMAGES, MASKING.keep_ids)
    assert shapes[0].dtype == jnp.bfloat16


def test_convolutions_start_as_in_pytorch_and_linear_layers_and_the_last_embedding_xavier():
    encoder = ENCODER.clone(widths=(32, 48, 64))
    given = jax.device_get(jax.jit(encoder.init)(jax.random.key(0), IMAGES)["params"])
    bounds = {
        "stage1_embed/conv/kernel": (4 * 4 * 2) ** -0.5,
        "stage1_embed/conv/bias": (4 * 4 * 2) ** -0.5,
        "stage1_blocks_0/conv1/kernel": 32**-0.5,
        "stage1_blocks_0/fc2/kernel": 128**-0.5,
        "stage1_blocks_0/depthwise/kernel": 25**-0.5,
        "stage1_blocks_0/depthwise/bias": 25**-0.5,
        "stage1_fusion/kernel": (4 * 4 * 32) ** -0.5,
        "stage3_embed/conv/kernel": (6 / (2 * 2 * 48 + 64)) ** 0.5,
        "token_embed/kernel": (6 / 128) ** 0.5,
    }
    for path, bound in bounds.items():
        largest = np.abs(flatten(given)[path]).max()
        assert 0.85 * bound < largest <= bound * (1 + 1e-6), path
    assert not given["token_embed"]["bias"].any()
    assert given["stage1_blocks_0"]["depthwise"]["kernel"].shape == (5, 5, 1, 32)


def test_layers_for_rates_that_decay():
    encoder = ENCODER.clone(transformer=Transformer(3, 2), positions="learned")
    shapes = jax.eval_shape(lambda: encoder.init(jax.random.key(0), IMAGES))["params"]
    layers = {path: encoder.layer_of(path) for path in flatten(shapes)}
    assert encoder.depth == 5
    assert layers["transformer/blocks_2/mlp/fc1/kernel"] == 3
    assert layers["norm/scale"] == 4
    for path, layer in layers.items():
        if not path.startswith(("transformer", "norm")):
            assert layer == 0, path


def test_adopted_positions_have_the_receivers_grid():
    receiver = ENCODER.clone(image_size=(96, 64), positions="learned")
    positions = adopted("encoder/positions", {}, ENCODER, receiver)
    assert positions.shape == receiver.position_table().shape
    name = "encoder/stage1_blocks_0/conv1/kernel"
    assert adopted(name, {name: np.ones(1)}, ENCODER, receiver) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: init(removed="shown"), "'shown'; known are skipped, zeroed, seen"),
        (lambda: init(positions="fixed"), "'fixed'; known are sincos, learned"),
        (lambda: init(image_size=(60, 64)), r"expects images \[batch, 60, 64, 2\]"),
        (lambda: init(keep_ids=np.zeros((3, 1), int)), "3 rows for 2 images"),
        (lambda: conv_vit_size("huge"), "'huge'; known are base, large"),
        (lambda: conv_vit_size(""), r"or model\.widths"),
        (lambda: conv_vit_size("base", depths=(2, 11)), "3 stages"),
    ],
)
def test_what_does_not_fit_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def init(keep_ids=None, **fields):
    encoder = ENCODER.clone(**fields)
    return jax.eval_shape(lambda: encoder.init(jax.random.key(0), IMAGES, keep_ids))


def test_named_sizes_may_be_changed_in_part():
    assert conv_vit_size("base")["widths"] == (256, 384, 768)
    assert conv_vit_size("base", heads=6) == dict(
        widths=(256, 384, 768), depths=(2, 2, 11), heads=6
    )
