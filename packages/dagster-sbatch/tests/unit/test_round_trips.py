"""How often a run waits for the login node's answer: a real client and agent, with commands in place of Slurm's."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dagster_sbatch.environments.code import read_code
from dagster_sbatch.environments.deployed import Environments, EnvironmentSpec, Progress
from dagster_sbatch.environments.lockfile import read_lock
from dagster_sbatch.slurm.gateway import Gateway, Questions, make_gateway
from dagster_sbatch.slurm.gateway.channel import Channel, Frame
from resources import PROJECT
from support.agent_fixtures import put
from support.workload_asset import PIPES, materialize

SBATCH = """\
cd "$3"
basename "$3" >"$HOME/name"
SLURM_JOB_ID=7 setsid bash job.sh >stdout 2>stderr </dev/null &
echo 7"""
SCONTROL = """\
echo "JobName=$(cat "$HOME/name") JobState=COMPLETED ExitCode=0:0 SubmitTime=1 StartTime=1 EndTime=2" """


@pytest.fixture
def exchanges(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The requests of all clients; those that are sent without waiting for an answer in between are one exchange."""
    found: list[list[str]] = []
    send, receive = Channel.send, Channel.receive
    answered = True

    def record_request(channel: Channel, data: bytes = b"", **request: Any) -> int:
        nonlocal answered
        if request["do"] != "server.ping":
            if answered:
                found.append([])
            answered = False
            found[-1].append(request["do"])
        return send(channel, data, **request)

    def record_answer(channel: Channel) -> Frame | None:
        nonlocal answered
        frame = receive(channel)
        answered |= frame is not None
        return frame

    monkeypatch.setattr(Channel, "send", record_request)
    monkeypatch.setattr(Channel, "receive", record_answer)
    return found


@pytest.fixture
def workloads(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for workloads, on a login node whose sbatch starts the job at once."""
    put(slurm, "sbatch", SBATCH)
    put(slurm, "scontrol", SCONTROL)
    variables = {
        "SLURM_SUPERCOMPUTER_SITE": "musica",
        "SLURM_EDGE_NODE_HOST": "localhost",
        "SLURM_DEPLOYMENT_BASE_PATH": str(slurm.parent / "base"),
        "SLURM_PYTHON": sys.executable,
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    folder = slurm.parent / "workloads"
    folder.mkdir()
    return folder


@pytest.fixture
def gateway(workloads: Path) -> Iterator[Gateway]:
    made = make_gateway(PROJECT.load_settings(), PROJECT.load_site("musica"))
    yield made
    made.close()


def environments_of(gateway: Gateway) -> Environments:
    return Environments(gateway, str(PROJECT.load_settings().deployment_base_path), PROJECT.load_site("musica"))


def spec_of(workloads: Path, python: str = sys.executable) -> EnvironmentSpec:
    return EnvironmentSpec(read_code(workloads), read_lock(PROJECT.lock), python)


@pytest.mark.parametrize("deployment", ["staging_supercomputer", "production_supercomputer"])
def test_a_run_whose_environment_exists_waits_twice(
    deployment: str, gateway: Gateway, workloads: Path, exchanges: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks for all that it has to know, then submits and follows."""
    monkeypatch.setenv("DAGSTER_DEPLOYMENT", deployment)
    workload = f"{PIPES}    pipes.report_asset_materialization(metadata={{'rows': 7}})\n"
    (workloads / "probe workload.py").write_text(workload)
    environments = environments_of(gateway)
    environments.publish({"": environments.ensure(spec_of(workloads), Progress(lambda _: None))}, "")
    exchanges.clear()
    outcome = materialize(workload, workloads)
    assert outcome.error == ""
    assert outcome.materializations[None][0]["rows"] == 7
    assert exchanges == [["claims.claim"], ["jobs.run"]]


def test_a_claim_does_not_depend_on_the_environment(gateway: Gateway, workloads: Path) -> None:
    """A step that adopts a job does not need it: it is not searched for while a job runs, and may not be there."""
    (workloads / "probe.py").touch()
    found, lost = (
        Questions(environment=environments_of(gateway).request_find(spec_of(workloads, python)))
        for python in (sys.executable, "/not/there/python")
    )
    runs = workloads.parent / "base" / "runs"
    answer = gateway.claim(str(runs), "family", "token", "me", found).environment
    assert answer
    assert answer["ready"] is False
    assert gateway.claim(str(runs), "family", "token", "me", lost).environment is None
    (runs / "family-1").mkdir(mode=0o700)
    (runs / "family-1" / "tried").touch()
    claim = gateway.claim(str(runs), "family", "token", "me", found)
    assert (claim.attempts[0].over, claim.environment) == (False, None)
