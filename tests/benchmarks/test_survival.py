"""The benchmark of checkpoints tells steps that pay for one from those that do not."""

import json
import time

from benchmarks import survival
from mim_jax.training.checkpoints import Checkpoints


def test_time_of_saves_is_found_in_the_windows_that_begin_with_one(tmp_path, monkeypatch):
    save = Checkpoints.save

    def slow_save(self, *arguments):
        time.sleep(0.4)
        save(self, *arguments)

    monkeypatch.setattr(Checkpoints, "save", slow_save)
    monkeypatch.setattr(
        survival, "MODEL", {**survival.MODEL, "model.width": 16, "model.depth": 1, "model.heads": 2}
    )
    output = tmp_path / "survival.json"
    options = ["--windows=3", "--every=5", "--batch-size=8", "--starts=0", f"--output={output}"]
    survival.main(options)
    found = json.loads(output.read_text())["overhead"]
    assert found["with_over_without"]["count"] == 3
    assert found["with_over_without"]["median"] > 1.5
    difference = found["step_seconds_with"]["median"] - found["step_seconds_without"]["median"]
    assert 5 * difference > 0.3
