import pathlib

import numpy as np
import pytest
from PIL import Image

from mim_jax import cli
from mim_jax.data import open_source
from tests.data.images import write_images


def run(*arguments: str) -> int:
    return cli.main(list(arguments))


@pytest.fixture
def pictures(tmp_path: pathlib.Path) -> pathlib.Path:
    for name in ("ant", "bee"):
        write_images(tmp_path / "pictures" / name, 4)
    return tmp_path / "pictures"


@pytest.fixture
def error_of(capsys):
    """Runs `mim-jax data` with arguments that must fail, and returns the one message."""

    def call(*arguments: str) -> str:
        assert run("data", *arguments) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and "Traceback" not in err
        return err.removeprefix("error: ").strip()

    return call


def test_inspect_prints_the_facts_and_draws_a_sheet(pictures, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert run("data", "inspect", "--source", str(pictures), f"--output={sheet}") == 0
    out = capsys.readouterr().out
    for part in (f"folder:{pictures}", "examples", "8, all", "3 (files: 8 with 3)", "ant", "bee"):
        assert part in out
    assert f"picture: {sheet}" in out
    assert np.asarray(Image.open(sheet)).shape[2] == 3


def test_inspect_takes_a_split_a_sample_and_channels(pictures, capsys):
    flags = ("--split=train[:50%]", "--sample=3", "--channels=1")
    assert run("data", "inspect", f"--source=folder:{pictures}", *flags) == 0
    out = capsys.readouterr().out
    assert "folder:" in out and "train[:50%]" in out
    assert "1 (files: 3 with 3)" in out
    assert run("data", "inspect", f"--source=folder:{pictures}", "--sample=3", "--all") == 0
    assert "8, all" in capsys.readouterr().out


def test_convert_writes_shards_that_are_a_source(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--source", f"folder:{pictures}", f"--output={out}", "--shards=2", "--short-side=17"]
    assert run("data", "convert", *flags, "--threads=2") == 0
    assert f"8 images in 2 shards: --data {out}" in capsys.readouterr().out
    source = open_source(str(out))
    assert len(source) == 8 and source.class_names == ("ant", "bee")
    assert {min(source[i]["image"].shape[:2]) for i in range(8)} == {16, 17}
    assert run("data", "convert", *flags, "--output-split=val") == 0
    assert len(open_source(str(out), "val")) == 8


def test_convert_names_what_it_left_out(pictures, tmp_path, capsys):
    (pictures / "ant" / "[bold].png").write_bytes(b"no image")
    assert run("data", "convert", f"--source={pictures}", f"--output={tmp_path / 'out'}") == 0
    out = capsys.readouterr().out
    assert "1 unreadable images left out, the first:" in out
    assert "ant/[bold].png: not an image" in out


def test_a_missing_or_unknown_verb_lists_the_known(error_of):
    assert error_of() == (
        "data needs one of inspect, convert, such as 'mim-jax data inspect --source X'."
    )
    assert error_of("inspct") == "data needs one of inspect, convert, not 'inspct'."


def test_help_lists_the_flags_of_both(capsys):
    assert run("data", "--help") == 0
    out = capsys.readouterr().out
    for part in ("mim-jax data inspect", "--sample: ", "mim-jax data convert", "--short_side: "):
        assert part in out
    assert run("data", "convert", "--help") == 0
    assert "--sample" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect"], "data inspect needs --source."),
        (["convert", "--source=embedded"], "data convert needs --output."),
        (["inspect", "--source=embeded"], "unknown data source 'embeded'"),
        (["inspect", "--source=embedded", "more"], "unexpected argument 'more'"),
        (["inspect", "--source=embedded", "--sample=0"], "sample must be at least 1"),
        (["convert", "--source=embedded", "--output=x", "--shards=0"], "shards must be between"),
        (["convert", "--source=embedded", "--output=x", "--shards=many"], "--shards"),
    ],
)
def test_bad_arguments_are_one_message(error_of, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(*arguments)
    assert not (tmp_path / "x").exists()
