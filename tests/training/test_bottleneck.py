"""The note that names what limits a run which waits for its data."""

import io
import time

import jax
import numpy as np
import pytest
from rich.console import Console

from mim_jax.data import train_batches
from mim_jax.data.sources import ArraySource
from mim_jax.data.stages import STAGES, stage, start_clock
from mim_jax.training import bottleneck, loop
from mim_jax.training.bottleneck import DataDoctor
from mim_jax.training.feed import DeviceFeed
from tests.training.runs import TINY, metrics_of, tiny

SECONDS = 0.004  # for each slow image: many times what a tiny one takes


class SlowSource(ArraySource):
    """Images in memory that take their time, in a stage or in none."""

    def __init__(self, name=None, wait=time.sleep, seconds=SECONDS):
        super().__init__("slow", np.zeros((64, 28, 28, 1), np.uint8))
        self.stage_name = name
        self.wait = wait
        self.seconds = seconds

    def __getitem__(self, index):
        if self.stage_name is None:
            self.wait(self.seconds)
        else:
            with stage(self.stage_name):
                self.wait(self.seconds)
        return super().__getitem__(index)


def busy(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def unchanged(image, rng):
    return image


def slow_crop(image, rng):
    time.sleep(SECONDS)
    return image


def seconds_by_stage(source, transform=unchanged, workers=0):
    batches = train_batches(
        source, transform, batch_size=8, seed=0, num_steps=4, workers=workers, timed=True
    )
    total = sum(batch["seconds"] for batch in batches)
    return dict(zip(STAGES, total))


@pytest.mark.parametrize(
    ("source", "transform", "limit"),
    [
        (SlowSource("read"), unchanged, "read"),
        (SlowSource("decode", busy), unchanged, "decode"),
        (SlowSource(), unchanged, "load"),
        (ArraySource("fast", np.zeros((64, 28, 28, 1), np.uint8)), slow_crop, "augment"),
    ],
)
def test_batch_tells_in_which_stage_its_time_went(source, transform, limit):
    seconds = seconds_by_stage(source, transform)
    assert seconds[limit] > 32 * SECONDS * 0.9
    assert max(seconds, key=seconds.get) == limit


def test_times_come_from_worker_processes_too():
    seconds = seconds_by_stage(SlowSource("read"), workers=1)
    assert seconds["read"] > 0.8 * sum(seconds.values()) > 32 * SECONDS * 0.8


def test_batches_have_no_times_unless_asked():
    batches = train_batches(SlowSource(), unchanged, batch_size=8, seed=0, num_steps=1)
    assert "seconds" not in next(batches)


def test_time_inside_a_stage_is_not_counted_for_the_stage_around_it():
    clock = start_clock()
    with stage("load"):
        time.sleep(0.02)
        with stage("read"):
            time.sleep(0.04)
    total = dict(zip(STAGES, clock.total()))
    assert 0.02 <= total["load"] < 0.04 <= total["read"] < 0.08
    assert total["decode"] == 0


def test_stage_that_raises_is_closed():
    clock = start_clock()
    with pytest.raises(ValueError), stage("read"):
        raise ValueError
    time.sleep(0.02)
    assert dict(zip(STAGES, clock.total()))["other"] >= 0.02


def doctor(monkeypatch, cores=8, **changes):
    """One that has seen the time in which the queues were filled."""
    monkeypatch.setattr(bottleneck.os, "cpu_count", lambda: cores)
    fresh = DataDoctor(tiny(**{"data.source": "folder:images", **changes}))
    fresh.advice(10.0, 5.0, 0.0)
    return fresh


def made(**seconds):
    return np.array([seconds.get(name, 0.0) for name in STAGES])


def test_note_names_the_slowest_stage_its_share_and_what_helps(monkeypatch):
    sick = doctor(monkeypatch, cores=16)
    sick.made(made(read=10.0, decode=57.0, augment=8.0, other=5.0))
    assert sick.advice(10.0, 3.4, 0.0) == (
        "data wait 34%: decoding limits (71% of the time of 8 threads). Helps: data.workers=16; "
        "smaller files by mim-jax data convert --source=folder:images --output=FOLDER "
        "--short-side=32."
    )


def test_a_gain_that_was_measured_is_told(monkeypatch):
    sick = doctor(monkeypatch, **{"data.image_size": (224, 224)})
    sick.made(made(decode=57.0))
    assert "--short-side=256 (measured: 2.4 times as fast" in sick.advice(10.0, 3.4, 0.0)


@pytest.mark.parametrize(
    ("seconds", "changes", "expected"),
    [
        ({"read": 70}, {}, ["reading files", "data.workers=16", "--short-side=32"]),
        ({"load": 70}, {}, ["reading and decoding", "data.workers=16", "convert"]),
        ({"decode": 70}, {"data.backend": "pillow"}, ["decoding", "data.backend=opencv"]),
        ({"decode": 7}, {"data.workers": 1}, ["1 worker process)", "data.workers=8"]),
        ({"augment": 70}, {"data.augment": "rand-m9"}, ["cropping", "a lighter data.augment"]),
        ({"augment": 70}, {}, ["cropping", "a smaller data.image_size"]),
        ({"read": 4}, {}, ["handing over batches in Python", "data.workers=8"]),
        ({"other": 70}, {}, ["handing over batches in Python", "data.workers=8"]),
    ],
)
def test_each_limit_has_its_own_advice(monkeypatch, seconds, changes, expected):
    sick = doctor(monkeypatch, **changes)
    sick.made(made(**seconds))
    note = sick.advice(10.0, 2.0, 0.0)
    assert all(text in note for text in expected), note


def test_setting_that_is_in_use_already_is_not_advised(monkeypatch):
    sick = doctor(monkeypatch, **{"data.workers": 8, "data.source": "embedded"})
    sick.made(made(decode=70))
    assert sick.advice(10.0, 2.0, 0.0).endswith("Helps: a machine with more CPU cores.")


def test_slow_way_to_the_devices_is_named(monkeypatch):
    sick = doctor(monkeypatch, **{"data.bits": 16})
    sick.made(made(decode=70))
    note = sick.advice(10.0, 1.0, 2.0)
    assert "data wait 30%: the transfer to the devices limits (67% of the wait)" in note
    assert "data.bits=8" in note


def test_note_comes_once_for_each_change_of_verdict(monkeypatch):
    sick = doctor(monkeypatch)
    told = []
    for name in ("decode", "decode", "read", "read", "decode"):
        sick.made(made(**{name: 70}))
        told.append(sick.advice(10.0, 2.0, 0.0))
    assert [note is not None for note in told] == [True, False, True, False, True]


def test_healthy_run_and_first_seconds_get_no_note(monkeypatch):
    well = doctor(monkeypatch)
    well.made(made(decode=10))
    assert well.advice(10.0, 1.0, 0.0) is None
    assert well.advice(0.1, 0.1, 0.0) is None


def run_with(folder, monkeypatch, source, steps=40):
    monkeypatch.setattr(loop, "training_source", lambda config: source)
    output = io.StringIO()
    config = tiny(
        **{
            **TINY,
            "batch_size": 8,
            "steps": steps,
            "log.every_steps": 5,
            "checkpoint.every_steps": 1000,
        }
    )
    loop.train(config, folder, devices=jax.devices()[:1], console=Console(file=output, width=300))
    return [line for line in output.getvalue().splitlines() if line.startswith("data wait")]


def test_log_says_that_reading_limits_once(tmp_path, monkeypatch):
    monkeypatch.setattr(bottleneck, "ENOUGH_SECONDS", 0.2)
    source = SlowSource("read", seconds=0.05)  # many times a step, also on a busy machine
    notes = run_with(tmp_path, monkeypatch, source)
    assert len(notes) == 1 and "reading files limits" in notes[0]
    assert metrics_of(tmp_path)[40]["data_wait"] > 0.1


def test_log_says_that_the_transfer_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(bottleneck, "ENOUGH_SECONDS", 0.2)
    put = DeviceFeed._put

    def slow_put(self, batch):
        time.sleep(0.05)
        return put(self, batch)

    monkeypatch.setattr(DeviceFeed, "_put", slow_put)
    source = ArraySource("fast", np.zeros((64, 28, 28, 1), np.uint8))
    notes = run_with(tmp_path, monkeypatch, source)
    assert len(notes) == 1 and "the transfer to the devices limits" in notes[0]
