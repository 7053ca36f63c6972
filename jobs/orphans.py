"""Slurm jobs that no run follows: cancelled if nobody wants them, else listed; and run directories nobody needs."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg

from jobs.deployment import running_on_supercomputer, supercomputer_settings
from resources import SUPERCOMPUTER_SITE_OVERRIDES
from resources.attention import ACCESS, LEFT_JOBS, REACHABLE, evaluate
from resources.auth import AccessError, check_health
from resources.history import is_stored
from resources.ownership import LeftJob, left_jobs, reason_to_cancel, standing_of
from resources.runs import RunRecord, Runs, open_runs
from resources.slurm.gateway import RefusedError
from resources.ssh import SshError

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


@dg.sensor(
    name="cancel_orphaned_jobs",
    minimum_interval_seconds=30,
    default_status=running_on_supercomputer(),
    description="Cancels Slurm jobs whose run was terminated, or whose step has succeeded with another job. Lists jobs "
    "whose run failed while they were running in a check of musica_access: a re-execution attaches to them. Connects "
    "only when there are such runs; jobs of runs that this Dagster does not know are left alone.",
)
def cancel_orphaned_jobs_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
    """One tick; the cursor holds the groups of runs that are not settled yet, and the jobs that are listed."""
    settings = supercomputer_settings()  # the tick fails where they are wrong
    instance, now = context.instance, datetime.now(UTC)
    cursor = _Cursor.parse(context.cursor, now)
    ended, since = _find_ended(instance, cursor.since)
    standings = {root: standing_of(instance, root, now) for root in sorted({*cursor.roots, *cursor.left, *ended})}
    open_ones = {root for root, standing in standings.items() if standing in ("alive", "retry due", "just ended")}
    over = {root for root, standing in standings.items() if standing == "over"}
    listed = {root: left for root, left in cursor.left.items() if root in over - ended and not left.is_due(now)}
    said = [f"run {root}: {standings[root]}" for root in sorted(open_ones)]
    if over - set(listed):
        try:
            with open_runs(settings, SUPERCOMPUTER_SITE_OVERRIDES, TICK_SECONDS) as runs:
                for deed in _settle(instance, runs, over - set(listed)):
                    context.log.info(deed.text)
                    if deed.left:
                        listed[deed.root] = _Left(now, (*listed.get(deed.root, _Left(now)).jobs, deed.text))
                    else:
                        said.append(deed.text)
                        if not deed.done:
                            open_ones.add(deed.root)
        except _NO_ACCESS as error:
            open_ones |= over - set(listed)
            said.append(str(error))
    jobs = [job for left in listed.values() for job in left.jobs]
    report = "\n".join(jobs)
    events = [evaluate(LEFT_JOBS, passed=not jobs, description=report or _NONE_LEFT)] if report != cursor.report else []
    reason = "\n".join([*said, *jobs]) or "no run has ended with a job left behind"
    rendered = _Cursor(since, tuple(sorted(open_ones)), listed, report).render()
    return dg.SensorResult(skip_reason=reason, cursor=rendered, asset_events=events)


_NONE_LEFT = "Every job that is waiting or running is followed by a run."


@dg.asset_check(
    asset=ACCESS,
    name=LEFT_JOBS,
    description="Whether every job on the supercomputer is followed by a run. A job is not if its step or its process "
    "failed while the job was running: re-execute that run.",
)
def jobs_are_followed(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
    """Ask the supercomputer, now."""

    def find(runs: Runs) -> tuple[bool, str]:
        left = "\n".join(job.text for job in left_jobs(context.instance, runs))
        return not left, left or _NONE_LEFT

    return _ask(find)


@dg.asset_check(
    asset=ACCESS,
    name=REACHABLE,
    description="Whether steps can reach their jobs on the supercomputer. Reported by each step that cannot, with what "
    "to do, and again when it can.",
)
def jobs_are_reachable() -> dg.AssetCheckResult:
    """Ask the supercomputer, now."""
    return _ask(lambda runs: (True, f"{len(runs.all())} runs are there."))


def _ask(question: Any) -> dg.AssetCheckResult:
    try:
        with open_runs(supercomputer_settings(), SUPERCOMPUTER_SITE_OVERRIDES, TICK_SECONDS) as runs:
            passed, text = question(runs)
    except _NO_ACCESS as error:
        passed, text = False, f"{error}\nEvery link of the chain is tested by\n  scripts/doctor"
    return dg.AssetCheckResult(passed=passed, description=text.replace("\n", "  \n"))


@dg.sensor(
    name="clean_run_directories",
    minimum_interval_seconds=CLEAN_EVERY,
    default_status=running_on_supercomputer(),
    description=f"Removes run directories from the supercomputer {KEEP_DAYS} days after their job has ended well, if "
    f"Dagster has stored the result; those of jobs that have failed {KEEP_FAILED_DAYS} days after their end.",
)
def clean_run_directories_sensor(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """One tick. Access is brought to life by the job that shows how: it is not begun here."""
    settings, now = supercomputer_settings(), datetime.now(UTC)
    health = check_health(settings)
    if health.verdict != "ok":
        return dg.SkipReason(f"waits until access is in order: {health.summary}")
    try:
        with open_runs(settings, SUPERCOMPUTER_SITE_OVERRIDES, TICK_SECONDS) as runs:
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
class _Left:
    """Jobs of a group of runs that are listed.

    Attributes:
        at: when the supercomputer was asked about them.
        jobs: what is said about each.
    """

    at: datetime
    jobs: tuple[str, ...] = ()

    def is_due(self, now: datetime) -> bool:
        """Whether to ask again."""
        return now - self.at >= LEFT_PAUSE


@dataclass(frozen=True)
class _Cursor:
    """What a tick leaves to the next one.

    Attributes:
        since: up to when runs that have ended are examined.
        roots: first runs of the groups that are not settled.
        left: by the first run of their group: jobs that are listed.
        report: what the check says of them.
    """

    since: datetime
    roots: tuple[str, ...] = ()
    left: dict[str, _Left] = field(default_factory=dict)
    report: str = ""

    @classmethod
    def parse(cls, text: str | None, now: datetime) -> "_Cursor":
        if not text:
            return cls(now - LOOK_BACK)
        values = json.loads(text)
        left = {
            root: _Left(datetime.fromisoformat(at), tuple(jobs)) for root, (at, jobs) in values.get("left", {}).items()
        }
        since = datetime.fromisoformat(values["since"])
        return cls(since, tuple(values["roots"]), left, values.get("report", ""))

    def render(self) -> str:
        left = {root: (each.at.isoformat(), each.jobs) for root, each in self.left.items()}
        return json.dumps({"since": self.since.isoformat(), "roots": self.roots, "left": left, "report": self.report})


def _find_ended(instance: dg.DagsterInstance, since: datetime) -> tuple[set[str], datetime]:
    """First runs of the groups in which a run has ended without success since then; and up to when that is."""
    records = instance.get_run_records(dg.RunsFilter(statuses=_UNHAPPY, updated_after=since))
    latest = max((record.update_timestamp.astimezone(UTC) for record in records), default=since)
    return {record.dagster_run.root_run_id or record.dagster_run.run_id for record in records}, max(latest, since)


@dataclass(frozen=True)
class _Deed:
    """What was done about a job.

    Attributes:
        root: first run of its group.
        text: for people.
        done: whether that settles it.
        left: whether it stays as it is and is listed.
    """

    root: str
    text: str
    done: bool = True
    left: bool = False


def _settle(instance: dg.DagsterInstance, runs: Runs, over: set[str]) -> Iterator[_Deed]:
    """Cancel or list the jobs of runs that are over."""
    for run in runs.all():
        if run.about.root not in over or run.end is not None:
            continue
        reason = reason_to_cancel(instance, run)
        state = None if reason else runs.look(run)[0]
        if reason:
            yield _cancel(instance, runs, run, reason)
        elif state:
            yield _Deed(run.about.root, LeftJob(run, state.state).text, left=True)


def _cancel(instance: dg.DagsterInstance, runs: Runs, run: RunRecord, reason: str) -> _Deed:
    """Cancel a job, holding the claim on it: a re-execution that comes now waits, and finds it cancelled."""
    name = f"job {run.job or run.key} of run {run.about.run} ({run.about.asset})"
    holder = runs.claim(run, "the sensor cancel_orphaned_jobs")
    if holder:
        return _Deed(run.about.root, f"{name}: {holder} acts on it", done=False)
    if standing_of(instance, run.about.root, datetime.now(UTC)) != "over":
        return _Deed(run.about.root, f"{name}: a new run has come for it", done=False)
    end = runs.gateway.cancel(run.path)
    return _Deed(run.about.root, f"{name}: {end.state if end else 'was never submitted'}, since {reason}")
