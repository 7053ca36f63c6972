"""Assets with environments of their own on the simulated site: groups of packages, and an interpreter that is there."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch.environments import deployed
from dagster_sbatch.environments.lockfile import LockFile
from dagster_sbatch.environments.wheels import Wheel
from dagster_sbatch.inspect.asset_preview import preview_asset
from dagster_sbatch.inspect.dry_run import try_script
from dagster_sbatch.launchers import ScriptLauncher
from dagster_sbatch.project import Project
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.slurm import SlurmRequest
from resources import PROJECT
from slurm_in_a_box import SimulatedSite
from support import ROOT, forked
from support.environment_fixtures import FOLDER, Client, names, there
from support.environment_fixtures import client as client
from support.environment_fixtures import gathered as gathered
from support.environment_fixtures import in_order as in_order
from support.environment_fixtures import index as index
from support.environment_fixtures import site_python as site_python
from support.environment_fixtures import wanted as wanted
from support.environment_fixtures import workload as workload

pytestmark = pytest.mark.cluster

PROGRAM = """\
import importlib.util, sys
from dagster_pipes import open_dagster_pipes

with open_dagster_pipes() as pipes:
    found = bool(importlib.util.find_spec("ballast"))
    pipes.report_asset_materialization(metadata={"ballast": found, "python": sys.executable})
"""
GROUPS = (
    '[dependency-groups]\ncluster = ["pip", "dagster-pipes"]\ncluster-extra = ["pip", "dagster-pipes", "ballast"]\n'
)
Deploy = Callable[..., str]


@pytest.fixture
def project(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project whose group `extra` has a package that the group `cluster` lacks."""
    (tmp_path / "requirements").mkdir()
    (tmp_path / "pyproject.toml").write_text(GROUPS)
    text = (index / "lock.txt").read_text()
    (tmp_path / "requirements" / "cluster-extra.txt").write_text(text)
    without = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("ballast"))
    (tmp_path / "requirements" / "cluster.txt").write_text(without)
    monkeypatch.setattr(Project, "lock", tmp_path / "requirements" / "cluster.txt")
    return Project(tmp_path, PROJECT.site_overrides)


@pytest.fixture
def deploy(project: Project, tmp_path: Path) -> Deploy:
    """Runs scripts/deploy_environment.py for that project, and returns what it prints."""
    resources = tmp_path / "of the project" / "resources.py"
    resources.parent.mkdir()
    resources.write_text(
        "from pathlib import Path\nfrom dagster_sbatch import Project\n"
        f"PROJECT = Project(Path({str(project.root)!r}), {dict(project.site_overrides)!r})\n"
    )

    def run(*options: str) -> str:
        variables = {**os.environ, "PYTHONPATH": str(resources.parent), "COLUMNS": "120"}
        done = forked.run([str(ROOT / "scripts" / "deploy_environment.py"), *options], variables)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def published_by(text: str) -> dict[str, str]:
    """The name of the environment of each group, as the script prints them."""
    rows = re.findall(r"^published: (\w+), Python [\d.]+(?: \(environment='(\w+)'\))?$", text, re.M)
    assert [group for _, group in rows] == ["", "extra"], text
    return {group: name for name, group in rows}


@pytest.fixture
def fetched(gathered: list[Wheel], monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheels of each group are here already."""

    def gather(lock: LockFile, *_: Any) -> list[Wheel]:
        pins = {pin.name.replace("-", "_") for pin in lock.pins}
        return [wheel for wheel in gathered if wheel.path.name.partition("-")[0] in pins]

    monkeypatch.setattr(deployed, "gather_wheels", gather)


def make(workload: Path, name: str, environment: str | None) -> dg.AssetsDefinition:
    @dg.asset(name=name)
    def asset(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        launcher, request = ScriptLauncher(), SlurmRequest(time_limit="5")
        return compute.run(
            context, workload=workload, launcher=launcher, request=request, environment=environment
        ).get_materialize_result()

    return asset


def materialize(project: Project, workload: Path, **environments: str | None) -> dg.ExecuteInProcessResult:
    """Run the same workload in one run as several assets, each with its environment."""
    assets = [make(workload, name, environment) for name, environment in environments.items()]
    return dg.materialize(assets, resources={"compute": ComputeResource.of(project)}, raise_on_error=False)


def trial(project: Project, workload: Path, client: Client, environment: str) -> tuple[bool, str]:
    """Whether Slurm would accept an asset's job, as `scripts/preview --test-only` asks it."""
    assets = dg.Definitions([make(workload, "probe", environment)], resources={"compute": ComputeResource.of(project)})
    (preview,) = preview_asset(assets, "probe")
    return try_script(client.gateway, preview, client.gateway.projects())


def reported(result: dg.ExecuteInProcessResult, asset: str) -> dict[str, Any]:
    assert result.success, [event.message for event in result.all_events if event.is_failure]
    (event,) = result.asset_materializations_for_node(asset)
    return {name: value.value for name, value in event.metadata.items()}


def error_of(result: dg.ExecuteInProcessResult, asset: str) -> str:
    data = result.failure_data_for_node(asset)
    assert data is not None
    assert data.error is not None
    return data.error.message


def environments_of_both(project: Project, workload: Path) -> dict[str, str]:
    """Run two assets in one run, each with its group of packages; the name of the environment of each."""
    result = materialize(project, workload, plain=None, extra="extra")
    found = {group: reported(result, asset) for group, asset in (("", "plain"), ("extra", "extra"))}
    assert [each["ballast"] for each in found.values()] == [False, True]
    return {group: each["python"].split("/")[-3] for group, each in found.items()}


def test_the_script_publishes_rolls_back_and_cleans_all_groups(
    site: SimulatedSite, project: Project, workload: Path, deploy: Deploy, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload.write_text(PROGRAM)
    monkeypatch.setenv("DAGSTER_DEPLOYMENT", "production_supercomputer")
    said = error_of(materialize(project, workload, extra="extra"), "extra")
    assert "environment 'extra' has not been published for production_supercomputer yet" in said
    assert "scripts/deploy_environment.py" in said

    first = published_by(deploy())
    monkeypatch.setenv("DAGSTER_DEPLOYMENT", "staging_supercomputer")
    assert environments_of_both(project, workload) == first
    assert set(names(site)) == set(first.values())

    workload.write_text(f"{PROGRAM}# changed\n")
    second = published_by(deploy())
    made = {*first.values(), *second.values()}
    assert set(names(site)) == made
    rows = [row.split() for row in deploy("--list").splitlines()]
    assert {row[0]: row[5:] for row in rows if row and row[0] in made} == {
        first[""]: ["before"], first["extra"]: ["before", "extra"],
        second[""]: ["current"], second["extra"]: ["current", "extra"],
    }  # fmt: skip

    both = f"{first['']}, {first['extra']} (environment='extra')"
    assert f"production runs {both} again" in deploy("--rollback")
    monkeypatch.setenv("DAGSTER_DEPLOYMENT", "production_supercomputer")
    assert f"{workload} is changed" in error_of(materialize(project, workload, extra="extra"), "extra")
    there(site, f"touch -d '2 days ago' {FOLDER}/*")
    removed = deploy("--remove", "--older-than", "1").removeprefix("removed 2: ")
    assert sorted(removed.strip().split(", ")) == sorted(second.values())
    assert set(names(site)) == set(first.values())
    workload.write_text(PROGRAM)
    assert environments_of_both(project, workload) == first


@pytest.mark.usefixtures("fetched")
def test_an_asset_names_an_interpreter_that_is_there(
    site: SimulatedSite, project: Project, workload: Path, site_python: tuple[str, str], client: Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    workload.write_text(PROGRAM)
    python = site.environment()["SLURM_PYTHON"]
    folder = python.removesuffix("/bin/python")
    result = materialize(project, workload, path=python, folder=folder, none="/no/env/bin/python", bare=site_python[0])
    for asset in ("path", "folder"):
        (event,) = result.asset_materializations_for_node(asset)
        assert event.metadata["python"].value == python
    assert "environment=/no/env/bin/python does not run on login" in error_of(result, "none")
    said = error_of(result, "bare")
    assert "No module named 'dagster_pipes'" in said
    assert said.splitlines()[-1].startswith(f"{site_python[0]} -m pip install dagster-pipes")
    tried = {path: trial(project, workload, client, path) for path in (folder, "/no/env/bin/python", site_python[0])}
    assert [accepted for accepted, _ in tried.values()] == [True, False, False]
    assert "environment=/no/env/bin/python does not run on login" in tried["/no/env/bin/python"][1]
    assert f"\n{site_python[0]} -m pip install dagster-pipes" in tried[site_python[0]][1]

    # Production compares the code only with what was published.
    monkeypatch.setenv("DAGSTER_DEPLOYMENT", "production_supercomputer")
    client.environments.publish({"": client.ensure()}, "")
    said = error_of(materialize(project, workload, path=python), "path")
    assert f"{workload} is changed" in said
    assert "SLURM_PYTHON" not in said
    assert "packages" not in said
