"""What production runs on the simulated site: published, rolled back, removed; scripts/deploy_environment.py."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dagster_sbatch.commands.deploy_environment import check
from dagster_sbatch.environments.code import read_code
from dagster_sbatch.environments.deployed import EnvironmentSpec
from dagster_sbatch.inspect.remote_runs import open_runs
from dagster_sbatch.project import Project
from dagster_sbatch.slurm.gateway import RefusedError
from resources import PROJECT
from slurm_in_a_box import SimulatedSite, wait_until
from support import ROOT
from support.environment_fixtures import FOLDER, Client, failure_of, materialize, metadata, names, there
from support.environment_fixtures import client as client
from support.environment_fixtures import fetched as fetched
from support.environment_fixtures import gathered as gathered
from support.environment_fixtures import in_order as in_order
from support.environment_fixtures import index as index
from support.environment_fixtures import site_python as site_python
from support.environment_fixtures import wanted as wanted
from support.environment_fixtures import workload as workload

pytestmark = pytest.mark.cluster


@pytest.mark.smoke
@pytest.mark.usefixtures("fetched")
def test_production_runs_only_what_was_published(
    site: SimulatedSite,
    workload: Path,
    client: Client,
    site_python: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DAGSTER_DEPLOYMENT", "production_supercomputer")
    monkeypatch.setattr(Project, "workloads", workload.parent)
    assert "nothing has been published" in failure_of(materialize(workload))
    assert site.squeue("--noheader") == ""

    assert client.environments.publish({"": client.ensure()}, "v1")
    assert metadata(materialize(workload))["word"] == "one"

    helper = workload.parent / "helpers" / "deep" / "__init__.py"
    helper.write_text("WORD = 'two'\n")
    said = failure_of(materialize(workload))
    assert f"{helper} is changed" in said
    assert "revision v1" in said
    assert "scripts/deploy_environment.py" in said

    client.wanted = EnvironmentSpec(read_code(workload.parent), client.wanted.lock)
    assert client.environments.publish({"": client.ensure()}, "v2")
    assert not client.environments.publish({"": client.ensure()}, "v2")
    assert metadata(materialize(workload))["word"] == "two"

    assert client.environments.roll_back()["revision"] == "v1"
    assert "is changed" in failure_of(materialize(workload))
    helper.write_text("WORD = 'one'\n")
    assert metadata(materialize(workload))["word"] == "one"
    with pytest.raises(RefusedError, match="nothing to go back to"):
        client.environments.roll_back()

    monkeypatch.setenv("SLURM_PYTHON", site_python[0])
    assert f"SLURM_PYTHON: {site_python[0]}, was not set" in failure_of(materialize(workload))


@pytest.mark.usefixtures("fetched")
def test_the_check_prints_what_would_be_sent_and_changes_nothing(
    site: SimulatedSite, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(client.environments, {"": client.wanted}) == 1
    printed = capsys.readouterr().out
    assert "6.3 MB  ballast-1.0-py3-none-any.whl\n" in printed
    assert "MB in 3 wheels would be sent, and 0." in printed
    assert "nothing has been published yet" in printed
    assert names(site) == []
    client.environments.publish({"": client.ensure()}, "")
    assert check(client.environments, {"": client.wanted}) == 0
    assert "exists: nothing would be sent" in capsys.readouterr().out


@pytest.mark.usefixtures("fetched")
def test_old_environments_go_but_none_that_a_job_uses(site: SimulatedSite, workload: Path, client: Client) -> None:
    (workload.parent / "helpers" / "deep" / "__init__.py").write_text("import time\ntime.sleep(600)\n")
    context = threading.Thread(target=materialize, args=(workload,), daemon=True)
    context.start()
    wait_until(lambda: "RUNNING" in site.squeue("--noheader", "--format=%T"), "a running job", 120)
    (live,) = names(site)
    idle = client.ensure().name
    there(site, f"touch -d '2 days ago' {FOLDER}/{live} {FOLDER}/{idle}")

    settings = PROJECT.load_settings()
    with open_runs(settings, PROJECT) as runs:
        assert runs.environments_in_use() == {live}
    script = ROOT / "scripts" / "deploy_environment.py"
    command = [sys.executable, str(script), "--remove", "--older-than", "1"]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"removed 1: {idle}\n"), done.stderr
    assert names(site) == [live]
    assert there(site, f"ls -d {FOLDER}/packages/*")  # the live one's

    site.cluster.cancel_all()
    context.join(120)
    assert not context.is_alive()
    there(site, f"touch -d '2 days ago' {FOLDER}/* {FOLDER}/packages/* {FOLDER}/wheels/*")
    assert client.environments.remove([live]) == [live]
    assert there(site, f"ls {FOLDER} {FOLDER}/packages {FOLDER}/wheels").split("\n") == [
        f"{FOLDER}:", "packages", "wheels", "", f"{FOLDER}/packages:", "", f"{FOLDER}/wheels:",
    ]  # fmt: skip


def test_the_script_with_an_interpreter_that_exists_there(site: SimulatedSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real lock: `ray` and `dagster_pipes` are imported on the login node."""
    monkeypatch.setenv("SLURM_PYTHON", site.environment()["SLURM_PYTHON"])
    script = ROOT / "scripts" / "deploy_environment.py"

    def run(*options: str) -> tuple[int, str]:
        done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    code, said = run("--check")
    assert (code, "nothing has been published yet" in said) == (1, True), said
    assert "in 0 wheels would be sent" in said
    assert names(site) == []
    code, said = run()
    assert (code, "published: " in said) == (0, True), said
    code, said = run()
    assert (code, "published already" in said) == (0, True), said
    code, said = run("--check")
    assert (code, "production runs what is here" in said) == (0, True), said
    assert "current" in run("--list")[1]
    assert run("--rollback")[0] == 3
    assert run("--remove")[0] == 2
    monkeypatch.setenv("SLURM_PYTHON", "/usr/bin/no-python")
    code, said = run()
    assert (code, "SLURM_PYTHON=/usr/bin/no-python does not run on login" in said) == (3, True), said
    monkeypatch.setenv("SLURM_QOS", "")
    monkeypatch.setenv("SLURM_EDGE_NODE_PORT", "no")
    assert run("--list")[0] == 2
