import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.experiments import cae, dmjd, locality_alignment, maskalign, mr_mae, toy_task
from mim_jax.models.tower import TOWERS

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
    monkeypatch.setattr(toy_task.Workbench, "add", lambda *_: None)
    monkeypatch.setattr(toy_task.Workbench, "teacher", lambda *_: ("a file", None, None))
    monkeypatch.setattr(toy_task, "step_times", lambda *_: {})
    monkeypatch.setattr(mr_mae, "parameters", lambda *_: 0)
    for module in (maskalign, mr_mae):
        monkeypatch.setattr(module, "teacher_scores", lambda *_: {})
    if experiment is locality_alignment:
        monkeypatch.setattr(toy_task, "predictions", lambda m, v, x: x.labels - 0.5)
    path = tmp_path / "result.json"
    experiment.main(["--no-full", "--workdir", str(tmp_path), "--output", str(path)])
    assert json.loads(path.read_text())["claim"]
    return found


ROWS = {cae: 3, dmjd: 5, locality_alignment: 6, maskalign: 7, mr_mae: 6}


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
        programs.add(str(program) + str(arm.changes))
    assert len(programs) == len(arms)
