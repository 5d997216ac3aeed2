"""`mim-jax replay` and `mim-jax verify`, from the command line."""

import pytest

from mim_jax import cli
from tests.training.runs import TINY, losses_of, run

SMALL = {"model.depth": 1}


@pytest.fixture(autouse=True)
def away_from_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MIM_JAX_TRACEBACK", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(folder, steps=3, **SMALL)
    return folder


def test_replay_prints_both_losses_and_draws_the_batch(folder, capsys, tmp_path):
    code = cli.main(["replay", f"--run={folder}", "--step=2", "--output=batch.png", "--modules"])
    out = capsys.readouterr().out
    assert code == 0
    assert "the loss is that of the run" in out and "loss and gradients are finite" in out
    assert "encoder/patch_embed" in out
    assert (tmp_path / "batch.png").is_file()


def test_replay_says_what_it_needs(folder, capsys):
    assert cli.main(["replay", f"--run={folder}"]) == 1
    assert "replay needs --step" in capsys.readouterr().err
    assert cli.main(["replay", f"--run={folder}", "--step=9"]) == 1
    assert "has no step 9; it has steps 1 to 3" in capsys.readouterr().err


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.1, 1)])
def test_exit_code_tells_whether_losses_agree(folder, capsys, monkeypatch, factor, code):
    loss = losses_of(folder)[2] * factor
    changes = {**TINY, **SMALL, "steps": 3, "reference.steps": (2,), "reference.loss": (loss,)}
    changes["reference.band"] = (1e-4,)
    arguments = [f"--config.{field}={value}" for field, value in changes.items()]
    arguments = [a for a in arguments if not a.endswith("=()")]
    assert cli.main(["verify", "--config=mae:tiny", *arguments]) == code
    out = capsys.readouterr().out
    assert ("agrees" in out, "differs" in out) == (code == 0, code == 1)
    assert ("data.split" in out) == (code == 1), "changed fields are named"
