import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.special import log_softmax
from sklearn.metrics import log_loss

from mim_jax.losses import (
    absolute_error,
    binary_cross_entropy,
    cosine_distance,
    cross_entropy,
    masked_mean,
    mean_discrepancy,
    moments,
    smooth_l1,
    smoothed_targets,
    soft_cross_entropy,
    squared_error,
    wasserstein_distance,
)

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


@few
@given(seeds, st.sampled_from([0.5, 1.0, 2.0]))
def test_smooth_l1_is_a_parabola_near_zero_and_a_line_beyond_beta(seed, beta):
    prediction, target = 3 * draw(seed, 2, 5, 7), draw(seed + 1, 2, 5, 7)
    distance = np.abs(prediction.astype(np.float64) - target)
    exact = np.where(distance < beta, distance**2 / (2 * beta), distance - beta / 2).mean(axis=-1)
    np.testing.assert_allclose(smooth_l1(prediction, target, beta), exact, rtol=1e-5)


def test_smooth_l1_of_the_papers():
    small, large = jnp.asarray([[0.5]]), jnp.asarray([[3.0]])
    zero = jnp.zeros((1, 1))
    # MaskAlign: twice Huber's loss, which is the square for small errors.
    np.testing.assert_allclose(2 * smooth_l1(small, zero), [0.25])
    np.testing.assert_allclose(2 * smooth_l1(large, zero), [5.0])
    # DMJD: d^2 / 4 below 2, |d| - 1 above.
    np.testing.assert_allclose(smooth_l1(small, zero, beta=2), [0.0625])
    np.testing.assert_allclose(smooth_l1(large, zero, beta=2), [2.0])


def test_absolute_error_is_the_mean_distance():
    prediction, target = draw(0, 2, 3, 4), draw(1, 2, 3, 4)
    np.testing.assert_allclose(
        absolute_error(prediction, target), np.abs(prediction - target).mean(axis=-1), rtol=1e-5
    )


@few
@given(seeds)
def test_cosine_distance_ignores_lengths_and_lies_between_zero_and_two(seed):
    prediction, target = draw(seed, 3, 4, 6), draw(seed + 1, 3, 4, 6)
    distance = np.asarray(cosine_distance(prediction, target))
    assert distance.shape == (3, 4)
    assert np.all((distance >= 0) & (distance <= 2))
    np.testing.assert_allclose(cosine_distance(5 * prediction, target), distance, atol=1e-5)
    np.testing.assert_allclose(cosine_distance(target, 2 * target), 0, atol=1e-5)
    np.testing.assert_allclose(cosine_distance(target, -target), 2, atol=1e-5)


def test_errors_of_features_are_computed_in_float32():
    prediction = jnp.asarray([256.0, 1.0], jnp.bfloat16)
    target = jnp.asarray([257.0, 1.0], jnp.float32)  # 257 does not exist in bfloat16
    for loss in (absolute_error, smooth_l1, cosine_distance):
        assert loss(prediction, target).dtype == jnp.float32
    assert absolute_error(prediction, target) == 0.5


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


@few
@given(seeds, st.sampled_from([1, 8]), st.sampled_from([2, 6]))
def test_soft_cross_entropy_is_the_mean_of_the_expected_log_probability(seed, batch, classes):
    logits = 3 * draw(seed, batch, classes)
    targets = np.random.default_rng(seed).dirichlet(np.ones(classes), batch).astype(np.float32)
    expected = -np.mean(np.sum(targets * log_softmax(logits.astype(np.float64), axis=1), axis=1))
    np.testing.assert_allclose(soft_cross_entropy(logits, targets), expected, rtol=1e-5, atol=1e-6)


def test_soft_cross_entropy_of_one_hot_targets_is_the_cross_entropy():
    logits, labels = draw(0, 8, 5), jnp.arange(8) % 5
    ours = soft_cross_entropy(logits, smoothed_targets(labels, 5))
    np.testing.assert_allclose(ours, cross_entropy(logits, labels), rtol=1e-6)


@few
@given(st.floats(0, 0.99), st.integers(2, 8))
def test_smoothed_targets_give_every_class_its_part(smoothing, classes):
    labels = np.arange(classes)[::-1]
    targets = smoothed_targets(jnp.asarray(labels), classes, smoothing)
    expected = np.where(np.eye(classes)[labels] == 1, 1 - smoothing, 0) + smoothing / classes
    assert targets.dtype == jnp.float32
    np.testing.assert_allclose(targets, expected, atol=1e-6)
    np.testing.assert_allclose(targets.sum(axis=1), 1, atol=1e-6)


@few
@given(seeds, st.sampled_from([1, 8]), st.sampled_from([1, 6]))
def test_binary_cross_entropy_is_the_mean_over_examples_and_classes(seed, batch, classes):
    logits = 3 * draw(seed, batch, classes)
    targets = np.random.default_rng(seed).random((batch, classes)).astype(np.float32)
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    expected = -np.mean(targets * np.log(probability) + (1 - targets) * np.log(1 - probability))
    np.testing.assert_allclose(
        binary_cross_entropy(logits, targets), expected, rtol=1e-4, atol=1e-6
    )


def test_losses_with_soft_targets_survive_large_logits_and_half_precision():
    logits = jnp.asarray([[1e4, -1e4], [-1e4, 1e4]], jnp.bfloat16)
    for loss in (soft_cross_entropy, binary_cross_entropy):
        right, wrong = loss(logits, jnp.eye(2)), loss(logits, 1 - jnp.eye(2))
        assert right.dtype == jnp.float32
        assert right == 0 and wrong > 1e3 and np.isfinite(wrong)


def moments_of(rows: np.ndarray):
    return moments(jnp.asarray(rows), jnp.ones(len(rows)))


@few
@given(seeds)
def test_wasserstein_distance_of_equal_features_is_zero_with_a_finite_gradient(seed):
    rows = draw(seed, 4, 6)  # fewer rows than channels: the covariance is singular
    fixed = moments_of(rows)
    for diagonal in (False, True):

        def distance(rows, diagonal=diagonal):
            return wasserstein_distance(fixed, moments_of(rows), diagonal=diagonal)

        value, gradient = jax.value_and_grad(distance)(jnp.asarray(rows))
        assert abs(float(value)) < 1e-4
        assert np.isfinite(gradient).all()


@few
@given(seeds)
def test_wasserstein_distance_is_that_of_the_two_gaussians(seed):
    first, second = draw(seed, 20, 5), 1 + 2 * draw(seed + 1, 15, 5)
    a, b = (np.cov(x.astype(np.float64), rowvar=False) + 1e-6 * np.eye(5) for x in (first, second))
    root = sqrtm(a)
    overlap = np.trace(sqrtm(root @ b @ root)).real
    expected = np.sum((first.mean(0) - second.mean(0)) ** 2) + np.trace(a + b) - 2 * overlap
    ours = wasserstein_distance(moments_of(first), moments_of(second))
    np.testing.assert_allclose(ours, expected, rtol=1e-4)


@few
@given(seeds)
def test_wasserstein_distance_of_diagonal_covariances_is_the_diagonal_one(seed):
    random = np.random.default_rng(seed)
    # Every channel by itself goes up and down.
    steps = np.concatenate([np.eye(4), -np.eye(4)]).astype(np.float32)
    first, second = (
        moments_of(random.normal(size=4) + random.uniform(0.5, 2, 4) * steps) for _ in range(2)
    )
    np.testing.assert_allclose(
        wasserstein_distance(first, second),
        wasserstein_distance(first, second, diagonal=True),
        rtol=1e-4,
    )


def test_wasserstein_distance_has_the_gradient_of_its_second_features():
    first, second = draw(0, 12, 4), 1 + draw(1, 10, 4)

    def distance(rows):
        return wasserstein_distance(moments_of(first), moments(rows, jnp.ones(len(second))))

    gradient = jax.grad(distance)(jnp.asarray(second))
    step = 1e-2 * draw(2, 10, 4)
    difference = distance(jnp.asarray(second + step)) - distance(jnp.asarray(second - step))
    np.testing.assert_allclose(np.sum(gradient * step), difference / 2, rtol=2e-2)


@few
@given(seeds)
def test_mean_discrepancy_is_the_mean_of_kernels_within_less_that_between(seed):
    first, second = draw(seed, 6, 3), 0.5 + draw(seed + 1, 4, 3)
    rows = np.concatenate([first, second])
    squares = np.sum((rows[:, None] - rows[None]) ** 2, axis=-1)
    kernel = np.exp(-squares / (2 * squares.mean()))
    expected = kernel[:6, :6].mean() + kernel[6:, 6:].mean() - 2 * kernel[:6, 6:].mean()
    ours = mean_discrepancy(first, second, (jnp.ones(6), jnp.ones(4)))
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-6)
    # Rows without weight do not count, neither in the means nor in the kernel's width.
    more = np.concatenate([first, 10 * draw(seed + 2, 2, 3)])
    weights = jnp.asarray([1.0] * 6 + [0.0] * 2), jnp.ones(4)
    np.testing.assert_allclose(mean_discrepancy(more, second, weights), ours, rtol=1e-3, atol=1e-6)
