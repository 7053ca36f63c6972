"""Where files lie on the supercomputer: $DATA, the node's own disk, and what modules provide."""

import time
from pathlib import Path

import paramiko
import pytest

import resources
from dagster_sbatch.launchers import RayLauncher
from dagster_sbatch.slurm import SlurmRequest
from dagster_sbatch.ssh import AuthenticationError, connect
from slurm_in_a_box import CERTIFICATE_USER, CPU_PARTITION, SimulatedSite, wait_until
from slurm_in_a_box.login import DEVICE_LOGIN
from slurm_in_a_box.storage import MODULE, MODULE_PYTHON
from support.workload_asset import PIPES, materialize

pytestmark = pytest.mark.cluster
SHORT = SlurmRequest(time_limit="00:10:00")
WHERE = (
    PIPES
    + """
    import os, tempfile
    with tempfile.NamedTemporaryFile() as file:
        where = {"temporary": os.path.dirname(file.name), "data": os.environ["DATA_ROOT"]}
    pipes.report_asset_materialization(metadata=where)
"""
)


def as_user(site: SimulatedSite, command: str) -> str:
    return site.run_on_login(CERTIFICATE_USER, command).stdout


# The simulated site itself


def test_the_site_has_the_storage_of_the_real_one(site: SimulatedSite) -> None:
    shell = "bash -lc 'echo $DATA $SCRATCH; touch $DATA/a $SCRATCH/b'; cd; touch c; ls -d /local && ! touch /local/d"
    assert as_user(site, shell).splitlines()[0] == f"{CERTIFICATE_USER.data} {CERTIFICATE_USER.scratch}"
    qos = (
        "--partition",
        CPU_PARTITION,
        "--qos",
        f"dev_{CPU_PARTITION}",
        "--nodelist=n4001",
        "--ntasks=1",
        "--mem=100M",
        "--time=5",
        "--export=NONE",
    )
    script = "ls $DATA $SCRATCH > found; touch /local/e; ls /local >> found"
    job = site.submit(script, *qos)
    site.wait_for_job(job)
    assert as_user(site, "cat found").split() == [
        f"{CERTIFICATE_USER.data}:",
        "a",
        f"{CERTIFICATE_USER.scratch}:",
        "b",
        "e",
    ]
    assert site.run_on_node("n4001", "ls /local").stdout == ""  # the epilog has emptied it
    site.reset()
    assert as_user(site, f"ls {CERTIFICATE_USER.data} {CERTIFICATE_USER.scratch}").split() == [
        f"{CERTIFICATE_USER.data}:",
        f"{CERTIFICATE_USER.scratch}:",
    ]


def test_modules_are_there_in_login_shells_alone(site: SimulatedSite) -> None:
    load = f"module load {MODULE}; command -v {MODULE_PYTHON}; bash -c module"
    found = site.run_on_login(CERTIFICATE_USER, f"bash -lc '{load}'", check=False)
    assert found.stdout.split() == [f"{site.layout.state}/software/{MODULE}/bin/{MODULE_PYTHON}"]
    assert "module: command not found" in found.stderr  # the shell below the login shell
    assert site.run_on_login(CERTIFICATE_USER, "bash -c 'module avail'", check=False).returncode == 127


def test_the_homes_quota_of_files_can_be_used_up(site: SimulatedSite) -> None:
    with site.faults.no_more_files():
        full = site.run_on_login(CERTIFICATE_USER, "echo more >>.bashrc && touch another", check=False)
        assert "No space left on device" in full.stderr
    as_user(site, "touch another")


def test_without_a_certificate_the_site_shows_a_link(site: SimulatedSite) -> None:
    told: list[str] = []
    transport = paramiko.Transport((site.login.address, 22))
    transport.start_client(timeout=30)

    def answer(_: str, __: str, prompts: list[tuple[str, bool]]) -> list[str]:
        told.extend(text for text, _ in prompts)
        transport.close()
        return []

    with pytest.raises(paramiko.SSHException):
        transport.auth_interactive(CERTIFICATE_USER.name, answer)
    assert any(DEVICE_LOGIN in each for each in told), told


@pytest.mark.usefixtures("on_supercomputer")
def test_the_client_does_not_wait_for_somebody_to_open_the_link(site: SimulatedSite) -> None:
    settings = resources.PROJECT.load_settings()
    key = Path(str(settings.edge_node_key_path))
    site.mint_certificate(key, validity="-2h:-1h")
    begun = time.monotonic()
    with pytest.raises(AuthenticationError) as raised, connect(settings, lambda _: None):
        pass
    assert time.monotonic() - begun < 25
    assert "The certificate expired at " in str(raised.value)
    assert "keyboard-interactive is the login for people: a link to open in a browser" in str(raised.value)


# The product


@pytest.mark.smoke
@pytest.mark.usefixtures("on_supercomputer")
def test_a_run_below_data_with_its_temporary_files_on_the_nodes_disk(
    site: SimulatedSite, workloads: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_DEPLOYMENT_BASE_PATH", "$DATA/dagster-slurm")
    monkeypatch.setenv("DATA_ROOT", "$SCRATCH/rivers")
    outcome = materialize(WHERE, workloads, request=SHORT)
    assert outcome.error == ""
    (metadata,) = outcome.materializations[None]
    assert str(metadata["run_directory"]).startswith(f"{CERTIFICATE_USER.data}/dagster-slurm/runs/probe-")
    assert (metadata["data"], metadata["temporary"]) == (f"{CERTIFICATE_USER.scratch}/rivers", "/local")
    assert "temporary files in /local" in capfd.readouterr().err
    assert as_user(site, "ls").split() == []  # nothing of it is in the home


@pytest.mark.usefixtures("on_supercomputer")
def test_ray_has_its_folder_on_the_nodes_disk(site: SimulatedSite, workloads: Path) -> None:
    workload = (
        PIPES
        + """
    import glob, os, tempfile
    folders = glob.glob("/local/r-*")
    pipes.report_asset_materialization(metadata={"folders": folders, "temporary": tempfile.gettempdir()})
    """
    )
    launcher = RayLauncher(ray_start_args=["--include-dashboard=false"])
    outcome = materialize(workload, workloads, launcher=launcher, request=SHORT)
    assert outcome.error == ""
    (metadata,) = outcome.materializations[None]
    assert len(metadata["folders"]) == 1
    assert metadata["temporary"] == "/local"
    wait_until(lambda: not site.run_on_node("n4001", "ls -d /local/r-*", check=False).stdout, "it is removed")


@pytest.mark.usefixtures("on_supercomputer")
def test_a_folder_that_compute_nodes_do_not_see(
    site: SimulatedSite, workloads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_DEPLOYMENT_BASE_PATH", "/tmp/dagster-slurm")
    monkeypatch.setenv("DATA_ROOT", CERTIFICATE_USER.data)
    outcome = materialize(WHERE, workloads, request=SHORT)
    assert "the job could not start in its run directory (Slurm: FAILED " in outcome.error
    assert "SLURM_DEPLOYMENT_BASE_PATH" in outcome.error
