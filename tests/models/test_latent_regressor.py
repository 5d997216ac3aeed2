import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.models.latent_regressor import CrossAttention, LatentDecoder, LatentRegressor
from mim_jax.models.transformer import Transformer

BLOCKS = Transformer(2, 2, qkv_bias="query_value", layer_scale=0.5)
REGRESSOR = LatentRegressor(8, BLOCKS)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


VISIBLE, MASKED_POSITIONS, VISIBLE_POSITIONS = (
    normal(0, 2, 4, 8),
    normal(1, 2, 3, 8),
    normal(2, 2, 4, 8),
)


def random_like(module, *inputs) -> dict:
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))["params"]
    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(tree, [0.4 * normal(i, *x.shape) for i, x in enumerate(leaves)])


@functools.cache
def params() -> dict:
    return random_like(REGRESSOR, VISIBLE, MASKED_POSITIONS, VISIBLE_POSITIONS)


@functools.cache
def call(regressor: LatentRegressor = REGRESSOR):
    return jax.jit(lambda p, *inputs: regressor.apply({"params": p}, *inputs))


def norm(p: dict, x: np.ndarray) -> np.ndarray:
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * p["scale"] + p["bias"]


def block(p: dict, state, visible, masked_positions, visible_positions) -> np.ndarray:
    """One block, written out with the formulas of section 3."""
    tokens = np.concatenate([visible, state], axis=1)
    positions = np.concatenate([visible_positions, masked_positions], axis=1)
    a = p["attention"]
    query = norm(p["query_norm"], state + masked_positions)
    query = np.einsum("btd,dhe->bthe", query, a["query"]["kernel"]) + a["query_bias"]
    key = np.einsum("btd,dhe->bthe", norm(p["key_norm"], tokens + positions), a["key"]["kernel"])
    value = np.einsum("btd,dhe->bthe", norm(p["value_norm"], tokens), a["value"]["kernel"])
    value = value + a["value_bias"]
    logits = np.einsum("bthe,bshe->bhts", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    x = np.einsum("bhts,bshe->bthe", weights, value)
    x = np.einsum("bthe,hed->btd", x, a["out"]["kernel"]) + a["out"]["bias"]
    state = norm(p["norm"], state + p["layer_scale1"]["scale"] * x)
    hidden = state @ p["mlp"]["fc1"]["kernel"] + p["mlp"]["fc1"]["bias"]
    hidden = np.asarray(jax.nn.gelu(hidden, approximate=False))
    x = hidden @ p["mlp"]["fc2"]["kernel"] + p["mlp"]["fc2"]["bias"]
    return state + p["layer_scale2"]["scale"] * x


def test_blocks_are_the_formulas_of_the_paper():
    predicted, states = call()(params(), VISIBLE, MASKED_POSITIONS, VISIBLE_POSITIONS)
    state = np.broadcast_to(params()["mask_token"], (2, 3, 8))
    for i in range(2):
        given = (state, VISIBLE, MASKED_POSITIONS, VISIBLE_POSITIONS)
        state = block(params()[f"blocks_{i}"], *given)
        np.testing.assert_allclose(states[i], state, atol=1e-5)
    np.testing.assert_allclose(predicted, norm(params()["norm"], state), atol=1e-5)


def test_without_final_norm_its_parameters_are_there_and_have_no_effect():
    plain = REGRESSOR.clone(final_norm=False)
    predicted, states = call(plain)(params(), VISIBLE, MASKED_POSITIONS, VISIBLE_POSITIONS)
    np.testing.assert_array_equal(predicted, states[-1])
    given = random_like(plain, VISIBLE, MASKED_POSITIONS, VISIBLE_POSITIONS)
    assert set(given["norm"]) == {"scale", "bias"}


def test_a_branch_that_is_switched_off_leaves_the_state_of_its_sample():
    regressor = REGRESSOR.clone(settings=BLOCKS.clone(drop_path=0.5))
    noise = np.full((2, 2, 2), 0.9, np.float32)
    noise[1, :, 0] = 0.1  # both branches of the last block, first sample
    inputs = (VISIBLE, MASKED_POSITIONS, VISIBLE_POSITIONS)
    _, states = call(regressor)(params(), *inputs, noise)
    skipped = norm(params()["blocks_1"]["norm"], np.asarray(states[0][0]))
    np.testing.assert_allclose(states[1][0], skipped, atol=1e-5)
    assert (
        np.abs(states[1][1] - norm(params()["blocks_1"]["norm"], np.asarray(states[0][1]))).max()
        > 0.1
    )


def test_rematerialization_changes_no_value():
    inputs = (VISIBLE, MASKED_POSITIONS, VISIBLE_POSITIONS)
    again = REGRESSOR.clone(settings=BLOCKS.clone(remat="full"))
    np.testing.assert_allclose(
        call(again)(params(), *inputs)[0], call()(params(), *inputs)[0], atol=1e-6
    )


def test_heads_that_do_not_divide_the_width_are_an_error_unless_their_width_is_given():
    x = jnp.zeros((1, 2, 8))
    with pytest.raises(ValueError, match="width 8 is not divisible by 3 attention heads"):
        CrossAttention(3).init(jax.random.key(0), x, x, x)
    output, _ = CrossAttention(3, head_width=2).init_with_output(jax.random.key(0), x, x, x)
    assert output.shape == (1, 2, 8)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_decoder_without_blocks_looks_at_every_token_by_itself(depth):
    decoder = LatentDecoder(5, Transformer(depth, 2))
    p = random_like(decoder, VISIBLE)
    decode = jax.jit(lambda x: decoder.apply({"params": p}, x))
    before = decode(VISIBLE)
    changed = VISIBLE.copy()
    changed[:, 0] += normal(5, 2, 8)
    after = decode(changed)
    assert after.shape == (2, 4, 5)
    assert np.all(np.any(after[:, 0] != before[:, 0], axis=-1))
    assert np.array_equal(after[:, 1:], before[:, 1:]) == (depth == 0)
