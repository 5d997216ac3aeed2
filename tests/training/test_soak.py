"""A run that is disturbed at random moments ends as if nothing had happened; see `soak`."""

from tests.training import soak


def test_twenty_faults_leave_no_trace(tmp_path, capfd):
    assert soak.main([f"--folder={tmp_path}", "--faults=20", "--steps=300"]) == 0
    assert "the end is the same" in capfd.readouterr().out
