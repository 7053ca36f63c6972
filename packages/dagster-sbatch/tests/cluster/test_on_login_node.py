"""Dagster on the login node itself: the same assets, without SSH."""

import json
import shutil
import threading

import pytest

from slurm_in_a_box import CERTIFICATE_USER, CPU_PARTITION, SimulatedSite, wait_until
from slurm_in_a_box.interpreter import interpreter
from slurm_in_a_box.slurm_configuration import SECOND_ACCOUNT
from support import ENGINE, ROOT
from support.background import nobody_left

pytestmark = pytest.mark.cluster

PROGRAM = """\
import json, os
from pathlib import Path
import dagster as dg
from resources import PROJECT, build_resources
from dagster_sbatch.inspect.diagnosis import examine
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.launchers import ScriptLauncher
from dagster_sbatch.upkeep.budget_asset import make_budget_sensor
from dagster_sbatch.upkeep.cleaning import make_cleaning_sensor
from dagster_sbatch.upkeep.credentials import make_credential_refresh

@dg.asset
def probe(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    workload = Path(__file__).parent / "workloads" / "workload.py"
    return compute.run(context, workload=workload, launcher=ScriptLauncher()).get_materialize_result()

for sensor in make_credential_refresh(PROJECT).sensor, make_cleaning_sensor(PROJECT), make_budget_sensor(PROJECT):
    with dg.build_sensor_context(instance=dg.DagsterInstance.ephemeral()) as context:
        print(f"{sensor.name}: {sensor.evaluate_tick(context).skip_message}")
for name, found in examine(PROJECT, open_instance=dg.DagsterInstance.ephemeral):
    print(f"{name}: {found.state} {found.found}")
result = dg.materialize([probe], resources=build_resources())
(event,) = result.asset_materializations_for_node("probe")
print(json.dumps({name: value.value for name, value in event.metadata.items()}))
"""
WORKLOAD = f"""\
import pathlib, time
from dagster_pipes import open_dagster_pipes
with open_dagster_pipes() as pipes:
    while not pathlib.Path("{CERTIFICATE_USER.home}/go-on").exists():
        time.sleep(0.1)
    pipes.report_asset_materialization(metadata={{"rows": 7}})
"""


def test_a_run_without_ssh(site: SimulatedSite) -> None:
    project = site.layout.home / CERTIFICATE_USER.name / "project"
    (project / "workloads").mkdir(parents=True)
    for folder in (ROOT / "resources", ENGINE):
        shutil.copytree(folder, project / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "requirements", project / "requirements")
    (project / "program.py").write_text(PROGRAM)
    (project / "workloads" / "workload.py").write_text(WORKLOAD)
    python = str(interpreter(site.layout))
    variables = {
        "PYTHONDONTWRITEBYTECODE": "1",
        "DAGSTER_DEPLOYMENT": "staging_supercomputer",
        "SLURM_SUPERCOMPUTER_SITE": "musica",
        "SLURM_EDGE_NODE_HOST": "localhost",
        "SLURM_DEPLOYMENT_BASE_PATH": f"{CERTIFICATE_USER.home}/dagster-slurm",
        "SLURM_PYTHON": python,
        "SLURM_QOS": CPU_PARTITION,
        "SBATCH_ACCOUNT": SECOND_ACCOUNT,
        "ASC_OIDC_APP_PASSWORD": "not to be passed on",
    }
    command = ["env", *(f"{name}={value}" for name, value in variables.items())]
    command += [python, f"{CERTIFICATE_USER.home}/project/program.py"]
    said: list[str] = []

    def run() -> None:
        said.append(site.machines["login01"].run(command, CERTIFICATE_USER, timeout=180).stdout)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: site.squeue("--noheader", "--states=RUNNING"), "the job runs", 120)
    agent = next(each for each in site.processes_on_login() if "import sys, zlib" in each.command)
    assert "ASC_" not in site.run_on_node(agent.machine, f"cat /proc/{agent.pid}/environ").stdout
    site.run_on_login(CERTIFICATE_USER, "touch go-on")
    thread.join(180)
    for line in (
        "refresh_credentials_when_due: Dagster runs on the login node",
        "clean_run_directories: nothing is old enough",
        "observe_budget: ",
        "settings: ok staging_supercomputer, musica\n",
        "login: ok this machine",
        "Slurm: ok Slurmctld",
        "jobs: ok",
    ):
        assert f"\n{line}" in f"\n{said[0]}"
    metadata = json.loads(said[0].splitlines()[-1])
    assert (metadata["rows"], metadata["account"]) == (7, SECOND_ACCOUNT)
    assert metadata["attach"] == f"srun --jobid={metadata['job_id']} --overlap --pty bash"
    site.wait_for_job(metadata["job_id"], "COMPLETED")
    nobody_left(site)
