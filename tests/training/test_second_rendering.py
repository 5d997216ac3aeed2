"""What a config makes of the images, where a method asks for two renderings of them."""

import dataclasses

import jax
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.data.configured import training_source
from mim_jax.data.on_device import normalize
from mim_jax.data.transforms import RandomResizedCrop
from mim_jax.method import Input
from mim_jax.methods.mae import MAE
from mim_jax.training.experiment import (
    Experiment,
    training_batches,
    training_crop,
)
from tests.training.runs import tiny


class Targeted(MAE):
    """An MAE that declares a second rendering."""

    @property
    def inputs(self):
        return {**super().inputs, "target_image": Input((14, 14, 1))}


def experiment(**changes) -> Experiment:
    plain = Experiment.without_data(tiny(**changes))
    method = Targeted(**{f.name: getattr(plain.method, f.name) for f in dataclasses.fields(MAE)})
    return dataclasses.replace(plain, method=method)


def batch(**changes) -> dict[str, np.ndarray]:
    config = tiny(**changes)
    batches = training_batches(config, training_source(config), 0, 1)
    return next(batches)


SIZE = {"data.target_size": (14, 14), "data.target_interpolation": "bilinear"}


def test_the_second_rendering_is_flipped_with_the_first():
    ramp = np.tile(np.arange(28, dtype=np.uint8)[:, None], (32, 28, 1, 1))
    given = {"image": ramp, "target_image": ramp[:, ::2, ::2]}
    prepared = experiment(**SIZE).prepare(given, jax.random.key(0))
    image, target = (np.asarray(prepared[name]) for name in ("image", "target_image"))
    flipped = image[:, 0, 0, 0] > image[:, 0, -1, 0]
    assert 0 < flipped.sum() < 32
    np.testing.assert_array_equal(target[:, 0, 0, 0] > target[:, 0, -1, 0], flipped)


def test_a_second_rendering_changes_nothing_of_the_first():
    given = batch(**SIZE)
    key = jax.random.key(1)
    prepared = experiment(**SIZE).prepare(given, key)
    del given["target_image"]
    alone = experiment().prepare(given, key)
    assert set(prepared) - set(alone) == {"target_image"}
    np.testing.assert_array_equal(prepared["image"], alone["image"])
    np.testing.assert_array_equal(given["image"], batch()["image"])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_second_rendering_is_scaled_to_one_without_statistics(dtype):
    white = np.iinfo(dtype).max
    images = np.asarray([0, white // 5, white], dtype).reshape(1, 1, 3, 1)
    prepared = experiment(**{"data.flip": False}).prepare(
        {"image": images, "target_image": images}, jax.random.key(0)
    )
    assert prepared["target_image"].dtype == np.float32
    np.testing.assert_allclose(np.ravel(prepared["target_image"]), [0, 0.2, 1], rtol=1e-6)
    np.testing.assert_allclose(prepared["image"], normalize(images, (0.2861,), (0.3530,)))


def test_shapes_without_data_are_those_of_the_batches():
    shapes = experiment(**SIZE).batch_shapes()
    given = batch(**SIZE)
    for name in ("image", "target_image"):
        assert shapes[name].shape == given[name].shape
        assert shapes[name].dtype == given[name].dtype
    deep = experiment(**{"data.bits": 16}).batch_shapes()
    assert {array.dtype for array in deep.values()} == {np.dtype(np.uint16)}


def test_without_the_fields_the_crop_is_the_plain_one():
    assert isinstance(training_crop(tiny()), RandomResizedCrop)


def test_colours_are_changed_before_the_crop_and_in_both_renderings_alike():
    jitter = {"data.color_jitter": (0.5, 0.0, 0.0), "data.crop_area": (1.0, 1.0)}
    plain, changed = batch(**SIZE), batch(**SIZE, **jitter)
    del plain["index"], changed["index"]
    assert np.any(plain["image"] != changed["image"])
    config = tiny(**SIZE, **jitter, **{"data.crop_aspect": (1.0, 1.0)})
    image = np.full((28, 28, 1), 100, np.uint8)
    rendered = training_crop(config)(image, np.random.default_rng(0))
    values = {int(value) for x in rendered.values() for value in np.unique(x)}
    assert len(values) == 1 and values != {100}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.target_size": (112,)}, r"target_size is \(112,\); give height and width"),
        ({"data.target_size": (0, 8)}, "give height and width in pixels"),
        (
            {"data.target_size": (14, 14), "data.augment": "rand-m9-mstd0.5-inc1"},
            "only one of the two renderings",
        ),
        ({"data.bits": 16, "data.color_jitter": (0.4, 0.0, 0.0)}, "needs images of 8 bits"),
    ],
)
def test_what_does_not_fit_is_an_error_of_the_config(changes, message):
    with pytest.raises(ValueError, match=message):
        configs.resolve(tiny(**changes), "cpu")


def test_a_missing_second_rendering_is_an_error_that_names_the_field():
    with pytest.raises(ValueError, match=r"'target_image'.*[Ss]et data\.target_size to \(14, 14\)"):
        experiment().method.check(batch())
    with pytest.raises(ValueError, match=r"'target_image'.*[Ss]et data\.target_size to \(14, 14\)"):
        experiment().method.check(batch(**{"data.target_size": (16, 16)}))
    experiment().method.check(batch(**SIZE))
