"""docs/another-site.md is true: one entry and one dotenv file, with a user who has a plain key and nothing else."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slurm_in_a_box import CPU_PARTITION, GPU_PARTITION, PLAIN_KEY_USER, SimulatedSite
from support import DOWNLOADS, ROOT

pytestmark = pytest.mark.cluster

PAGE = (ROOT / "packages" / "dagster-sbatch" / "docs" / "another-site.md").read_text()
LOCATION = '''\
"""One asset, and what there is to say about the site."""
import json, sys
from pathlib import Path
import dagster as dg
from jobs import credentials
from resources import PROJECT, build_resources
from dagster_sbatch.auth import check_health
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.inspect.diagnosis import examine
from dagster_sbatch.launchers import ScriptLauncher
from dagster_sbatch.setting_files import load_settings
from dagster_sbatch.slurm import SlurmRequest

@dg.asset
def probe(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    return compute.run(
        context, workload=Path("workloads/probe.py"), launcher=ScriptLauncher(),
        request=SlurmRequest(time_limit="5", mem="100M"),
    ).get_materialize_result()

settings = PROJECT.load_settings(supercomputer=True)
looked = examine(PROJECT, open_instance=dg.DagsterInstance.ephemeral)
found = {"links": [[name, *link] for name, link in looked]}
health = check_health(settings)
found["health"] = [health.verdict, health.summary, list(health.notes)]
with dg.DagsterInstance.ephemeral() as instance:
    tick = credentials.refresh_credentials_sensor(dg.build_sensor_context(instance=instance))
    found["tick"] = tick.skip_reason.skip_message
    job = credentials.refresh_credentials_job
    found["job"] = job.execute_in_process(instance=instance, raise_on_error=False).success
if "run" in sys.argv:
    result = dg.materialize([probe], resources=build_resources())
    (event,) = result.asset_materializations_for_node("probe")
    found["metadata"] = {name: value.value for name, value in event.metadata.items()}
print(json.dumps(found))
'''
WORKLOAD = """\
import getpass, os
from dagster_pipes import open_dagster_pipes
with open_dagster_pipes() as pipes:
    numbers = {"user": getpass.getuser(), "proxy": os.environ["HTTPS_PROXY"], "account": os.environ["SLURM_JOB_QOS"]}
    pipes.report_asset_materialization(metadata=numbers)
"""


@pytest.fixture
def project(site: SimulatedSite, tmp_path: Path, client_home: Path) -> Path:
    """A clone with the page's entry and dotenv file; names, addresses and submit plugin are the simulated site's."""
    folder = tmp_path / "project"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), folder], check=True)
    entry, file = (re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)[0] for kind in ("python", "bash"))
    shutil.copy(site.login.plain_key, client_home / ".ssh" / "id_borealis")
    (client_home / ".ssh" / "id_borealis").chmod(0o600)
    names = {
        '"borealis": {': '"borealis": {"script_header": ["#ASC --vanilla"],',
        '"time_limit": "30"': '"time_limit": "10"',
        "accelerated": GPU_PARTITION,
        "batch": CPU_PARTITION,
        "login.borealis.example": site.login.address,
        "/home/me/": f"{PLAIN_KEY_USER.home}/",
        "USER=me\n": f"USER={PLAIN_KEY_USER.name}\n",
    }
    for old, new in names.items():
        entry, file = entry.replace(old, new), file.replace(old, new)
    overrides = folder / "resources" / "__init__.py"
    head = "SUPERCOMPUTER_SITE_OVERRIDES: dict[str, dict[str, Any]] = {\n"
    text = overrides.read_text()
    assert head in text
    overrides.write_text(text.replace(head, head + entry))
    (folder / "envs" / ".env.borealis").write_text(file)
    (folder / "workloads").mkdir()
    (folder / "workloads" / "probe.py").write_text(WORKLOAD)
    (folder / "look.py").write_text(LOCATION)
    subprocess.run(["git", "-C", folder, "add", "workloads"], check=True)
    return folder


def look(project: Path, site: SimulatedSite, *arguments: str) -> Any:
    """What the code location finds with these files alone: no variable is set but the interpreter of the workloads."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(project.parent / "home"),
        "SLURM_PYTHON": site.environment()["SLURM_PYTHON"],
        "DAGSTER_DEPLOYMENT": "staging_supercomputer",
    }
    done = subprocess.run(
        [sys.executable, "look.py", *arguments],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_plain_key_is_all_that_is_needed(project: Path, site: SimulatedSite) -> None:
    found = look(project, site, "run")
    states = {name: state for name, state, *_ in found["links"]}
    assert {name for name, state in states.items() if state != "ok"} <= {"open files"}, found["links"]
    assert "environment" in states
    verdict, summary, notes = found["health"]
    assert verdict == "ok"
    assert summary.endswith("id_borealis: nothing expires")
    assert notes == []
    assert found["tick"] == summary
    assert found["job"] is True
    metadata = found["metadata"]
    assert metadata["user"] == PLAIN_KEY_USER.name
    assert metadata["proxy"] == "http://proxy.borealis.example:3128"
    assert (metadata["partition"], metadata["qos"]) == (CPU_PARTITION, f"dev_{CPU_PARTITION}")
    assert not list((project.parent / "home" / ".config").glob("**/*.env"))


def test_a_key_that_is_missing_is_asked_for_and_not_a_token(project: Path, site: SimulatedSite) -> None:
    (project.parent / "home" / ".ssh" / "id_borealis").unlink()
    found = look(project, site)
    name, state, problem, _ = found["links"][-1]
    assert (name, state) == ("credentials", "broken")
    assert "id_borealis does not exist" in problem
    assert "plain key" in problem
    assert "ssh-keygen -t ed25519 -N '' -f " in problem
    assert found["health"][0] == "broken"
    assert found["tick"] == found["health"][1]
    assert found["job"] is False


def test_the_doctor_is_asked_as_the_page_says(project: Path, site: SimulatedSite) -> None:
    command = "SLURM_SUPERCOMPUTER_SITE=borealis scripts/doctor"
    assert f"\n{command} " in PAGE
    own = {"PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}", "HOME": str(project.parent / "home")}
    environment = {**os.environ, **own, **DOWNLOADS}
    done = subprocess.run(
        ["bash", "-c", command], cwd=project, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"login             {PLAIN_KEY_USER.name} at {site.login.address}" in done.stdout
