"""Frozen parts that start from weights of their own, from the file to the last checkpoint."""

import contextlib
import dataclasses
import functools
import io
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from rich.console import Console

from mim_jax import config as configs
from mim_jax.conversion.files import write_state_dict
from mim_jax.conversion.pretrained import load_pretrained
from mim_jax.conversion.towers import read_tower, settings_of
from mim_jax.layout.towers import tower_layout
from mim_jax.method import Pretrained, method_class
from mim_jax.models.tower import build_tower, see
from mim_jax.training.checkpoints import Checkpoints, read_variables
from mim_jax.training.derived import derive, open_fields
from mim_jax.training.experiment import Experiment
from mim_jax.training.loop import train
from mim_jax.training.state import state_from_variables
from mim_jax.training.tree import flatten, unflatten
from tests.conversion.models import SQUARE, classifier_config, mae_config, variables
from tests.training.follower import SMALL, follower_config, random_tower


@functools.cache
def weights():
    tower, params = random_tower()
    return params, tower_layout(tower, "timm", "tower").save({"tower": params})


@pytest.fixture
def file(tmp_path):
    """A teacher in timm's names, with the heads in the JSON file beside it."""
    path = tmp_path / "teacher.safetensors"
    write_state_dict(path, weights()[1])
    about = {
        "architecture": "vit",
        "model_args": {"num_heads": SMALL["heads"]},
        "pretrained_cfg": {"mean": SMALL["mean"], "std": SMALL["std"]},
    }
    path.with_suffix(".json").write_text(json.dumps(about))
    return path


def trained(config, folder, devices=1):
    console = Console(file=io.StringIO(), width=200)
    return train(config, folder, devices=jax.devices()[:devices], console=console)


def assert_teacher(params, expected=None):
    given = flatten(params)
    for path, value in flatten(weights()[0] if expected is None else expected).items():
        np.testing.assert_array_equal(given[f"teacher/{path}"], value, err_msg=path)


def test_frozen_teacher_is_sharded_saved_once_and_never_changed(file, tmp_path):
    sharded = {"mesh.fsdp": 8, "mesh.data": 1, "sharding.strategy": "fsdp"}
    result = trained(follower_config(str(file), **sharded), tmp_path / "run", 8)
    assert_teacher(jax.device_get(result.state.params))
    kernel = flatten(result.state.params)["teacher/encoder/transformer/blocks_0/mlp/fc1/kernel"]
    assert 8 * np.prod(kernel.sharding.shard_shape(kernel.shape)) == kernel.size
    moments = [
        jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(result.state.opt_state)
    ]
    assert any("student" in path for path in moments)
    assert not any("teacher" in path for path in moments)
    saved, _ = read_variables(tmp_path / "run")
    names = [path for path in flatten(saved) if path.endswith("blocks_0/mlp/fc1/kernel")]
    assert names == ["params/teacher/encoder/transformer/blocks_0/mlp/fc1/kernel"]
    assert_teacher(saved["params"])


def test_teacher_gets_no_gradient(file):
    method, _ = method_and_state()
    state, notes = load_from(file)
    assert_teacher(state.params)
    assert notes == [f"teacher: {len(flatten(weights()[0]))} arrays from {file}"]
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 28, 28, 1)), jnp.float32)

    def loss(params):
        return method.loss({"params": params}, {"image": images}, {}, state.step)[0]

    gradient = flatten(jax.jit(jax.grad(loss))(state.params))
    assert all(not np.any(g) for path, g in gradient.items() if path.startswith("teacher/"))
    assert any(np.any(g) for path, g in gradient.items() if path.startswith("student/"))


def test_run_goes_on_after_its_teachers_file_is_gone(file, tmp_path):
    # The config's own tower is another one: nothing but the path tells what the file holds.
    given = {"model.teacher.width": 0, "model.teacher.depth": 0, "model.teacher.heads": 0}
    config = follower_config(str(file), **given)
    trained(config, tmp_path / "run")
    kept = configs.from_json((tmp_path / "run" / "config.json").read_text()).model.teacher
    assert (kept.width, kept.depth, kept.heads) == (16, 2, 2)
    file.unlink()
    file.with_suffix(".json").unlink()
    config.steps = 3
    result = trained(config, tmp_path / "run")
    assert int(result.state.step) == 3
    assert_teacher(jax.device_get(result.state.params))


def test_path_of_a_teacher_derives_its_settings_without_a_look_at_the_data(file, tmp_path):
    config = follower_config(str(file), **{"data.source": "folder:/nowhere"})
    configs.override(config, {"model.teacher.width": 48, "model.teacher.family": "clip"})
    derived, settings = derive(config, tmp_path)
    teacher = derived.model.teacher
    assert (teacher.family, teacher.width, teacher.patch_size) == ("vit", 16, (14, 14))
    assert {s.field for s in settings} == {"model.teacher.family", "model.teacher.width"}
    assert all(s.reason == f"of {file}" for s in settings)


def test_config_without_a_teachers_path_leaves_nothing_open():
    assert open_fields(follower_config()) == []


def test_empty_path_names_the_field_and_what_to_give():
    with pytest.raises(ValueError, match=r"model\.teacher\.path is empty.*\.safetensors"):
        load_from("")


@functools.cache
def method_and_state():
    experiment = Experiment.build(follower_config("unused"), 64, jax.devices()[:1])
    return experiment.method, experiment.initial_state(experiment.batch_shapes())


def load_from(path):
    method, state = method_and_state()
    return load_pretrained(dataclasses.replace(method, path=str(path)), state)


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint file"):
        load_from(tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError, match="holds neither"):
        load_from(tmp_path)


def test_weights_of_other_sizes_are_refused_with_the_whole_list(tmp_path):
    other, params = random_tower({**SMALL, "width": 24, "depth": 1, "heads": 3})
    state = tower_layout(other, "timm", "tower").save({"tower": params})
    write_state_dict(tmp_path / "x.safetensors", state)
    about = {"architecture": "vit", "model_args": {"num_heads": 3}}
    (tmp_path / "x.json").write_text(json.dumps(about))
    with pytest.raises(ValueError) as error:
        load_from(tmp_path / "x.safetensors")
    text = str(error.value)
    assert "do not fit 'teacher'" in text and "model.teacher.path" in text
    assert "missing: encoder/transformer/blocks_1/norm1/scale" in text
    assert "encoder/norm/scale: (24,) in " in text and "(16,) in the model" in text


def test_teacher_computes_in_bfloat16_where_asked(file):
    tower, params = read_tower(str(file))
    half = build_tower(ml_collections.ConfigDict({**SMALL, "compute_dtype": "bfloat16"}), "float32")
    images = np.random.default_rng(0).normal(size=(2, 28, 28, 1)).astype(np.float32)
    full, ours = (
        jax.jit(functools.partial(see, t))(unflatten(params), images) for t in (tower, half)
    )
    assert ours.tokens.dtype == ours.blocks[0].dtype == jnp.bfloat16
    difference = np.abs(np.asarray(ours.pooled, np.float32) - full.pooled).max()
    assert 0 < difference < 0.05 * np.abs(full.pooled).max()


def written_run(config, folder):
    """A run of random parameters."""
    method = method_class(config.method).build(config)
    given = variables(method)
    experiment = Experiment.on_one_device(config)
    state = state_from_variables(method, experiment.optimizer, given)
    with contextlib.closing(Checkpoints(folder, config)) as checkpoints:
        checkpoints.save(state, 0)
        checkpoints.wait()
    return method, given


def capped_config():
    """Of an encoder that bounds its logits, and whose final norm has an epsilon of its own."""
    teacher = {**SMALL, "patch_size": (4, 4), "image_size": (12, 12), "channels": 3}
    teacher |= {"mean": SQUARE["data.mean"], "std": SQUARE["data.std"]}
    fields = {f"model.teacher.{name}": value for name, value in teacher.items()}
    return configs.load("locality_alignment:tiny", {**fields, **SQUARE, "compute_dtype": "float32"})


RUNS = {
    "mae": lambda: mae_config({"model.scan": True}),
    "mae-spread": lambda: mae_config({"model.position_grid": (5, 5)}),
    "class token": lambda: classifier_config("cls"),
    "mean": lambda: classifier_config("mean", {"model.scan": True}),
    "capped": capped_config,
}


@pytest.mark.parametrize("kind", RUNS)
def test_run_as_teacher_sees_exactly_what_the_run_computes(kind, tmp_path):
    config = RUNS[kind]()
    method, given = written_run(config, tmp_path)
    tower, params = read_tower(str(tmp_path))
    assert not tower.encoder.transformer.scan
    images = np.random.default_rng(1).normal(size=(2, 12, 12, 3)).astype(np.float32)
    seen = jax.jit(functools.partial(see, tower))(unflatten(params), images)
    features = jax.jit(method.features)(given, {"image": images})
    if kind != "capped":  # which takes the mean of tokens
        np.testing.assert_allclose(seen.pooled, features.pooled, rtol=1e-5, atol=1e-5)
    if kind != "mean":  # whose tokens are those before the norm
        np.testing.assert_allclose(seen.patches(seen.tokens), features.tokens, rtol=1e-5, atol=1e-5)
    else:
        last = seen.patches(seen.blocks[-1])
        np.testing.assert_allclose(last, features.tokens, rtol=1e-5, atol=1e-5)
    settings = settings_of(str(tmp_path), SMALL)
    assert (settings["width"], settings["image_size"]) == (16, (28, 28))
    assert settings["mean"] == config.data.mean
    again = build_tower(
        ml_collections.ConfigDict(
            {
                **SMALL,
                **settings,
                "image_size": (12, 12),
                "position_grid": tower.encoder.position_grid or (),
            }
        ),
        "float32",
    )
    assert again == tower


def test_encoder_of_a_tower_is_a_part_as_well(file):
    tower, _ = random_tower()
    encoder = tower.encoder.clone(transformer=tower.encoder.transformer.clone(scan=True))
    method, _ = method_and_state()

    @dataclasses.dataclass(frozen=True)
    class OfEncoder(type(method)):
        @property
        def pretrained(self):
            return (Pretrained("encoder", encoder, str(file), "model.path", (r"norm/",)),)

    images = jnp.zeros((1, 28, 28, 1))
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), images)["params"]
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)
    _, state = method_and_state()
    state = dataclasses.replace(state, params={"encoder": ones})
    ours, notes = load_pretrained(OfEncoder(method.teacher, "", (), ()), state)
    given = weights()[0]["encoder"]
    stacked = ours.params["encoder"]["transformer"]["blocks"]["mlp"]["fc1"]["kernel"]
    for i in range(2):
        wanted = given["transformer"][f"blocks_{i}"]["mlp"]["fc1"]["kernel"]
        np.testing.assert_array_equal(stacked[i], wanted)
    np.testing.assert_array_equal(ours.params["encoder"]["norm"]["scale"], np.ones(16))  # fresh
    assert notes[0].startswith("encoder: ")
