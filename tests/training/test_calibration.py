"""A method that measures its targets before the first step: on the first batches, for good."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import method
from mim_jax.data.configured import training_source
from mim_jax.method import Aux
from mim_jax.methods.mae import MAE
from mim_jax.training.checkpoints import read_variables
from mim_jax.training.experiment import Experiment, training_batches
from mim_jax.training.stretch import first_state, without_host_entries
from tests.training.runs import losses_of, run, tiny

COUNT = 2


@dataclasses.dataclass(frozen=True)
class CalibratedMAE(MAE):
    """An MAE that divides its loss by the mean square of the pixels of the first batches."""

    calibration_batches = COUNT

    def init(self, rng, batch):
        zeros = {"count": jnp.zeros(()), "mean_square": jnp.zeros(())}
        return {**super().init(rng, batch), "calibration": zeros}

    def calibrate(self, variables, batch, rngs):
        old = variables["calibration"]
        count = old["count"] + 1
        change = jnp.mean(batch["image"] ** 2) - old["mean_square"]
        return {"calibration": {"count": count, "mean_square": old["mean_square"] + change / count}}

    def loss(self, variables, batch, rngs, step):
        value, _ = super().loss({"params": variables["params"]}, batch, rngs, step)
        scale = variables["calibration"]["mean_square"]
        return value / scale, Aux({"scale": scale})


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(method._REGISTRY, "calibrated_mae", CalibratedMAE)


def build():
    config = tiny(method="calibrated_mae")
    source = training_source(config)
    return Experiment.build(config, len(source), jax.devices()[:1]), source


def test_calibration_sees_the_first_batches_and_no_more():
    experiment, source = build()
    batches = [
        without_host_entries(batch)
        for batch in training_batches(experiment.config, source, 0, COUNT + 1)
    ]
    state, notes = first_state(experiment, source, batches[0])
    data = experiment.config.data
    # Flips do not change the mean of squares.
    pixels = [(b["image"] / 255 - data.mean[0]) / data.std[0] for b in batches[:COUNT]]
    expected = np.mean([np.mean(np.square(p)) for p in pixels])
    assert float(state.mutable["calibration"]["count"]) == COUNT
    np.testing.assert_allclose(state.mutable["calibration"]["mean_square"], expected, rtol=1e-5)
    assert f"calibrated on {COUNT} batches" in notes
    assert int(state.step) == 0


def test_a_run_that_goes_on_keeps_its_calibration(tmp_path):
    whole, _ = run(tmp_path / "whole", method="calibrated_mae")
    _, text = run(tmp_path / "parts", method="calibrated_mae", steps=3)
    assert "calibrated on" in text
    saved, _ = read_variables(tmp_path / "parts", 3)
    assert float(saved["calibration"]["count"]) == COUNT
    again, text = run(tmp_path / "parts", method="calibrated_mae")
    assert "calibrated on" not in text
    for leaf, other in zip(
        jax.tree.leaves(whole.state.mutable), jax.tree.leaves(again.state.mutable), strict=True
    ):
        np.testing.assert_array_equal(leaf, other)
    # The schedule of the first part was that of a shorter run; what it measured is the same.
    assert set(losses_of(tmp_path / "parts")) == set(losses_of(tmp_path / "whole"))
