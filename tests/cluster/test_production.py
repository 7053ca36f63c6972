"""The document's .env.musica verbatim, in a fresh clone: first credentials, deployment, everything from the UI."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite
from support import ROOT
from support.background import STRESS
from support.browser import open_ui, take
from support.dagster_dev import DagsterDev, wait_for
from unit.test_settings import DOCUMENT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]

FILLED_IN = (
    "SLURM_EDGE_NODE_HOST", "ASC_OIDC_CLIENT_ID", "ASC_OIDC_TOKEN_URL", "ASC_AUTHENTIK_API_BASE",
    "ASC_AUTHENTIK_API_TOKEN", "ASC_STEP_CA_URL", "ASC_STEP_FINGERPRINT",
)  # fmt: skip
"""What differs at the simulated site."""
BACKFILL = "{ partitionBackfillsOrError(limit: 1) { ... on PartitionBackfills { results { status } } } }"
# scripts/... of the clone, in the environment of these tests: setting up another one is the demo's business.
SCRIPT = """\
import runpy, sys
sys.path.insert(0, "scripts")
import _environment
_environment.activate = lambda: None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def variables(site: SimulatedSite, client_home: Path) -> dict[str, str]:
    """A person's environment: a home with the centre's line in known_hosts, and the deployment."""
    site.authentik.set_lifetimes(token=30 * 86400.0)
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    own = {"HOME": str(client_home), "DAGSTER_DEPLOYMENT": "production_supercomputer"}
    return {**kept, **own, "ASC_ALLOW_HTTP": "true"}  # the site's authentik has no certificate


BASES = ("dagster-slurm", "$DATA/dagster-slurm") if STRESS else ("dagster-slurm",)
"""Deployment folders: the document's, in the home, and the recommended one. The second takes as long as the first."""


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> str:
    """The deployment folder, as a login shell on the supercomputer takes it."""
    return str(request.param)


@pytest.fixture
def clone(site: SimulatedSite, tmp_path: Path, base: str) -> Path:
    """A fresh clone, and in it nothing but the document's file, its values filled in."""
    folder = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    text, values = DOCUMENT, {**site.environment(), "SLURM_DEPLOYMENT_BASE_PATH": base}
    for name in (*FILLED_IN, *(["SLURM_DEPLOYMENT_BASE_PATH"] if base.startswith("$") else [])):
        text = re.sub(rf"^{name}=\S+", f"{name}={values[name]}", text, flags=re.MULTILINE)
    text = re.sub(r"^ASC_OIDC_APP_PASSWORD=\S+", "ASC_OIDC_APP_PASSWORD=", text, flags=re.MULTILINE)
    file = folder / "envs" / ".env.musica"
    file.touch(mode=0o600)
    file.write_text(text)
    return folder


@pytest.fixture
def dagster_dev(clone: Path, variables: dict[str, str], tmp_path: Path) -> Iterator[DagsterDev]:
    server = DagsterDev(clone, {**variables, "PYTHONPATH": str(clone), "DATA_ROOT": ""})
    yield server
    server.stop()


def run_script(clone: Path, variables: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=clone,
        env={**variables, "PYTHONPATH": str(clone)},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )


def test_materialize_all_from_the_ui(
    clone: Path, variables: dict[str, str], dagster_dev: DagsterDev, site: SimulatedSite,
    tmp_path: Path, base: str,
) -> None:  # fmt: skip
    deployed = run_script(clone, variables, "scripts/deploy_environment.py")
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    assert Path(variables["HOME"], ".config", "dagster-slurm", "musica-auth.env").stat().st_mode & 0o777 == 0o600
    dagster_dev.start()
    with open_ui(dagster_dev.url) as page:
        page.goto("/asset-groups")
        page.get_by_text("Materialize all").click()
        page.get_by_role("button", name="All", exact=True).click()
        page.get_by_role("button", name="Launch backfill").click()
        page.get_by_text("Created backfill").wait_for()
        page.goto("about:blank")  # an open page of the UI asks for news all the time
        wait_for(lambda: backfill(dagster_dev) not in ("REQUESTED", "COMPLETING"), 900, "the backfill has ended")
        assert backfill(dagster_dev) == "COMPLETED_SUCCESS"
        (sweep,) = dagster_dev.materializations("delay_sweep")
        page.goto(f"/runs/{sweep['runId']}?levels=info")
        expect(page.get_by_text(re.compile("^job [0-9]+: RUNNING on g400[12]")).first).to_be_visible()
        expect(page.get_by_text("A shell inside it: ssh -t -i ~/.ssh/id_musica xy12345@").first).to_be_visible()
        take(page, "sweep-on-the-supercomputer.png", tmp_path)
    runs = site.run_on_login(CERTIFICATE_USER, f"bash -lc 'ls -d {base}/runs/*/'").stdout.split()
    keys = [run.strip("/").rpartition("/")[2] for run in runs if "dagster-slurm/runs/" in run]
    jobs: list[str] = []

    def accounted() -> bool:
        fields = "--format=JobName,Partition,QOS,State,NNodes"
        jobs[:] = site.sacct("-XnP", "--starttime=now-1days", f"--name={','.join(keys)}", fields).splitlines()
        return not any("|PENDING|" in row or "|RUNNING|" in row for row in jobs)

    wait_for(accounted, 60, "the accounting has the ends of all jobs")
    ran = {name.partition("-")[0]: row for name, *row in (line.split("|") for line in jobs)}
    gpu = ["zen4_0768_h100x4", "zen4_0768_h100x4", "COMPLETED", "2"]
    all_gpus = [*gpu[:3], "1"]
    cpu = ["zen4_0768", "zen4_0768", "COMPLETED", "1"]
    assert ran == {
        "flights": cpu,
        "delay_features": cpu,
        "delay_sweep": gpu,
        "delay_model": cpu,
        "delay_forest": all_gpus,
    }
    assert len(keys) == 5
    assert len(jobs) == 4 + 12  # an array has a row per task
    months = [f"2013-{month:02}" for month in range(1, 13)]
    for asset in ("flights", "delay_features"):
        found = {event["partition"]: event["rows"] for event in dagster_dev.materializations(asset)}
        assert sorted(found) == months
        assert found["2013-01"] > 10_000


def backfill(server: DagsterDev) -> str:
    """The status of the newest."""
    (newest,) = server.ask(BACKFILL)["partitionBackfillsOrError"]["results"]
    return str(newest["status"])
