import json

import numpy as np
import pytest

from benchmarks.experiments import tip
from mim_jax.data.table_missing import with_missing
from mim_jax.methods.parts.table_image import PARTS
from mim_jax.training.tree import flatten

SMALL = {
    "model.base": 2,
    "model.depths": (1,),
    "model.table_width": 8,
    "model.table_depth": 1,
    "model.table_heads": 2,
    "model.fusion_depth": 1,
    "data.image_size": (16, 16),
}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(tip, "SIZES", {**tip.SIZES, **SMALL})


def test_a_seed_deals_all_rows_and_another_seed_deals_others():
    unlabelled, labelled = tip.dealt(0)
    assert (len(unlabelled), len(labelled)) == (1500, 120)
    rows = np.concatenate([unlabelled.table, labelled.table])
    assert len(np.unique(rows, axis=0)) == len(np.unique(tip.pairs("train").table, axis=0))
    other = tip.dealt(1)[1]
    assert not np.array_equal(other.table, labelled.table)
    index = int(np.flatnonzero((tip.pairs("train").table == labelled.table[0]).all(axis=1))[0])
    np.testing.assert_array_equal(labelled[0]["image"], tip.pairs("train")[index]["image"])
    assert labelled[0]["label"] == tip.pairs("train")[index]["label"]


def test_imputation_fills_with_the_mean_of_training_rows_and_sees_no_missing_value():
    whole = tip.dealt(0)[1]
    train = with_missing(whole, "random_values", 0.4)
    features = tip.imputed(train, train, False)
    hue, present = whole.table[:, 0], ~train.missing[:, 0]
    shares = np.bincount(hue[present].astype(int), minlength=4) / present.sum()
    np.testing.assert_allclose(features[present, :4], np.eye(4)[hue[present].astype(int)])
    np.testing.assert_allclose(features[~present, :4], np.tile(shares, (sum(~present), 1)), 1e-5)
    np.testing.assert_allclose(
        features.mean(axis=0)[-1], whole.table[~train.missing[:, 7], 7].mean(), rtol=1e-4
    )
    assert tip.imputed(train, train, True).shape == (120, 14 + 4 + 8 * 8 * 3)
    # Rows of another source are filled by the same means.
    nothing = whole.without(np.ones(whole.table.shape, bool), "nothing")
    np.testing.assert_allclose(tip.imputed(nothing, train, False)[0, :4], shares, rtol=1e-5)


def test_fine_tuning_starts_from_the_encoders_of_pretraining_and_leaves_them_whole(small):
    unlabelled, labelled = tip.dealt(0)
    labelled = with_missing(labelled, "random_values", 0.4)
    pretraining = tip.Pretraining(("itc", "itm", "mtr"), 20, len(unlabelled))
    variables = pretraining.initial(1).variables
    classifier = tip.FineTuning()
    state = classifier.start(variables, 0)
    taken, given = flatten(state.variables), flatten(variables)
    for path, value in taken.items():
        if path.split("/")[1] in PARTS or path.startswith("batch_stats/"):
            np.testing.assert_array_equal(value, given[path], err_msg=path)
    fresh = flatten(classifier.start(None, 0).variables)
    assert not np.array_equal(
        fresh["params/table_encoder/cls_token"], taken["params/table_encoder/cls_token"]
    )
    np.testing.assert_array_equal(fresh["params/head/kernel"], taken["params/head/kernel"])
    tuned = classifier.train(state, classifier.batches(labelled, 0)[:1], 0)
    # What was given can start another one.
    assert 0 <= classifier.accuracy(classifier.start(variables, 0).variables, labelled) <= 1
    assert not np.array_equal(flatten(tuned)["params/head/kernel"], fresh["params/head/kernel"])
    scores = pretraining.scores(variables, 0)
    assert set(scores) == {tip.HUE, tip.HUE_BY_ANOTHER, tip.MATCHING}
    assert all(0 <= score <= 1 for score in scores.values())


class Told:
    """In place of both trainers: says what tells which arm it is."""

    initial = staticmethod(lambda seed: None)

    def __init__(self, objectives=(), steps=0, examples=0):
        self.level = {3: 0.9, 2: 0.8, 1: 0.7}.get(len(objectives))
        self.config = tip.configs.load("tip_classifier:tiny")

    def batches(self, source, seed):
        return [source]

    def train(self, state, batches, seed):
        return state if self.level is None else self.level

    def scores(self, variables, seed):
        return {tip.MATCHING: variables}

    def start(self, given, seed):
        return 0.5 if given is None else given

    def accuracy(self, variables, source):
        assert len(source) == 400
        return variables - 0.1 * float(source.missing.mean())


def test_every_arm_is_scored_at_every_rate(monkeypatch, tmp_path):
    monkeypatch.setattr(tip, "Pretraining", Told)
    monkeypatch.setattr(tip, "FineTuning", Told)
    monkeypatch.setattr(tip, "BASELINES", dict.fromkeys(tip.BASELINES, False))
    path = tmp_path / "result.json"
    tip.main(["--seeds", "2", "--output", str(path)])
    result = json.loads(path.read_text())
    accuracy = result["accuracy by rate"]
    for arm, level in (("TIP", 0.9), ("contrast alone", 0.7), ("no pre-training", 0.5)):
        means = [accuracy[arm][rate]["mean"] for rate in ("0", "0.4", "0.7")]
        np.testing.assert_allclose(means, [level, level - 0.04, level - 0.07], atol=1e-6)
    assert result["seeds where TIP is above, by rate"]["no pre-training"] == dict.fromkeys(
        ("0", "0.4", "0.7"), 2
    )
    # Two of ten cells are wrong in hue or shape, so that the table alone tells most classes.
    table = accuracy["table alone"]
    assert 0.5 < table["0"]["mean"] < 0.95 and table["0"]["mean"] > table["0.7"]["mean"] > 1 / 12
    assert result["after pre-training"]["TIP"]["matching"]["values"] == [0.9, 0.9]
    assert path.with_suffix(".png").is_file()
