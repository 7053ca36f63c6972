"""What a project has left, compared with the highest possible cost of a call."""

import json
import threading
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch.costs.budget import check_budget, find_shortage
from dagster_sbatch.inspect.asset_preview import preview_asset
from dagster_sbatch.inspect.dry_run import try_script
from dagster_sbatch.launchers import ScriptLauncher
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import SlurmRequest, allocate
from dagster_sbatch.slurm.gateway import Gateway, JobLife, Projects, Queued, Share, StoppedError, Usage
from dagster_sbatch.slurm.gateway.agent.server import HELLO
from dagster_sbatch.slurm.gateway.channel import Channel
from resources import PROJECT

SITE = PROJECT.load_site("musica")
NOW = datetime(2026, 11, 27, tzinfo=UTC)
GPUS = Share("p1", "", "gres/gpu", limit=600, used=240, running=60)
WAITS = Queued(2, running=False, user="xy", project="p1", seconds=1800, tres={"gres/gpu": 1, "node": 1})
ELSEWHERE = "charge another project (SLURM_ACCOUNT, or account=... of the request)"


def usage(**fields: Any) -> Usage:
    known: dict[str, Any] = {
        "user": "xy", "projects": ["p1", "p2"], "default": "p1", "since": None, "now": NOW, "jobs": None,
        "queue": [WAITS], "parents": {"p1": "root", "p2": "root"}, "shares": [GPUS], "private": False, "trouble": [],
    }  # fmt: skip
    return Usage(**{**known, **fields})


def find(found: Usage, tasks: int = 1, **fields: Any) -> tuple[str | None, list[str]]:
    request = SlurmRequest(**{"gpus_per_node": 1, "time_limit": "04:00:00", **fields})
    shortage, notes = find_shortage(allocate(request, SITE), tasks, found, Settings.model_validate({}))
    return shortage, list(notes)


def test_what_waits_and_runs_is_subtracted_and_the_refusal_has_the_numbers() -> None:
    assert find(usage()) == (None, [])  # 10 - 4 - 1 - 1: just enough
    assert find(usage(), time_limit="04:01:00") == (
        "This call of compute.run could cost 4.02 GPU-hours (1 node x 1 GPU x 04:01:00). Project p1 has 4 free: "
        "of 10 GPU-hours (GrpTRESMins of p1), 4 are used, running jobs may use 1 more, and waiting jobs 1. "
        f"SLURM_KEEP_WITHIN_BUDGET is set, so nothing is submitted. Request less, wait until other jobs have ended, or "
        f"{ELSEWHERE}",
        [],
    )
    little = usage(queue=[replace(WAITS, seconds=1803)])
    assert "could cost 4 GPU-hours (1 node x 1 GPU x 04:00:00). Project p1 has 3.998 free:" in str(find(little)[0])
    hidden = str(find(usage(private=True), time_limit="04:01:00")[0])
    assert (
        "running jobs may use 1 more, and waiting jobs 1 (waiting jobs of others are not known). SLURM_KEEP" in hidden
    )
    less = usage(shares=[replace(GPUS, limit=60, used=90)])
    assert (
        "could cost 1 GPU-hour (1 node x 1 GPU x 01:00:00). Project p1 has 0 free: of 1 GPU-hour (GrpTRESMins"
        in str(find(less, time_limit="01:00:00")[0])
    )
    assert find(usage(), account="P1", time_limit="04:01:00") == find(usage(), time_limit="04:01:00")  # as for Slurm
    assert "could cost 8 GPU-hours (2 tasks x 1 node x 1 GPU x 04:00:00). Project" in str(find(usage(), 2)[0])


@pytest.mark.parametrize(
    ("used", "running", "queue", "advice"),
    [
        (240, 60, [], f"Request less, wait until other jobs have ended, or {ELSEWHERE}"),
        (420, 0, [], f"Request less, or {ELSEWHERE}"),
        (540, 60, [WAITS], f"Wait until other jobs have ended, or {ELSEWHERE}"),
        (600, 60, [WAITS], f"C{ELSEWHERE[1:]}, or ask the centre for more"),
        (900, 0, [], f"C{ELSEWHERE[1:]}, or ask the centre for more"),
    ],
)
def test_a_refusal_advises_what_helps(used: int, running: int, queue: list[Queued], advice: str) -> None:
    found = usage(shares=[replace(GPUS, used=used, running=running)], queue=queue)
    assert str(find(found, time_limit="10:00:00")[0]).endswith(f"so nothing is submitted. {advice}")


@pytest.mark.parametrize(("used", "advice"), [(420, "Request less"), (900, "Ask the centre for more")])
def test_the_only_project_of_a_user_has_no_other_beside_it(used: int, advice: str) -> None:
    found = usage(projects=["p1"], shares=[replace(GPUS, used=used, running=0)], queue=[])
    assert str(find(found, time_limit="10:00:00")[0]).endswith(f"so nothing is submitted. {advice}")


@pytest.mark.parametrize("projects", [["p1", "p2"], []], ids=["known", "not known"])
def test_the_owner_of_a_budget_can_raise_it(projects: list[str]) -> None:
    settings = Settings.model_validate({"SLURM_BUDGET_GPU_HOURS": 1, "SLURM_BUDGET_START": "2026-11-01"})
    hours: dict[str, Any] = {"seconds": 3600, "tres": {"gres/gpu": 1}, "partition": "gpu", "name": "", "comment": ""}
    life = JobLife("17", "xy", "p1", NOW - timedelta(hours=2), NOW - timedelta(hours=1), **hours)
    found = usage(projects=projects, shares=[], queue=[], jobs=[life], since=NOW - timedelta(days=30))
    shortage, _ = find_shortage(allocate(SlurmRequest(gpus_per_node=1), SITE), 1, found, settings)
    assert f"C{ELSEWHERE[1:]}, or raise SLURM_BUDGET_GPU_HOURS" in str(shortage)


@pytest.mark.parametrize(
    ("fields", "request_", "tasks"),
    [
        ({}, {"account": "p2"}, 9),  # the limit is that of another project
        ({}, {"gpus_per_node": 0}, 9),  # the job takes nothing of what is limited
        ({"shares": [Share("p1", "", "gres/gpu", 600, 900, 0)]}, {"gpus_per_node": 0}, 9),
        ({"shares": [Share("p1", "", "billing", 1, 1, 0)]}, {}, 9),  # what a job costs in that is not known
        ({"shares": []}, {}, 9),
        ({}, {}, 0),  # tasks that run again
    ],
)
def test_what_is_not_limited_is_not_refused(fields: dict[str, Any], request_: dict[str, Any], tasks: int) -> None:
    assert find(usage(**fields), tasks, **request_) == (None, [])


def test_a_limit_on_nodes_counts_and_one_that_is_unknown_does_not_hide_it() -> None:
    nodes = Share("p1", "", "node", limit=120, used=0, running=0)
    unknown = Share("p1", "", "gres/gpu", limit=600, used=None, running=0)
    shortage, (note,) = find(usage(shares=[unknown, nodes]))
    assert "could cost 4 node-hours (1 node x 04:00:00). Project p1 has 1 free: of 2 node-hours" in str(shortage)
    assert note.startswith("SLURM_KEEP_WITHIN_BUDGET: what project p1 has left of GrpTRESMins of p1 is not known.")


def test_a_job_that_costs_just_what_is_free_is_submitted() -> None:
    """10.7 hours, less 3.9, 1.1 and 0.7, are 4.999999999999999 in binary numbers."""
    share = replace(GPUS, limit=642, used=234, running=66)
    waits = replace(WAITS, count=1, seconds=0.7 * 3600)
    assert find(usage(shares=[share], queue=[waits]), time_limit="05:00:00") == (None, [])


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({"queue": None, "trouble": ["squeue: down"]}, "what project p1 has left of GrpTRESMins of p1 is not known: "
         "squeue: down."),
        ({"queue": [replace(WAITS, seconds=None)]}, "what project p1 has left of GrpTRESMins of p1 is not known."),
        ({"shares": None, "trouble": ["sshare: down"]}, "the limits of project p1 are not known: sshare: down."),
        ({"shares": [], "parents": {}, "trouble": ["sacctmgr: hidden"]}, "the limits of project p1 are not known: "
         "sacctmgr: hidden."),
        ({"shares": None, "projects": [], "default": ""}, "the limits of your default project are not known."),
    ],
)  # fmt: skip
def test_numbers_that_are_absent_refuse_nothing_and_the_log_says_so(fields: dict[str, Any], note: str) -> None:
    assert find(usage(**fields), 99) == (None, [f"SLURM_KEEP_WITHIN_BUDGET: {note} The job is submitted."])


def test_an_answer_that_does_not_come_in_time_refuses_nothing_and_the_log_says_so() -> None:
    gateway: Any = SimpleNamespace(usage_before_submitting=lambda *_: None)
    settings, warnings = Settings.model_validate({"SLURM_KEEP_WITHIN_BUDGET": True}), list[str]()
    check_budget(gateway, allocate(SlurmRequest(gpus_per_node=1), SITE), settings, warnings.append, 1)
    text = "the supercomputer did not say in time what is left. The job is submitted."
    assert warnings == [f"SLURM_KEEP_WITHIN_BUDGET: {text}"]


@dg.asset
def trains(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    request = SlurmRequest(gpus_per_node=1, time_limit="05:00:00")
    done = compute.run(context, workload=Path(__file__), launcher=ScriptLauncher(), request=request)
    return done.get_materialize_result()


def test_the_preview_refuses_what_a_run_would_refuse() -> None:
    (shown,) = preview_asset(dg.Definitions([trains], resources={"compute": ComputeResource.of(PROJECT)}), "trains")
    slurm: Any = None  # it is not asked
    accepted, said = try_script(slurm, shown, Projects({}, default="p1"), usage())
    assert (accepted, "could cost 5 GPU-hours (1 node x 1 GPU x 05:00:00). Project p1 has 4 free" in said) == (
        False,
        True,
    )


class FullSlurm:
    """It refuses what a test asks, as Slurm does if the project has used up its computing time."""

    def test(self, _: str) -> tuple[bool, str]:
        said = "sbatch: error: AssocGrpGRESMinutes", "allocation failure: Job violates accounting/QOS policy (...)"
        return False, "\n".join(["Welcome", *said])

    def ask(self, **_: Any) -> dict[str, Any]:
        """Find the environment."""
        return {}


def test_the_preview_explains_what_slurm_refuses_for_the_budget() -> None:
    (shown,) = preview_asset(dg.Definitions([trains], resources={"compute": ComputeResource.of(PROJECT)}), "trains")
    slurm: Any = FullSlurm()
    accepted, said = try_script(slurm, shown, Projects({}, default="p1"))
    first, second, advice = said.splitlines()
    assert (accepted, first) == (False, "sbatch: error: AssocGrpGRESMinutes")
    assert second.startswith("allocation failure: Job violates accounting/QOS policy")
    assert "more computing time than the project has left; scripts/costs shows that. Request less" in advice


SAID = {
    "user": "xy", "projects": ["p1"], "default": "p1", "now": 0.0, "jobs": None, "queue": None, "shares": None,
    "parents": None, "tracked": None, "private": None, "trouble": ["down"],
}  # fmt: skip


class Agent(Channel):
    """A connection whose agent answers `usage` after another answer, or with an error, or never."""

    def __init__(self, said: Mapping[str, Any] | None) -> None:
        super().__init__()
        self._said, self._lines, self.closed = said, [{"id": 0, "hello": HELLO}], False

    def _write(self, data: bytes) -> None:
        ask = json.loads(data)
        other = {"rows": [], "default": "", "exported": False}
        self._lines.append({"id": ask["id"] - 1 if ask["do"] == "usage.usage" else ask["id"], **other})
        if ask["do"] == "usage.usage" and self._said is not None:
            self._lines.append({**self._said, "id": ask["id"]})

    def _read(self, seconds: float) -> bytes:
        if self.closed:
            raise EOFError
        if self._lines:
            return json.dumps(self._lines.pop(0)).encode() + b"\n"
        threading.Event().wait(min(seconds, 0.01))
        raise TimeoutError

    def _complaint(self) -> str:
        return ""

    def close(self) -> None:
        self.closed = True


def test_the_answer_is_that_to_the_request() -> None:
    gateway = Gateway(lambda: Agent(SAID))
    gateway.projects()
    found = gateway.usage_before_submitting("/runs", None, 30)
    assert found
    assert (found.user, found.trouble) == ("xy", ["down"])


@pytest.mark.parametrize("said", [None, {"error": "broken", "text": "the gateway agent failed"}])
def test_an_answer_that_does_not_come_is_absent(said: Mapping[str, Any] | None) -> None:
    agent = Agent(said)
    gateway = Gateway(lambda: agent)
    assert gateway.usage_before_submitting("/runs", None, 30) is None  # without a connection
    gateway.projects()
    assert gateway.usage_before_submitting("/runs", None, 0.05) is None
    agent.closed = True  # the connection breaks
    assert gateway.usage_before_submitting("/runs", None, 30) is None


def test_a_step_that_is_stopped_waits_no_longer() -> None:
    gateway = Gateway(lambda: Agent(None))
    gateway.projects()
    gateway.stop.set()
    with pytest.raises(StoppedError):
        gateway.usage_before_submitting("/runs", None, 30)
