import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax import losses
from mim_jax.conversion.files import write_state_dict
from mim_jax.conversion.initial import read_donor
from mim_jax.method import method_class
from mim_jax.methods.hi_end_mae import HiEndMAE
from mim_jax.methods.parts.volumes import COLOURS, fullest_voxel, overlaid
from mim_jax.methods.unetr import SegmentationFineTune
from mim_jax.models.unetr import Doubling, instance_norm, normalizing_factor
from mim_jax.training.tree import flatten, unflatten

SIZE, CLASSES = (4, 6, 4), 3

ENCODER = {
    "model.width": 12,
    "model.depth": 4,
    "model.heads": 2,
    "model.patch_size": (2, 2, 2),
    "model.taps": (0, 1, 2),
    "data.image_size": SIZE,
    "compute_dtype": "float32",
}


@functools.cache
def tiny(**changes) -> SegmentationFineTune:
    own = {"model.feature_size": 2, "model.num_classes": CLASSES}
    fields = {name.replace("__", "."): value for name, value in changes.items()}
    return SegmentationFineTune.build(configs.load("unetr:tiny", {**ENCODER, **own, **fields}))


@functools.cache
def donor() -> HiEndMAE:
    own = {"model.decoder_width": 12, "model.decoder_depth": 1, "model.decoder_heads": 2}
    return HiEndMAE.build(configs.load("hi_end_mae:tiny", {**ENCODER, **own}))


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "image": random.uniform(size=(2, *SIZE, 1)).astype(np.float32),
        "segmentation": random.integers(0, CLASSES, (2, *SIZE)).astype(np.uint8),
    }


@functools.cache
def variables(name: str = "unetr"):
    method = tiny() if name == "unetr" else donor()
    given = jax.device_get(jax.jit(lambda: method.init(jax.random.key(0), batch()))())
    random = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.1 * random.normal(size=x.shape).astype(np.float32), given)


@functools.cache
def logits():
    return jax.jit(tiny().logits)


def adopted(given: dict, method) -> dict[str, np.ndarray]:
    """What a UNETR takes over, by path; the other parameters are its own."""
    own = flatten(variables()["params"])
    found = {path: tiny().adopt(path, given, method) for path in own}
    return {path: own[path] if value is None else value for path, value in found.items()}


def test_logits_and_loss_are_of_every_voxel():
    out = logits()(variables(), batch())
    assert out.shape == (2, *SIZE, CLASSES)
    assert out.dtype == jnp.float32
    assert tiny().num_classes == CLASSES
    loss, aux = tiny().loss(variables(), batch(), {}, 0)
    parts = aux.metrics["dice_loss"], aux.metrics["cross_entropy"]
    assert float(loss) == pytest.approx(float(sum(parts)), rel=1e-6)
    labels = batch()["segmentation"].astype(int)
    chance = np.take_along_axis(np.asarray(jax.nn.log_softmax(out)), labels[..., None], -1)
    assert float(parts[1]) == pytest.approx(-chance.mean(), rel=1e-5)


def test_dice_loss_is_that_of_each_class_of_each_example():
    random = np.random.default_rng(0)
    scores = random.normal(size=(2, 5, 3)).astype(np.float32)
    labels = np.array([[0, 1, 1, 0, 1], [2, 0, 1, 2, 2]])  # the first example lacks class 2
    p, y = np.asarray(jax.nn.softmax(scores), np.float64), np.eye(3)[labels]
    dice = 2 * (p * y).sum(axis=1) / ((p**2).sum(axis=1) + y.sum(axis=1) + 1e-6)
    assert float(losses.dice_loss(scores, labels)) == pytest.approx(np.mean(1 - dice), rel=1e-5)
    assert float(losses.dice_loss(30 * y[1:], labels[1:])) == pytest.approx(0, abs=1e-5)


def test_encoder_of_pre_training_gives_the_same_levels_without_its_class_token():
    given = flatten(variables("donor")["params"])
    params = unflatten(adopted(given, donor()))
    encoder = donor().encoder.clone(class_token=False)
    theirs = {k: v for k, v in variables("donor")["params"]["encoder"].items() if k != "cls_token"}
    expected, outputs = encoder.apply({"params": theirs}, batch()["image"])
    ours, levels = tiny().model.apply({"params": params}, batch()["image"], method="encode")
    # MONAI's LayerNorm has another epsilon.
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    for level, output in zip(levels, outputs, strict=False):
        np.testing.assert_allclose(level, output, atol=1e-4)


def test_pre_trained_run_leaves_nothing_of_the_encoder_but_the_class_token():
    given = flatten(variables("donor")["params"])
    taken = adopted(given, donor())
    for path, value in given.items():
        if path.startswith("encoder/") and not path.endswith("cls_token"):
            np.testing.assert_array_equal(taken[path], value)
    assert taken["encoder/positions"].shape == (12, 12)
    np.testing.assert_array_equal(taken["encoder/positions"], donor().encoder.position_table()[1:])


def test_official_files_of_both_kinds_are_read(tmp_path):
    path = tmp_path / "pretrained.safetensors"
    state = donor().layout().save(variables("donor")["params"])
    write_state_dict(path, {f"module.{key}": value for key, value in state.items()})
    found = read_donor(str(path), tiny())
    assert isinstance(found.method, HiEndMAE)
    assert found.method.encoder == donor().encoder
    own = tiny().layout().save(variables()["params"])
    for name, keys in (("whole", list(own)), ("vit", [k for k in own if k.startswith("vit.")])):
        path = tmp_path / f"{name}.safetensors"
        write_state_dict(path, {key: own[key] for key in keys})
        found = read_donor(str(path), tiny())
        assert found.method.model == tiny().model
        assert len(found.variables) == len(keys)
    with pytest.raises(ValueError, match="neither a UNETR nor a Hi-End-MAE"):
        tiny().sized_like({"head.weight": np.zeros((2, 2))}, {})


def test_another_number_of_classes_starts_with_a_last_layer_of_its_own():
    given = flatten(variables()["params"])
    other = tiny(model__num_classes=4)
    assert other.adopt("decoder/out/kernel", given, tiny()) is None
    np.testing.assert_array_equal(
        other.adopt("decoder/decoder2/conv1/kernel", given, tiny()),
        given["decoder/decoder2/conv1/kernel"],
    )


def test_doubling_is_a_transposed_convolution():
    layer = Doubling(3)
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 2, 4)).astype(np.float32)
    params = layer.init(jax.random.key(0), x)
    kernel = np.asarray(params["params"]["kernel"])
    ours = np.asarray(layer.apply(params, x))
    assert ours.shape == (1, 4, 6, 4, 3)
    for place in np.ndindex(4, 6, 4):
        voxel, corner = tuple(i // 2 for i in place), tuple(i % 2 for i in place)
        expected = x[(0, *voxel)] @ kernel[corner]
        np.testing.assert_allclose(ours[(0, *place)], expected, atol=1e-5)


def test_factor_before_instance_norm_has_the_derivative_of_epsilon():
    x = np.random.default_rng(0).uniform(size=(1, 6, 6, 6, 1)).astype(np.float32)
    variance, weight = float(x.var()), 0.3
    ours = instance_norm(jnp.asarray(weight * x))
    factor = normalizing_factor(jnp.float32(weight), jnp.float32(variance))
    np.testing.assert_allclose(ours, (x - x.mean()) * factor, atol=1e-5)
    slopes = jax.grad(normalizing_factor, argnums=(0, 1))(weight, variance)
    inverse = np.float64(weight**2 * variance + 1e-5) ** -1.5
    assert float(slopes[0]) == pytest.approx(1e-5 * inverse, rel=1e-5)
    assert float(slopes[1]) == pytest.approx(-0.5 * weight**3 * inverse, rel=1e-5)


def test_features_are_patch_tokens_and_their_mean():
    features = tiny().features(variables(), batch())
    assert features.tokens.shape == (2, 12, 12)
    np.testing.assert_allclose(features.pooled, features.tokens.mean(axis=1), atol=1e-6)


def test_pictures_paint_true_and_predicted_classes_over_three_planes():
    pictures = jax.jit(lambda v, b: tiny().pictures(v, b, {}))(variables(), batch())
    columns = pictures["segmentation"].columns
    assert len(columns) == 9
    for name, column in columns.items():
        assert column.shape[-1] == 3, name
        assert 0 <= column.min() <= column.max() <= 1
    assert np.any(columns["axial: true"] != columns["axial: volume"])


def test_planes_go_through_most_of_a_segmentation():
    classes = np.zeros((2, 5, 6, 7), np.int32)
    classes[0, 1, 1:3, 4] = 2
    np.testing.assert_array_equal(fullest_voxel(jnp.asarray(classes)), [[1, 2, 4], [2, 3, 3]])


def test_background_is_not_painted():
    grey = jnp.full((1, 2, 1), 0.4)
    painted = overlaid(grey, jnp.array([[0, 1]]), strength=0.5)
    np.testing.assert_allclose(painted[0, 0], 0.4, atol=1e-6)
    np.testing.assert_allclose(painted[0, 1], 0.2 + 0.5 * np.array(COLOURS[0]), atol=1e-6)


def test_the_method_is_known_by_its_name_and_checks_its_inputs():
    assert method_class("unetr") is SegmentationFineTune
    tiny().check(batch())
    with pytest.raises(ValueError, match="needs the batch entry 'segmentation'"):
        tiny().check({"image": batch()["image"]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__num_classes": 1}, "count the background"),
        ({"model__taps": (0, 1)}, "needs 3 blocks"),
        ({"model__taps": (0, 1, 4)}, "from 0 to 3"),
    ],
)
def test_what_does_not_fit_together_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
