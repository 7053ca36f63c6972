"""Two projects with different versions of the engine share one folder on the supercomputer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite
from support.new_project import made_in, newer_engine, plain_environment, run_in

pytestmark = pytest.mark.cluster

NEWER_FORMATS = {
    "src/dagster_sbatch/slurm/gateway/agent/disk.py": (
        "dict(document, format=FORMAT)",
        "dict(document, format=2, newer=['of', 2])",
    ),
    "src/dagster_sbatch/slurm/gateway/agent/building.py": ("FORMAT = 1", "FORMAT = 2"),
    "src/dagster_sbatch/run/directory.py": ('"format": FORMAT', '"format": 2, "newer": "of 2"'),
}
"""Every document of the newer engine has a field more: those of its agents, and those of its run directories."""
MATERIALIZE = """\
import importlib.metadata, json, sys
import dagster as dg
from {package}.assets.estimates import pi_estimate
from resources import build_resources

with dg.DagsterInstance.ephemeral() as instance:
    result = dg.materialize([pi_estimate], resources=build_resources(), instance=instance)
(event,) = result.asset_materializations_for_node("pi_estimate")
(check,) = result.get_asset_check_evaluations()
found = [importlib.metadata.version("dagster-sbatch"), check.passed, event.metadata["job_id"].value]
print(json.dumps(found))
"""


def start(project: Path, variables: dict[str, str]) -> "subprocess.Popen[str]":
    """Materialise the project's asset in its own environment."""
    code = MATERIALIZE.format(package=project.name.replace("-", "_"))
    return subprocess.Popen(
        [f"{project}/.venv/bin/python", "-c", code],
        cwd=project,
        env=plain_environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_versions_of_the_engine_share_one_base_path(
    site: SimulatedSite, on_supercomputer: dict[str, str], tmp_path: Path
) -> None:
    """At the same time, and each lists the other's runs and reads its files, although the newer one has new formats."""
    older, newer = (made_in(tmp_path, name) for name in ("older-runs", "newer-runs"))
    wheel = newer_engine(tmp_path, "1.1.0", NEWER_FORMATS)
    upgraded = run_in(newer, sys.executable, "scripts/upgrade", str(wheel.path), PYTEST_ADDOPTS="tests/unit")
    assert upgraded.returncode == 0, upgraded.stdout + upgraded.stderr
    assert run_in(older, sys.executable, "scripts/test", "--version").returncode == 0
    jobs = []
    for process, version in [(start(older, on_supercomputer), "1.0.0"), (start(newer, on_supercomputer), "1.1.0")]:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        found, passed, job = json.loads(output.splitlines()[-1])
        assert (found, passed) == (version, True)
        jobs.append(str(job))
    base = site.layout.home / CERTIFICATE_USER.name / "dagster-slurm"
    for name in ("about.json", "environment.json"):
        assert {json.loads(path.read_text())["format"] for path in base.rglob(name)} == {1, 2}
    for project in (older, newer):
        listed = run_in(project, sys.executable, "scripts/job", **on_supercomputer)
        assert listed.returncode == 0, listed.stderr
        assert all(job in listed.stdout for job in jobs)
