import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.masking import random_masking
from mim_jax.method import method_class
from mim_jax.methods.mae import MAE, Reconstruction
from mim_jax.targets import normalize_patches, patchify
from mim_jax.training.optimizer import is_decayed
from mim_jax.training.tree import flatten
from tests.methods.tiny import KEPT, TOKENS, images, tiny_config, tiny_mae, tiny_params

IMAGES = images(batch=3)
PATCH = (4, 4)


@functools.cache
def compiled(name: str, normalize_target: bool = True):
    method = tiny_mae({"model.normalize_target": normalize_target})
    return jax.jit(getattr(method, name))


@functools.cache
def reconstruct():
    return jax.jit(tiny_mae().model.apply)


def variables() -> dict:
    return {"params": tiny_params()}


def rngs(seed: int) -> dict[str, jax.Array]:
    return {"mask": jax.random.key(seed)}


def drawn_noise(seed: int, batch: int = 3) -> jax.Array:
    """The noise that `loss` and `pictures` draw from `rngs(seed)`."""
    return jax.random.uniform(rngs(seed)["mask"], (batch, TOKENS))


def pixel_mask(mask: np.ndarray) -> np.ndarray:
    """`[batch, tokens]` -> `[batch, 8, 12, 1]`."""
    return np.asarray(mask).reshape(-1, 2, 3).repeat(4, axis=1).repeat(4, axis=2)[..., None]


def loss_of(given: np.ndarray, seed: int = 0) -> float:
    value, _ = compiled("loss")(variables(), {"image": given}, rngs(seed), 0)
    return float(value)


def test_encoder_never_sees_removed_patches():
    noise = drawn_noise(0)
    removed = pixel_mask(random_masking(noise, KEPT).mask)
    other = np.where(removed == 1, 100 * images(3, seed=1), IMAGES)
    before, after = (reconstruct()(variables(), x, noise) for x in (IMAGES, other))
    np.testing.assert_array_equal(after.latent, before.latent)
    np.testing.assert_array_equal(after.pred, before.pred)
    visible = np.where(removed == 1, IMAGES, images(3, seed=1))
    assert np.any(reconstruct()(variables(), visible, noise).latent != before.latent)


def test_every_sample_hides_the_configured_share_of_its_patches():
    output = reconstruct()(variables(), IMAGES, drawn_noise(0))
    np.testing.assert_array_equal(output.masking.mask.sum(axis=1), TOKENS - KEPT)
    assert output.latent.shape == (3, 1 + KEPT, 16)
    assert output.pred.shape == (3, TOKENS, 4 * 4 * 1)


@pytest.mark.parametrize("normalize_target", [False, True])
def test_loss_is_the_mean_squared_error_over_the_removed_patches(normalize_target):
    output = reconstruct()(variables(), IMAGES, drawn_noise(5))
    target = np.asarray(patchify(jnp.asarray(IMAGES), PATCH), np.float64)
    if normalize_target:
        variance = target.var(axis=-1, ddof=1, keepdims=True)
        target = (target - target.mean(axis=-1, keepdims=True)) / np.sqrt(variance + 1e-6)
    removed = np.asarray(output.masking.mask) == 1
    expected = ((output.pred - target) ** 2).mean(axis=-1)[removed].mean()
    method = tiny_mae({"model.normalize_target": normalize_target})
    ours = float(method.reconstruction_loss(IMAGES, output))
    assert ours == pytest.approx(float(expected), rel=1e-5)
    if normalize_target:
        assert loss_of(IMAGES, 5) == pytest.approx(ours, rel=1e-5)


def test_loss_reads_only_the_removed_patches_of_the_target():
    method = tiny_mae()
    output = reconstruct()(variables(), IMAGES, drawn_noise(0))
    removed = pixel_mask(output.masking.mask)
    noise = images(3, seed=1)
    expected = float(method.reconstruction_loss(IMAGES, output))
    visible_changed = np.where(removed == 1, IMAGES, noise)
    removed_changed = np.where(removed == 1, noise, IMAGES)
    assert float(method.reconstruction_loss(visible_changed, output)) == expected
    assert float(method.reconstruction_loss(removed_changed, output)) != expected


def test_loss_and_target_are_float32_under_bfloat16_compute():
    method = tiny_mae({"compute_dtype": "bfloat16"})
    value, _ = jax.eval_shape(method.loss, variables(), {"image": IMAGES}, rngs(0), 0)
    assert value.dtype == jnp.float32
    assert value.shape == ()
    assert method.target(IMAGES.astype(jnp.bfloat16)).dtype == jnp.float32


def test_loss_is_a_pure_function_of_its_random_key():
    assert loss_of(IMAGES, 1) == loss_of(IMAGES, 1)
    assert len({loss_of(IMAGES, seed) for seed in range(4)}) == 4


def test_one_samples_loss_does_not_depend_on_the_others():
    # The targets and masks of a sample are its own; only the mean joins them.
    method, noise = tiny_mae(), drawn_noise(0)
    together = reconstruct()(variables(), IMAGES, noise)
    losses = []
    for i in range(3):
        one = jax.tree.map(lambda x, i=i: x[i : i + 1], together)
        losses.append(float(method.reconstruction_loss(IMAGES[i : i + 1], one)))
    whole = float(method.reconstruction_loss(IMAGES, together))
    assert whole == pytest.approx(np.mean(losses), rel=1e-6)


def test_gradient_has_no_position_table_and_reaches_every_parameter():
    def loss(params):
        return tiny_mae().loss({"params": params}, {"image": IMAGES}, rngs(0), jnp.int32(0))[0]

    gradient = flatten(jax.jit(jax.grad(loss))(tiny_params()))
    assert set(gradient) == set(flatten(tiny_params()))
    assert not [path for path in gradient if "pos" in path]
    for path, leaf in gradient.items():
        assert np.any(np.asarray(leaf) != 0), path


@pytest.mark.parametrize("scan", [False, True])
def test_decayed_parameters_are_those_of_the_official_rule(scan):
    """Excluded are tensors of one dimension and names ending in `.bias`; tokens are decayed."""
    method = tiny_mae({"model.scan": scan})
    shapes = jax.eval_shape(lambda: method.init(jax.random.key(0), {"image": IMAGES}))
    ours = {path: is_decayed(path, leaf) for path, leaf in flatten(shapes["params"]).items()}
    official = tiny_mae().layout().save(tiny_params())
    for rule in method.layout().rules:
        expected = official[rule.key].ndim > 1 and not rule.key.endswith(".bias")
        assert ours[rule.path] == expected, rule.path
    assert ours["encoder/cls_token"]
    assert ours["decoder/mask_token"]


def test_features_are_the_normalized_tokens_of_whole_images():
    features = compiled("features")(variables(), {"image": IMAGES})
    assert features.pooled.shape == (3, 16)
    assert features.tokens.shape == (3, TOKENS, 16)
    assert features.grid == (2, 3)
    encode = jax.jit(tiny_mae().model.encoder.apply)
    tokens = encode({"params": tiny_params()["encoder"]}, IMAGES)[0]
    np.testing.assert_allclose(features.pooled, tokens[:, 0], atol=1e-5)
    np.testing.assert_allclose(features.tokens, tokens[:, 1:], atol=1e-5)


def test_features_are_deterministic_and_each_image_has_its_own():
    features = compiled("features")(variables(), {"image": IMAGES})
    again = compiled("features")(variables(), {"image": IMAGES})
    reverse = compiled("features")(variables(), {"image": IMAGES[::-1]})
    np.testing.assert_array_equal(again.pooled, features.pooled)
    np.testing.assert_allclose(reverse.pooled[::-1], features.pooled, atol=1e-6)
    assert np.any(np.abs(features.pooled[0] - features.pooled[1]) > 1e-3)


def picture(normalize_target: bool = True):
    call = compiled("pictures", normalize_target)
    return call(variables(), {"image": IMAGES}, rngs(3))["reconstruction"]


def test_pictures_have_four_columns_of_images():
    shown = picture()
    assert list(shown.columns) == ["image", "visible", "prediction", "prediction + visible"]
    for column in shown.columns.values():
        assert column.shape == IMAGES.shape
    np.testing.assert_array_equal(shown.columns["image"], IMAGES)


def test_the_caption_says_what_carries_the_statistics_of_the_true_patches():
    assert "Loss on removed patches only" in picture().caption
    assert "mean and deviation of the true patches" in picture().caption
    assert "mean and deviation" not in picture(normalize_target=False).caption


def test_visible_patches_are_shown_unchanged_and_removed_ones_grey():
    columns = picture().columns
    removed = pixel_mask(random_masking(drawn_noise(3), KEPT).mask) == 1
    np.testing.assert_array_equal(columns["visible"], np.where(removed, 0, IMAGES))
    np.testing.assert_array_equal(
        columns["prediction + visible"], np.where(removed, columns["prediction"], IMAGES)
    )


def test_shown_predictions_have_the_mean_and_deviation_of_the_true_patches():
    shown = np.asarray(patchify(picture().columns["prediction"], PATCH), np.float64)
    true = np.asarray(patchify(jnp.asarray(IMAGES), PATCH), np.float64)
    pred = np.asarray(reconstruct()(variables(), IMAGES, drawn_noise(3)).pred, np.float64)
    mean, deviation = true.mean(-1, keepdims=True), true.std(-1, ddof=1, keepdims=True)
    # In units of the true patch's deviation, around its mean, it is the prediction itself.
    np.testing.assert_allclose((shown - mean) / deviation, pred, atol=1e-4)


def test_predictions_of_raw_pixels_are_shown_as_they_are():
    shown = patchify(picture(normalize_target=False).columns["prediction"], PATCH)
    pred = reconstruct()(variables(), IMAGES, drawn_noise(3)).pred
    np.testing.assert_allclose(shown, pred, atol=1e-6)


def test_a_perfect_prediction_is_shown_as_the_image():
    method = tiny_mae()
    perfect = normalize_patches(patchify(jnp.asarray(IMAGES), PATCH))
    masking = random_masking(drawn_noise(3), KEPT)

    class Oracle:
        encoder = method.model.encoder

        @staticmethod
        def apply(variables, images, noise):
            return Reconstruction(perfect, perfect, masking)

    shown = MAE(Oracle()).pictures({}, {"image": IMAGES}, rngs(3))["reconstruction"]
    np.testing.assert_allclose(shown.columns["prediction"], IMAGES, atol=1e-5)
    np.testing.assert_allclose(shown.columns["prediction + visible"], IMAGES, atol=1e-5)


def test_scanned_and_unrolled_models_are_the_same_function():
    unrolled, scanned = tiny_mae(), tiny_mae({"model.scan": True, "model.remat": "full"})
    like = jax.eval_shape(lambda: scanned.init(jax.random.key(0), {"image": IMAGES}))["params"]
    params = scanned.layout().load(unrolled.layout().save(tiny_params()), like)
    value = jax.jit(scanned.loss)({"params": params}, {"image": IMAGES}, rngs(0), 0)[0]
    assert float(value) == pytest.approx(loss_of(IMAGES, 0), rel=1e-5)


@pytest.mark.parametrize(
    ("variant", "encoder", "decoder"),
    [("vit_b16", 85.65, 26.01), ("vit_l16", 303.10, 26.14), ("vit_h14", 630.44, 26.18)],
)
def test_parameter_counts_are_the_papers_without_position_tables(variant, encoder, decoder):
    config = configs.load(f"mae:{variant}", {"model.scan": True, "compute_dtype": "float32"})
    method = MAE.build(config)
    shapes = {"image": jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)}
    params = jax.eval_shape(lambda: method.init(jax.random.key(0), shapes))["params"]
    counts = {name: sum(x.size for x in jax.tree.leaves(params[name])) for name in params}
    assert counts["encoder"] / 1e6 == pytest.approx(encoder, abs=0.005)
    assert counts["decoder"] / 1e6 == pytest.approx(decoder, abs=0.005)


def test_the_method_is_known_by_its_name():
    assert method_class("mae") is MAE


def test_a_batch_of_the_models_size_passes_the_check():
    tiny_mae().check({"image": np.zeros((2, 8, 12, 1), np.uint8)})
    with pytest.raises(ValueError, match=r"expects \[batch, 8, 12, 1\]"):
        tiny_mae().check({"image": np.zeros((2, 12, 8, 1), np.uint8)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.image_size": (8, 13)}, r"\(8, 13\) is not divisible .* nearest .* \(8, 12\)"),
        ({"model.size": "huuge"}, "'huuge'; known are tiny, small, base, large, huge"),
        ({"model.depth": 0}, r"set model\.size .* or model\.depth"),
        ({"model.mask_ratio": 0.0}, "strictly between 0 and 1"),
        ({"model.mask_ratio": 0.95}, "leaves none of 6 tokens"),
        ({"model.mask_ratio": 1e-17}, "removes none of 6 tokens"),
        ({"model.patch_size": (4,)}, "same number of axes"),
    ],
)
def test_what_does_not_fit_together_is_an_error_when_built(changes, message):
    with pytest.raises(ValueError, match=message):
        MAE.build(tiny_config(changes))
