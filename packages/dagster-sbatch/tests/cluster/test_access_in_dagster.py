"""The whole chain in a real `dagster dev`: the sensor brings access to life, an asset logs in, with no person."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from slurm_in_a_box import SimulatedSite
from support import ROOT, access
from support.browser import open_ui, take, visit
from support.dagster_dev import DagsterDev, beside_location, wait_for

pytestmark = pytest.mark.cluster

LOCATION = """\
import dagster as dg
from resources import PROJECT
from dagster_sbatch.auth import ensure_certificate
from dagster_sbatch.setting_files import load_settings
from dagster_sbatch.ssh import connect

@dg.asset
def login_node(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    settings = PROJECT.load_settings()
    with connect(settings, ensure_certificate) as connection:
        name = connection.run("hostname", hide=True).stdout.splitlines()[-1]
    return dg.MaterializeResult(metadata={"hostname": name})

defs = dg.Definitions(assets=[login_node])
if __name__ == "__main__":
    result = dg.materialize([login_node])
    print(result.asset_materializations_for_node("login_node")[0].metadata["hostname"].value)
"""

SENSOR = """
    query Sensor($selector: SensorSelector!) { sensorOrError(sensorSelector: $selector) { ... on Sensor {
      sensorState { status ticks(limit: 5) { status skipReason runIds error { message } } } } } }"""


@pytest.fixture
def variables(site: SimulatedSite, client_home: Path, tmp_path: Path) -> dict[str, str]:
    site.authentik.set_lifetimes(token=30 * access.DAY)
    return {**site.environment(), "HOME": str(client_home), "DATA_ROOT": str(tmp_path / "data")}


@pytest.fixture
def location(tmp_path: Path) -> Path:
    path = tmp_path / "login_location.py"
    path.write_text(LOCATION)
    return path


@pytest.fixture
def dagster_dev(variables: dict[str, str], location: Path, tmp_path: Path) -> Iterator[DagsterDev]:
    with beside_location(location, tmp_path / "project", variables, "login", projects_own=True) as server:
        yield server


def ticks(server: DagsterDev) -> list[dict[str, Any]]:
    """The latest of the sensor, newest first."""
    selector = {
        "repositoryLocationName": "musica_pipelines",
        "repositoryName": "__repository__",
        "sensorName": "refresh_credentials_when_due",
    }
    state = server.ask(SENSOR, selector=selector)["sensorOrError"]["sensorState"]
    assert state["status"] == "RUNNING"
    found: list[dict[str, Any]] = state["ticks"]
    assert not [tick for tick in found if tick["error"]]
    return found


@pytest.mark.smoke
def test_the_sensor_brings_access_to_life_and_an_asset_logs_in(
    dagster_dev: DagsterDev, variables: dict[str, str], site: SimulatedSite, tmp_path: Path
) -> None:
    (run_id,) = wait_for(
        lambda: next((tick["runIds"] for tick in ticks(dagster_dev) if tick["runIds"]), None), 90, "the sensor asks"
    )
    assert dagster_dev.wait(run_id) == "SUCCESS"
    assert Path(variables["ASC_AUTHENTIK_CREDENTIALS_FILE"]).exists()
    run_id = dagster_dev.launch("login_node", location="login")
    assert dagster_dev.wait(run_id) == "SUCCESS"
    # The certificate ends; a step gets itself a new one.
    site.mint_certificate(Path(variables["SLURM_EDGE_NODE_KEY_PATH"]), validity="-2h:-1h")
    run_id = dagster_dev.launch("login_node", location="login")
    assert dagster_dev.wait(run_id) == "SUCCESS"
    skipped = wait_for(
        lambda: next((tick["skipReason"] for tick in ticks(dagster_dev) if tick["skipReason"]), None), 90, "a tick"
    )
    assert "the next refresh is due at" in skipped
    with open_ui(dagster_dev.url) as page:
        visit(page, "/assets/musica_access", "certificate_hours")
        expect(page.get_by_text("app_password_hours", exact=True)).to_be_visible()
        take(page, "musica-access.png", tmp_path)
        page.get_by_text("Plots", exact=True).click()
        expect(page.locator("canvas").first).to_be_visible()
        page.goto("/assets/musica_access?view=checks")
        expect(page.get_by_text("health", exact=True).first).to_be_visible()
        expect(page.get_by_text("Passed", exact=True).first).to_be_visible()
    check_no_secret(site, tmp_path)


def check_no_secret(site: SimulatedSite, folder: Path) -> None:
    """Neither Dagster's storage nor its logs hold one, nor the folder of anybody but the owner."""
    secrets = access.secrets_of(site.authentik)
    assert len(secrets) > 5
    looked_at = 0
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            looked_at += b"musica_access" in content
            assert not [secret for secret in secrets if secret.encode() in content], path
    assert looked_at


def test_an_asset_in_a_plain_materialize_logs_in(location: Path, variables: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, location],
        env={**variables, "PATH": os.environ["PATH"]},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("login01", "login02")
