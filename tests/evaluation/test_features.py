import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.data import EvaluationCrop, evaluation_batches, open_source
from mim_jax.evaluation.features import extract_features, place, raw_pixels
from mim_jax.methods.mae import MAE
from mim_jax.training.sharding import make_mesh, state_shardings
from tests.evaluation.toy import Toy, toy_variables

MEAN, STD = (0.2861,), (0.3530,)


def batches(count: int = 90, batch_size: int = 32):
    source = open_source("embedded", f"test[:{count}]")
    return evaluation_batches(source, EvaluationCrop((28, 28), 1.0), batch_size=batch_size)


def images_and_labels(count: int):
    source = open_source("embedded", f"test[:{count}]")
    examples = [source[i] for i in range(count)]
    return np.stack([e["image"] for e in examples]), np.array([e["label"] for e in examples])


def direct(method, variables, images):
    """Features of all images in one forward pass, without any of the machinery."""
    normalized = (images.astype(np.float32) / 255 - MEAN[0]) / STD[0]
    return method.features(variables, {"image": jnp.asarray(normalized)})


def extract(method, variables, given, **options):
    return extract_features(method, variables, given, mean=MEAN, std=STD, **options)


def test_features_are_those_of_one_forward_pass_in_order():
    variables = toy_variables()
    features, labels = extract(Toy(), variables, batches())
    images, expected_labels = images_and_labels(90)
    assert features.dtype == np.float32 and labels.dtype == np.int32
    np.testing.assert_allclose(features, direct(Toy(), variables, images).pooled, atol=1e-5)
    np.testing.assert_array_equal(labels, expected_labels)


def test_mean_pool_is_the_mean_of_patch_tokens_and_differs_from_the_methods_own():
    variables = toy_variables()
    expected = direct(Toy(), variables, images_and_labels(40)[0])
    mean, _ = extract(Toy(), variables, batches(40), pool="mean")
    np.testing.assert_allclose(mean, expected.tokens.mean(axis=1), atol=1e-5)
    assert mean.shape != expected.pooled.shape


def test_features_of_mae_are_its_normalized_class_token():
    config = configs.load("mae:tiny", {"compute_dtype": "float32", "model.depth": 1})
    method = MAE.build(config)
    variables = jax.jit(method.init)(jax.random.key(0), {"image": jnp.zeros((1, 28, 28, 1))})
    images = jnp.asarray((images_and_labels(20)[0] / 255 - MEAN[0]) / STD[0], jnp.float32)
    encode = jax.jit(lambda v, x: method.model.apply(v, x, method="encode")[:, 0])
    features, _ = extract(method, variables, batches(20, batch_size=16))
    np.testing.assert_allclose(features, encode(variables, images), atol=1e-4)


@pytest.mark.parametrize("read", [raw_pixels, lambda b: extract(Toy(), toy_variables(), b)])
def test_rows_that_are_not_valid_are_never_counted(read):
    given = [{**batch} for batch in batches()]
    assert sum(len(batch["valid"]) for batch in given) == 96
    given[1]["valid"] = given[1]["valid"].copy()
    given[1]["valid"][5] = False  # an unreadable example amidst good ones
    features, labels = read(given)
    everything, every_label = read(batches())
    assert len(features) == 89
    np.testing.assert_array_equal(features, np.delete(everything, 32 + 5, axis=0))
    np.testing.assert_array_equal(labels, np.delete(every_label, 32 + 5))


def test_padding_does_not_change_features():
    variables = toy_variables()
    one = extract(Toy(), variables, batches(batch_size=90))[0]
    np.testing.assert_allclose(one, extract(Toy(), variables, batches(batch_size=32))[0], atol=1e-5)


def test_forward_pass_is_compiled_once_for_all_batches_and_splits():
    method = Toy(width=16, size=28)
    variables = toy_variables(1)
    extract(method, variables, batches(batch_size=16))
    before = len(Toy.traces)
    extract(method, variables, batches(batch_size=16))
    extract(Toy(), toy_variables(2), batches(40, batch_size=16))
    assert len(Toy.traces) == before


def test_batches_without_labels_give_none():
    given = ({"image": batch["image"], "valid": batch["valid"]} for batch in batches())
    features, labels = extract(Toy(), toy_variables(), given)
    assert labels is None and len(features) == 90


def test_raw_pixels_are_in_zero_to_one():
    pixels, labels = raw_pixels(batches())
    images, expected = images_and_labels(90)
    np.testing.assert_array_equal(pixels, images.reshape(90, -1).astype(np.float32) / 255)
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize(
    ("mesh", "strategy_rules"),
    [
        (dict(data=8, fsdp=1, tensor=1), ((r".*", ()),)),
        (dict(data=2, fsdp=4, tensor=1), ((r".*", "fsdp:largest"),)),
        (dict(data=2, fsdp=2, tensor=2), ((r".*projection", (None, "tensor")), (r".*", ()))),
    ],
)
def test_variables_on_a_mesh_give_the_features_of_one_device(mesh, strategy_rules):
    mesh = make_mesh(configs.ml_collections.ConfigDict(mesh))
    variables = toy_variables()
    shardings = state_shardings(variables, strategy_rules, mesh)
    on_mesh = jax.device_put(variables, shardings)
    # 30 rows are not divisible by 8 devices.
    features, labels = extract(Toy(), on_mesh, batches(batch_size=30))
    expected, expected_labels = extract(Toy(), variables, batches(batch_size=30))
    np.testing.assert_allclose(features, expected, atol=1e-5)
    np.testing.assert_array_equal(labels, expected_labels)


def test_rows_are_spread_over_the_mesh():
    mesh = make_mesh(configs.ml_collections.ConfigDict(dict(data=4, fsdp=2, tensor=1)))
    placed = place({"image": np.arange(30)}, mesh)["image"]
    assert [len(shard.data) for shard in placed.addressable_shards] == [4] * 8
    np.testing.assert_array_equal(np.asarray(placed)[:30], np.arange(30))


def test_float_images_are_refused():
    given = [{"image": np.zeros((4, 28, 28, 1), np.float32)}]
    with pytest.raises(ValueError, match="images are float32; evaluation expects uint8"):
        extract(Toy(), toy_variables(), given)


def test_images_of_another_size_are_refused():
    given = [{"image": np.zeros((4, 32, 32, 1), np.uint8)}]
    with pytest.raises(ValueError, match=r"has shape \[batch, 32, 32, 1\]"):
        extract(Toy(), toy_variables(), given)


def test_unknown_pool_is_refused():
    with pytest.raises(ValueError, match=r"evaluate\.pool is 'cls'; known are method, mean"):
        extract(Toy(), toy_variables(), batches(), pool="cls")


def test_no_valid_example_is_an_error():
    given = [{"image": np.zeros((4, 28, 28, 1), np.uint8), "valid": np.zeros(4, bool)}]
    with pytest.raises(ValueError, match="no valid example"):
        raw_pixels(given)
