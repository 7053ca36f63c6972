"""Jobs of unrelated runs for the same data: adopted, waited for, or named, and whose they are then."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch.inspect.remote_runs import RunRecord
from dagster_sbatch.run.calls import StepCalls, step_prefix
from dagster_sbatch.run.directory import RunInfo
from dagster_sbatch.run.family import Family
from dagster_sbatch.run.history import find_rivals, tag_job
from dagster_sbatch.slurm import SlurmRequest
from dagster_sbatch.slurm.gateway import Claim, JobEnd, JobState, OtherRun, Questions
from dagster_sbatch.upkeep.ownership import unended
from support.agent_fixtures import Prepare

THEIRS = RunInfo("theirs", "theirs", "a", "", step="ab")
INPUTS = {"args": "7"}
END = JobEnd(0, "COMPLETED", "0:0")


class Gateway:
    """Its claims, by family; `active`: the run directories whose jobs are not over."""

    def __init__(self, claims: dict[str, Claim], active: set[str]) -> None:
        self.claims, self.active, self.claimed = claims, active, list[str]()

    def claim(self, _: str, family: str, *__: object) -> Claim:
        self.claimed.append(family)
        return self.claims[family]

    def state(self, run: str) -> tuple[JobState | None, JobEnd | None]:
        return (JobState("RUNNING", "None", None), None) if run in self.active else (None, END)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        made.add_run(dg.DagsterRun("job", run_id="theirs"))
        yield made


def rival(family: str, inputs: dict[str, str], *, own: bool = False, over: bool = False) -> OtherRun:
    record = {"inputs": inputs, "call": 0}
    return OtherRun(family, f"/runs/{family}-1", "79", record, own, over)


def choose(
    instance: dg.DagsterInstance, rivals: list[OtherRun], theirs: Claim, own: str | None = None
) -> tuple[Any, list[str], list[str], Any]:
    """Return the choice, the families that were claimed in this order, the warnings, and what else was found.

    `own`: the run.
    """
    warnings: list[str] = []
    log = SimpleNamespace(info=lambda _: None, warning=warnings.append, error=None)
    run = dg.DagsterRun("job", run_id="mine", root_run_id=own, parent_run_id=own)
    context: Any = SimpleNamespace(
        instance=instance, run_id="mine", run=run, log=log, op_handle="ab", get_mapping_key=lambda: None,
        selected_asset_keys={dg.AssetKey("a"), dg.AssetKey("b")},
    )  # fmt: skip
    call = StepCalls().begin("mine", "ab", "digest")
    gateway: Any = Gateway({call.family: Claim(None, rivals=rivals), "theirs": theirs}, {"/runs/theirs-1"})
    family = Family(
        context, gateway, "/base", call, INPUTS, SlurmRequest(), questions=Questions(rivals={"theirs": "r1"})
    )
    found, choice = family.choose()
    claimed = ["mine" if each == call.family else each for each in gateway.claimed]
    return choice, claimed, warnings, [each.family for each in found.others] or family.call.family


RUNS = Claim(None, attempt=1, over=False, job="79", followers=("theirs",))
HAS_ENDED = replace(RUNS, over=True, end=END)


@pytest.mark.parametrize("theirs", [RUNS, HAS_ENDED], ids=["runs", "its run has not stored it"])
def test_a_job_with_equal_inputs_is_adopted(instance: dg.DagsterInstance, theirs: Claim) -> None:
    choice, claimed, warnings, family = choose(instance, [rival("theirs", INPUTS)], theirs)
    assert (choice.adopt, claimed, warnings, family) == (True, ["mine", "theirs"], [], "theirs")


def test_after_another_run_has_stored_its_result_a_new_job_follows(instance: dg.DagsterInstance) -> None:
    """The claim waits until that run has ended. Whoever requested this run wants it to compute."""

    @dg.op
    def ab() -> None: ...

    @dg.job
    def job() -> None:
        ab()

    followers = (job.execute_in_process(instance=instance).run_id,)
    choice, claimed, warnings, family = choose(
        instance, [rival("theirs", INPUTS)], replace(HAS_ENDED, followers=followers)
    )
    assert (choice.adopt, claimed, warnings) == (False, ["mine", "theirs", "mine"], [])
    assert family != "theirs"


def test_a_job_with_other_inputs_is_named(instance: dg.DagsterInstance) -> None:
    rivals = [rival("theirs", {"args": "8"}), rival("over", INPUTS), rival("over as well", {}, over=True)]
    rivals.append(replace(rivals[0], record={"inputs": {}, "call": 1}))  # a later call may adopt it
    choice, claimed, warnings, _ = choose(instance, rivals, RUNS)
    assert (choice.adopt, claimed) == (False, ["mine"])
    assert warnings == [
        "Slurm job 79 of run r1 computes the same with other inputs (args). Both jobs may write the same files. If you "
        "need only one of them, cancel the other one:\n  scripts/job 79 cancel"
    ]


def test_a_job_that_this_group_of_runs_has_adopted_is_its_own(instance: dg.DagsterInstance) -> None:
    """A re-execution uses its result, or cancels it if the inputs differ."""
    ended = rival("theirs", INPUTS, own=True, over=True)
    choice, claimed, warnings, family = choose(instance, [ended], HAS_ENDED, "before")
    assert (choice.adopt, claimed, warnings, family) == (True, ["mine", "theirs"], [], "theirs")
    runs = rival("theirs", {"args": "8"}, own=True)
    choice, claimed, warnings, outdated = choose(instance, [runs], RUNS, "before")
    assert (choice.adopt, claimed, warnings, outdated) == (False, ["mine"], [], ["theirs"])
    choice, *_ = choose(instance, [replace(ended, own=False)], HAS_ENDED, "before")
    assert not choice.adopt


def test_unrelated_runs_for_the_same_partition(instance: dg.DagsterInstance) -> None:
    """Those that have failed or are alive, and have submitted a job, by the name that the step has there."""
    keys = dg.StaticPartitionsDefinition(["1", "2"])
    found: list[dict[str, str]] = []

    @dg.asset(partitions_def=keys)
    def probe(context: dg.AssetExecutionContext) -> None:
        step = context.op_execution_context
        found.append(find_rivals(step, context.run.root_run_id or context.run_id))
        tag_job(step, "79", 0)
        raise ValueError

    @dg.asset
    def other(context: dg.AssetExecutionContext) -> None:
        tag_job(context.op_execution_context, "79", 0)
        raise ValueError

    def run(asset: dg.AssetsDefinition, partition: str | None) -> str:
        return dg.materialize([asset], instance=instance, partition_key=partition, raise_on_error=False).run_id

    first, _, _, second = run(probe, "1"), run(probe, "2"), run(other, None), run(probe, "1")
    terminated = instance.get_run_by_id(second)
    assert terminated
    run(probe, "1")
    instance.report_run_canceled(terminated)
    run(probe, "1")
    names = {run: f"{step_prefix(run, 'probe')}-" for each in found for run in each.values()}
    assert found[:2] == [{}, {}]
    assert found[2] == {names[first]: first}
    assert found[3] == {names[first]: first, names[second]: second}
    assert second not in found[4].values()
    assert len(found[4]) == 2


def test_the_agent_reports_what_unrelated_runs_have_there(prepare: Prepare, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for name in ("ab-r-i-1", "ab-s-i-1", "ab-s-j-1", "ab-t-i-1"):
        (runs / name).mkdir(parents=True)
        (runs / name / "job").symlink_to("17")
    for mark in ("end", "follower-mine"):
        (runs / "ab-s-j-1" / mark).touch()
    gateway, rivals = prepare(), {"ab-s-": "r1", "ab-u-": "r2"}
    first, again = (
        gateway.claim(str(runs), "ab-r-k", "token", "me", Questions("ab-r-", rivals, group))
        for group in (["other"], ["other", "mine"])
    )
    assert [(each.family, each.own, each.over) for each in first.rivals] == [("ab-s-i", False, False)]
    assert [(each.family, each.own, each.over) for each in again.rivals[1:]] == [("ab-s-j", True, True)]
    assert [each.family for each in first.others] == ["ab-r-i"]


def test_a_job_belongs_to_the_run_that_has_followed_it_last(instance: dg.DagsterInstance) -> None:
    """That run has adopted the job of an unrelated one: while it is alive, the job is followed."""
    instance.add_run(dg.DagsterRun("job", run_id="mine", root_run_id="root", parent_run_id="root"))
    record = RunRecord("/runs/ab-1", "79", THEIRS, None, datetime.now(UTC), ("theirs",))
    records = [record, replace(record, followers=("theirs", "mine")), replace(record, followers=("deleted",))]
    runs: Any = SimpleNamespace(all=lambda: [*records, replace(record, end=END)])
    assert [run.about.root for run in unended(instance, runs)] == ["theirs", "root", "theirs"]
