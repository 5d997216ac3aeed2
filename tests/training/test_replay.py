"""Any step of a run again: its loss, its batch, and the module where a NaN began."""

import json
import math
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mim_jax import config as configs
from mim_jax.data import open_source
from mim_jax.data.on_device import normalize
from mim_jax.data.order import batch_indices
from mim_jax.training import replay as replays
from mim_jax.training.activations import activations
from mim_jax.training.checkpoints import Checkpoints
from mim_jax.training.contact_sheet import contact_sheet
from mim_jax.training.experiment import Experiment
from mim_jax.training.replay import replay, report
from mim_jax.training.step import step_key, stream_keys
from mim_jax.training.tree import flatten, unflatten
from tests.training.runs import metrics_of, run, tiny

SMALL = {"model.depth": 1, "schedule.warmup_epochs": 0.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """On eight devices, with two micro-batches; checkpoints at steps 3 and 6."""
    folder = tmp_path_factory.mktemp("trained")
    run(folder, devices=8, accumulate=2, **SMALL)
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


def text_of(found):
    return "\n".join(part for part in report(found) if isinstance(part, str))


@pytest.mark.parametrize(
    ("step", "start"),
    [
        (3, 0),  # from a new state, over two steps
        (6, 3),  # from a checkpoint, over two steps
    ],
)
def test_step_of_a_run_on_eight_devices_comes_out_on_one(trained, step, start):
    found = replay(trained, step)
    logged = metrics_of(trained)[step]
    assert found.start == start
    assert found.metrics["loss"] == pytest.approx(logged["loss"], rel=1e-5)
    assert found.metrics["grad_norm"] == pytest.approx(logged["grad_norm"], rel=1e-4)
    assert found.agrees and found.first_difference is None
    assert not (found.parameters or found.gradients or found.modules)
    assert "the loss is that of the run" in text_of(found)


def test_replay_changes_nothing_in_the_run_but_adds_the_picture(copy):
    def files():
        return {path for path in copy.rglob("*") if path.is_file()}

    before = files()
    half_written = copy / "checkpoints" / "9.orbax-checkpoint-tmp"
    half_written.mkdir()
    found = replay(copy, 4)
    assert files() - before == {found.sheet}
    assert half_written.is_dir(), "another process may be writing it"


def test_sheet_shows_every_image_as_the_model_sees_it(trained, tmp_path, monkeypatch):
    seen = {}

    def keep(images, captions):
        seen.update(images=images, captions=captions)
        return contact_sheet(images, captions)

    monkeypatch.setattr(replays, "contact_sheet", keep)
    found = replay(trained, 1, output=tmp_path / "some" / "sheet.png")
    with Image.open(found.sheet) as sheet:
        assert sheet.mode == "RGB" and min(sheet.size) > 500
    indices = batch_indices(160, 32, seed=0, step=0)
    source = open_source("embedded", "train[:160]")
    names = [source.class_names[source[int(index)]["label"]] for index in indices]
    assert seen["captions"] == [[str(i), name] for i, name in zip(indices, names)]
    assert loss_of_initial_state(seen["images"]) == pytest.approx(found.logged["loss"], rel=1e-5)


def loss_of_initial_state(images):
    """The mean loss of two micro-batches in the first step."""
    experiment = Experiment.build(tiny(**SMALL), 160, jax.devices()[:1])
    variables = experiment.initial_state(experiment.batch_shapes()).variables
    data, method = experiment.config.data, experiment.method
    losses = [
        method.loss(
            variables,
            {"image": normalize(images[i::2], data.mean, data.std)},
            stream_keys(jax.random.fold_in(step_key(0, 0), i), method.streams),
            0,
        )[0]
        for i in range(2)
    ]
    return float(sum(losses)) / 2


def poison(folder, step, path, value):
    """Puts one bad value into a parameter of a checkpoint."""
    config = configs.from_json((folder / "config.json").read_text())
    config.update(mesh=dict(data=1))
    experiment = Experiment.build(config, 160, jax.devices()[:1])
    checkpoints = Checkpoints(folder, experiment.config)
    state = checkpoints.restore(experiment.abstract_state(experiment.batch_shapes()), step)
    flat = flatten(state.params)
    flat[path] = flat[path].at[(0,) * flat[path].ndim].set(value)
    shutil.rmtree(folder / "checkpoints" / str(step))
    checkpoints.close()
    checkpoints = Checkpoints(folder, experiment.config)
    checkpoints.save(state.replace(params=unflatten(flat)), step)
    checkpoints.close()


def test_module_with_a_poisoned_parameter_is_named(copy):
    poison(copy, 3, "encoder/transformer/blocks_0/mlp/fc1/bias", math.nan)
    found = replay(copy, 4)
    assert found.first_module == "encoder/transformer/blocks_0/mlp/fc1"
    assert found.parameters == ["encoder/transformer/blocks_0/mlp/fc1/bias"]
    assert found.gradients
    assert found.agrees is False
    text = text_of(found)
    assert "first module whose output is not finite: encoder/transformer/blocks_0/mlp/fc1" in text
    assert "gradients that are not finite: " in text and " more" in text


def test_first_logged_loss_that_does_not_come_out_is_named(copy):
    change_losses(copy, lambda step: 1.01 if step >= 5 else 1.0)
    found = replay(copy, 6)
    assert found.agrees is False and found.first_difference == 5
    text = text_of(found)
    assert "the first logged loss that does not come out is at 5" in text
    assert "what may differ from the run: the data" in text


def test_step_that_was_not_logged_has_nothing_to_compare_with(copy):
    (copy / "metrics.jsonl").write_text("")
    found = replay(copy, 4)
    assert found.agrees is None and math.isfinite(found.metrics["loss"])


@pytest.mark.parametrize(("compute_dtype", "agrees"), [("bfloat16", True), ("float32", False)])
def test_loss_is_compared_by_the_compute_type_of_the_run(copy, compute_dtype, agrees):
    text = (copy / "config.json").read_text()
    text = text.replace('"compute_dtype": "float32"', f'"compute_dtype": "{compute_dtype}"')
    (copy / "config.json").write_text(text)
    shutil.rmtree(copy / "checkpoints" / "6")  # it holds the config that step 4 was taken with
    change_losses(copy, lambda step: 1.01)
    found = replay(copy, 4)
    assert found.compute_dtype == compute_dtype and found.agrees is agrees


def change_losses(folder, factor):
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    changed = [{**line, "loss": line["loss"] * factor(line["step"])} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in changed))


def test_every_module_is_shown_on_demand(trained):
    found = replay(trained, 4, modules=True)
    assert len(found.modules) == 2, "one list for each micro-batch"
    names = [activation.module for activation in found.modules[0]]
    assert names.index("encoder/patch_embed") < names.index("encoder") < names.index("decoder/pred")
    assert found.first_module is None


def test_step_is_replayed_with_the_config_that_it_was_taken_with(copy):
    config = json.loads((copy / "config.json").read_text())
    config["data"]["flip"] = False
    config["log"]["every_steps"] = 7
    (copy / "config.json").write_text(json.dumps(config))
    found = replay(copy, 4)
    assert found.agrees
    assert len(found.notes) == 1
    assert "data.flip was True at step 4, as replayed here" in found.notes[0]


def test_errors_name_what_is_missing(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is no folder of a run: it has no config"):
        replay(tmp_path / "nowhere", 1)
    for step in (0, 7):
        with pytest.raises(ValueError, match=rf"no step {step}; it has steps 1 to 6, and the last"):
            replay(copy, step)
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text.replace('"batch_size": 32', '"batch_syze": 32', 1))
    with pytest.raises(ValueError, match=r"does not fit this version.*no field 'batch_syze'"):
        replay(copy, 1)
    shutil.rmtree(copy / "checkpoints")
    (copy / "config.json").write_text(text.replace('"embedded"', '"folder:gone"', 1))
    with pytest.raises(FileNotFoundError, match=r"'gone' does not exist"):
        replay(copy, 1)


class Divides(nn.Module):
    """Divides by the distance to the number of its turn."""

    @nn.compact
    def __call__(self, x, turn):
        x = nn.Dense(3, name="dense")(x)
        return x / (turn - 1), None


class Loop(nn.Module):
    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(nn.remat(Divides), {"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = scanned(name="turns")(x, jnp.arange(3.0))
        return nn.Dense(2, name="last")(x)


def test_turn_of_a_compiled_loop_in_which_a_module_divides_by_zero_is_named():
    x = jnp.ones((2, 3))
    variables = Loop().init(jax.random.key(0), x)
    found = activations(Loop().apply, variables, x)
    names = [activation.module for activation in found]
    assert names[:2] == ["turns/dense[0]", "turns[0]"] and names[-2:] == ["last", "Loop"]
    assert names.index("turns[0]") < names.index("turns/dense[1]") < names.index("turns[1]")
    assert next(a.module for a in found if not a.finite) == "turns[1]"
    assert found[0].largest == pytest.approx(
        float(jnp.abs(x @ variables["params"]["turns"]["dense"]["kernel"][0]).max()), rel=1e-6
    )


def test_contact_sheet_has_a_tile_and_caption_for_each_image():
    images = np.full((5, 28, 28, 1), 128, np.uint8)
    sheet = contact_sheet(images, [["1", "a"], ["2"], ["3"], ["4"], ["a_very_long_name" * 9]])
    assert sheet.dtype == np.uint8 and sheet.shape[1] > 3 * 96
    assert (sheet == 128).all(-1).sum() == 5 * 112 * 112


def test_large_images_and_batches_shrink_to_a_sheet_that_can_be_opened():
    assert max(contact_sheet(np.zeros((2, 500, 300, 4), np.uint8), [[""], [""]]).shape) < 600
    images = np.broadcast_to(np.uint8(0), (1024, 64, 64, 1))
    assert max(contact_sheet(images, [[""]] * 1024).shape) < 7000


def test_contact_sheet_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match=r"float32 \[2, 4, 4, 1\]; expected uint8"):
        contact_sheet(np.zeros((2, 4, 4, 1), np.float32), [[], []])
    with pytest.raises(ValueError, match="2 images have 1 captions"):
        contact_sheet(np.zeros((2, 4, 4, 1), np.uint8), [[]])


def test_captions_name_file_and_class_and_what_was_replaced(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / name / "a.png")
    (tmp_path / "dog" / "a.png").write_bytes(b"broken")
    batch = {"index": np.arange(2), "label": np.arange(2), "unreadable": np.array([False, True])}
    first, second = replays._captions(open_source(f"folder:{tmp_path}"), batch)
    assert first == ["0", "cat", "cat/a.png"]
    assert second[:2] == ["1 replaced", "dog"]
