"""Runs in object stores."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from mim_jax import object_store
from mim_jax.cli import main
from mim_jax.conversion.initial import read_donor
from mim_jax.evaluation.run import evaluate_run
from mim_jax.training.checkpoints import checkpoint_steps, local_run
from mim_jax.training.replay import replay
from mim_jax.training.run_folder import RunFolder
from mim_jax.training.tree import flatten
from tests import object_stores
from tests.training.runs import TINY, run

SCHEMES = ("gs", "s3")

OFTEN = {
    "checkpoint.every_steps": 2,
    "log.tensorboard": True,
}


@pytest.fixture(scope="module")
def gs():
    with object_stores.gcs() as bucket:
        yield bucket


@pytest.fixture(scope="module")
def s3():
    with object_stores.s3() as bucket:
        yield bucket


@pytest.fixture(params=SCHEMES)
def bucket(request):
    return request.getfixturevalue(request.param)


class Stop(Exception):
    pass


def stop_after_4(step):
    if step == 4:
        raise Stop


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    result, _ = run(folder)
    return result, folder


def losses_at(url):
    lines = object_store.read(f"{url}/metrics.jsonl").decode().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


def test_a_run_in_a_bucket_that_is_cut_off_ends_as_a_local_one(bucket, local, monkeypatch):
    monkeypatch.setattr("mim_jax.training.run_folder.SECONDS_BETWEEN_UPLOADS", 0.05)
    url = f"{bucket}/runs/whole"
    with pytest.raises(Stop):
        run(url, on_step=stop_after_4, **OFTEN)
    assert checkpoint_steps(url) == [2]
    assert min(losses_at(url)) == 1

    result, output = run(url, **OFTEN)
    assert "resumed from step 2" in output
    assert result.folder == url
    assert checkpoint_steps(url) == [4, 6]
    names = object_store.files(url)
    assert not any(name.startswith(("checkpoints/2/", "damaged")) for name in names)
    assert not any(name.endswith(".tmp") for name in names)
    assert sum(name.startswith("tensorboard/") for name in names) == 2

    expected, folder = local
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert losses_at(url) == {(line := json.loads(text))["step"]: line["loss"] for text in lines}
    donor = read_donor(url, None)
    for path, value in flatten(expected.state.variables).items():
        np.testing.assert_array_equal(donor.variables[path], np.asarray(value), path)
    with local_run(url, lambda steps: steps[:1]) as copy:
        assert checkpoint_steps(copy) == [4]
        assert (copy / "metrics.jsonl").is_file()


@pytest.mark.skipif(
    os.environ.get("MIM_JAX_LONG_TESTS") != "1",
    reason="compiles many programs: set MIM_JAX_LONG_TESTS=1",
)
def test_commands_read_a_run_in_a_bucket_and_write_one(bucket, tmp_path):
    url = f"{bucket}/runs/commands"
    result, _ = run(url, **OFTEN, **{"log.pictures_every_steps": 6})
    assert object_store.read(str(result.picture)).startswith(b"\x89PNG")
    report = replay(url, 6, output=tmp_path / "batch.png")
    assert (report.start, report.first_difference) == (4, None)
    rows = evaluate_run(url, protocols=["knn"], baselines=False)
    assert 0 < rows["trained"]["knn"] <= 1
    assert main(["visualize", f"--run={url}", f"--output={tmp_path}", "--rows=2"]) == 0
    assert main(["convert", f"--run={url}", f"--output={tmp_path / 'a.safetensors'}"]) == 0
    into = f"{bucket}/runs/imported"
    command = ["convert", f"--input={tmp_path / 'a.safetensors'}", f"--output={into}"]
    fields = {k: v for k, v in TINY.items() if k.startswith("model.")}
    config = [f"--config.{field}={value}" for field, value in fields.items()]
    assert main([*command, "--config=mae:tiny", *config]) == 0
    assert checkpoint_steps(into) == [0]
    assert main([*command, "--config=mae:tiny", *config]) == 1  # it is there already


def test_replay_wants_to_know_where_its_picture_goes(s3):
    with pytest.raises(ValueError, match="name the --output"):
        replay(f"{s3}/runs/whole", 6)


def test_what_was_cut_off_is_not_a_checkpoint(s3):
    url = f"{s3}/runs/cut_off"
    object_store.write(f"{url}/config.json", b"{}")
    object_store.write(f"{url}/checkpoints/7/variables/d/1", b"half")
    assert checkpoint_steps(url) == []
    with RunFolder(url) as place:
        assert (place.local / "config.json").read_text() == "{}"
        (place.local / "metrics.jsonl").write_text("line")
    assert not place.local.exists()
    assert object_store.files(url) == {"config.json": 2, "metrics.jsonl": 4}


def test_checkpoints_that_vanish_here_stay_in_the_bucket(s3):
    url = f"{s3}/runs/vanish"
    with RunFolder(url) as place:
        for step in (1, 2, 3):
            (place.local / "checkpoints" / str(step)).mkdir(parents=True)
            (place.local / "checkpoints" / str(step) / "part").write_text("x")
    steps = [1, 2, 3]
    assert checkpoint_steps(url) == steps
    with RunFolder(url) as place:
        place.follow(lambda: steps)
        shutil.rmtree(place.local / "checkpoints" / "1")
        steps.remove(2)
    assert checkpoint_steps(url) == [1, 3]
    assert not any(name.startswith("checkpoints/2/") for name in object_store.files(url))


def test_a_store_that_fails_warns_meanwhile_and_keeps_the_files_at_the_end(
    s3, caplog, tmp_path, monkeypatch
):
    def failing(url, data):
        raise OSError("the network is down")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    place = RunFolder(f"{s3}/runs/failing")
    with pytest.raises(OSError, match="the network is down") as raised, place:
        (place.local / "metrics.jsonl").write_text("line")
        monkeypatch.setattr(object_store, "write", failing)
        place.keep()
        assert "the network is down; it is tried again" in caplog.text
        with pytest.raises(OSError, match="the network is down"):
            place.keep(strict=True)
    assert (place.local / "metrics.jsonl").read_text() == "line"
    assert str(place.local) in str(raised.value)


def test_a_missing_bucket_is_named(bucket):
    scheme = bucket.partition("://")[0]
    with pytest.raises(FileNotFoundError, match=f"no bucket {scheme}://nowhere"):
        run(f"{scheme}://nowhere/run")


def test_missing_credentials_are_named(s3, monkeypatch):
    store = object_store.file_system(s3)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    fresh = type(store)(use_listings_cache=False, skip_instance_cache=True)
    monkeypatch.setattr(object_store, "file_system", lambda url: fresh)
    with pytest.raises(PermissionError, match=r"no valid credentials for s3.*AWS_PROFILE"):
        object_store.files(f"{s3}/run")


def test_a_missing_library_is_named(monkeypatch):
    for scheme, (library, extra) in object_store.LIBRARIES.items():
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(ModuleNotFoundError, match=rf"mim-jax\[{extra}\]"):
            checkpoint_steps(f"{scheme}://bucket/run")


def test_several_processes_are_told_that_s3_has_no_sharded_checkpoints(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(ValueError, match="Orbax has no support for s3"):
        RunFolder("s3://bucket/run")


def test_urls_pass_through_pathlib():
    assert object_store.object_url(Path("gs://bucket/run") / "a") == "gs://bucket/run/a"
    assert object_store.object_url("s3://bucket/run/") == "s3://bucket/run"
    assert object_store.object_url("runs/gs/x") is None
    assert object_store.object_url(Path("/s3/x")) is None
