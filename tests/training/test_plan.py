"""Plans against the bytes of real arrays, the compiler's own figures, and numbers by hand."""

import collections
import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mim_jax import cli
from mim_jax.plan.chips import CHIPS, chip_of
from mim_jax.plan.estimate import IMAGES_PER_CORE, estimate
from mim_jax.plan.hlo import Collective, Product, Work, read_work
from mim_jax.plan.program import (
    compile_program,
    compile_with_text,
    memory_of,
    mesh_sizes,
    planned_config,
    topology_of,
)
from mim_jax.plan.report import report
from mim_jax.training.experiment import Experiment
from tests.methods.tiny import SIZES, tiny_config

ROOT = Path(__file__).resolve().parents[2]

MESHES = {
    "replicated": dict(data=8, fsdp=1, tensor=1),
    "fsdp": dict(data=4, fsdp=2, tensor=1),
    "fsdp+tensor": dict(data=2, fsdp=2, tensor=2),
}
"""A mesh of eight devices for every strategy."""


def config_of(strategy, **changes):
    fields = {"batch_size": 32, "sharding.strategy": strategy, **changes}
    return planned_config(tiny_config(fields), MESHES[strategy])


@functools.cache
def program_of(strategy):
    return compile_program(config_of(strategy), MESHES[strategy])


@functools.cache
def experiment_of(strategy):
    return Experiment.without_data(config_of(strategy))


def held(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("strategy", MESHES)
def test_planned_state_is_exactly_what_a_device_holds(strategy):
    experiment = experiment_of(strategy)
    shapes = experiment.batch_shapes()
    memory = memory_of(experiment, experiment.abstract_state(shapes))
    state = experiment.initial_state(shapes)
    assert memory.trained + memory.frozen + memory.ema == held(state.params)
    assert memory.optimizer == held(state.opt_state)
    assert memory.state == held(state)


def test_planned_temporaries_are_those_of_the_compiled_step():
    # The plan is compiled for four devices, two along data; the step for all eight.
    experiment = experiment_of("fsdp")
    real = experiment.compiled_step(experiment.batch_shapes()).memory_analysis()
    memory = program_of("fsdp").memory
    assert memory.state + memory.batch == pytest.approx(real.argument_size_in_bytes, abs=1024)
    assert memory.temporaries == pytest.approx(real.temp_size_in_bytes, rel=0.05)


def test_replicated_parameters_cost_an_all_reduce_of_their_gradients():
    program = program_of("replicated")
    assert {(c.kind, c.axes) for c in program.work.collectives} == {("all-reduce", ("data",))}
    reduced = sum(c.bytes * c.count for c in program.work.collectives)
    scalars = reduced - program.memory.gradients  # the loss, a mean over the global batch
    assert 4 <= scalars <= 16
    (traffic,) = estimate(program, CHIPS["v5p"]).traffic
    # Each of eight devices sends 7/8 of the array twice, at 200 GB/s.
    assert traffic.sent == pytest.approx(reduced * 2 * 7 / 8)
    assert traffic.seconds == pytest.approx(reduced * 2 * 7 / 8 / 200e9)


@pytest.mark.parametrize("data", [1, 2])
def test_parameters_in_pieces_are_gathered_and_their_gradients_scattered(data):
    fsdp = 8 // data
    mesh = Mesh(np.asarray(jax.devices()).reshape(data, fsdp, 1), ("data", "fsdp", "tensor"))
    pieces, rows, whole = (
        NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("fsdp",), (("data", "fsdp"),), ())
    )

    def loss(kernel, x):
        return jnp.sum((x @ jax.lax.with_sharding_constraint(kernel, whole)) ** 2)

    kernel = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32)
    gradient = jax.jit(jax.grad(loss), in_shardings=(pieces, rows), out_shardings=pieces)
    _, text = compile_with_text(gradient.lower(kernel, x))
    work = read_work(text, dict(mesh.shape))
    found = {(c.kind, c.axes): c.bytes for c in work.collectives}
    size = 64 * 32 * 4
    if data == 1:
        assert found == {("all-gather", ("fsdp",)): size, ("reduce-scatter", ("fsdp",)): size}
    else:  # A sum over both axes is more than its piece, which is for fsdp alone.
        assert found == {("all-gather", ("fsdp",)): size, ("all-reduce", ("data", "fsdp")): size}
    # Forward and the gradient of the kernel, for two of the sixteen rows.
    assert work.flops == 2 * (2 * 2 * 64 * 32)


def test_fsdp_gathers_each_parameter_once_and_sums_each_gradient_once_and_sends_nothing_else():
    program = program_of("fsdp")
    sent = collections.Counter()
    for one in program.work.collectives:
        sent[one.kind, one.axes] += one.bytes * one.count
    size = 2 * program.memory.trained  # a device holds half of each
    scalars = sent["all-reduce", ("data", "fsdp")] - size
    assert sent.keys() == {("all-gather", ("fsdp",)), ("all-reduce", ("data", "fsdp"))}
    assert sent["all-gather", ("fsdp",)] == size and 4 <= scalars <= 16


def test_devices_share_the_models_operations():
    program = program_of("replicated")
    assert program.work.flops * 8 == pytest.approx(program.model_flops, rel=1e-3)
    experiment = experiment_of("replicated")
    assert program.model_flops == pytest.approx(
        experiment.flops_per_step(experiment.batch_shapes()), rel=1e-3
    )


LOOP = """
HloModule m

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%condition (p: (s32[], f32[4,8])) -> pred[] {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %limit = s32[] constant(24)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (q: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %q = (s32[], f32[4,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%q), index=1
  %w = f32[8,8]{1,0} constant({...})
  %y = f32[4,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %r = f32[4,8]{1,0} all-reduce(%y), channel_id=1, replica_groups=GROUPS, to_apply=%sum
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%j, %r)
}

ENTRY %main (z: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %z = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %w.1 = (s32[], f32[4,8]{1,0}) while(%z), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(
    "groups, axes",
    [
        ("[2,4]<=[8]", ("fsdp", "tensor")),
        ("[4,2]<=[2,4]T(1,0), use_global_device_ids=true", ("data",)),
        ("{{0,2},{1,3},{4,6},{5,7}}", ("fsdp",)),
        ("mesh['a'=2,'b'=4] {'b'}", ("fsdp", "tensor")),
        ("mesh['a'=2,'b'=4] {'b':(2)2}", ("tensor",)),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ("data",)),
        ("{}", ("data", "fsdp", "tensor")),
    ],
)
def test_loops_count_as_often_as_they_run_and_groups_name_their_axes(groups, axes):
    work = read_work(LOOP.replace("GROUPS", groups), dict(data=2, fsdp=2, tensor=2))
    assert work.products == (Product(2 * 4 * 8 * 8, 4 * (32 + 64 + 32), 24),)
    assert work.collectives == (Collective("all-reduce", 128, axes, 24, "f32[4,8]", ""),)
    assert work.unknown_loops == 0


def test_loop_of_unknown_length_counts_once_and_is_reported():
    text = LOOP.replace("constant(24)", "parameter(1)").replace("GROUPS", "{}")
    work = read_work(text, dict(data=2, fsdp=2, tensor=2))
    assert [product.count for product in work.products] == [1]
    assert work.unknown_loops == 1


def planned(chip="h100", **changes):
    """The tiny plan with other figures, which would take long to compile."""
    program = program_of("replicated")
    memory = {f: changes.pop(f) for f in ("temporaries", "optimizer") if f in changes}
    program = dataclasses.replace(
        program, memory=dataclasses.replace(program.memory, **memory), **changes
    )
    return estimate(program, chip_of(chip), examples=3200)


def as_text(plan):
    return "\n".join(part for part in report(plan) if isinstance(part, str))


def test_groups_beyond_a_server_are_bound_by_its_network():
    one = Collective("all-gather", 10**9, ("data",), 1, "", "")
    rows = Work(collectives=(one,))
    inside = planned(work=rows, mesh=dict(data=8, fsdp=1, tensor=1))
    assert inside.communication_seconds == pytest.approx(7 / 8 / 450)
    # All eight adapters of a server carry the ring of a group of sixteen.
    beyond = planned(work=rows, mesh=dict(data=16, fsdp=1, tensor=1))
    assert beyond.communication_seconds == pytest.approx(15 / 16 / 400)
    # Of two along data, eight apart, only one is in each server.
    apart = planned(work=rows, mesh=dict(data=2, fsdp=8, tensor=1))
    assert apart.communication_seconds == pytest.approx(1 / 2 / 50)


def test_time_is_a_roofline_and_a_share_of_it():
    plan = planned(work=Work((Product(989e12, 1, 2), Product(1, 3350 * 10**9, 1))))
    assert plan.compute_bound == pytest.approx(2)
    assert plan.memory_bound == pytest.approx(1)
    assert plan.best_seconds == pytest.approx(3, rel=1e-3)
    assert plan.expected_seconds == pytest.approx(3 / 0.7, rel=1e-3)
    assert plan.limit.startswith("compute")
    assert plan.steps == 30 * (3200 // 32)
    assert plan.cores(3.0) == pytest.approx(32 / 3 / 727)


def test_job_that_does_not_fit_says_which_fields_would_help():
    text = as_text(planned("v5e", temporaries=60 * 2**30))
    assert "does NOT fit: it needs 375% of the memory of v5e" in text
    assert "--config.accumulate=" not in text  # four rows a device are too few
    assert "--config.model.remat=full" in text
    assert "--config.accumulate=2" in as_text(planned("v5e", temporaries=20 * 2**30))
    fixed = as_text(planned("v5e", optimizer=20 * 2**30))
    assert "--config.sharding.strategy=fsdp with --mesh fsdp=8" in fixed
    assert "fits: it needs" in as_text(planned("v5e"))


def test_mesh_that_the_strategy_does_not_use_is_pointed_out():
    mesh = dict(data=2, fsdp=4, tensor=1)
    assert "every device holds all parameters" in as_text(planned(mesh=mesh))


def test_too_few_cores_for_the_images_limit_a_job():
    work = Work((Product(1e6, 1, 1),))
    assert planned(work=work).limit.startswith("input")


def test_volumes_are_not_taken_for_pictures():
    config = program_of("replicated").config.copy_and_resolve_references()
    assert "volumes" not in as_text(planned(config=config))
    config.data.image_size = (8, 8, 8)
    assert "volumes take a core far longer" in as_text(planned(config=config))


def test_images_per_core_are_those_measured():
    measured = json.loads((ROOT / "benchmarks/results/data_loading.json").read_text())
    assert measured["machine"]["cores"] == 1
    assert measured["web"]["pixels"] == [375, 500]
    assert round(measured["web"]["loaders"]["ours"]["images_per_second"]) == IMAGES_PER_CORE


def test_chip_may_have_other_figures():
    chip = chip_of("h100,memory=94,cores=64")
    assert (chip.memory, chip.cores, chip.tflops) == (94, 64, 989)


@pytest.mark.parametrize(
    "text, message",
    [
        ("v5", "unknown chip 'v5'; known are a100-40g, .* Did you mean 'v5"),
        ("h10", "Did you mean 'h100'"),
        ("h100,memroy=94", "a chip has no 'memroy'; .* Did you mean 'memory'"),
        ("h100,memory=big", "'memory=big' of the chip h100 needs a number above 0"),
    ],
)
def test_bad_chip_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        chip_of(text)


def test_mesh_takes_other_axes_from_the_config():
    assert mesh_sizes("fsdp=4", dict(data=-1, fsdp=1, tensor=2)) == dict(data=1, fsdp=4, tensor=2)


@pytest.mark.parametrize(
    "text, message",
    [
        ("dta=4", "no axis 'dta'; known are data, fsdp, tensor. Did you mean 'data'"),
        ("data=many", "'data=many' needs a whole number above 0, such as data=8"),
        ("data=-1", "'data=-1' needs a whole number"),
    ],
)
def test_bad_mesh_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        mesh_sizes(text, dict(data=-1, fsdp=1, tensor=1))


def test_batch_that_the_mesh_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"batch_size 32 is not divisible.*nearest size.* is 30"):
        planned_config(tiny_config({"batch_size": 32}), dict(data=10, fsdp=1, tensor=1))


def test_open_fields_are_named():
    with pytest.raises(ValueError, match=r"set .*batch_size"):
        planned_config(tiny_config({"batch_size": 0}), MESHES["replicated"])


def test_too_few_simulated_devices_are_an_error_that_says_how_many():
    mesh = dict(data=4, fsdp=8, tensor=1)
    config = planned_config(tiny_config({"batch_size": 32}), mesh)
    with pytest.raises(ValueError, match="needs 16 simulated devices, but there are 8; set XLA"):
        compile_program(config, mesh)


def test_topologies_are_as_cubic_as_may_be():
    assert topology_of("v5e", 8) == "v5e:2x4"
    assert topology_of("v6e", 64) == "v6e:8x8"
    assert topology_of("v5p", 16) == "v5p:2x2x4"
    with pytest.raises(ValueError, match="no topology of 12 chips"):
        topology_of("v5e", 12)
    with pytest.raises(ValueError, match="'v4' itself; that works for v5e"):
        topology_of("v4", 8)


def test_command_plans_for_more_devices_than_there_are():
    command = [sys.executable, "-m", "mim_jax", "plan", "--config=mae:tiny", "--chip=v6e"]
    fields = [f"--config.{name}={value}" for name, value in SIZES.items()]
    mesh = ["--mesh=data=64,fsdp=16", "--config.sharding.strategy=fsdp"]
    done = subprocess.run(
        [*command, *fields, *mesh, "--config.batch_size=2048"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "on 1,024 x v6e (256 hosts of 4), mesh data=64, fsdp=16, tensor=1" in done.stdout
    assert "2 rows a device" in done.stdout
    assert "fits: it needs" in done.stdout
    for title in ("memory of a device", "time of a step", "communication of a device", "speed"):
        assert title in done.stdout
    steps = 30 * (4000 // 2048)
    assert f"the whole training, {steps} steps" in done.stdout
    assert "limited by " in done.stdout


def test_command_without_a_chip_says_so(capsys):
    assert cli.main(["plan", "--config=mae:tiny"]) == 1
    assert "plan needs --chip" in capsys.readouterr().err


def test_every_chip_has_plausible_figures():
    for name, chip in CHIPS.items():
        assert chip.name == name
        assert 16 <= chip.memory <= 141
        # Memory is slower than the chip's arithmetic, links than memory, the network than links.
        assert chip.tflops > chip.bandwidth / 1e3 > chip.links / 1e3 > chip.network / 1e3
        assert math.log2(chip.host).is_integer()
