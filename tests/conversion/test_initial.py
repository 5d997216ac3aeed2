import functools

import jax
import numpy as np
import optax
import pytest

from mim_jax.conversion import initial
from mim_jax.conversion.files import write_state_dict
from mim_jax.conversion.initial import initialize_from, read_official
from mim_jax.conversion.official import import_checkpoint
from mim_jax.training.experiment import Experiment, image_shapes
from mim_jax.training.state import TrainState, init_state
from mim_jax.training.tree import flatten
from tests.methods.tiny import tiny_config, tiny_mae, tiny_params
from tests.training.toy import Toy


def build(changes: dict | None = None, devices: int = 1) -> tuple[Experiment, TrainState]:
    config = tiny_config(changes)
    experiment = Experiment.build(config, examples=64, devices=jax.devices()[:devices])
    return experiment, experiment.initial_state(image_shapes(config))


new_run = functools.cache(build)


@pytest.fixture
def official(tmp_path):
    """A file with the weights of `tiny_params`."""
    path = tmp_path / "official.safetensors"
    write_state_dict(path, tiny_mae().layout().save(tiny_params()))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose checkpoint holds `tiny_params`."""
    folder = tmp_path_factory.mktemp("run")
    write_state_dict(folder / "x.safetensors", tiny_mae().layout().save(tiny_params()))
    import_checkpoint(tiny_config(), folder / "x.safetensors", folder / "run")
    return folder / "run"


def assert_params(state: TrainState, expected: dict) -> None:
    given = flatten(state.params)
    for path, value in flatten(expected).items():
        np.testing.assert_array_equal(given[path], value, err_msg=path)


def test_an_official_file_gives_all_parameters(official):
    experiment, state = new_run()
    ours, notes = initialize_from(str(official), experiment.method, state)
    assert_params(ours, tiny_params())
    assert notes == [f"initialized 60 of 60 arrays from {official}"]


def test_everything_but_the_parameters_stays(official):
    experiment, state = new_run()
    ours, _ = initialize_from(str(official), experiment.method, state)
    assert int(ours.step) == 0
    for a, b in zip(jax.tree.leaves(ours.opt_state), jax.tree.leaves(state.opt_state), strict=True):
        assert a is b


def test_an_encoder_only_file_leaves_the_decoder_initial_and_the_notes_say_so(tmp_path):
    state_dict = tiny_mae().layout().save(tiny_params())
    encoder = {k: v for k, v in state_dict.items() if not k.startswith(("decoder_", "mask_token"))}
    write_state_dict(tmp_path / "x.safetensors", encoder)
    experiment, state = new_run()
    ours, notes = initialize_from(str(tmp_path / "x.safetensors"), experiment.method, state)
    assert_params(ours, {"encoder": tiny_params()["encoder"]})
    assert_params(ours, {"decoder": jax.device_get(state.params)["decoder"]})
    assert notes[0].startswith("initialized 29 of 60 arrays")
    listed = notes[1].removeprefix("not in the file, so at their initial values: ").split(", ")
    assert listed == sorted(path for path in flatten(state.params) if path.startswith("decoder/"))


def test_a_run_gives_all_parameters(run):
    experiment, state = new_run()
    ours, notes = initialize_from(str(run), experiment.method, state)
    assert_params(ours, tiny_params())
    assert notes == [f"initialized 60 of 60 arrays from {run}"]


def test_weights_are_laid_out_over_the_devices_as_the_state_was(official):
    experiment, state = build({"mesh.fsdp": 4, "sharding.strategy": "fsdp"}, devices=4)
    ours, _ = initialize_from(str(official), experiment.method, state)
    assert_params(ours, tiny_params())
    for path, leaf in flatten(ours.params).items():
        assert leaf.sharding == flatten(state.params)[path].sharding, path
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(ours.params))


def test_a_folder_that_is_no_run_is_an_error(tmp_path):
    experiment, state = new_run()
    with pytest.raises(FileNotFoundError, match="is a folder, but no run of ours"):
        initialize_from(str(tmp_path), experiment.method, state)


def test_a_run_without_a_complete_checkpoint_is_an_error(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    experiment, state = new_run()
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint"):
        initialize_from(str(tmp_path), experiment.method, state)


def test_a_missing_file_is_an_error(tmp_path):
    experiment, state = new_run()
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        initialize_from(str(tmp_path / "nowhere.pth"), experiment.method, state)


def test_a_file_of_another_size_is_an_error_that_names_the_file_and_lists_all(official):
    wider = tiny_mae({"model.width": 24, "model.depth": 1})
    like = jax.eval_shape(lambda: wider.init(jax.random.key(0), image_shapes(tiny_config())))
    with pytest.raises(ValueError) as error:
        read_official(str(official), wider, like["params"])
    message = str(error.value)
    assert message.startswith(f"{official}: the checkpoint does not fit the model:")
    assert "cls_token: shape (1, 1, 16) in the file, (1, 1, 24) in the model" in message
    assert "pos_embed: shape (1, 7, 16) in the file, (1, 7, 24) in the model" in message
    assert message.count("unexpected: blocks.1.") == 12


def test_a_run_of_another_size_is_an_error_that_lists_all(run):
    experiment, state = new_run()
    params = dict(flatten(state.params))
    params["encoder/cls_token"] = jax.numpy.zeros((1, 1, 24))
    params["head/kernel"] = params.pop("decoder/mask_token")
    with pytest.raises(ValueError) as error:
        initialize_from(str(run), experiment.method, state.replace(params=params))
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "missing: params/head/kernel",
        "unexpected: params/decoder/mask_token",
        "params/encoder/cls_token: (1, 1, 16) in the run, (1, 1, 24) in the model",
    ]


def test_a_method_without_official_checkpoint_says_so(official):
    with pytest.raises(ValueError, match="Toy has no official checkpoint to read"):
        read_official(str(official), Toy(), {})


def test_a_run_gives_its_teacher_and_mutable_collections_too(tmp_path, monkeypatch):
    optimizer = optax.with_extra_args_support(optax.identity())
    state = init_state(Toy(), optimizer, jax.random.key(0), {})
    given = jax.tree.map(lambda leaf: np.asarray(leaf) + 1, state.variables)
    monkeypatch.setattr(initial, "read_variables", lambda path: (given, {}))
    (tmp_path / "checkpoints").mkdir()
    loaded, notes = initial.initialize_from(str(tmp_path), Toy(), state)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, given)
    assert len(notes) == 1


def test_a_teacher_that_the_weights_lack_starts_from_its_student(tmp_path, monkeypatch):
    optimizer = optax.with_extra_args_support(optax.identity())
    state = init_state(Toy(), optimizer, jax.random.key(0), {})
    given = {"student": jax.tree.map(lambda leaf: np.asarray(leaf) + 1, state.params["student"])}
    monkeypatch.setattr(initial, "read_official", lambda *_: given)
    loaded, _ = initial.initialize_from("weights.pth", Toy(), state)
    jax.tree.map(np.testing.assert_array_equal, loaded.params["teacher"], loaded.params["student"])
    jax.tree.map(np.testing.assert_array_equal, loaded.params["student"], given["student"])
