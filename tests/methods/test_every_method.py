"""What holds for every method: its `:tiny` config, made still smaller, from training to export."""

import dataclasses
import functools
import io
import shutil
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest
from rich.console import Console

from mim_jax import config as configs
from mim_jax.conversion.initial import read_donor
from mim_jax.conversion.official import export_run, import_checkpoint
from mim_jax.data.configured import training_source
from mim_jax.training.checkpoints import checkpoint_steps, read_variables
from mim_jax.training.experiment import Experiment, training_rows
from mim_jax.training.gallery import picture_batch
from mim_jax.training.loop import Result, train
from mim_jax.training.state import TrainState, split_trainable
from mim_jax.training.stretch import first_state, take_steps
from mim_jax.training.tree import flatten, path_string
from tests.training.runs import compilations, losses_of

STEPS = 4

SMALL = {
    "model.width": 16,
    "model.depth": 1,
    "model.heads": 2,
    "model.decoder_width": 8,
    "model.decoder_depth": 1,
    "model.decoder_heads": 2,
    "model.regressor_depth": 1,
    "model.calibration_batches": 1,
    "data.split": "train[:64]",
    "compute_dtype": "float32",
    "batch_size": 16,
    "steps": STEPS,
    "schedule.warmup_epochs": 0.5,
    "log.every_steps": 1,
    "log.pictures_every_steps": 0,
    "log.tensorboard": False,
    "checkpoint.every_steps": 2,
    "evaluate.protocols": (),
}
"""Of these fields, a method takes those that it has."""

OWN = {
    "cae": {"model.decoder_width": 16},  # the regressor's, in which it is at home
    # Widths that six divides; levels to attend to.
    "hi_end_mae": {
        "model.width": 12,
        "model.depth": 3,
        "model.taps": (0, 1),
        "model.decoder_width": 12,
    },
    "unetr": {
        "model.width": 12,
        "model.depth": 4,
        "model.taps": (0, 1, 2),
        "model.feature_size": 2,
        "batch_size": 4,
        "schedule.warmup_epochs": 0.125,
    },
    "maskalign": {"model.depth": 4},  # the teacher's: layers are paired
    "vec2face": {"model.discriminator_start": 0},
    # Its sizes are those of the two towers of CLIP; and a mixture has no slices.
    "gm_df": {
        "data.split": "train",
        "model.clip.width": 16,
        "model.clip.depth": 2,
        "model.clip.heads": 2,
        "model.clip.outputs": 8,
        "model.clip.patch_size": (8, 8),
        "model.text.width": 8,
        "model.text.depth": 1,
        "model.expert_hidden": 8,
        "model.second_order_layers": (0,),
        "schedule.warmup_epochs": 0.0,  # its epochs are long
    },
}


def config_of(name: str) -> ml_collections.ConfigDict:
    known = configs.leaves(configs.load(f"{name}:tiny"))
    small = {field: value for field, value in SMALL.items() if field in known}
    return configs.load(f"{name}:tiny", {**small, **OWN.get(name, {})})


def trained(config: ml_collections.ConfigDict, folder: Path, on_step=None) -> Result:
    console = Console(file=io.StringIO(), width=200)
    return train(config, folder, devices=jax.devices()[:1], console=console, on_step=on_step)


@dataclasses.dataclass
class Run:
    """A finished run of a method on one device."""

    name: str
    folder: Path
    result: Result
    compiled_at: list[int]

    @property
    def config(self) -> ml_collections.ConfigDict:
        """Nothing in it is open."""
        return configs.from_json((self.folder / "config.json").read_text())

    @property
    def experiment(self) -> Experiment:
        rows = training_rows(self.config, training_source(self.config))
        return Experiment.build(self.config, rows, jax.devices()[:1])

    @functools.cached_property
    def start(self) -> TrainState:
        """What the run started from, as NumPy arrays."""
        experiment = self.experiment
        source = training_source(self.config)
        return jax.device_get(first_state(experiment, source, experiment.batch_shapes())[0])

    @property
    def params(self) -> dict[str, np.ndarray]:
        return flatten(jax.device_get(self.result.state.params))


@pytest.fixture(scope="module", params=configs.known_configs())
def run(request, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp(request.param)
    steps = [0]
    with compilations(steps) as compiled_at:
        result = trained(
            config_of(request.param), folder, on_step=lambda step: steps.__setitem__(0, step)
        )
    return Run(request.param, folder, result, compiled_at)


def assert_equal(ours, expected) -> None:
    assert set(ours) == set(expected)
    for path, value in expected.items():
        np.testing.assert_array_equal(np.asarray(ours[path]), np.asarray(value), err_msg=path)


def test_steady_state_never_compiles(run):
    assert 0 in run.compiled_at, "the listener saw no compilation at all"
    assert [step for step in run.compiled_at if 1 < step < STEPS] == []


def test_resumed_run_is_bit_identical(run, tmp_path):
    # All that a run leaves which ended after its second step.
    shutil.copytree(run.folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / str(STEPS))
    (tmp_path / "metrics.jsonl").unlink()
    assert checkpoint_steps(tmp_path) == [2]
    result = trained(config_of(run.name), tmp_path)
    expected = losses_of(run.folder)
    assert losses_of(tmp_path) == {step: expected[step] for step in (3, 4)}
    assert_equal(flatten(result.state.params), run.params)
    assert_equal(flatten(result.state.mutable), flatten(run.result.state.mutable))


def test_training_moves_every_trained_parameter_and_no_frozen_one(run):
    before = flatten(run.start.params)
    parts = split_trainable(run.experiment.method, run.start.params)
    trainable, fixed = (set(flatten(part)) for part in parts)
    moved = {path for path, value in run.params.items() if np.any(value != before[path])}
    assert moved == trainable
    # And the optimizer has something for each of the ones, and nothing for the others.
    leaves = jax.tree_util.tree_flatten_with_path(run.result.state.opt_state)[0]
    kept = [path_string(path) for path, leaf in leaves if leaf.ndim]
    assert all(any(entry.endswith(f"/{path}") for entry in kept) for path in trainable)
    assert not any(entry.endswith(f"/{path}") for entry in kept for path in fixed)


def test_losses_do_not_depend_on_the_devices(run):
    config = run.config
    config.update(mesh=dict(data=2, fsdp=2), sharding=dict(strategy="fsdp"))
    source = training_source(config)
    experiment = Experiment.build(config, training_rows(config, source), jax.devices()[:4])
    shapes = experiment.abstract_state(experiment.batch_shapes())
    state = jax.device_put(run.start, jax.tree.map(lambda leaf: leaf.sharding, shapes))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))
    steps = take_steps(experiment, source, state, STEPS)
    ours = [float(metrics["loss"]) for _, metrics in steps]
    np.testing.assert_allclose(ours, list(losses_of(run.folder).values()), rtol=1e-5)


def test_official_file_brings_back_the_weights_and_the_features(run, tmp_path):
    file = tmp_path / "official.safetensors"
    export_run(run.folder, file)
    given = flatten(read_variables(run.folder)[0])
    read = read_donor(str(file), run.experiment.method).variables
    assert {path for path in read if path.startswith("params/encoder/")} == {
        path for path in given if path.startswith("params/encoder/")
    }
    assert_equal(read, {path: given[path] for path in read})
    import_checkpoint(run.config, file, tmp_path / "run")
    experiment = Experiment.on_one_device(run.config)
    source = training_source(run.config)
    batch = experiment.normalized(picture_batch(run.config, source, rows=4))
    features = jax.jit(experiment.method.features)
    ours, theirs = (
        jax.tree.leaves(features(read_variables(folder)[0], batch))
        for folder in (run.folder, tmp_path / "run")
    )
    for our, their in zip(ours, theirs, strict=True):
        assert np.std(our) > 0
        np.testing.assert_array_equal(our, their)
