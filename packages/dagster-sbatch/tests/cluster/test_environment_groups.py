"""Assets with environments of their own on the simulated site: groups of packages, and an interpreter that is there."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch.environments import deployed
from dagster_sbatch.environments.lockfile import LockFile
from dagster_sbatch.environments.wheels import Wheel
from dagster_sbatch.launchers import ScriptLauncher
from dagster_sbatch.project import Project
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.slurm import SlurmRequest
from resources import PROJECT
from slurm_in_a_box import SimulatedSite
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
EVERYTHING_OLD = f"touch -d '2 days ago' {FOLDER}/*"


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
def fetched(gathered: list[Wheel], monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheels of each group are here already."""

    def gather(lock: LockFile, *_: Any) -> list[Wheel]:
        pins = {pin.name.replace("-", "_") for pin in lock.pins}
        return [wheel for wheel in gathered if wheel.path.name.partition("-")[0] in pins]

    monkeypatch.setattr(deployed, "gather_wheels", gather)


def materialize(project: Project, workload: Path, **environments: str | None) -> dg.ExecuteInProcessResult:
    """Run the same workload in one run as several assets, each with its environment."""

    def make(name: str, environment: str | None) -> dg.AssetsDefinition:
        @dg.asset(name=name)
        def asset(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
            launcher, request = ScriptLauncher(), SlurmRequest(time_limit="5")
            return compute.run(
                context, workload=workload, launcher=launcher, request=request, environment=environment
            ).get_materialize_result()

        return asset

    assets = [make(name, environment) for name, environment in environments.items()]
    return dg.materialize(assets, resources={"compute": ComputeResource.of(project)}, raise_on_error=False)


def reported(result: dg.ExecuteInProcessResult, asset: str) -> dict[str, Any]:
    assert result.success, [event.message for event in result.all_events if event.is_failure]
    (event,) = result.asset_materializations_for_node(asset)
    return {name: value.value for name, value in event.metadata.items()}


def error_of(result: dg.ExecuteInProcessResult, asset: str) -> str:
    data = result.failure_data_for_node(asset)
    assert data is not None
    assert data.error is not None
    return data.error.message


@pytest.mark.usefixtures("fetched")
def test_two_assets_of_one_run_have_two_groups_of_packages(
    site: SimulatedSite, project: Project, workload: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload.write_text(PROGRAM)
    result = materialize(project, workload, plain=None, extra="extra")
    assert not reported(result, "plain")["ballast"]
    assert reported(result, "extra")["ballast"]
    made = {reported(result, asset)["python"].split("/")[-3] for asset in ("plain", "extra")}
    assert made == set(names(site))
    assert len(made) == 2

    # Production runs what was published for the asset's group, and cleaning keeps that of each group.
    monkeypatch.setenv("DAGSTER_DEPLOYMENT", "production_supercomputer")
    found = {each.environment.name: each.environment for each in client.environments.inventory()}
    plain, extra = (found[reported(result, asset)["python"].split("/")[-3]] for asset in ("plain", "extra"))
    assert client.environments.publish({"": plain}, "")
    said = error_of(materialize(project, workload, extra="extra"), "extra")
    assert "environment 'extra' has not been published for production_supercomputer yet" in said
    assert "scripts/deploy_environment.py" in said
    assert client.environments.publish({"": plain, "extra": extra}, "")
    assert reported(materialize(project, workload, extra="extra"), "extra")["ballast"]
    there(site, EVERYTHING_OLD)
    assert client.environments.remove(sorted(made)) == []
    assert set(names(site)) == made


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

    # Production compares the code only with what was published.
    monkeypatch.setenv("DAGSTER_DEPLOYMENT", "production_supercomputer")
    client.environments.publish({"": client.ensure()}, "")
    said = error_of(materialize(project, workload, path=python), "path")
    assert f"{workload} is changed" in said
    assert "SLURM_PYTHON" not in said
    assert "packages" not in said
