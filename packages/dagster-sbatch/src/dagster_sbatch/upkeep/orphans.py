"""Slurm jobs that no run follows: a sensor cancels those that nobody can adopt, and lists the others in a check."""

import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

import dagster as dg
from pydantic import BaseModel, ValidationError

from dagster_sbatch.inspect.remote_runs import RunRecord, Runs, open_runs
from dagster_sbatch.project import Project
from dagster_sbatch.run.reports import ACCESS, LEFT_JOBS, REACHABLE, evaluate, markdown
from dagster_sbatch.slurm.gateway import JobEnd, RefusedError
from dagster_sbatch.slurm.units import count_of
from dagster_sbatch.upkeep import NO_ACCESS, TICK_SECONDS, running_on_supercomputer
from dagster_sbatch.upkeep.ownership import describe_left, group_state, left_jobs, reason_to_cancel, repeat_failures

LOOK_BACK = timedelta(days=7)  # the first tick examines runs that have ended within this time
LATE = timedelta(minutes=1)  # the database may show the end of a run so much later than its time
LEFT_PAUSE = timedelta(minutes=15)  # before the supercomputer is asked again about jobs that are listed
_UNHAPPY = [dg.DagsterRunStatus.CANCELED, dg.DagsterRunStatus.FAILURE]
_NONE_LEFT = "Every job that is waiting or running is followed by a run."


def make_orphan_sensor(project: Project) -> dg.SensorDefinition:
    """Make the sensor that cancels or lists the Slurm jobs that no run follows."""

    @dg.sensor(
        name="cancel_orphaned_jobs",
        minimum_interval_seconds=30,
        default_status=running_on_supercomputer(project),
        description="Cancels Slurm jobs whose run was terminated, or whose step has succeeded with another job. If a "
        "run failed while its job was running, a check of musica_access lists the job: a re-execution attaches to it. "
        "Connects only when there are such runs, and ignores jobs of runs that this Dagster does not know.",
    )
    def cancel_orphaned_jobs(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        return _make_tick(project, context)

    return cancel_orphaned_jobs


def make_job_checks(project: Project) -> tuple[dg.AssetChecksDefinition, dg.AssetChecksDefinition]:
    """Make the checks of `musica_access` on jobs: whether runs follow them, and whether steps reach them."""

    @dg.asset_check(
        asset=ACCESS,
        name=LEFT_JOBS,
        description="Whether a run follows every job on the supercomputer. If a step or its process failed while the "
        "job was running, no run follows the job: re-execute the run that failed.",
    )
    def jobs_are_followed(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        def find(runs: Runs) -> tuple[bool, str]:
            left = "\n".join(left_jobs(context.instance, runs))
            return not left, left or _NONE_LEFT

        return _ask(project, find)

    @dg.asset_check(
        asset=ACCESS,
        name=REACHABLE,
        description="Whether steps can reach their jobs on the supercomputer. A step that cannot reach its job reports "
        "this, with what to do, and reports again when it can.",
    )
    def jobs_are_reachable() -> dg.AssetCheckResult:
        return _ask(project, lambda runs: (True, f"The supercomputer has {count_of(len(runs.all()), 'run')}."))

    return jobs_are_followed, jobs_are_reachable


def _ask(project: Project, question: Callable[[Runs], tuple[bool, str]]) -> dg.AssetCheckResult:
    try:
        with open_runs(project.load_settings(supercomputer=True), project, TICK_SECONDS) as runs:
            passed, text = question(runs)
    except NO_ACCESS as error:
        passed, text = False, f"{error}\nTo check all that access needs:\n  scripts/doctor"
    return dg.AssetCheckResult(passed=passed, description=markdown(text))


class _Group(BaseModel):
    """A run, its retries and its re-executions, which are not settled yet."""

    asked: float = 0  # when the supercomputer was asked about their jobs, in seconds since 1970
    jobs: dict[str, str] = {}  # the report on each job that no run follows, by its submission key


class _Cursor(BaseModel):
    """What a tick leaves to the next one."""

    since: datetime  # runs that ended before that time have been examined
    groups: dict[str, _Group]  # by the id of their first run
    report: str | None = None  # what the check reported last; None if that is not known, so that this tick reports

    @classmethod
    def read(cls, text: str | None, now: datetime) -> "_Cursor":
        """Read a cursor; without one, or with one of a clock that was ahead, begin with the runs of the last days."""
        with suppress(ValidationError):
            cursor = cls.model_validate_json(text or "")
            if cursor.since <= now:
                return cursor
        return cls(since=now - LOOK_BACK, groups={})


def _make_tick(project: Project, context: dg.SensorEvaluationContext) -> dg.SensorResult:
    settings = project.load_settings(supercomputer=True)  # the tick fails if they are wrong
    instance, now = context.instance, datetime.now(UTC)
    cursor = _Cursor.read(context.cursor, now)
    ended, since = _find_ended(instance, cursor.since, now)
    states = {root: group_state(instance, root, now) for root in sorted({*cursor.groups, *ended})}
    groups = {root: _Group() for root, state in states.items() if state not in ("over", "unknown")}
    said = [f"run {root}: {states[root]}" for root in groups]
    found: list[_Finding] = []
    trouble: list[str] = []
    repeat_failures(instance, [root for root in groups if states[root] == "retry missed"])
    over = {root: cursor.groups.get(root, _Group()) for root, state in states.items() if state == "over"}
    recently = (now - LEFT_PAUSE).timestamp()
    due = {root for root, group in over.items() if root in ended or group.asked <= recently}
    groups |= {root: group for root, group in over.items() if root not in due}
    if due:
        try:
            with open_runs(settings, project, TICK_SECONDS) as runs:
                _settle(instance, runs, due, found)
        except NO_ACCESS as error:
            cancelled = {each.run.key for each in found if each.kind == "cancelled"}
            for root in due:
                groups[root] = _Group(jobs={key: job for key, job in over[root].jobs.items() if key not in cancelled})
            trouble = [str(error)]
        else:
            groups |= _group(found, over, now)
    said += [*(each.text for each in found if each.kind != "left"), *trouble]
    for text in said:
        context.log.info(text)
    jobs = [job for group in groups.values() for job in group.jobs.values()]
    report: str | None = "\n".join(jobs)
    if cursor.report is None and not jobs and any(not groups[root].asked for root in due & groups.keys()):
        report = None  # the supercomputer has not answered: there may be jobs
    events = [evaluate(LEFT_JOBS, passed=not jobs, description=report or _NONE_LEFT)] if report != cursor.report else []
    return dg.SensorResult(
        skip_reason="\n".join([*said, *jobs]) or "no run has ended with a job left behind",
        cursor=_Cursor(since=since, groups=groups, report=report).model_dump_json(),
        asset_events=events,
    )


def _find_ended(instance: dg.DagsterInstance, since: datetime, now: datetime) -> tuple[set[str], datetime]:
    """Return the first runs of groups in which a run has ended without success since then, and where to look next."""
    records = instance.get_run_records(dg.RunsFilter(statuses=_UNHAPPY, updated_after=since))
    latest = max((record.update_timestamp.astimezone(UTC) for record in records), default=since)
    roots = {record.dagster_run.root_run_id or record.dagster_run.run_id for record in records}
    return roots, max(min(latest, now - LATE), since)


@dataclass(frozen=True)
class _Finding:
    """What was found or done about a job."""

    run: RunRecord  # the run directory of the job
    text: str  # for people
    # `cancelled`: it is over. `later`: it cannot be settled now. `left`: it runs, and no run follows it
    kind: Literal["cancelled", "later", "left"]


def _group(found: list[_Finding], before: Mapping[str, _Group], now: datetime) -> dict[str, _Group]:
    """Return the groups that have jobs left, or jobs that wait for the next tick: those stay listed if they were."""
    groups: dict[str, _Group] = {}
    for each in found:
        root, key = each.run.about.root, each.run.key
        if each.kind != "cancelled":
            listed = each.text if each.kind == "left" else before[root].jobs.get(key)
            groups.setdefault(root, _Group(asked=now.timestamp())).jobs |= {key: listed} if listed else {}
    for each in found:
        if each.kind == "later":
            groups[each.run.about.root].asked = 0
    return groups


def _settle(instance: dg.DagsterInstance, runs: Runs, over: set[str], found: list[_Finding]) -> None:
    """Cancel the jobs of groups that are over, or find that they are left; one that is refused stops no other."""
    families = defaultdict[str, list[tuple[RunRecord, str]]](list)
    for run in runs.all():
        if run.about.root in over and run.end is None:
            families[run.family].append((run, reason_to_cancel(instance, run)))
    for family in families.values():
        if doomed := [(run, reason) for run, reason in family if reason]:
            _cancel(instance, runs, doomed, found)
        for run in (run for run, reason in family if not reason):
            try:
                state = runs.gateway.state(run.path)[0]
            except RefusedError as error:
                found.append(_later(run, error))
            else:
                found += [_Finding(run, describe_left(run, state.state), "left")] if state else []


def _cancel(
    instance: dg.DagsterInstance, runs: Runs, family: Sequence[tuple[RunRecord, str]], found: list[_Finding]
) -> None:
    """Cancel the jobs of a family at the same time: a step has several if it is an array.

    The sensor holds the claim on the family: a re-execution that comes now waits, and finds the jobs cancelled.

    `family`: runs of it, each with the reason.
    """
    by_path = {run.path: (run, reason) for run, reason in family}

    def report(path: str, outcome: JobEnd | RefusedError | None) -> None:
        run, reason = by_path[path]
        how = outcome.state if isinstance(outcome, JobEnd) else "was never submitted"
        cancelled = _Finding(run, f"{_name(run)}: {how}, since {reason}", "cancelled")
        found.append(_later(run, outcome) if isinstance(outcome, RefusedError) else cancelled)

    why_later = _claim(instance, runs, family[0][0])
    if why_later:
        found += [_later(run, why_later) for run, _ in family]
    else:
        runs.gateway.cancel_all(list(by_path), report)


def _claim(instance: dg.DagsterInstance, runs: Runs, run: RunRecord) -> str:
    """Claim the family of a run; return why its jobs cannot be cancelled now, empty if they can."""
    who = "the sensor cancel_orphaned_jobs"
    try:
        holder = runs.gateway.claim(runs.folder, run.family, uuid.uuid4().hex, who).held_by
    except RefusedError as error:
        return str(error)
    if holder:
        return f"{holder} acts on it"
    over = group_state(instance, run.about.root, datetime.now(UTC)) == "over"
    return "" if over else "a new run has come for it"


def _later(run: RunRecord, why: object) -> _Finding:
    return _Finding(run, f"{_name(run)}: {why}", "later")


def _name(run: RunRecord) -> str:
    return f"job {run.job or run.key} of run {run.about.run} ({run.about.asset})"
