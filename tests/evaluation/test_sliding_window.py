"""Windows over a volume, and Dice coefficients."""

import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.data.volumes import ArrayVolume
from mim_jax.evaluation import dice as dice_module
from mim_jax.evaluation.dice import check_segmenter, dice, dice_coefficients, dice_scores
from mim_jax.evaluation.protocols import check_protocols
from mim_jax.evaluation.sliding_window import predicted_classes, window_starts
from mim_jax.method import Input


def test_windows_cover_an_axis_with_the_overlap():
    assert window_starts(96, 96, 0.5) == [0]
    assert window_starts(60, 96, 0.5) == [0]
    assert window_starts(192, 96, 0.5) == [0, 48, 96]
    assert window_starts(200, 96, 0.5) == [0, 48, 96, 104]
    assert window_starts(10, 4, 0.0) == [0, 4, 6]


def test_classes_are_those_of_the_summed_logits_of_all_windows():
    rng = np.random.default_rng(0)
    volume = ArrayVolume(rng.integers(0, 65535, (11, 9, 7), dtype=np.uint16))
    window = (4, 4, 4)
    weights = rng.normal(size=(*window, 3)).astype(np.float32)
    calls = []

    def predict(windows):  # a voxel's logits depend on its place in the window
        calls.append(windows.shape)
        return np.sin(windows.astype(np.float32) * 1e-3 + weights)

    found = predicted_classes(volume, predict, window, overlap=0.5, batch_size=5)
    sums = np.zeros((*volume.shape, 3), np.float32)
    starts = [window_starts(side, 4, 0.5) for side in volume.shape]
    for a in starts[0]:
        for b in starts[1]:
            for c in starts[2]:
                part = volume.voxels[a : a + 4, b : b + 4, c : c + 4, None].astype(np.float32)
                sums[a : a + 4, b : b + 4, c : c + 4] += np.sin(part * 1e-3 + weights)
    np.testing.assert_array_equal(found, sums.argmax(-1))
    assert set(calls) == {(5, 4, 4, 4, 1)}, "one shape, so one compilation"


def test_a_volume_smaller_than_the_window_keeps_its_shape():
    volume = ArrayVolume(np.full((3, 9, 5), 65535, np.uint16))
    found = predicted_classes(
        volume, lambda w: np.concatenate([w < 1, w > 1], -1).astype(np.float32), (4, 4, 4)
    )
    assert found.shape == (3, 9, 5) and np.all(found == 1)
    with pytest.raises(ValueError, match=r"overlap must be in \[0, 1\), got 1"):
        predicted_classes(volume, lambda w: w, (4, 4, 4), overlap=1)


def test_dice_is_the_formula_and_leaves_out_what_is_not_there():
    rng = np.random.default_rng(0)
    predicted, true = rng.integers(0, 4, (2, 5, 6, 7))
    true[true == 2] = 0
    for number, ours in enumerate(dice_coefficients(predicted, true, 4)):
        a, b = predicted == number, true == number
        expected = 2 * (a & b).sum() / (a.sum() + b.sum()) if b.any() else np.nan
        np.testing.assert_allclose(ours, expected)
    scores = dice_scores([np.array([1.0, 0.5, np.nan]), np.array([0.8, 0.2, 0.4])])
    assert scores == pytest.approx(
        {"mean": (0.75 + 1.4 / 3) / 2, "organs": 0.4, "class_1": 0.35, "class_2": 0.4}
    )


class Thresholds:
    """Tells the organs of procedural abdomens by their brightness alone."""

    num_classes = 5

    @property
    def inputs(self):
        return {"image": Input((24, 24, 24, 1))}

    def logits(self, variables, batch):
        levels = jnp.asarray(variables["levels"])
        distance = jnp.abs(batch["image"] - levels)
        return -distance


def test_the_protocol_scores_whole_volumes_of_the_test_split():
    config = configs.load(
        "unetr:tiny", {"evaluate.test_split": "test[:3]", "data.image_size": (16, 16, 16)}
    )
    levels = np.array([0.35, 0.5, 0.6, 9.0, 0.8], np.float32)
    scores = dice(Thresholds(), {"levels": levels}, config)
    assert scores["class_4"] > 0.7 and scores["class_2"] > 0.3
    assert scores["class_3"] == 0.0, "it looks like class 2"
    config.evaluate.source = "embedded"
    config.evaluate.test_split = "test"
    with pytest.raises(ValueError, match="needs volumes, but embedded:test holds none"):
        dice(Thresholds(), {"levels": levels}, config)
    few = Thresholds()
    few.num_classes = 3
    config.evaluate.source = ""
    with pytest.raises(ValueError, match=r"has the class 4, but model.num_classes is 3"):
        dice(few, {"levels": levels[:3]}, config)


def test_methods_without_classes_of_voxels_are_refused():
    assert dice_module.check_segmenter(Thresholds()) is None
    mae = type("Other", (), {"inputs": {"image": Input((8, 8, 1))}})()
    with pytest.raises(ValueError, match="such as unetr, not Other"):
        check_segmenter(mae)
    with pytest.raises(ValueError, match="such as unetr, not Other"):
        check_protocols(("knn", "dice"), mae)
