import json

import jax
import pytest

from benchmarks import train_step
from mim_jax.training.experiment import Experiment
from tests.methods.tiny import SIZES, tiny_config

TINY = [
    f"--config.{field}={value}"
    for field, value in SIZES.items()
    if field not in ("model.size", "compute_dtype")
]


def test_main_writes_speed_memory_and_the_config(tmp_path):
    path = tmp_path / "result.json"
    train_step.main(["--config", "mae:tiny", "--steps", "3", "--output", str(path), *TINY])
    result = json.loads(path.read_text())
    assert result["config"] == "mae:tiny"
    assert result["batch_size"] == 8
    assert result["step_seconds"]["count"] == result["steps"] == 3
    median = result["step_seconds"]["median"]
    assert result["images_per_second"] == pytest.approx(8 / median)
    flops = result["gflop_per_image"] * 8e9
    assert result["model_flops_utilization"] == pytest.approx(
        flops / median / (result["peak_tflops"] * 1e12)
    )
    assert result["compile_seconds"] > 0
    assert result["memory_mib"]["planned_state_and_batch"] > 0
    assert result["memory_mib"]["peak_of_the_process"] > 0


def test_steps_need_not_be_a_multiple_of_the_readings():
    figures = train_step.measure_step(Experiment.on_one_device(tiny_config()), steps=12)
    assert figures["step_seconds"]["count"] == train_step.READINGS


def test_synthetic_batch_is_spread_over_the_devices():
    experiment = Experiment.without_data(tiny_config())
    images = train_step.synthetic_batch(experiment)["image"]
    assert images.shape == (8, 8, 12, 1) and images.dtype == "uint8"
    assert len(images.sharding.device_set) == len(jax.devices())
    assert images.max() > 200


def test_zero_steps_are_refused(capsys):
    with pytest.raises(SystemExit):
        train_step.main(["--config", "mae:tiny", "--steps", "0"])
    assert "must be at least 1" in capsys.readouterr().err
