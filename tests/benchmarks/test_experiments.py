import json

import jax
import numpy as np
import pytest

from benchmarks.experiments import (
    cae,
    dmjd,
    hi_end_mae,
    locality_alignment,
    maskalign,
    mr_mae,
    toy_images,
    toy_task,
)
from mim_jax.training import tree

SIZES = {"WIDTH": 16, "DEPTH": 2, "HEADS": 2}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in SIZES.items():
        monkeypatch.setattr(toy_task, name, value)
    monkeypatch.setattr(
        toy_task,
        "SIZES",
        {
            **toy_task.SIZES,
            "model.width": SIZES["WIDTH"],
            "model.depth": SIZES["DEPTH"],
            "model.heads": SIZES["HEADS"],
        },
    )


def arms_of(experiment, monkeypatch, tmp_path):
    """The arms of an experiment by row, and its task; nothing is trained."""
    found = {}

    def keep(bench, row, arm, score, tag):
        found[row] = (bench.task, arm)

    monkeypatch.setattr(toy_task.Workbench, "add_arm", keep)
    monkeypatch.setattr(toy_task.Workbench, "add", lambda *_, **__: None)
    monkeypatch.setattr(toy_task.Workbench, "teacher", lambda *_: ("a file", None, None))
    monkeypatch.setattr(toy_task, "step_times", lambda *_: {})
    monkeypatch.setattr(mr_mae, "parameters", lambda *_: 0)
    for module in (maskalign, mr_mae):
        monkeypatch.setattr(module, "add_teacher", lambda *_: ("a file", {}))
    monkeypatch.setattr(toy_task, "encoder_of", lambda _: None)
    monkeypatch.setattr(toy_task, "predictions", lambda method, variables, x: x.labels - 0.5)
    path = tmp_path / "result.json"
    experiment.main(["--no-full", "--workdir", str(tmp_path), "--output", str(path)])
    assert json.loads(path.read_text())["claim"]
    return found


ROWS = {cae: 5, dmjd: 6, locality_alignment: 6, maskalign: 8, mr_mae: 7}


@pytest.mark.parametrize("experiment", ROWS, ids=lambda module: module.__name__.split(".")[-1])
def test_every_arm_has_a_step_of_its_own_that_trains_its_encoder(experiment, monkeypatch, tmp_path):
    arms = arms_of(experiment, monkeypatch, tmp_path)
    assert len(arms) == ROWS[experiment]
    programs = set()
    for row, (task, arm) in arms.items():
        trainer = toy_task.Trainer(task, arm)
        state = jax.eval_shape(trainer.initial, 0)
        batch = next(trainer.batches(0))
        program = jax.make_jaxpr(trainer._step)(state, batch, 0)
        new, metrics = program.out_avals[: len(jax.tree.leaves(state))], program.out_avals
        assert [x.shape for x in new] == [x.shape for x in jax.tree.leaves(state)], row
        assert len(metrics) > len(new), row
        programs.add(str(program) + str(arm.changes) + str(arm.steps))
    assert len(programs) == len(arms)


def workbench(tmp_path):
    arguments = ["--no-full", "--workdir", str(tmp_path), "--output", str(tmp_path / "x.json")]
    options = toy_task.arguments("maskalign", "A test.", 3, arguments)
    return toy_task.Workbench("maskalign", toy_images.fashion(full=False), options)


def test_an_arm_trains_its_student_and_leaves_the_teacher_of_the_file_alone(tmp_path):
    bench = workbench(tmp_path)
    path, _, variables = bench.teacher(2)
    arm = toy_task.Arm("maskalign:tiny", {**bench.tower(path), "model.loss_weights": "top1"}, 3)
    trainer = toy_task.Trainer(bench.task, arm)
    before, after = tree.flatten(trainer.start(5).params), trainer.train(5)
    params = tree.flatten(after.variables["params"])
    for name, value in tree.flatten(variables["params"]).items():
        if name.startswith("encoder/"):
            np.testing.assert_allclose(params[f"teacher/{name}"], value, atol=1e-6)
    moved = {name for name in params if np.any(np.asarray(params[name]) != before[name])}
    assert any(name.startswith("encoder/transformer/blocks_0/") for name in moved)
    assert not any(name.startswith("teacher/") for name in moved)
    assert np.isfinite(after.metrics["loss"])
    scores = toy_task.encoder_scores(after)
    assert len(scores) == 3
    assert all(0.1 < score < 1 for score in scores.values()), scores


def test_scores_are_made_once_and_kept(tmp_path):
    calls = []

    def make(seed):
        calls.append(seed)
        return {"score": seed / 10}

    for _ in range(2):
        bench = workbench(tmp_path)
        bench.add("row", ["key"], make)
    assert calls == [0, 1, 2]
    assert bench.rows == {"row": {"score": [0.0, 0.1, 0.2]}}


def test_patches_of_a_scene_have_the_classes_of_the_image():
    task = toy_images.scenes(full=False)
    classes = len(toy_images.SCENE_CLASSES)
    for labels, patches in zip(task.test.labels, task.test.patches):
        seen = set(patches.tolist()) - {-1, classes}
        assert seen <= set(np.flatnonzero(labels))
        assert 1 <= labels.sum() <= 4
    ground = task.test.patches == classes
    assert 0.5 < ground.mean() < 0.8


def test_objects_brighten_the_patches_that_have_their_class():
    task = toy_images.scenes(full=False)
    side = task.side // task.patch
    cut = task.test.images.reshape(-1, side, task.patch, side, task.patch).mean(axis=(2, 4))
    brightness, patches = cut.reshape(len(cut), -1), task.test.patches
    classes = len(toy_images.SCENE_CLASSES)
    objects = brightness[(patches >= 0) & (patches < classes)]
    assert objects.mean() > 2 * brightness[patches == classes].mean()


@pytest.mark.parametrize("row, share", [("one view", 10 / 16), ("DM", 1.0)])
def test_disjoint_views_predict_every_token_and_one_view_its_share(
    row, share, monkeypatch, tmp_path
):
    task, arm = arms_of(dmjd, monkeypatch, tmp_path)[row]
    assert dmjd.predicted_share(toy_task.experiment_of(task, arm).method, 8) == share


def test_hierarchical_decoding_is_compared_on_every_level(monkeypatch, tmp_path):
    small = {"model.width": 12, "model.heads": 2, "model.decoder_width": 12}
    monkeypatch.setattr(hi_end_mae, "SIZES", {**hi_end_mae.SIZES, **small})
    path = tmp_path / "result.json"
    hi_end_mae.main(["--seeds", "1", "--steps", "2", "--output", str(path)])
    scores = json.loads(path.read_text())["scores"]
    assert set(scores) == {"untrained", "plain MAE", "Hi-End-MAE"}
    for row in scores.values():
        assert set(row) >= {"h3", "h6", "h9", "final"}
        assert all(np.isfinite(column["mean"]) for column in row.values())
    assert path.with_suffix(".png").is_file()


def test_shares_of_organs_are_those_of_the_voxels_of_a_patch():
    classes = np.zeros((1, 24, 24, 24), np.uint8)
    classes[0, :6, :6, 6:9] = 2  # half of the second patch
    shares = hi_end_mae.shares(classes)
    assert shares.shape == (1, 64, 4)
    assert shares[0, 1].tolist() == [0, 0.5, 0, 0]
    assert shares.sum() == 0.5


def test_probe_finds_what_is_a_linear_function_of_the_tokens():
    random = np.random.default_rng(0)
    tokens = random.normal(size=(72, 64, 8)).astype(np.float32)
    wanted = tokens @ random.normal(size=(8, 4)).astype(np.float32)
    score, guess = hi_end_mae.probe(tokens, wanted)
    assert score > 0.99
    assert guess.shape == (48, 64, 4)
    assert hi_end_mae.probe(random.normal(size=tokens.shape), wanted)[0] < 0.05
