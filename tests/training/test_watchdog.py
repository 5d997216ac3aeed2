"""The watchdog, on real runs whose data do not come: it tells, goes on, or ends the process."""

import io
import os
import subprocess
import sys
import threading
import time

import pytest

from mim_jax.training import loop
from mim_jax.training.watchdog import EXIT_STUCK, SECONDS_LAST, Watchdog
from tests.training.runs import losses_of, run

STUCK_RUN = """
import sys, threading
from tests.training import runs, test_watchdog

test_watchdog.make_stuck(setattr, threading.Event(), from_step=4)
runs.run(sys.argv[1], **{"log.watchdog_exit_seconds": 8.0})
"""


class Stop(Exception):
    pass


def make_stuck(setattr, released, from_step):
    """From one step on, the batches of a run wait for an event."""
    batches_of = loop.training_batches

    def training_batches(config, source, first_step, **settings):
        batches = batches_of(config, source, first_step, **settings)

        def wait_for_the_disk():
            for step, batch in enumerate(batches, start=first_step + 1):
                if step >= from_step:
                    released.wait()
                yield batch

        return wait_for_the_disk()

    setattr(loop, "training_batches", training_batches)


class Finds(io.StringIO):
    """Collects what is written, and says when a text has come."""

    def __init__(self, text, times=1):
        super().__init__()
        self.text, self.times, self.found = text, times, threading.Event()

    def write(self, text):
        super().write(text)
        if self.getvalue().count(self.text) >= self.times:
            self.found.set()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


def test_stuck_run_tells_what_all_threads_are_at_and_goes_on(whole, tmp_path, monkeypatch):
    released = threading.Event()
    make_stuck(monkeypatch.setattr, released, from_step=4)
    output = Finds("while waiting for the batch of step", times=2)
    monkeypatch.setattr(sys, "stderr", output)

    def release():
        output.found.wait(60)
        released.set()

    thread = threading.Thread(target=release)
    thread.start()
    run(tmp_path, **{"log.watchdog_seconds": 0.7})
    thread.join()
    told = output.getvalue()
    assert f"watchdog: process 0 of 1 ({os.uname().nodename}, {os.getpid()}) gives no sign" in told
    assert "The run is left alone." in told
    assert "Thread MainThread, most recent call last:" in told and "in wait_for_the_disk" in told
    assert "Thread watchdog" not in told
    # Batches are fetched two steps ahead, and metrics two steps late.
    assert "(last step finished: none)" in told
    assert losses_of(tmp_path) == losses_of(whole)


def test_run_that_reaches_the_limit_exits_with_its_code_and_goes_on_when_started_again(
    whole, tmp_path
):
    def stop(step):
        if step == 5:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path, on_step=stop)
    stuck = subprocess.run(
        [sys.executable, "-c", STUCK_RUN, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert stuck.returncode == EXIT_STUCK, stuck.stderr
    assert "while waiting for the batch of step 4" in stuck.stderr
    assert f"exit {EXIT_STUCK}" in stuck.stderr and "in wait_for_the_disk" in stuck.stderr
    _, output = run(tmp_path)
    assert "resumed from step 3 of 6" in output
    assert losses_of(tmp_path) == losses_of(whole)


def watch(seconds, limit=0, **settings):
    output, codes = io.StringIO(), []
    return Watchdog(seconds, limit, output=output, leave=codes.append, **settings), output, codes


def test_one_message_for_each_interval_and_none_after_a_sign_of_life():
    watchdog, output, codes = watch(0.2)
    with watchdog:
        watchdog.at("restoring the checkpoint of step 7")
        time.sleep(0.7)
        assert output.getvalue().count("while restoring the checkpoint of step 7") == 3
        for step in range(8, 18):
            watchdog.finished(step)
            time.sleep(0.05)
        assert output.getvalue().count("watchdog:") == 3
        time.sleep(0.3)
        assert "last step finished: 17" in output.getvalue()
    assert not codes


def test_evaluation_may_take_longer_than_the_limit_and_training_may_not():
    watchdog, output, codes = watch(0, limit=0.2)
    with watchdog:
        with watchdog.patient("evaluating"):
            time.sleep(0.5)
        assert not codes and not output.getvalue()
        watchdog.at("computing step 3")
        time.sleep(0.6)
    assert codes == [EXIT_STUCK] and "while computing step 3" in output.getvalue()


def test_process_0_of_several_leaves_last():
    limits = [watch(1, 60, process=i, processes=2)[0]._limit for i in range(2)]
    assert limits == [60 + SECONDS_LAST, 60]


def test_clock_that_jumps_is_no_reason(monkeypatch):
    watchdog, output, codes = watch(5, limit=10)
    with watchdog:
        for moment in (1e12, 0.0, 1e15):
            monkeypatch.setattr(time, "time", lambda moment=moment: moment)
            time.sleep(0.1)
    assert not output.getvalue() and not codes


@pytest.mark.parametrize("seconds", [0, 60])
def test_signs_of_life_cost_nothing(seconds):
    watchdog, _, _ = watch(seconds)
    with watchdog:
        start = time.perf_counter()
        for step in range(10_000):
            watchdog.at(f"computing step {step}")
            watchdog.finished(step)
        taken = time.perf_counter() - start
    assert taken < 0.5, "50 microseconds a step at most, even on a busy machine"
    assert not watchdog._thread.is_alive()


def test_leaving_does_not_wait_for_the_next_look():
    watchdog, _, _ = watch(600)
    start = time.monotonic()
    with watchdog:
        pass
    assert time.monotonic() - start < 5
