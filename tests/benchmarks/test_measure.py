import json

import pytest

from benchmarks import measure


def test_runs_alternate_and_warm_up_rounds_do_not_count():
    calls = []
    seconds = measure.alternate(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warmup=1
    )
    assert "".join(calls) == "ababab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_summary_has_median_quartiles_and_range():
    assert measure.summary([4.0, 1.0, 3.0, 2.0, 5.0]) == {
        "median": 3.0,
        "quartiles": [2.0, 4.0],
        "range": [1.0, 5.0],
        "count": 5,
    }
    assert measure.summary([2.0])["median"] == 2.0


def test_config_takes_fields_of_the_command_line():
    config = measure.config_with("mae:tiny", ["--config.batch_size=4", "--config.data.flip=False"])
    assert (config.batch_size, config.data.flip) == (4, False)


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--config.batchsize=4", "no field 'batchsize'.*'batch_size'"),
        ("--batch-size=4", "unexpected argument '--batch-size=4'"),
    ],
)
def test_config_names_a_wrong_argument(argument, message):
    with pytest.raises(ValueError, match=message):
        measure.config_with("mae:tiny", [argument])


def test_a_report_says_what_was_run_on_what(tmp_path, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    report = measure.Report("train_step", ["--steps", "3"])
    report.write(tmp_path / "new" / "result.json", {"figure": 1.5})
    content = json.loads((tmp_path / "new" / "result.json").read_text())
    assert content["command"] == "python -m benchmarks.train_step --steps 3"
    assert content["figure"] == 1.5
    assert content["versions"]["jax"]
    assert content["date"].endswith("+00:00")
    machine = content["machine"]
    assert machine["cores"] >= 1 and machine["memory_gib"] > 0 and "cpu" in machine["devices"]
    assert machine["environment"]["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
