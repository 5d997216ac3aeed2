"""Reference losses, and what is said where they are not met."""

import jax
import pytest

from mim_jax import config as configs
from mim_jax.training.verify import Point, explanation, verdict_table, verify
from tests.training.runs import losses_of, run, tiny

FEW = (1, 4)
SMALL = {"model.depth": 1}


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(folder, **SMALL)
    return losses_of(folder)


def with_reference(losses, **changes):
    config = tiny(**SMALL, **changes)
    config.reference.update(
        steps=FEW, loss=tuple(losses[step] for step in FEW), band=tuple(1e-5 for _ in FEW)
    )
    return config


@pytest.mark.parametrize("devices", [1, 4])
def test_losses_are_those_of_training_on_any_number_of_devices(losses, devices):
    config = with_reference(losses)
    points = verify(config, devices=jax.devices()[:devices])
    assert [point.step for point in points] == list(FEW)
    assert all(point.agrees for point in points)
    assert explanation(points, config) == "mae trains here as it should: all losses agree."


def test_other_data_fail_from_the_first_step_on(losses):
    config = with_reference(losses, **{"data.flip": False})
    points = verify(config, devices=jax.devices()[:1])
    assert not any(point.agrees for point in points)
    text = explanation(points, config, ["data.flip"])
    assert "from the first step on" in text and "fields changed: data.flip" in text
    assert "jax " + jax.__version__ in text


def test_another_rate_fails_after_the_first_step(losses):
    config = with_reference(losses, **{"optimizer.base_lr": 6e-3})
    first, last = verify(config, devices=jax.devices()[:1])
    assert first.agrees and not last.agrees
    assert "look at the updates" in explanation([first, last], config)


def test_loss_that_is_not_finite_never_agrees():
    assert not Point(1, 1.0, float("nan"), 0.5).agrees
    assert Point(1, 1.0, 1.4, 0.5).agrees and not Point(1, 1.0, 1.6, 0.5).agrees
    assert verdict_table([Point(1, 1.0, 1.4, 0.5)]).row_count == 1


def test_config_without_a_fitting_reference_is_refused():
    with pytest.raises(ValueError, match=r"config of mae carries no reference.*mae:tiny does"):
        verify(configs.load("mae:vit_b16"))
    with pytest.raises(ValueError, match="as many losses and bands as steps"):
        verify(tiny(**{"reference.steps": (1, 2), "reference.loss": (1.0,), "reference.band": ()}))
    with pytest.raises(ValueError, match=r"goes to step 9, but the run ends at step 6"):
        changes = {"reference.steps": (9,), "reference.loss": (1.0,), "reference.band": (0.1,)}
        verify(tiny(**changes))


def test_reference_of_the_tiny_config_fits_its_run():
    config = configs.load("mae:tiny")
    assert config.reference.steps
    assert len(config.reference.loss) == len(config.reference.band) == len(config.reference.steps)
