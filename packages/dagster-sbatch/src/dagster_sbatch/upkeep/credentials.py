"""Access to the supercomputer renews itself: a job, the sensor that requests it, and what the UI shows."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import dagster as dg
from pydantic import BaseModel, ValidationError

from dagster_sbatch import clock
from dagster_sbatch.auth import AccessError, AccessHealth, Report, check_health, refresh
from dagster_sbatch.auth.refresh_failures import pause_end
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.project import Project
from dagster_sbatch.run.reports import ACCESS, markdown
from dagster_sbatch.slurm.units import count_of
from dagster_sbatch.upkeep import running_on_supercomputer

LONGEST_RUN = timedelta(minutes=15)
"""A refresh takes five minutes at most: a run whose status has not changed for longer was killed."""
LATER = timedelta(minutes=1)
"""A run whose last update lies further in the future was updated by a clock that was ahead: it counts as killed."""
JOB = "refresh_credentials"

MUSICA_ACCESS = dg.AssetSpec(
    ACCESS,
    group_name="access",
    kinds={"ssh"},
    owners=["team:platform"],
    description="Access to the supercomputer: the SSH certificate and the two secrets that renew it. Each refresh adds "
    "their remaining hours, which plot.",
)


@dataclass(frozen=True)
class CredentialRefresh:
    """The definitions that renew access to the supercomputer.

    Attributes:
        op: replaces the secrets and the certificate if they are due, and records the state of the access.
        job: the op alone.
        sensor: reads the files every 30 s, connects to nothing, and requests the job when something is due.
        asset: `musica_access`, whose metadata are the remaining hours of the certificate and of both secrets.
        check: fails if access does not work, or does not renew itself.
    """

    op: dg.OpDefinition
    job: dg.JobDefinition
    sensor: dg.SensorDefinition
    asset: dg.AssetSpec
    check: dg.AssetChecksDefinition


def make_credential_refresh(project: Project) -> CredentialRefresh:
    """Make the definitions that renew access to the supercomputer.

    Example:
        refresh = make_credential_refresh(PROJECT)
        defs = dg.Definitions(
            assets=[refresh.asset], asset_checks=[refresh.check], jobs=[refresh.job], sensors=[refresh.sensor]
        )
    """

    @dg.asset_check(asset=MUSICA_ACCESS.key, name="health", description="Whether access works and renews itself.")
    def health() -> dg.AssetCheckResult:
        try:
            found = check_health(project.load_settings(supercomputer=True))
        except ConfigurationError as error:
            return dg.AssetCheckResult(passed=False, description=str(error))
        return dg.AssetCheckResult(**_outcome(found), metadata=_numbers(found))

    @dg.op(  # Dagster wants its name to differ from its job's
        name=f"{JOB}_op", description="Replace the secrets and the certificate if they are due."
    )
    def refresh_op(context: dg.OpExecutionContext) -> None:
        _refresh(project, context)

    @dg.job(
        name=JOB,
        description="Renews access to the supercomputer; its sensor starts it when something is due.",
        executor_def=dg.in_process_executor,
        tags={
            "dagster/max_runtime": str(int(LONGEST_RUN.total_seconds())),
            "dagster/max_retries": "0",
            "dagster/priority": "10",  # before the workloads that wait in the queue
        },
    )
    def refresh_job() -> None:
        refresh_op()

    @dg.sensor(
        job=refresh_job,
        name=f"{JOB}_when_due",
        minimum_interval_seconds=30,
        default_status=running_on_supercomputer(project),
        description="Reads the files of the credentials, connects to nothing, and requests a refresh when one is due.",
    )
    def refresh_when_due(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        return _tick(project, context)

    return CredentialRefresh(refresh_op, refresh_job, refresh_when_due, MUSICA_ACCESS, health)


def _refresh(project: Project, context: dg.OpExecutionContext) -> None:
    """Refresh, and record the state of the access, also if the refresh failed."""
    failure: AccessError | None = None
    report = Report()
    try:
        settings = project.load_settings(supercomputer=True)
        report = refresh(settings)
    except ConfigurationError as error:
        raise dg.Failure(str(error), allow_retries=False) from None
    except AccessError as error:
        failure = error
    health = check_health(settings)
    for warning in report.warnings:
        context.log.warning(warning)
    sources = {"secrets_replaced_with": report.rotated_with, "certificate_issued_with": report.issued_with}
    numbers = _numbers(health) | {name: f"the {source} credential" for name, source in sources.items() if source}
    for event in _events(health, numbers) if health.verdict != "due" else ():  # it has failed; the sensor reports that
        context.log_event(event)  # type: ignore[arg-type]  # accepts a check's evaluation, against its annotation
    context.add_output_metadata(numbers)
    if failure is not None:
        raise dg.Failure(str(failure), metadata=numbers, allow_retries=False)


class _Cursor(BaseModel):
    """What the sensor remembers."""

    # When it made the latest request for a need that still exists; None if there is no such need
    at: datetime | None = None
    count: int = 0  # how many requests it made for that need
    shown: str = ""  # the state that it last recorded at `musica_access`; empty before the first tick


def _tick(project: Project, context: dg.SensorEvaluationContext) -> dg.SensorResult:
    """Evaluate the sensor; the first tick, and each that finds access better or worse, records its state.

    Raises ConfigurationError: the settings are wrong, and the tick fails.
    """
    health = check_health(project.load_settings(supercomputer=True))
    before = _Cursor()
    with suppress(ValidationError):  # another version has written it, or a person
        before = _Cursor.model_validate_json(context.cursor or "{}")
    after, requests, reason = _decide(context.instance, health, before)
    if health.verdict == "due" and after.count > 1:  # a refresh that cannot write, as on a full disk, records nothing
        runs = f"{count_of(after.count - 1, 'run')} of {JOB} {'has' if after.count == 2 else 'have'}"
        health = replace(health, verdict="failing", summary=f"{health.summary}\n{runs} not changed that: see the log")
    shown = "ok" if _passed(health) else health.verdict
    return dg.SensorResult(
        run_requests=requests,
        skip_reason=reason,
        cursor=after.model_copy(update={"shown": shown}).model_dump_json(),
        asset_events=[] if before.shown == shown else _events(health, _numbers(health)),
    )


def _decide(
    instance: dg.DagsterInstance, health: AccessHealth, cursor: _Cursor
) -> tuple[_Cursor, list[dg.RunRequest], str | None]:
    """Return the next cursor, the request for a refresh, and the reason if there is none."""
    if health.next_refresh is None:
        return _Cursor(), [], health.summary
    pause_ends = pause_end(cursor.at, cursor.count) if cursor.at else health.next_refresh
    moment = max(health.next_refresh, pause_ends)
    if moment > health.now:
        wait = clock.duration((moment - health.now).total_seconds())
        reason = f"the next refresh is due at {clock.written(moment)}, in {wait}"
        if health.verdict == "ok":
            return _Cursor(), [], reason
        return cursor, [], f"{health.verdict}: {health.summary}\n{reason}"
    running = _running(instance, health.now)
    if running:
        return cursor, [], f"a refresh is due, and run {running} does it"
    request = dg.RunRequest(run_key=f"requested at {health.now.isoformat()}")
    return _Cursor(at=health.now, count=cursor.count + 1), [request], None


def _running(instance: dg.DagsterInstance, now: datetime) -> str | None:
    """Return the id of a refresh that waits in the queue, however long, or runs and was not killed."""
    statuses = dg.DagsterRunStatus
    active = [statuses.NOT_STARTED, statuses.STARTING, statuses.STARTED, statuses.CANCELING]
    for wanted in (
        dg.RunsFilter(job_name=JOB, statuses=[statuses.QUEUED]),
        dg.RunsFilter(job_name=JOB, statuses=active, updated_after=now - LONGEST_RUN, updated_before=now + LATER),
    ):
        if records := instance.get_run_records(wanted, limit=1):
            return records[0].dagster_run.run_id
    return None


def _events(health: AccessHealth, numbers: Mapping[str, Any]) -> list[dg.AssetObservation | dg.AssetCheckEvaluation]:
    """Return the events that record the state of the access at `musica_access`."""
    outcome, asset = _outcome(health), MUSICA_ACCESS.key
    return [
        dg.AssetObservation(asset, description=outcome["description"], metadata=numbers),
        dg.AssetCheckEvaluation(asset_key=asset, check_name="health", **outcome, metadata=numbers),
    ]


def _passed(health: AccessHealth) -> bool:
    return health.verdict in ("ok", "due")


def _outcome(health: AccessHealth) -> dict[str, Any]:
    """Return the fields of a result of the check, without its metadata."""
    severity = dg.AssetCheckSeverity.ERROR if health.verdict == "broken" else dg.AssetCheckSeverity.WARN
    return {"passed": _passed(health), "description": markdown(health.summary), "severity": severity}


def _numbers(health: AccessHealth) -> dict[str, Any]:
    """Return remaining hours as numbers, which Dagster plots, and ends as times; unknown ones are left out."""
    numbers: dict[str, Any] = {"verdict": health.verdict}
    for item in health.items:
        remaining = health.remaining(item)
        if item.valid_until is not None and remaining is not None:
            name = item.name.replace(" ", "_").lower()
            numbers[f"{name}_hours"] = round(remaining.total_seconds() / 3600, 4)
            numbers[f"{name}_valid_until"] = dg.MetadataValue.timestamp(item.valid_until)
    for part, failing in health.failing.items():
        numbers[f"{part}_failing_since"] = dg.MetadataValue.timestamp(failing.since)
    if health.next_refresh is not None:
        numbers["next_refresh"] = dg.MetadataValue.timestamp(health.next_refresh)
    return numbers
