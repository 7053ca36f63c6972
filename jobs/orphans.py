"""Slurm jobs that nobody owns any more: their run was cancelled, or failed for good, while nobody could cancel them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

import dagster as dg

from jobs.deployment import running_on_supercomputer, supercomputer_settings
from resources import SUPERCOMPUTER_SITE_OVERRIDES
from resources.auth import AccessError, check_health
from resources.history import is_stored
from resources.runs import RunRecord, Runs, open_runs
from resources.slurm.gateway import RefusedError
from resources.ssh import SshError

LOOK_BACK = timedelta(days=7)
"""Runs that have ended so long before the first tick are looked at, too."""
GRACE = timedelta(minutes=1)
"""After the end of a run, in which a retry or a re-execution of it may be asked for."""
TICK_SECONDS = 40.0
"""For the supercomputer to answer; Dagster gives a tick 60."""
CLEAN_EVERY = 6 * 3600
KEEP_DAYS, KEEP_FAILED_DAYS = 14, 90
"""For which run directories are kept: those of runs that have succeeded, and all others whose job has ended."""

Standing = Literal["alive", "retry due", "just ended", "abandoned", "unknown"]
_UNHAPPY = [dg.DagsterRunStatus.CANCELED, dg.DagsterRunStatus.FAILURE]


@dg.sensor(
    name="cancel_orphaned_jobs",
    minimum_interval_seconds=30,
    default_status=running_on_supercomputer(),
    description="Cancels Slurm jobs of runs that were cancelled, or have failed and are not retried. Connects only "
    "when there are such runs; jobs of runs that this Dagster does not know are left alone.",
)
def cancel_orphaned_jobs_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
    """One tick; the cursor holds the runs that are not settled yet."""
    settings = supercomputer_settings()  # the tick fails where they are wrong
    instance, now = context.instance, datetime.now(UTC)
    cursor = _Cursor.parse(context.cursor, now)
    ended, since = _find_ended(instance, cursor.since)
    standings = {root: judge(instance, root, now) for root in sorted({*cursor.roots, *ended})}
    abandoned = {root for root, standing in standings.items() if standing == "abandoned"}
    left = {root for root, standing in standings.items() if standing in ("alive", "retry due", "just ended")}
    told = [f"run {root}: {standings[root]}" for root in sorted(left)]
    if abandoned:
        try:
            with open_runs(settings, SUPERCOMPUTER_SITE_OVERRIDES, TICK_SECONDS) as runs:
                for deed in _cancel(instance, runs, abandoned):
                    context.log.info(deed.text)
                    told.append(deed.text)
                    if not deed.done:
                        left.add(deed.root)
        except (AccessError, SshError, RefusedError) as error:
            left |= abandoned
            told.append(str(error))
    reason = "\n".join(told) or "no run has ended with a job left behind"
    return dg.SensorResult(skip_reason=reason, cursor=_Cursor(since, tuple(sorted(left))).render())


@dg.sensor(
    name="clean_run_directories",
    minimum_interval_seconds=CLEAN_EVERY,
    default_status=running_on_supercomputer(),
    description=f"Removes run directories from the supercomputer {KEEP_DAYS} days after their job has ended well, if "
    f"Dagster has stored the result; those of all other jobs {KEEP_FAILED_DAYS} days after their end.",
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
    except (AccessError, SshError, RefusedError) as error:
        return dg.SkipReason(str(error))
    return dg.SkipReason(f"removed {', '.join(cleaned)}" if cleaned else "nothing is old enough")


def _may_go(instance: dg.DagsterInstance, run: RunRecord, age: timedelta) -> bool:
    """Return whether nobody needs a run directory any more; `age`: since its job last said something."""
    if run.end is None or age < timedelta(days=KEEP_DAYS):
        return False
    if age > timedelta(days=KEEP_FAILED_DAYS):
        return True
    well = run.end.code == 0 and run.end.state in ("COMPLETED", "")
    return well and is_stored(instance, run.followers, run.about.step)


@dataclass(frozen=True)
class _Cursor:
    """Until when ended runs were looked at, and the groups of runs that are not settled."""

    since: datetime
    roots: tuple[str, ...]

    @classmethod
    def parse(cls, text: str | None, now: datetime) -> "_Cursor":
        if not text:
            return cls(now - LOOK_BACK, ())
        values = json.loads(text)
        return cls(datetime.fromisoformat(values["since"]), tuple(values["roots"]))

    def render(self) -> str:
        return json.dumps({"since": self.since.isoformat(), "roots": self.roots})


def _find_ended(instance: dg.DagsterInstance, since: datetime) -> tuple[set[str], datetime]:
    """First runs of the groups in which a run has ended without success since then; and up to when that is."""
    records = instance.get_run_records(dg.RunsFilter(statuses=_UNHAPPY, updated_after=since))
    latest = max((record.update_timestamp.astimezone(UTC) for record in records), default=since)
    return {record.dagster_run.root_run_id or record.dagster_run.run_id for record in records}, max(latest, since)


def judge(instance: dg.DagsterInstance, root: str, now: datetime) -> Standing:
    """Whether anybody still cares for the jobs of a run, its retries and its re-executions.

    Args:
        instance: which knows the runs; one that was deleted is unknown to it.
        root: id of the first run.
        now: with a zone.
    """
    groups = (dg.RunsFilter(run_ids=[root]), dg.RunsFilter(tags={"dagster/root_run_id": root}))
    records = [record for wanted in groups for record in instance.get_run_records(wanted)]
    if not any(record.dagster_run.run_id == root for record in records):
        return "unknown"
    if not all(record.dagster_run.is_finished for record in records):
        return "alive"
    if any(_is_to_be_retried(record.dagster_run) for record in records):
        return "retry due"
    ended = max(record.end_time or record.update_timestamp.timestamp() for record in records)
    return "just ended" if now.timestamp() - ended < GRACE.total_seconds() else "abandoned"


def _is_to_be_retried(run: dg.DagsterRun) -> bool:
    """Whether Dagster has promised a retry and not made it yet."""
    promised = run.status == dg.DagsterRunStatus.FAILURE and run.tags.get("dagster/will_retry") == "true"
    return promised and "dagster/auto_retry_run_id" not in run.tags


@dataclass(frozen=True)
class _Deed:
    """What was done about a job, of which group of runs, and whether that settles it."""

    root: str
    text: str
    done: bool


def _cancel(instance: dg.DagsterInstance, runs: Runs, abandoned: set[str]) -> Iterator[_Deed]:
    for run in runs.all():
        if run.about.root in abandoned and run.end is None:
            yield _cancel_one(instance, runs, run)


def _cancel_one(instance: dg.DagsterInstance, runs: Runs, run: RunRecord) -> _Deed:
    """Cancel a job, holding the claim on it: a re-execution that comes now waits, and finds it cancelled."""
    name = f"job {run.job or run.key} of run {run.about.run} ({run.about.asset})"
    holder = runs.claim(run, "the sensor cancel_orphaned_jobs")
    if holder:
        return _Deed(run.about.root, f"{name}: {holder} is at work on it", done=False)
    if judge(instance, run.about.root, datetime.now(UTC)) != "abandoned":
        return _Deed(run.about.root, f"{name}: a new run has come for it", done=False)
    end = runs.gateway.cancel(run.path)
    return _Deed(run.about.root, f"{name}: {end.state if end else 'was never submitted'}", done=True)
