"""A copy passes its own tests, shares a base path with a newer engine, and runs its demo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite
from support.new_project import made_in, newer_engine, plain_environment, replace_first_asset, run_in

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


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last test changes it."""
    return made_in(tmp_path_factory.mktemp("copy"))


def test_two_versions_of_the_engine_share_one_base_path(
    site: SimulatedSite, on_supercomputer: dict[str, str], copy: Path, tmp_path: Path
) -> None:
    """At the same time, and each lists the other's runs and reads its files, although the newer one has new formats."""
    newer = made_in(tmp_path, "newer-runs")
    wheel = newer_engine(tmp_path, "1.1.0", NEWER_FORMATS)
    upgraded = run_in(newer, sys.executable, "scripts/upgrade", str(wheel.path), PYTEST_ADDOPTS="tests/unit")
    assert upgraded.returncode == 0, upgraded.stdout + upgraded.stderr
    assert run_in(copy, sys.executable, "scripts/test", "--version").returncode == 0
    jobs = []
    for process, version in [(start(copy, on_supercomputer), "1.0.0"), (start(newer, on_supercomputer), "1.1.0")]:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        found, passed, job = json.loads(output.splitlines()[-1])
        assert (found, passed) == (version, True)
        jobs.append(str(job))
    base = site.layout.home / CERTIFICATE_USER.name / "dagster-slurm"
    for name in ("about.json", "environment.json"):
        assert {json.loads(path.read_text())["format"] for path in base.rglob(name)} == {1, 2}
    for project in (copy, newer):
        listed = run_in(project, sys.executable, "scripts/job", **on_supercomputer)
        assert listed.returncode == 0, listed.stderr
        assert all(job in listed.stdout for job in jobs)


def test_its_demo_runs_here_and_on_a_simulated_supercomputer(site: SimulatedSite, copy: Path) -> None:
    """The owner's settings of the real one are not used."""
    (copy / "envs" / ".env.musica").write_text("SLURM_ACCOUNT=another\n")
    done = run_in(copy, sys.executable, "scripts/demo", COLUMNS="200")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("pi 3.13504, points 200000") == 2
    assert done.stdout.count("job_id 1") == 1
    assert run_in(copy, "git", "status", "--porcelain").stdout == ""


def test_with_own_assets_it_passes_its_tests_on_the_simulated_supercomputer(site: SimulatedSite, copy: Path) -> None:
    """It starts a site of its own beside this one, which shows that a site can be simulated here."""
    replace_first_asset(copy)
    done = run_in(copy, sys.executable, "scripts/test", "-n", "0", "-m", "cluster")  # the others: local/
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
