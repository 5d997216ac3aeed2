import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mim_jax import config as configs
from mim_jax.evaluation.detection import (
    check_detector,
    detection_scores,
    domain_numbers,
    equal_error_rate,
    with_means,
)
from mim_jax.evaluation.protocols import check_protocols, evaluate
from mim_jax.method import Input
from tests.evaluation.toy import Toy

COLLECTIONS = [f"synthetic:collections:{number}" for number in range(3)]
TRAINED = f"mix:1*{COLLECTIONS[2]} + 1*{COLLECTIONS[0]}"
"""The domain 0 is the collection 2, and the domain 1 the collection 0."""


def pair_count(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve by its meaning: won pairs, and half of the drawn ones."""
    wins = [
        1.0 if fake > real else 0.5 if fake == real else 0.0
        for fake in scores[labels == 1]
        for real in scores[labels == 0]
    ]
    return sum(wins) / len(wins)


@pytest.mark.parametrize("levels", [3, 10, 10_000])
def test_area_under_the_curve_is_the_share_of_won_pairs(levels):
    random = np.random.default_rng(levels)
    labels = random.integers(2, size=60)
    scores = np.round((random.normal(size=60) + labels) * levels / 6) / levels
    assert len(np.unique(scores)) < 60 or levels > 10  # with ties
    found = detection_scores(scores, labels)
    assert found["auc"] == pytest.approx(pair_count(scores, labels), abs=1e-12)
    flipped = detection_scores(-scores, labels)
    assert flipped["auc"] == pytest.approx(1 - found["auc"], abs=1e-12)


def test_equal_error_rate_is_read_where_the_rates_meet():
    real, fake = [0.1, 0.2, 0.3, 0.7], [0.4, 0.6, 0.8, 0.9]
    scores, labels = np.array(real + fake), np.array([0] * 4 + [1] * 4)
    # Between 0.6 and 0.4 as thresholds one of four real is above, and one and none of the fakes
    # below: a vertical piece of the curve, on which misses are 1 of 4 as well.
    assert equal_error_rate(scores, labels) == pytest.approx(0.25)
    # Misses fall from 1/2 to 0 while false alarms rise from 0 to 1/2 along one slanted piece.
    tied, told = np.array([0.1, 0.5, 0.5, 0.9]), np.array([0, 0, 1, 1])
    assert equal_error_rate(tied, told) == pytest.approx(0.25)
    # From (0, 1) to (1/3, 1/3) by a tie of one real and two fakes: they meet at 1/3.
    three, truth = np.array([0.9, 0.1, 0.1, 0.9, 0.9, 0.1]), np.array([0, 0, 0, 1, 1, 1])
    assert equal_error_rate(three, truth) == pytest.approx(1 / 3)


def test_equal_error_rate_at_the_ends_and_of_a_guess():
    labels = np.array([0, 0, 1, 1])
    assert equal_error_rate(np.array([0.1, 0.2, 0.8, 0.9]), labels) == 0
    assert equal_error_rate(np.array([0.9, 0.8, 0.2, 0.1]), labels) == 1
    assert equal_error_rate(np.full(4, 0.5), labels) == pytest.approx(0.5)


def test_accuracy_takes_what_is_above_one_half_for_fake():
    found = detection_scores(np.array([0.5, 0.51, 0.9, 0.2]), np.array([0, 0, 1, 1]))
    assert found["accuracy"] == 0.5


@pytest.mark.parametrize(
    "scores, labels, message",
    [
        ([0.1, np.nan], [0, 1], "not finite"),
        ([0.1, 0.2], [1, 1], "of 2 images 0 are real .* and 2 fake"),
        ([0.1, 0.2, 0.3], [0, 1, 2], "of 3 images 1 are real .* and 1 fake"),
    ],
)
def test_scores_that_tell_nothing_are_errors(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        detection_scores(np.array(scores), np.array(labels))


def test_means_over_domains_come_first():
    scores = with_means({"a": {"auc": 1.0, "eer": 0.0}, "b": {"auc": 0.5, "eer": 0.5}})
    assert scores == {
        "auc": 0.75,
        "eer": 0.25,
        "auc/a": 1.0,
        "auc/b": 0.5,
        "eer/a": 0.0,
        "eer/b": 0.5,
    }


def test_domains_of_the_training_are_known_by_name_and_others_are_unseen():
    names = ("folder:/c", "folder:/a", "folder:/new")
    training = "mix:1*folder:/a|train[:90%] + 2*folder:/c"
    assert domain_numbers(names, training) == [1, 0, -1]
    assert domain_numbers(("folder:/a", "folder:/b"), "folder:/a") == [0, -1]


@dataclasses.dataclass(frozen=True)
class Teller(Toy):
    """Takes the brightness of an image for its score, and notes domains."""

    size: int = 32

    seen: ClassVar[list[np.ndarray]] = []

    @property
    def inputs(self):
        return {"image": Input((32, 32, 3)), "domain": Input((), "int")}

    def scores(self, variables, batch):
        def note(domains):
            Teller.seen.append(domains)
            return np.zeros(len(domains), np.float32)

        shape = jax.ShapeDtypeStruct(batch["domain"].shape, jnp.float32)
        noted = jax.pure_callback(note, shape, batch["domain"])
        return jax.nn.sigmoid(batch["image"].mean(axis=(1, 2, 3))) + noted


def config_of(**changes):
    fields = {
        "data.source": TRAINED,
        "data.image_size": (32, 32),
        "data.channels": 3,
        "data.mean": (0.5,) * 3,
        "data.std": (0.25,) * 3,
        "evaluate.crop_ratio": 1.0,
        "evaluate.batch_size": 300,  # two domains in a batch, and rows to fill in the last one
    }
    return configs.load("mae:tiny", {**fields, **changes})


def detect(**changes) -> dict[str, float]:
    Teller.seen.clear()
    return evaluate(Teller(), {}, config_of(**changes), ["detection"])


def test_every_domain_is_scored_under_its_name_and_by_its_number_in_the_training():
    found = detect()
    scores = ("auc", "eer", "accuracy")
    wanted = [f"detection/{score}" for score in scores] + [
        f"detection/{score}/{COLLECTIONS[number]}" for score in scores for number in (2, 0)
    ]
    assert list(found) == wanted
    for score in scores:
        values = [found[f"detection/{score}/{COLLECTIONS[number]}"] for number in (2, 0)]
        assert found[f"detection/{score}"] == pytest.approx(np.mean(values))
    seen = np.concatenate(Teller.seen)
    assert (np.bincount(seen[:1000]) == [500, 500]).all()  # every test image once


def test_a_collection_left_out_is_unseen():
    of_three = detect(**{"evaluate.source": "mix:" + " + ".join(f"1*{x}" for x in COLLECTIONS)})
    seen = np.concatenate(Teller.seen)[:1500]
    assert seen.tolist() == [1] * 500 + [-1] * 500 + [0] * 500
    alone = detect(**{"evaluate.source": COLLECTIONS[1]})
    assert set(np.concatenate(Teller.seen)[:500]) == {-1}
    name = f"detection/auc/{COLLECTIONS[1]}"
    assert alone["detection/auc"] == alone[name] == of_three[name]


def test_a_domain_of_one_class_is_named(tmp_path):
    for kind in ("real", "fake"):
        (tmp_path / "test" / kind).mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "test" / "real" / "0.png")
    with pytest.raises(ValueError, match=f"{tmp_path}.* has 1 real and 0 fake examples"):
        detect(**{"evaluate.source": f"folder:{tmp_path}"})


def test_a_method_that_tells_no_forgeries_is_refused():
    with pytest.raises(ValueError, match="'detection' needs a method that tells forged images"):
        check_protocols(["detection"], Toy())
    assert isinstance(check_detector(Teller()), Teller)
