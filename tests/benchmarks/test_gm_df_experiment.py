import functools
import json

import numpy as np
import pytest

from benchmarks.experiments import gm_df
from mim_jax.data.sources import ArraySource, open_source
from mim_jax.data.synthetic.collections import CLASS_NAMES
from mim_jax.training.tree import flatten

SMALL = {
    "model.clip.width": 16,
    "model.clip.depth": 1,
    "model.clip.heads": 2,
    "model.clip.outputs": 8,
    "model.text.width": 8,
    "model.text.depth": 1,
    "model.expert_hidden": 8,
    "model.second_order_layers": (0,),
}


@functools.cache
def few_images(number: int, split: str) -> ArraySource:
    source = open_source(f"synthetic:collections:{number}", split)
    rows = [source[i] for i in range(24)]
    labels = np.array([row["label"] for row in rows], np.int32)
    return ArraySource(str(number), np.stack([row["image"] for row in rows]), labels, CLASS_NAMES)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(gm_df, "SIZES", {**gm_df.SIZES, **SMALL})
    monkeypatch.setattr(gm_df, "BATCH", 8)
    monkeypatch.setattr(gm_df, "images", few_images)


class Told:
    """In place of an arm: says areas that tell what was trained on what."""

    def __init__(self, variant, domains, steps):
        self.variant, self.domains = variant, domains

    def train(self, numbers, seed):
        assert len(numbers) == self.domains and seed % 4 not in numbers
        return None

    def areas(self, variables, numbers):
        level = {"clip_joint": 0.6, "experts": 0.7, "full": 0.8}[self.variant]
        if self.domains == 1:
            return {n: 0.9 if n in numbers else 0.5 + 0.01 * numbers[0] for n in range(4)}
        return {n: level + (0.1 if n in numbers else 0.0) for n in range(4)}


def test_every_seed_leaves_a_collection_out_and_every_row_is_scored_on_it(monkeypatch, tmp_path):
    monkeypatch.setattr(gm_df, "Arm", Told)
    monkeypatch.setattr(gm_df, "images", few_images)
    path = tmp_path / "result.json"
    gm_df.main(["--seeds", "0", "3", "--output", str(path)])
    result = json.loads(path.read_text())
    assert result["left out"] == [0, 3]
    unseen = {row: columns["unseen"]["values"] for row, columns in result["scores"].items()}
    assert unseen == {
        "single": [0.53, 0.52],  # the best of 1, 2, 3 and of 0, 1, 2
        "naive joint": [0.6, 0.6],
        "joint, experts and norms": [0.7, 0.7],
        "full": [0.8, 0.8],
    }
    single = result["scores"]["single"]
    np.testing.assert_allclose(single["unseen, mean of three"]["values"], [0.52, 0.51])
    np.testing.assert_allclose(single["seen"]["values"], 0.9)
    np.testing.assert_allclose(result["scores"]["naive joint"]["seen"]["mean"], 0.7)
    above = result["seeds where the first is above"]
    assert above["unseen: full, naive joint"] == above["seen: single, naive joint"] == 2
    assert path.with_suffix(".png").is_file()


def test_an_arm_trains_on_its_collections_and_is_scored_on_all(small):
    arm = gm_df.Arm("experts", 2, steps=20)
    arm.steps = 2
    before, after = flatten(arm.initial(0).params), flatten(arm.train([3, 1], 0)["params"])
    moved = {path for path in before if np.any(np.asarray(before[path]) != after[path])}
    assert any("/experts/" in path for path in moved)
    assert not any(path.startswith("text/") for path in moved)
    table = {"params": {**arm.train([3, 1], 0)["params"]}}
    # A domain of its own for each of both, in the order of training; the others are unseen.
    embedding = np.zeros_like(table["params"]["domain_embedding"])
    table["params"]["domain_embedding"] = embedding
    alike = arm.areas(table, [3, 1])
    embedding = embedding.copy()
    embedding[0] = 50.0
    table["params"]["domain_embedding"] = embedding
    other = arm.areas(table, [3, 1])
    assert set(other) == {0, 1, 2, 3} and all(0 <= area <= 1 for area in other.values())
    assert other[1] == alike[1] and other != alike


def test_the_rows_of_the_ladder_are_those_of_the_config():
    changes = {row: gm_df.rung(variant) for row, variant in gm_df.LADDER.items()}
    assert changes["full"] == {}
    joint, experts = (changes[row] for row in list(changes)[:2])
    assert joint["model.experts"] == 0 and "model.experts" not in experts
    for row in (joint, experts):
        assert row["model.meta"] == "none" and row["model.alignment_weight"] == 0
