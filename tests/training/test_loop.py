"""The loop: resuming, signals, logging, pictures, errors, and no recompilation."""

import io
import json
import os
import signal

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mim_jax import config as configs
from mim_jax.conversion.official import export_run, import_checkpoint
from mim_jax.methods.mae import MAE
from mim_jax.training import loop
from mim_jax.training.checkpoints import Checkpoints, read_variables
from mim_jax.training.experiment import Experiment
from mim_jax.training.gallery import visualize
from mim_jax.training.interruption import Interrupted
from mim_jax.training.loop import TrainingStopped, train
from mim_jax.training.tree import flatten
from tests.training.runs import compilations, losses_of, metrics_of, run, tiny


class Stop(Exception):
    pass


def stop_after(last):
    def on_step(step):
        if step == last:
            raise Stop

    return on_step


def assert_same_parameters(a, b):
    for path, value in flatten(a).items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(flatten(b)[path]), path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    result, output = run(folder)
    return result, folder, output


def test_run_is_one_folder_with_everything(whole):
    _, folder, output = whole
    assert json.loads((folder / "config.json").read_text())["batch_size"] == 32
    assert json.loads((folder / "versions.json").read_text())["jax"] == jax.__version__
    assert sorted(int(p.name) for p in (folder / "checkpoints").iterdir()) == [3, 6]
    assert "160 images of embedded:train[:160]" in output
    assert list(losses_of(folder)) == [1, 2, 3, 4, 5, 6]


def test_every_log_line_has_rates_gradient_norm_skips_and_data_wait(whole):
    _, folder, _ = whole
    for line in metrics_of(folder).values():
        assert line["images_per_second"] > 0
        assert 0 < line["model_flops_utilization"] < 2
        assert 0 <= line["data_wait"] <= 1
        assert line["grad_norm"] > 0 and line["skipped"] == 0
        assert {"learning_rate", "epoch", "loss", "time"} <= set(line)


def test_resumed_run_is_bit_identical(whole, tmp_path):
    expected, whole_folder, _ = whole
    with pytest.raises(Stop):
        run(tmp_path, on_step=stop_after(5))
    result, output = run(tmp_path)
    assert "resumed from step 3 of 6" in output
    assert losses_of(tmp_path) == losses_of(whole_folder)
    assert_same_parameters(result.state.params, expected.state.params)


def test_finished_run_trains_no_further(whole, tmp_path):
    expected, folder, _ = whole
    before = (folder / "metrics.jsonl").read_text()
    again, _ = run(folder, on_step=stop_after(1))
    assert_same_parameters(again.state.params, expected.state.params)
    assert (folder / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_the_step_and_the_run_goes_on(whole, tmp_path, number):
    expected, whole_folder, _ = whole

    def kill_in_four(step):
        if step == 4:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"{number.name} at step 4: everything is saved"):
        run(tmp_path, on_step=kill_in_four)
    assert signal.getsignal(number) == handler
    assert (tmp_path / "checkpoints" / "4").is_dir()
    result, _ = run(tmp_path)
    assert losses_of(tmp_path) == losses_of(whole_folder)
    assert_same_parameters(result.state.params, expected.state.params)


def test_steady_state_never_compiles(tmp_path):
    steps = [0]
    with compilations(steps) as compiled_at:
        run(tmp_path, on_step=lambda step: steps.__setitem__(0, step), steps=20)
    assert compiled_at and 0 in compiled_at, "the listener saw no compilation at all"
    last = max(steps)
    assert [step for step in compiled_at if 2 < step < last] == []


def test_tiny_config_hardly_waits_for_data(tmp_path):
    config = configs.load(
        "mae:tiny",
        {"steps": 100, "evaluate.protocols": (), "log.pictures_every_steps": 0},
    )
    train(config, tmp_path, devices=jax.devices()[:1], console=Console(file=io.StringIO()))
    # The first interval fills the queues.
    assert metrics_of(tmp_path)[100]["data_wait"] < 0.05


def test_checkpoints_keep_the_newest_the_periodic_and_the_best(tmp_path, monkeypatch):
    scores = iter([0.9, 0.1, 0.2, 0.3])
    monkeypatch.setattr(loop, "evaluate", lambda *_: {"knn": next(scores)})
    monkeypatch.setattr(loop, "compare_with_baselines", lambda *_, **__: {"trained": {"knn": 1.0}})
    result, _ = run(
        tmp_path,
        **{
            "steps": 25,
            "evaluate.protocols": ("knn",),
            "evaluate.every_epochs": 1.0,
            "checkpoint.best_metric": "knn",
            "checkpoint.keep": 1,
            "checkpoint.every_steps": 4,
            "checkpoint.keep_every_steps": 8,
        },
    )
    steps = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert steps >= {5, 8, 16, 25}, "5 has the best score, 8 and 16 the period, 25 is the newest"
    assert not steps & {4, 10, 12, 20}
    assert metrics_of(tmp_path)[5]["eval/knn"] == 0.9
    assert result.evaluation == {"trained": {"knn": 1.0}}


def test_pictures_are_written_at_the_interval_and_at_the_end(tmp_path):
    result, _ = run(tmp_path, **{"log.pictures_every_steps": 4, "log.tensorboard": True})
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["reconstruction_00000004.png", "reconstruction_00000006.png"]
    assert result.picture == tmp_path / "pictures" / names[-1]
    with Image.open(result.picture) as picture:
        assert picture.mode == "RGB" and min(picture.size) > 300
        last = np.asarray(picture)
    (file,) = visualize(tmp_path, tmp_path / "again")
    np.testing.assert_array_equal(np.asarray(Image.open(file)), last)
    (few,) = visualize(tmp_path, tmp_path / "few", data="embedded", split="test[:3]", rows=5)
    assert Image.open(few).size[1] < last.shape[0]
    assert list((tmp_path / "tensorboard").iterdir())


def test_final_evaluation_has_both_baselines(tmp_path):
    result, _ = run(tmp_path, **{"evaluate.protocols": ("knn", "linear")})
    assert list(result.evaluation) == ["trained", "untrained", "raw pixels"]
    assert all(0 <= score <= 1 for row in result.evaluation.values() for score in row.values())
    assert json.loads((tmp_path / "evaluation.json").read_text()) == result.evaluation


def test_run_made_from_an_official_file_trains_on_from_its_weights(whole, tmp_path):
    _, folder, _ = whole
    export_run(folder, tmp_path / "mae.safetensors")
    import_checkpoint(tiny(), tmp_path / "mae.safetensors", tmp_path / "run")
    _, output = run(tmp_path / "run")
    assert "resumed from step 0 of 6" in output
    assert losses_of(tmp_path / "run")[1] < losses_of(folder)[1] - 0.01


def test_checkpoint_of_another_method_is_refused(whole):
    _, folder, _ = whole
    config = tiny()
    config.method = "other"
    checkpoints = Checkpoints(folder, config)
    with pytest.raises(
        ValueError, match="written by method 'mae', but the config asks for 'other'"
    ):
        checkpoints.restore(None)
    checkpoints.close()


def test_checkpoint_of_another_model_is_refused_with_all_differences(whole):
    _, folder, _ = whole
    with pytest.raises(ValueError) as error:
        run(folder, **{"model.width": 24, "model.depth": 1, "steps": 12})
    message = str(error.value)
    assert "encoder/cls_token: (1, 1, 16) in the checkpoint, (1, 1, 24) in the model" in message
    assert "unexpected: params/encoder/transformer/blocks_1/norm1/scale" in message
    assert "another --workdir" in message


def test_changed_settings_are_named_when_a_run_goes_on(tmp_path):
    with pytest.raises(Stop):
        run(tmp_path, on_step=stop_after(5))
    _, output = run(tmp_path, **{"log.every_steps": 2})
    assert "log.every_steps was 1 and is now 2" in output


def test_loss_that_stays_non_finite_stops_the_run(tmp_path, monkeypatch):
    healthy = MAE.reconstruction_loss
    monkeypatch.setattr(
        MAE, "reconstruction_loss", lambda self, *a: healthy(self, *a) * jax.numpy.nan
    )
    with pytest.raises(TrainingStopped, match=r"not finite in 3 steps in a row.*clip_norm"):
        run(tmp_path, max_nonfinite=3)


def test_out_of_memory_names_the_settings_that_help(tmp_path, monkeypatch):
    def exhausted(self, shapes):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr(Experiment, "compiled_step", exhausted)
    with pytest.raises(TrainingStopped, match=r"accumulate \(now 1\) x 2, batch_size \(now 32\)"):
        run(tmp_path)


def test_too_many_unreadable_images_stop_the_run(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(60):
        path = images / f"{i:02d}.png"
        Image.fromarray(np.full((28, 28), i * 4, np.uint8)).save(path)
        if i % 10 == 0:
            path.write_bytes(b"broken")
    folder = f"folder:{images}"
    changes = {"data.source": folder, "data.split": "train", "batch_size": 30, "steps": 4}
    with pytest.raises(TrainingStopped, match=r"6 of 60 images .* \(10.0%.*allows 1.0%\)"):
        run(tmp_path / "run", **changes)
    run(tmp_path / "run", **changes, **{"data.max_unreadable": 0.2})


def test_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"256.*160|160.*256"):
        run(tmp_path, batch_size=256)


def test_unknown_protocol_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"unknown evaluation protocol .knm.*Did you mean .knn"):
        run(tmp_path, **{"evaluate.protocols": ("knm",)})
    assert not (tmp_path / "checkpoints").exists()


def test_variables_are_read_back_without_the_model(whole):
    result, folder, _ = whole
    variables, about = read_variables(folder)
    assert about["method"] == "mae" and about["config"]["batch_size"] == 32
    assert_same_parameters(variables["params"], result.state.params)
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint of step 5; it has .*3, 6"):
        read_variables(folder, 5)
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint"):
        read_variables(folder / "pictures")
