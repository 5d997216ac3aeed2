import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss

from mim_jax.losses import cross_entropy, masked_mean, squared_error

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 1000)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@few
@given(seeds, st.sampled_from([1, 5]), st.sampled_from([1, 7]))
def test_squared_error_is_the_mean_over_the_values_of_a_patch(seed, tokens, values):
    prediction, target = draw(seed, 2, tokens, values), draw(seed + 1, 2, tokens, values)
    expected = ((prediction.astype(np.float64) - target) ** 2).sum(axis=-1) / values
    np.testing.assert_allclose(squared_error(prediction, target), expected, rtol=1e-5)


def test_squared_error_is_computed_in_float32():
    prediction = jnp.asarray([256.0, 1.0], jnp.bfloat16)
    target = jnp.asarray([257.0, 1.0], jnp.float32)  # 257 does not exist in bfloat16
    error = squared_error(prediction, target)
    assert error.dtype == jnp.float32
    assert error == 0.5


def test_masked_mean_divides_by_the_global_count():
    values = jnp.asarray([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    mask = jnp.asarray([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    # (1 + 2 + 3 + 10) / 4; a mean over the samples' means would be (2 + 10) / 2.
    assert masked_mean(values, mask) == 4


@few
@given(seeds, st.sampled_from([1, 4]), st.sampled_from([1, 6]))
def test_masked_mean_equals_the_mean_of_the_selected_values(seed, batch, tokens):
    values = draw(seed, batch, tokens)
    mask = np.random.default_rng(seed).integers(0, 2, (batch, tokens)).astype(np.float32)
    mask[0, 0] = 1
    np.testing.assert_allclose(
        masked_mean(values, mask), values[mask == 1].astype(np.float64).mean(), rtol=1e-4, atol=1e-6
    )


def test_loss_is_unchanged_when_visible_target_pixels_change():
    prediction, target = draw(0, 2, 6, 12), draw(1, 2, 6, 12)
    mask = np.tile(np.asarray([0, 1, 0, 1, 1, 1], np.float32), (2, 1))
    visible_changed = target + 100 * (1 - mask)[..., None]
    removed_changed = target + 100 * mask[..., None]

    def loss(t):
        return float(masked_mean(squared_error(prediction, t), mask))

    assert loss(visible_changed) == loss(target)
    assert loss(removed_changed) != loss(target)


def test_no_gradient_reaches_the_prediction_of_visible_tokens():
    mask = np.asarray([[0, 1, 0, 1]], np.float32)
    gradient = jax.grad(lambda p: masked_mean(squared_error(p, draw(1, 1, 4, 3)), mask))(
        jnp.asarray(draw(0, 1, 4, 3))
    )
    np.testing.assert_array_equal(np.any(np.asarray(gradient) != 0, axis=-1), mask == 1)


@few
@given(seeds, st.sampled_from([1, 8]), st.sampled_from([2, 6]))
def test_cross_entropy_equals_that_of_scikit_learn(seed, batch, classes):
    logits = 3 * draw(seed, batch, classes)
    labels = np.random.default_rng(seed).integers(0, classes, batch)
    exact = np.exp(logits.astype(np.float64))
    probabilities = exact / exact.sum(axis=1, keepdims=True)
    expected = log_loss(labels, probabilities, labels=list(range(classes)))
    np.testing.assert_allclose(cross_entropy(logits, labels), expected, rtol=1e-5, atol=1e-6)


def test_cross_entropy_survives_large_logits_and_half_precision():
    logits = jnp.asarray([[1e4, 0.0], [0.0, 1e4]], jnp.bfloat16)
    right = cross_entropy(logits, jnp.asarray([0, 1]))
    wrong = cross_entropy(logits, jnp.asarray([1, 0]))
    assert right.dtype == jnp.float32
    assert right == 0
    assert wrong == float(logits[0, 0])
