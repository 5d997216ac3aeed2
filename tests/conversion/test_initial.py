import collections
import functools

import jax
import numpy as np
import optax
import pytest

from mim_jax import config as configs
from mim_jax.conversion import initial
from mim_jax.conversion.files import write_state_dict
from mim_jax.conversion.initial import Donor, initialize_from
from mim_jax.conversion.official import import_checkpoint
from mim_jax.training.experiment import Experiment
from mim_jax.training.state import TrainState, init_state
from mim_jax.training.tree import flatten
from tests.methods.tiny import tiny_config, tiny_mae, tiny_params
from tests.training.toy import Toy


def build(changes: dict | None = None, devices: int = 1) -> tuple[Experiment, TrainState]:
    config = tiny_config(changes)
    experiment = Experiment.build(config, examples=64, devices=jax.devices()[:devices])
    return experiment, experiment.initial_state(experiment.batch_shapes())


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
    fresh = [path for path in flatten(state.params) if path.startswith("decoder/")]
    modules = collections.Counter("/".join(path.split("/")[:2]) for path in sorted(fresh))
    listed = notes[1].removeprefix("not in the weights, so at their initial values: ").split(", ")
    assert listed == [
        f"{module} ({count} arrays)" if count > 1 else module for module, count in modules.items()
    ]


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


def test_a_file_of_another_depth_and_width_is_an_error_that_names_the_file_and_lists_all(official):
    experiment, state = build({"model.width": 24, "model.depth": 3})
    with pytest.raises(ValueError) as error:
        initialize_from(str(official), experiment.method, state)
    message = str(error.value)
    assert message.startswith(f"the weights of {official} do not fit the model:")
    assert "params/encoder/cls_token: (1, 1, 16) in" in message
    assert message.count("missing: params/encoder/transformer/blocks_2/") == 12


def test_a_run_with_more_blocks_is_an_error_that_lists_them(run):
    experiment, state = build({"model.depth": 1})
    with pytest.raises(ValueError) as error:
        initialize_from(str(run), experiment.method, state)
    assert str(error.value).count("unexpected: params/encoder/transformer/blocks_1/") == 12


def test_a_method_without_official_checkpoint_says_so(official):
    state = init_state(Toy(), optax.identity(), jax.random.key(0), {})
    with pytest.raises(ValueError, match="Toy has no official checkpoint to read"):
        initialize_from(str(official), Toy(), state)


def test_stacked_and_single_blocks_exchange_weights(run):
    for changes in ({"model.scan": True}, {}):
        experiment, state = build(changes)
        ours, notes = initialize_from(str(run), experiment.method, state)
        assert len(notes) == 1, notes
        state_dict = experiment.method.layout().save(jax.device_get(ours.params))
        for key, value in tiny_mae().layout().save(tiny_params()).items():
            np.testing.assert_array_equal(state_dict[key], value, err_msg=key)


OTHER_IMAGES = {
    "data.image_size": (8, 8),
    "data.channels": 3,
    "data.mean": (0.5,) * 3,
    "data.std": (0.3,) * 3,
    "model.patch_size": (2, 4),
}


def test_weights_for_other_patches_channels_and_sizes_are_resized_with_a_note(run):
    experiment, state = build(OTHER_IMAGES)
    ours, notes = initialize_from(str(run), experiment.method, state)
    assert notes[1:] == [
        "resized decoder/pred/bias from (16,) to (24,)",
        "resized decoder/pred/kernel from (8, 16) to (8, 24)",
        "resized encoder/patch_embed/kernel from (4, 4, 1, 16) to (2, 4, 3, 16)",
    ]
    del ours.params["decoder"]["pred"], ours.params["encoder"]["patch_embed"]["kernel"]
    expected = tiny_params()
    del expected["decoder"]["pred"], expected["encoder"]["patch_embed"]["kernel"]
    assert_params(ours, expected)


def test_a_file_whose_grid_nothing_tells_asks_for_its_size(official):
    experiment, state = build(OTHER_IMAGES)
    with pytest.raises(ValueError, match=r"its 6 positions are no square; set data.image_size"):
        initialize_from(str(official), experiment.method, state)


def test_a_classifier_takes_the_encoder_and_lists_the_rest(run):
    fields = ("width", "depth", "heads", "patch_size", "mlp_ratio")
    like = tiny_config()
    config = configs.load(
        "finetune:tiny",
        {
            **{f"model.{name}": like.model[name] for name in fields},
            **{f"data.{name}": like.data[name] for name in ("image_size", "mean", "std")},
            "model.num_classes": 3,
            "model.labels": "single",
            "batch_size": 8,
        },
    )
    experiment = Experiment.build(config, examples=64, devices=jax.devices()[:1])
    state = experiment.initial_state(experiment.batch_shapes())
    ours, notes = initialize_from(str(run), experiment.method, state)
    encoder = dict(tiny_params()["encoder"])
    del encoder["norm"]
    assert_params(ours, {"encoder": encoder})
    table = tiny_mae().encoder.position_table()
    np.testing.assert_array_equal(ours.params["encoder"]["positions"], table)
    assert "not used by this model: decoder/embed (2 arrays), decoder/mask_token" in notes[1]
    assert notes[1].endswith("encoder/norm (2 arrays)")
    assert notes[2] == (
        "not in the weights, so at their initial values: "
        "fc_norm/bias, fc_norm/scale, head/bias, head/kernel"
    )


def test_a_run_gives_its_teacher_and_mutable_collections_too(monkeypatch):
    optimizer = optax.with_extra_args_support(optax.identity())
    state = init_state(Toy(), optimizer, jax.random.key(0), {})
    given = jax.tree.map(lambda leaf: np.asarray(leaf) + 1, state.variables)
    donor = Donor("run", Toy(), flatten(given))
    monkeypatch.setattr(initial, "read_donor", lambda path, method: donor)
    loaded, notes = initial.initialize_from("run", Toy(), state)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, given)
    assert len(notes) == 1


def test_a_teacher_that_the_weights_lack_starts_from_its_student(monkeypatch):
    optimizer = optax.with_extra_args_support(optax.identity())
    state = init_state(Toy(), optimizer, jax.random.key(0), {})
    given = {"student": jax.tree.map(lambda leaf: np.asarray(leaf) + 1, state.params["student"])}
    donor = Donor("weights.pth", Toy(), flatten({"params": given}))
    monkeypatch.setattr(initial, "read_donor", lambda path, method: donor)
    loaded, _ = initial.initialize_from("weights.pth", Toy(), state)
    jax.tree.map(np.testing.assert_array_equal, loaded.params["teacher"], loaded.params["student"])
    jax.tree.map(np.testing.assert_array_equal, loaded.params["student"], given["student"])
