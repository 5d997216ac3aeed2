"""Meshes, partition rules, and equal losses on one and on eight simulated devices."""

import jax
import ml_collections
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mim_jax import config as configs
from mim_jax.training.experiment import Experiment
from mim_jax.training.sharding import (
    LARGEST,
    STRATEGIES,
    bytes_per_device,
    check_batch_size,
    make_mesh,
    partition_spec,
    rules_of,
)
from tests.training.runs import losses_of, run


def mesh_of(data=-1, fsdp=1, tensor=1, devices=8):
    config = ml_collections.ConfigDict(dict(data=data, fsdp=fsdp, tensor=tensor))
    return make_mesh(config, jax.devices()[:devices])


def test_minus_one_takes_what_is_left():
    assert dict(mesh_of(fsdp=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    "sizes", [dict(data=3), dict(data=-1, fsdp=-1), dict(data=0), dict(data=2, fsdp=2)]
)
def test_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(ValueError, match=r"mesh data=.* 8 devices"):
        mesh_of(**sizes)


def test_batch_that_cannot_be_cut_is_refused_with_the_nearest_size():
    with pytest.raises(ValueError, match=r"batch_size 30 is not divisible.*nearest size.* is 32"):
        check_batch_size(30, 2, mesh_of())


def test_unknown_strategy_is_refused():
    config = configs.defaults().sharding
    config.strategy = "magic"
    with pytest.raises(ValueError, match="'magic'; known are replicated, fsdp"):
        rules_of(config)


def test_rules_find_parameter_and_moment_and_stack_alike():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    rules = STRATEGIES["fsdp+tensor"]
    path = "encoder/transformer/blocks/attention/qkv/kernel"
    for prefix in ("params/", "opt_state/0/mu/"):
        spec = partition_spec(prefix + path, (8, 3, 4, 2), rules, mesh)
        assert spec == PartitionSpec("fsdp", None, "tensor", None)
        stacked = partition_spec(prefix + path, (5, 8, 3, 4, 2), rules, mesh)
        assert stacked == PartitionSpec(None, "fsdp", None, "tensor", None)
    assert partition_spec("opt_state/0/count", (), rules, mesh) == PartitionSpec()


def test_axis_that_the_mesh_does_not_divide_stays_whole():
    mesh = mesh_of(data=1, fsdp=4, tensor=2)
    rules = STRATEGIES["fsdp+tensor"]
    path = "encoder/transformer/blocks_0/attention/qkv/kernel"
    spec = partition_spec(path, (6, 3, 3, 2), rules, mesh)
    assert spec == PartitionSpec(None, None, None, None)
    assert partition_spec("x", (7, 12, 8), (("x", LARGEST),), mesh) == PartitionSpec(
        None, "fsdp", None
    )
    assert partition_spec("x", (7,), (("x", LARGEST),), mesh) == PartitionSpec()


def test_users_rules_come_first():
    config = configs.defaults().sharding
    config.strategy = "fsdp"
    config.rules = (("norm/scale", ()),)
    mesh = mesh_of(data=1, fsdp=8)
    specs = [partition_spec(f"norm/{n}", (16,), rules_of(config), mesh) for n in ("scale", "bias")]
    assert specs == [PartitionSpec(None), PartitionSpec("fsdp")]


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    result, _ = run(folder)
    return result, losses_of(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mesh.fsdp": 8, "mesh.data": 1, "sharding.strategy": "fsdp"},
        {
            "mesh.data": 2,
            "mesh.fsdp": 2,
            "mesh.tensor": 2,
            "sharding.strategy": "fsdp+tensor",
            "model.scan": True,
        },
        {"accumulate": 2, "mesh.data": 4, "mesh.fsdp": 2, "sharding.strategy": "fsdp"},
    ],
    ids=["data", "fsdp", "fsdp+tensor+scan", "accumulate"],
)
def test_loss_curve_does_not_depend_on_the_devices(on_one_device, tmp_path, changes):
    if "accumulate" in changes or "model.scan" in changes:
        # These draw other masks or initial values; their one-device run is the reference.
        keep = {k: v for k, v in changes.items() if k in ("accumulate", "model.scan")}
        run(tmp_path / "one", **keep)
        expected = losses_of(tmp_path / "one")
    else:
        _, expected = on_one_device
    run(tmp_path / "eight", 8, **changes)
    ours = losses_of(tmp_path / "eight")
    assert set(ours) == set(range(1, 7))
    for step, loss in expected.items():
        assert ours[step] == pytest.approx(loss, rel=2e-5), step


def test_run_goes_on_with_other_devices_and_strategy(on_one_device, tmp_path):
    reference, expected = on_one_device
    folder = tmp_path / "moved"

    class Stop(Exception):
        pass

    def stop_after_four(step):
        if step == 4:
            raise Stop

    with pytest.raises(Stop):
        run(folder, on_step=stop_after_four)
    moved = {"mesh.data": 2, "mesh.fsdp": 4, "sharding.strategy": "fsdp"}
    result, _ = run(folder, 8, **moved)
    ours = losses_of(folder)
    for step, loss in expected.items():
        assert ours[step] == pytest.approx(loss, rel=2e-5), step
    for a, b in zip(jax.tree.leaves(result.state.params), jax.tree.leaves(reference.state.params)):
        np.testing.assert_allclose(a, b, atol=1e-4)
    kernel = result.state.params["encoder"]["transformer"]["blocks_0"]["mlp"]["fc1"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp")


def test_fsdp_holds_a_share_of_parameters_and_optimizer_state_per_device():
    config = configs.load("mae:tiny", {"mesh.fsdp": 8, "mesh.data": 1, "sharding.strategy": "fsdp"})
    experiment = Experiment.build(config, examples=4000)
    state = experiment.abstract_state(experiment.batch_shapes())
    for part in (state.params, state.opt_state):
        leaves = jax.tree.leaves(part)
        whole = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        held = sum(bytes_per_device(leaf, leaf.sharding) for leaf in leaves)
        assert held < whole / 7
