"""The asset of a copy runs on the supercomputer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.new_project import PACKAGE, made_in, plain_environment

pytestmark = pytest.mark.cluster

MATERIALIZE = f"""
import json, dagster as dg
from {PACKAGE}.assets.estimates import pi_estimate
from resources import build_resources
import resources
result = dg.materialize([pi_estimate], resources=build_resources())
(event,) = result.asset_materializations_for_node("pi_estimate")
(check,) = result.get_asset_check_evaluations()
print(json.dumps([resources.__file__, check.passed, event.metadata["job_id"].value]))
"""


def test_the_asset_of_a_copy_runs_on_the_supercomputer(on_supercomputer: dict[str, str], tmp_path: Path) -> None:
    """With this environment, but the copy's code: its folder comes first."""
    copy = made_in(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", MATERIALIZE],
        cwd=copy,
        env=plain_environment(**on_supercomputer),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    code, passed, job = json.loads(done.stdout.splitlines()[-1])
    assert Path(code).is_relative_to(copy)
    assert passed
    assert job
