import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.masking import random_masking
from mim_jax.models.masked_decoder import MaskedDecoder
from mim_jax.models.positions import sincos_positions
from mim_jax.models.transformer import Transformer

GRID, WIDTH, KEPT, OUTPUTS = (2, 3), 8, 2, 5
BATCH, TOKENS = 3, 6


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


ENCODED = draw(BATCH, 1 + KEPT, 12)  # the encoder is wider than the decoder
MASKING = random_masking(jnp.asarray(np.random.default_rng(0).random((BATCH, TOKENS))), KEPT)


def init(decoder: MaskedDecoder) -> dict:
    given = jax.jit(decoder.init)(jax.random.key(0), ENCODED, MASKING.restore_ids)["params"]
    return jax.device_get(given)


def test_decoder_input_holds_projected_tokens_at_their_true_places_and_mask_tokens_elsewhere():
    # Without blocks the output shows the input: prediction = norm(input) @ kernel + bias.
    decoder = MaskedDecoder(GRID, OUTPUTS, WIDTH, transformer=Transformer(0, 1))
    params = jax.tree.map(lambda p: p + draw(*p.shape, seed=1), init(decoder))
    ours = jax.jit(decoder.apply)({"params": params}, ENCODED, MASKING.restore_ids)

    projected = ENCODED @ params["embed"]["kernel"] + params["embed"]["bias"]
    tokens = np.tile(params["mask_token"], (BATCH, TOKENS, 1))
    for sample, keep_ids in enumerate(np.asarray(MASKING.keep_ids)):
        for place, position in enumerate(keep_ids):
            tokens[sample, position] = projected[sample, 1 + place]
    tokens = tokens + sincos_positions(GRID, WIDTH)
    mean, variance = tokens.mean(-1, keepdims=True), tokens.var(-1, keepdims=True)
    normalized = (tokens - mean) / np.sqrt(variance + 1e-6)
    normalized = normalized * params["norm"]["scale"] + params["norm"]["bias"]
    expected = normalized @ params["pred"]["kernel"] + params["pred"]["bias"]
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_every_prediction_depends_on_every_visible_token_and_on_the_class_token():
    decoder = MaskedDecoder(GRID, OUTPUTS, WIDTH, transformer=Transformer(1, 2))
    params = init(decoder)

    predict = jax.jit(decoder.apply)
    before = np.asarray(predict({"params": params}, ENCODED, MASKING.restore_ids))
    for place in range(1 + KEPT):
        changed = ENCODED.copy()
        changed[0, place] = draw(12, seed=1)
        after = np.asarray(predict({"params": params}, changed, MASKING.restore_ids))
        assert np.all(np.any(after[0] != before[0], axis=-1)), place
        np.testing.assert_array_equal(after[1:], before[1:])


def test_predictions_leave_out_the_class_token():
    decoder = MaskedDecoder(GRID, OUTPUTS, WIDTH, transformer=Transformer(1, 2))
    shape = jax.eval_shape(
        decoder.init_with_output, jax.random.key(0), ENCODED, MASKING.restore_ids
    )[0]
    assert shape.shape == (BATCH, TOKENS, OUTPUTS)


def test_the_initial_mask_token_is_normal_with_deviation_0_02():
    decoder = MaskedDecoder(GRID, OUTPUTS, width=256, transformer=Transformer(0, 1))
    mask_token = init(decoder)["mask_token"]
    assert mask_token.shape == (1, 1, 256)
    np.testing.assert_allclose(mask_token.std(), 0.02, rtol=0.2)
    assert abs(mask_token.mean()) < 4.5 * 0.02 / 16


def test_bfloat16_compute_keeps_float32_parameters():
    decoder = MaskedDecoder(GRID, OUTPUTS, WIDTH, transformer=Transformer(1, 2, dtype=jnp.bfloat16))
    output, shapes = jax.eval_shape(
        decoder.init_with_output, jax.random.key(0), ENCODED, MASKING.restore_ids
    )
    assert output.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_a_width_without_positions_is_an_error():
    decoder = MaskedDecoder(GRID, OUTPUTS, width=6, transformer=Transformer(1, 2))
    with pytest.raises(ValueError, match="divisible by 4, got 6"):
        jax.eval_shape(decoder.init, jax.random.key(0), ENCODED, MASKING.restore_ids)


def test_without_class_token_no_token_is_set_apart():
    decoder = MaskedDecoder(GRID, OUTPUTS, WIDTH, Transformer(1, 2), class_token=False)
    assert decoder.position_table().shape == (TOKENS, WIDTH)
    given = jax.jit(decoder.init)(jax.random.key(0), ENCODED[:, 1:], MASKING.restore_ids)
    predict = jax.jit(decoder.apply)
    before = predict(given, ENCODED[:, 1:], MASKING.restore_ids)
    assert before.shape == (BATCH, TOKENS, OUTPUTS)
    changed = ENCODED[:, 1:].copy()
    changed[0, 0] = draw(12, seed=1)
    after = predict(given, changed, MASKING.restore_ids)
    assert np.all(np.any(np.asarray(after != before)[0], axis=-1))
