"""Access to the supercomputer, kept alive with no person: a job, the sensor that asks for it, what the UI shows."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg

from dagster_sbatch.auth import AccessError, Health, Report, check_health, clock, refresh
from dagster_sbatch.auth.attempts import pause_after
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.project import Project
from dagster_sbatch.run.attention import ACCESS
from dagster_sbatch.upkeep.deployment import running_on_supercomputer, supercomputer_settings

LONGEST_RUN = timedelta(minutes=15)
"""A refresh takes five minutes at most: a run whose status has stood still for longer was killed."""
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
    """What keeps access to the supercomputer alive.

    Attributes:
        op: replaces the secrets and the certificate as far as they are due.
        job: one op.
        sensor: requests the job when something is due.
        asset: shows how access is.
        check: of the asset, whether access works and renews itself.
    """

    op: dg.OpDefinition
    job: dg.JobDefinition
    sensor: dg.SensorDefinition
    asset: dg.AssetSpec
    check: dg.AssetChecksDefinition


def make_credential_refresh(project: Project) -> CredentialRefresh:
    """Make the definitions that keep access to the supercomputer alive."""

    @dg.asset_check(asset=MUSICA_ACCESS.key, name="health", description="Whether access works and renews itself.")
    def health() -> dg.AssetCheckResult:
        return _check(project)

    @dg.op(  # its job has the name `refresh_credentials`, and Dagster wants them different
        name="refresh_credentials_op",
        description="Replace the secrets and the certificate as far as they are due.",
    )
    def refresh_op(context: dg.OpExecutionContext) -> None:
        _refresh(project, context)

    @dg.job(
        name=JOB,
        description="Keeps access to the supercomputer alive; its sensor starts it when something is due.",
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
        name="refresh_credentials_when_due",
        minimum_interval_seconds=30,
        default_status=running_on_supercomputer(project),
        description="Looks at the files of the credentials, asks nobody, and requests a refresh when one is due.",
    )
    def refresh_when_due(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        return _tick(project, context)

    return CredentialRefresh(refresh_op, refresh_job, refresh_when_due, MUSICA_ACCESS, health)


def _check(project: Project) -> dg.AssetCheckResult:
    """Look at the files, now."""
    try:
        health = check_health(supercomputer_settings(project))
    except ConfigurationError as error:
        return dg.AssetCheckResult(passed=False, description=str(error))
    return dg.AssetCheckResult(
        passed=_passed(health), description=_markdown(health), metadata=_numbers(health), severity=_severity(health)
    )


def _refresh(project: Project, context: dg.OpExecutionContext) -> None:
    """Refresh, and show how access is then, also if that failed."""
    failure: AccessError | None = None
    report = Report()
    try:
        settings = supercomputer_settings(project)
        report = refresh(settings)
    except ConfigurationError as error:
        raise dg.Failure(str(error), allow_retries=False) from None
    except AccessError as error:
        failure = error
    health = check_health(settings)
    for warning in report.warnings:
        context.log.warning(warning)
    numbers = _numbers(health) | _deeds(report)
    for event in _events(health, numbers):
        context.log_event(event)  # type: ignore[arg-type]  # takes a check's evaluation, though its annotation does not
    context.add_output_metadata(numbers)
    if failure is not None:
        raise dg.Failure(str(failure), metadata=numbers, allow_retries=False)


def _tick(project: Project, context: dg.SensorEvaluationContext) -> dg.SensorResult:
    """Make one tick; the first one, and each that finds access better or worse than before, shows how it is.

    The cursor holds what was asked for and has not helped yet, and what was shown.

    Raises:
        ConfigurationError: the settings are wrong: the tick fails.
    """
    health = check_health(supercomputer_settings(project))
    cursor = _Cursor.parse(context.cursor)
    shown = "ok" if _passed(health) else health.verdict
    asked, requests, reason = _decide(context.instance, health, cursor.asked)
    return dg.SensorResult(
        run_requests=requests,
        skip_reason=reason,
        cursor=_Cursor(asked, shown).render(),
        asset_events=[] if cursor.shown == shown else _events(health, _numbers(health)),
    )


@dataclass(frozen=True)
class _Asked:
    """The latest request for a need that is still there.

    Attributes:
        at: when it was made.
        count: how many were made for that need.
    """

    at: datetime
    count: int

    @property
    def pause_ends(self) -> datetime:
        """Before when it is not asked for again."""
        return self.at + (pause_after(self.count) if self.count else timedelta())


@dataclass(frozen=True)
class _Cursor:
    """What the sensor knows of its earlier ticks.

    Attributes:
        asked: the latest request.
        shown: the verdict that `musica_access` was last given by the sensor; empty before the first tick.
    """

    asked: _Asked
    shown: str

    @classmethod
    def parse(cls, text: str | None) -> "_Cursor":
        values = json.loads(text or "{}")
        asked = _Asked(datetime.fromisoformat(values["at"]), values["count"]) if values.get("count") else _NOTHING_ASKED
        return cls(asked, values.get("shown", ""))

    def render(self) -> str:
        asked = {"at": self.asked.at.isoformat(), "count": self.asked.count} if self.asked.count else {}
        return json.dumps({**asked, "shown": self.shown})


_NOTHING_ASKED = _Asked(datetime(1970, 1, 1, tzinfo=UTC), 0)
_ACTIVE = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def _decide(
    instance: dg.DagsterInstance, health: Health, asked: _Asked
) -> tuple[_Asked, list[dg.RunRequest], str | None]:
    """Decide whether a refresh is to be requested: what is then asked for, the request, or why there is none."""
    if health.next_refresh is None:
        return _NOTHING_ASKED, [], health.summary
    moment = max(health.next_refresh, asked.pause_ends)
    if moment > health.now:
        wait = clock.duration((moment - health.now).total_seconds())
        reason = f"the next refresh is due at {clock.written(moment)}, in {wait}"
        if health.verdict == "ok":
            return _NOTHING_ASKED, [], reason
        return asked, [], f"{health.verdict}: {health.summary}\n{reason}"
    running = _running(instance, health.now)
    if running:
        return asked, [], f"a refresh is due, and run {running} is at it"
    request = dg.RunRequest(run_key=f"asked at {health.now.isoformat()}")
    return _Asked(health.now, asked.count + 1), [request], None


def _running(instance: dg.DagsterInstance, now: datetime) -> str | None:
    """Id of a refresh that is on its way: waiting in the queue, however long, or at work and not left over."""
    for wanted in (
        dg.RunsFilter(job_name=JOB, statuses=[dg.DagsterRunStatus.QUEUED]),
        dg.RunsFilter(job_name=JOB, statuses=_ACTIVE, updated_after=now - LONGEST_RUN),
    ):
        if records := instance.get_run_records(wanted, limit=1):
            return records[0].dagster_run.run_id
    return None


def _events(health: Health, numbers: Mapping[str, Any]) -> list[dg.AssetObservation | dg.AssetCheckEvaluation]:
    """What shows how access is at `musica_access`."""
    text = _markdown(health)
    return [
        dg.AssetObservation(MUSICA_ACCESS.key, description=text, metadata=numbers),
        dg.AssetCheckEvaluation(
            asset_key=MUSICA_ACCESS.key,
            check_name="health",
            passed=_passed(health),
            description=text,
            severity=_severity(health),
            metadata=numbers,
        ),
    ]


def _passed(health: Health) -> bool:
    return health.verdict in ("ok", "due")


def _markdown(health: Health) -> str:
    """The summary as the UI is to show it: line by line."""
    return health.summary.replace("\n", "  \n")


def _severity(health: Health) -> dg.AssetCheckSeverity:
    return dg.AssetCheckSeverity.ERROR if health.verdict == "broken" else dg.AssetCheckSeverity.WARN


def _numbers(health: Health) -> dict[str, Any]:
    """Remaining hours as numbers, which plot; ends as times; what is not known is left out."""
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


def _deeds(report: Report) -> dict[str, Any]:
    deeds = {"secrets_replaced_with": report.rotated_with, "certificate_issued_with": report.issued_with}
    return {name: f"the {source} credential" for name, source in deeds.items() if source}
