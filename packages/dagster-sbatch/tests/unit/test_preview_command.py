"""The command line of `scripts/preview`."""

import subprocess
import sys

import pytest

from support import ROOT


@pytest.mark.parametrize("text", ["trials=3", "3", "[]"])
def test_a_config_that_is_no_json_object_is_wrong_usage(text: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "preview"), "anything", "--config-json", text]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert f"{text!r} is not a JSON object" in done.stderr
