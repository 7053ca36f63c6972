"""The command line of scripts/job."""

import subprocess
import sys

import pytest

from support import ROOT


@pytest.mark.parametrize("words", [["logs"], ["cancel"], ["state"], ["logs", "logs"]])
def test_an_action_without_a_job_is_wrong_usage(words: list[str]) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "job"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(f"name a job before the action, for example: scripts/job 1184 {words[0]}\n")
