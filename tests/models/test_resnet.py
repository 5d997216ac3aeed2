import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mim_jax.layout.tip import resnet_rules
from mim_jax.models.resnet import BatchNorm, ResNet, resnet_size
from mim_jax.training.tree import flatten


def tiny(**fields) -> ResNet:
    return ResNet((32, 48), 3, **{"depths": (1, 1, 1, 1), "base": 4, **fields})


@functools.cache
def started(bottleneck: bool):
    model = tiny(bottleneck=bottleneck)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 48, 3)))


def images(batch: int = 4) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (batch, 32, 48, 3))


@pytest.mark.parametrize("bottleneck", [True, False])
def test_the_last_map_has_the_width_and_grid_that_the_model_says(bottleneck):
    model, variables = started(bottleneck)
    maps = model.apply(variables, images())
    assert maps.shape == (4, *model.grid, model.width) == (4, 1, 2, 128 if bottleneck else 32)


def test_grids_of_odd_sizes_are_those_of_the_map():
    model = ResNet((45, 70), 1, (1, 1), base=2)
    shape = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), jnp.zeros((1, 45, 70, 1)))
    )[0].shape
    assert shape == (1, *model.grid, model.width)


def test_batch_norm_matches_pytorch_in_training_and_evaluation():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(2, 3, (5, 4, 6, 3)).astype(np.float32)
    theirs, ours = torch.nn.BatchNorm2d(3), BatchNorm()
    variables = ours.init(jax.random.key(0), jnp.asarray(x), False)
    for _ in range(3):
        expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2)))
        y, changed = ours.apply(variables, jnp.asarray(x), True, mutable=["batch_stats"])
        variables = {**variables, **changed}
        np.testing.assert_allclose(y, expected.detach().permute(0, 2, 3, 1), atol=1e-5)
        x = x * 1.5 + 1
    statistics = variables["batch_stats"]
    np.testing.assert_allclose(statistics["mean"], theirs.running_mean, rtol=1e-5)
    np.testing.assert_allclose(statistics["var"], theirs.running_var, rtol=1e-5)
    assert int(statistics["batches"]) == int(theirs.num_batches_tracked) == 3
    expected = theirs.eval()(torch.from_numpy(x.transpose(0, 3, 1, 2))).detach()
    np.testing.assert_allclose(
        ours.apply(variables, jnp.asarray(x), False), expected.permute(0, 2, 3, 1), atol=1e-4
    )


def test_initialization_leaves_the_running_statistics_alone():
    statistics = flatten(started(True)[1]["batch_stats"])
    for path, value in statistics.items():
        assert np.all(np.asarray(value) == (1 if path.endswith("/var") else 0)), path


def test_statistics_are_those_of_the_whole_batch_on_any_number_of_devices():
    x = jax.random.normal(jax.random.key(2), (8, 2, 2, 3)) * jnp.arange(1, 9)[:, None, None, None]
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x, False)

    @jax.jit
    def step(x):
        return norm.apply(variables, x, True, mutable=["batch_stats"])

    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    (one, alone), (four, together) = step(x), step(spread)
    np.testing.assert_allclose(four, one, rtol=1e-5, atol=1e-6)
    for path, value in flatten(alone).items():
        np.testing.assert_allclose(flatten(together)[path], value, rtol=1e-5, err_msg=path)


def test_one_value_for_each_channel_has_no_statistics():
    norm = BatchNorm()
    x = jnp.ones((1, 1, 1, 3))
    variables = norm.init(jax.random.key(0), x, False)
    with pytest.raises(ValueError, match="2 values or more for each channel"):
        norm.apply(variables, x, True, mutable=["batch_stats"])


@pytest.mark.parametrize("name, parameters", [("resnet18", 11_176_512), ("resnet50", 23_508_032)])
def test_named_sizes_are_torchvisions_without_their_classifier(name, parameters):
    model = ResNet((64, 64), 3, **resnet_size(name))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3))))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == parameters
    paths = {rule.path for rule in resnet_rules("x", "encoder", model)}
    own = {f"encoder/{path}" for path in flatten(shapes["params"])}
    own |= {f"batch_stats/encoder/{path}" for path in flatten(shapes["batch_stats"])}
    assert paths == own


def test_names_and_sizes_that_do_not_fit_are_told():
    with pytest.raises(ValueError, match="known are resnet18, resnet50"):
        resnet_size("resnet19")
    with pytest.raises(ValueError, match=r"expects images \[batch, 32, 48, 3\]"):
        tiny().apply(started(True)[1], jnp.zeros((1, 48, 32, 3)))


def test_bfloat16_computes_in_it_and_keeps_float32_statistics():
    variables = started(True)[1]
    half = tiny(dtype=jnp.bfloat16)
    maps, changed = half.apply(variables, images(), True, mutable=["batch_stats"])
    assert maps.dtype == jnp.bfloat16
    kept = {p: v for p, v in flatten(changed).items() if not p.endswith("/batches")}
    assert {value.dtype for value in kept.values()} == {jnp.dtype(jnp.float32)}
    exact = tiny().apply(variables, images(), True, mutable=["batch_stats"])[0]
    assert float(jnp.max(jnp.abs(maps - exact))) < 0.1 * float(jnp.max(jnp.abs(exact)))
