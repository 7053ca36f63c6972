"""The doctor finds the first thing that is broken, whichever it is, and says how to fix it."""

import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch.inspect.asset_preview import find_submitting
from dagster_sbatch.inspect.diagnosis import CHECKS, Finding, examine
from dagster_sbatch.sites import SITES
from musica_pipelines.definitions import defs
from resources import PROJECT
from slurm_in_a_box import CERTIFICATE_USER, CPU_PARTITION, TCSH_USER, SimulatedSite
from slurm_in_a_box.slurm_configuration import ACCOUNT, SECOND_ACCOUNT, SPENT_ACCOUNT
from support import ROOT, forked

pytestmark = pytest.mark.cluster
CHAIN = list(CHECKS)
Set = Callable[..., None]


@pytest.fixture
def set_variables(monkeypatch: pytest.MonkeyPatch) -> Set:
    def set_them(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_them


@pytest.fixture(autouse=True)
def in_order(site: SimulatedSite, set_variables: Set, client_home: Path) -> None:
    """A user for whom everything works."""
    set_variables(**site.environment(), HOME=str(client_home))


def examined(overrides: dict[str, Any] | None = None) -> dict[str, Finding]:
    project = replace(PROJECT, site_overrides=overrides or PROJECT.site_overrides)
    return dict(examine(project, open_instance=dg.DagsterInstance.ephemeral))


def broken(name: str, overrides: dict[str, Any] | None = None) -> Finding:
    """What is broken, which is found last and has that name."""
    findings = examined(overrides)
    assert [each for each, found in findings.items() if found.state == "broken"] == [name] == list(findings)[-1:]
    assert findings[name].fix
    return findings[name]


@pytest.mark.smoke
def test_all_is_in_order(site: SimulatedSite) -> None:
    findings = examined()
    assert list(findings) == CHAIN
    others = {name: finding.state for name, finding in findings.items() if finding.state != "ok"}
    assert others == {"open files": "warning"}
    storage = findings["storage"].found
    for name in ("HOME", "DATA", "SCRATCH"):
        assert re.search(rf"\${name} /\S+: [\d.,]+ GB and [\d,]+ files free", storage), storage
    assert findings["projects"].found.endswith(f"jobs are charged to {ACCOUNT} (your default)")
    assert ".doctor" not in site.run_on_login(CERTIFICATE_USER, "find ~").stdout
    assert not site.squeue("--noheader")


def test_production_without_anything_published(set_variables: Set) -> None:
    set_variables(DAGSTER_DEPLOYMENT="production_supercomputer")
    assert broken("environment").fix == "scripts/deploy_environment.py"


def test_a_python_of_the_user_that_lacks_the_packages(set_variables: Set) -> None:
    set_variables(SLURM_PYTHON="/usr/bin/python3")
    assert "SLURM_PYTHON=/usr/bin/python3 cannot import dagster_pipes" in broken("environment").found


def test_a_shell_of_another_kind_is_no_hindrance(site: SimulatedSite, set_variables: Set, tmp_path: Path) -> None:
    site.mint_certificate(tmp_path / "id_tcsh", TCSH_USER)
    set_variables(
        SLURM_EDGE_NODE_USER=TCSH_USER.name,
        SLURM_EDGE_NODE_KEY_PATH=str(tmp_path / "id_tcsh"),
        SLURM_DEPLOYMENT_BASE_PATH=f"{TCSH_USER.home}/with spaces, 'quotes' and $HOME",
    )
    assert list(examined()) == CHAIN


def test_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASC_AUTHENTIK_API_TOKEN")
    assert "One of these is enough" in broken("credentials").found


def test_no_certificate(site: SimulatedSite) -> None:
    with site.faults.certificate_authority_down():
        assert "cannot be reached" in broken("certificate").found


def test_an_unknown_name(set_variables: Set) -> None:
    set_variables(SLURM_EDGE_NODE_HOST="nowhere.invalid")
    assert "nowhere.invalid" in broken("name").found


def test_a_broken_client_configuration(client_home: Path) -> None:
    (client_home / ".ssh" / "config").write_text("Host *\nPort many\n")
    assert "Port many" in broken("name").found


def test_a_port_that_refuses(site: SimulatedSite) -> None:
    with site.faults.ssh_refused():
        assert "refused" in broken("port").found


def test_an_unknown_host_key(client_home: Path) -> None:
    (client_home / ".ssh" / "known_hosts").unlink()
    assert "SHA256:" in broken("login").found


def test_the_authority_of_the_sites_entry(site: SimulatedSite, client_home: Path) -> None:
    """For a user without a line in known_hosts it is enough; the user's own `@revoked` wins."""
    known_hosts = client_home / ".ssh" / "known_hosts"
    line = known_hosts.read_text().strip()
    key = " ".join(line.split()[2:4])
    known_hosts.unlink()
    overrides: dict[str, Any] = {"musica": {"host_authorities": [*SITES["musica"]["host_authorities"], line]}}
    findings = examined(overrides)
    assert list(findings) == CHAIN
    shown = subprocess.run(["ssh-keygen", "-lf", "-"], input=key, capture_output=True, text=True, check=True).stdout
    assert shown.split()[1] in findings["host authority"].found
    assert findings["host authority"].found.endswith("compare it with https://docs.asc.ac.at")
    known_hosts.write_text(f"@revoked * {key}\n")
    assert "its key is revoked" in broken("login", overrides).found


def test_a_login_that_is_refused(set_variables: Set) -> None:
    set_variables(SLURM_EDGE_NODE_USER=TCSH_USER.name)
    assert "has refused to log in" in broken("login").found


@pytest.mark.usefixtures("shells_that_end_at_once")
def test_a_login_shell_that_runs_nothing(site: SimulatedSite) -> None:
    site.run_on_login(CERTIFICATE_USER, "printf 'echo closed for maintenance; exit 1\\n' > ~/.bashrc")
    assert "closed for maintenance" in broken("login").found


def test_no_slurm_on_the_path(site: SimulatedSite) -> None:
    site.run_on_login(
        CERTIFICATE_USER,
        "mkdir bin; for c in df python3; do ln -s $(command -v $c) bin; done; "
        "echo 'PATH=$HOME/bin' | tee ~/.bashrc > ~/.bash_profile",
    )
    assert broken("Slurm").found == "not on PATH of the login node: sbatch, squeue, scancel, scontrol, sinfo"


def test_a_controller_that_is_down(site: SimulatedSite) -> None:
    with site.faults.controller_down():
        assert "DOWN" in broken("Slurm").found


def with_partition(name: str, qos: str) -> dict[str, Any]:
    new = {} if name in SITES["musica"]["partitions"] else {"cores": 8, "mem": "16G"}
    return {"musica": {"partitions": {name: {**new, "qos": {qos: {}}}}}}


def test_a_partition_that_is_not_there() -> None:
    finding = broken("partitions", with_partition("zen5_2304_b200x8", "zen5"))
    assert finding.found == "there is no partition zen5_2304_b200x8"
    assert "zen4_0768, zen4_0768_h100x4" in finding.fix


def test_a_qos_that_the_partition_does_not_take() -> None:
    finding = broken("partitions", with_partition("zen4_0768", "faster_zen4_0768"))
    assert finding.found == "partition zen4_0768 does not allow QoS faster_zen4_0768"


def test_a_project_that_is_not_the_users(set_variables: Set) -> None:
    set_variables(SLURM_ACCOUNT="p99999")
    finding = broken("projects")
    assert finding.found == "p99999 (SLURM_ACCOUNT) is not a project of yours"
    assert ACCOUNT in finding.fix


def test_slurm_takes_a_project_in_capital_letters(set_variables: Set) -> None:
    set_variables(SLURM_ACCOUNT=ACCOUNT.upper())
    finding = examined()["projects"]
    assert finding.found.endswith(f"jobs are charged to {ACCOUNT} (SLURM_ACCOUNT)")


def test_a_project_without_budget(site: SimulatedSite, set_variables: Set) -> None:
    set_variables(SLURM_ACCOUNT=SPENT_ACCOUNT, SLURM_QOS="")
    finding = examined()["projects"]
    assert finding.state == "warning"
    assert f"{SECOND_ACCOUNT}; jobs are charged to {SPENT_ACCOUNT} (SLURM_ACCOUNT), without QoS" in finding.found
    set_variables(SLURM_QOS=CPU_PARTITION)
    assert broken("projects").found == f"project {SPENT_ACCOUNT} may not use SLURM_QOS={CPU_PARTITION}"


def test_accounting_that_does_not_answer(site: SimulatedSite) -> None:
    with site.faults.accounting_off():
        findings = examined()
    assert findings["projects"].state == "warning", findings["projects"]
    assert "accounting does not answer" in findings["projects"].found
    assert "environment" in findings


def test_a_folder_that_is_not_the_users(set_variables: Set) -> None:
    set_variables(SLURM_DEPLOYMENT_BASE_PATH="/root/dagster")
    assert "/root cannot be written to" in broken("deployment folder").found


def test_a_full_disk(site: SimulatedSite) -> None:
    with site.faults.disk_full():
        assert "No space left" in broken("deployment folder").found


def test_what_slurm_says_to_the_assets_job_scripts(set_variables: Set) -> None:
    def tried() -> dict[str, Finding]:
        findings = list(examine(PROJECT, defs, dg.DagsterInstance.ephemeral))
        assert [name for name, _ in findings[: len(CHAIN)]] == CHAIN
        return dict(findings[len(CHAIN) :])

    with dg.DagsterInstance.ephemeral() as instance:
        submitting = find_submitting(defs, instance)
    findings = tried()
    assert list(findings) == [f"asset {name}" for name, _ in submitting]
    for finding in findings.values():
        assert finding.state == "ok", finding
        assert " to start at " in finding.found
        assert finding.found.endswith(f"charged to project {ACCOUNT}")
    set_variables(SLURM_KEEP_WITHIN_BUDGET="true", SLURM_BUDGET_GPU_HOURS="0.01", SLURM_BUDGET_START="2026-11-01")
    refused = [finding.found for finding in tried().values() if finding.state == "broken"]
    assert refused
    for found in refused:
        assert "SLURM_KEEP_WITHIN_BUDGET is set, so nothing is submitted" in found
    set_variables(SLURM_KEEP_WITHIN_BUDGET="false", SLURM_RESERVATION="nobodys", DAGSTER_DEPLOYMENT="development")
    findings = tried()
    assert {finding.state for finding in findings.values()} == {"broken"}  # not the first one alone
    for name, partition in submitting:
        assert "reservation" in findings[f"asset {name}"].found
        command = f"scripts/preview {name}" + (f" --partition '{partition}'" if partition else "")
        fix = findings[f"asset {name}"].fix
        assert fix.startswith("do what it says, or correct the asset; if all ")
        assert fix.endswith(f"SUPERCOMPUTER_SITE_OVERRIDES. To ask again:\n  {command} --test-only")


def test_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return forked.run([str(ROOT / "scripts" / "doctor"), *options], os.environ, tmp_path)

    done = run("--json")
    assert done.returncode == 0, done.stderr
    assert [finding["name"] for finding in json.loads(done.stdout)][: len(CHAIN)] == CHAIN
    assert run().stdout.endswith("\nready, with 1 warning\n")
    monkeypatch.setenv("SLURM_ACCOUNT", "p99999")
    done = run()
    assert done.returncode == 1
    assert "\nbroken  projects          p99999 (SLURM_ACCOUNT) is not a project of yours\n" in done.stdout
    assert "\n                          -> set SLURM_ACCOUNT to one of p70001, " in done.stdout
    assert done.stdout.endswith("\nfirst thing to fix: projects\n")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert run("--no-such-option").returncode == 2
