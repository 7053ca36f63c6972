"""Slurm jobs that no run follows: cancelled if nobody wants them, else listed; and run directories nobody needs."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal

import dagster as dg

from dagster_sbatch.auth import AccessError, check_health
from dagster_sbatch.inspect.remote_runs import RunRecord, Runs, open_runs
from dagster_sbatch.project import Project
from dagster_sbatch.run.history import is_stored
from dagster_sbatch.run.reports import ACCESS, LEFT_JOBS, REACHABLE, evaluate
from dagster_sbatch.slurm.gateway import RefusedError
from dagster_sbatch.ssh import SshError
from dagster_sbatch.upkeep.deployment import running_on_supercomputer, supercomputer_settings
from dagster_sbatch.upkeep.ownership import LeftJob, left_jobs, reason_to_cancel, standing_of

LOOK_BACK = timedelta(days=7)
"""How long before the first tick runs may have ended to be examined."""
LEFT_PAUSE = timedelta(minutes=15)
"""Before the supercomputer is asked again about jobs that are listed."""
TICK_SECONDS = 40.0
"""For the supercomputer to answer; Dagster gives a tick 60."""
CLEAN_EVERY = 6 * 3600
KEEP_DAYS, KEEP_FAILED_DAYS = 14, 90
"""For which run directories are kept: those whose result Dagster has stored, and those of jobs that have failed."""

_UNHAPPY = [dg.DagsterRunStatus.CANCELED, dg.DagsterRunStatus.FAILURE]
_NO_ACCESS = (AccessError, SshError, RefusedError)


def _settle_orphans(project: Project, context: dg.SensorEvaluationContext) -> dg.SensorResult:
    """Make one tick; the cursor holds the groups of runs that are not settled yet, and what the check reports."""
    settings = supercomputer_settings(project)  # the tick fails where they are wrong
    instance, now = context.instance, datetime.now(UTC)
    cursor = _Cursor.parse(context.cursor, now)
    ended, since = _find_ended(instance, cursor.since)
    standings = {root: standing_of(instance, root, now) for root in sorted({*cursor.groups, *ended})}
    groups = {
        root: _Group() for root, standing in standings.items() if standing in ("alive", "retry due", "just ended")
    }
    said = [f"run {root}: {standings[root]}" for root in groups]
    over = {root: cursor.groups.get(root, _Group()) for root, standing in standings.items() if standing == "over"}
    due = {root for root, group in over.items() if root in ended or group.is_due(now)}
    groups |= {root: group for root, group in over.items() if root not in due}
    if due:
        try:
            with open_runs(settings, project, TICK_SECONDS) as runs:
                found = list(_settle(instance, runs, due))
        except _NO_ACCESS as error:
            groups |= {root: _Group(0, over[root].jobs) for root in due}
            said.append(str(error))
        else:
            said += [finding.text for finding in found if finding.kind != "left"]
            for root in sorted({finding.root for finding in found if finding.kind != "cancelled"}):
                left = [finding.text for finding in found if finding.root == root and finding.kind == "left"]
                later = any(finding.root == root and finding.kind == "later" for finding in found)
                groups[root] = _Group(0 if later else now.timestamp(), tuple(left))
    for text in said:
        context.log.info(text)
    jobs = [job for group in groups.values() for job in group.jobs]
    report = "\n".join(jobs)
    events = [evaluate(LEFT_JOBS, passed=not jobs, description=report or _NONE_LEFT)] if report != cursor.report else []
    reason = "\n".join([*said, *jobs]) or "no run has ended with a job left behind"
    return dg.SensorResult(skip_reason=reason, cursor=_Cursor(since, groups, report).render(), asset_events=events)


_NONE_LEFT = "Every job that is waiting or running is followed by a run."


def _check_followed(project: Project, context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
    """Ask the supercomputer, now."""

    def find(runs: Runs) -> tuple[bool, str]:
        left = "\n".join(job.text for job in left_jobs(context.instance, runs))
        return not left, left or _NONE_LEFT

    return _ask(project, find)


def _ask(project: Project, question: Callable[[Runs], tuple[bool, str]]) -> dg.AssetCheckResult:
    try:
        with open_runs(supercomputer_settings(project), project, TICK_SECONDS) as runs:
            passed, text = question(runs)
    except _NO_ACCESS as error:
        passed, text = False, f"{error}\nEvery link of the chain is tested by\n  scripts/doctor"
    return dg.AssetCheckResult(passed=passed, description=text.replace("\n", "  \n"))


def _clean(project: Project, context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """One tick. Access is brought to life by the job that shows how: it is not begun here."""
    settings, now = supercomputer_settings(project), datetime.now(UTC)
    health = check_health(settings)
    if health.verdict != "ok":
        return dg.SkipReason(f"waits until access is in order: {health.summary}")
    try:
        with open_runs(settings, project, TICK_SECONDS) as runs:
            cleaned = runs.remove(run for run in runs.all() if _may_go(context.instance, run, now - run.heard))
    except _NO_ACCESS as error:
        return dg.SkipReason(str(error))
    return dg.SkipReason(f"removed {', '.join(cleaned)}" if cleaned else "nothing is old enough")


def _may_go(instance: dg.DagsterInstance, run: RunRecord, age: timedelta) -> bool:
    """Return whether nobody needs a run directory any more; `age`: since its job last said something.

    A result that Dagster has not stored stays, whatever its age.
    """
    if run.end is None or age < timedelta(days=KEEP_DAYS):
        return False
    if run.end.code == 0 and run.end.state in ("COMPLETED", ""):
        return is_stored(instance, run.followers, run.about.step)
    return age > timedelta(days=KEEP_FAILED_DAYS)


@dataclass(frozen=True)
class _Group:
    """A run, its retries and its re-executions, which are not settled yet.

    Attributes:
        asked: when the supercomputer was asked about their jobs, in seconds since 1970.
        jobs: the report on each job that no run follows.
    """

    asked: float = 0
    jobs: tuple[str, ...] = ()

    def is_due(self, now: datetime) -> bool:
        """Return whether to ask again."""
        return now.timestamp() - self.asked >= LEFT_PAUSE.total_seconds()


@dataclass(frozen=True)
class _Cursor:
    """What a tick leaves to the next one.

    Attributes:
        since: runs that ended before that time have been examined.
        groups: by the id of their first run.
        report: what the check reported last.
    """

    since: datetime
    groups: dict[str, _Group] = field(default_factory=dict)
    report: str = ""

    @classmethod
    def parse(cls, text: str | None, now: datetime) -> "_Cursor":
        """Read a cursor; without one, and with one of an older version, runs of the last days are examined."""
        values = json.loads(text or "{}")
        if "groups" not in values:
            return cls(now - LOOK_BACK)
        groups = {root: _Group(asked, tuple(jobs)) for root, (asked, jobs) in values["groups"].items()}
        return cls(datetime.fromisoformat(values["since"]), groups, values["report"])

    def render(self) -> str:
        """Return it as text."""
        groups = {root: (group.asked, group.jobs) for root, group in self.groups.items()}
        return json.dumps({"since": self.since.isoformat(), "groups": groups, "report": self.report})


def _find_ended(instance: dg.DagsterInstance, since: datetime) -> tuple[set[str], datetime]:
    """Return the first runs of the groups in which a run has ended without success since then, and the latest end."""
    records = instance.get_run_records(dg.RunsFilter(statuses=_UNHAPPY, updated_after=since))
    latest = max((record.update_timestamp.astimezone(UTC) for record in records), default=since)
    return {record.dagster_run.root_run_id or record.dagster_run.run_id for record in records}, max(latest, since)


@dataclass(frozen=True)
class _Finding:
    """What was found or done about a job.

    Attributes:
        root: first run of its group.
        text: for people.
        kind: `cancelled`: it is over. `later`: it cannot be settled now. `left`: it runs, and no run follows it.
    """

    root: str
    text: str
    kind: Literal["cancelled", "later", "left"]


def _settle(instance: dg.DagsterInstance, runs: Runs, over: set[str]) -> Iterator[_Finding]:
    """Cancel or report the jobs of groups that are over."""
    for run in runs.all():
        if run.about.root not in over or run.end is not None:
            continue
        reason = reason_to_cancel(instance, run)
        state = None if reason else runs.state(run)[0]
        if reason:
            yield _cancel(instance, runs, run, reason)
        elif state:
            yield _Finding(run.about.root, LeftJob(run, state.state).text, "left")


def _cancel(instance: dg.DagsterInstance, runs: Runs, run: RunRecord, reason: str) -> _Finding:
    """Cancel a job, holding the claim on it: a re-execution that comes now waits, and finds it cancelled."""
    root, name = run.about.root, f"job {run.job or run.key} of run {run.about.run} ({run.about.asset})"
    holder = runs.claim(run, "the sensor cancel_orphaned_jobs")
    if holder:
        return _Finding(root, f"{name}: {holder} acts on it", "later")
    if standing_of(instance, root, datetime.now(UTC)) != "over":
        return _Finding(root, f"{name}: a new run has come for it", "later")
    end = runs.gateway.cancel(run.path)
    return _Finding(root, f"{name}: {end.state if end else 'was never submitted'}, since {reason}", "cancelled")


def make_orphan_sensor(project: Project) -> dg.SensorDefinition:
    """Make the sensor that cancels or lists the Slurm jobs that no run follows."""

    @dg.sensor(
        name="cancel_orphaned_jobs",
        minimum_interval_seconds=30,
        default_status=running_on_supercomputer(project),
        description="Cancels Slurm jobs whose run was terminated, or whose step has succeeded with another job. "
        "Lists jobs whose run failed while they were running in a check of musica_access: a re-execution attaches to "
        "them. Connects only when there are such runs; jobs of runs that this Dagster does not know are left alone.",
    )
    def cancel_orphaned_jobs(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        return _settle_orphans(project, context)

    return cancel_orphaned_jobs


def make_cleaning_sensor(project: Project) -> dg.SensorDefinition:
    """Make the sensor that removes old run directories."""

    @dg.sensor(
        name="clean_run_directories",
        minimum_interval_seconds=CLEAN_EVERY,
        default_status=running_on_supercomputer(project),
        description=f"Removes run directories from the supercomputer {KEEP_DAYS} days after their job has ended well, "
        f"if Dagster has stored the result; those of jobs that have failed {KEEP_FAILED_DAYS} days after their end.",
    )
    def clean_run_directories(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        return _clean(project, context)

    return clean_run_directories


def make_job_checks(project: Project) -> tuple[dg.AssetChecksDefinition, dg.AssetChecksDefinition]:
    """Make the checks of `musica_access` on jobs: whether runs follow them, and whether steps reach them."""

    @dg.asset_check(
        asset=ACCESS,
        name=LEFT_JOBS,
        description="Whether every job on the supercomputer is followed by a run. A job is not if its step or its "
        "process failed while the job was running: re-execute that run.",
    )
    def jobs_are_followed(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        return _check_followed(project, context)

    @dg.asset_check(
        asset=ACCESS,
        name=REACHABLE,
        description="Whether steps can reach their jobs on the supercomputer. Reported by each step that cannot, with "
        "what to do, and again when it can.",
    )
    def jobs_are_reachable() -> dg.AssetCheckResult:
        return _ask(project, lambda runs: (True, f"{len(runs.all())} runs are there."))

    return jobs_are_followed, jobs_are_reachable
