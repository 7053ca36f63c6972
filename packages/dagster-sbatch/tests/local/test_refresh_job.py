"""The job that refreshes, the sensor that asks for it, and what both show, with authentik's stand-in."""

import errno
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import dagster as dg
import pytest
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
from dagster._core.test_utils import freeze_time

from dagster_sbatch import clock
from dagster_sbatch.auth import check_health
from dagster_sbatch.auth.keys import certificate_path
from jobs.credentials import access_health, musica_access, refresh_credentials_job, refresh_credentials_sensor
from slurm_in_a_box import AuthentikControl, AuthentikServer, Disturbance
from support import access
from support.rotation import quick as quick

pytestmark = [pytest.mark.local, pytest.mark.usefixtures("quick")]


@pytest.fixture
def variables(authentik: AuthentikServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """In the environment: the document's with a bootstrap token; and a certificate for 400 days beside the key."""
    found = access.environment(authentik.base_url, tmp_path)
    found["ASC_AUTHENTIK_API_TOKEN"] = access.bootstrap_token(authentik.control)
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    access.certify(Path(found["SLURM_EDGE_NODE_KEY_PATH"]), 400 * access.DAY)
    return found


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster"), overrides={"telemetry": {"enabled": False}}) as made:
        yield made


def tick(instance: dg.DagsterInstance, cursor: str | None = None) -> dg.SensorResult:
    result = refresh_credentials_sensor(dg.build_sensor_context(instance=instance, cursor=cursor))
    assert isinstance(result, dg.SensorResult)
    return result


def checks(result: dg.SensorResult) -> list[dg.AssetCheckEvaluation]:
    return [each for each in result.asset_events if isinstance(each, dg.AssetCheckEvaluation)]


def reason(result: dg.SensorResult) -> str:
    assert isinstance(result.skip_reason, dg.SkipReason)
    return str(result.skip_reason.skip_message)


class Wind(Protocol):
    def __call__(self, **later: float) -> None: ...


@pytest.fixture
def wind(monkeypatch: pytest.MonkeyPatch) -> Wind:
    """Stops this machine's clock, so much later than the test began."""
    begun = datetime.now(UTC)

    def stop_at(**later: float) -> None:
        monkeypatch.setattr(clock, "now", lambda: begun + timedelta(**later))

    return stop_at


def run_job(instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    return refresh_credentials_job.execute_in_process(instance=instance, raise_on_error=False)


def observations(instance: dg.DagsterInstance) -> list[dict[str, Any]]:
    """Metadata of what was logged of the access, oldest first."""
    records = instance.fetch_observations(musica_access.key, limit=100).records
    found = [record.asset_observation for record in reversed(records)]
    return [{name: each.value for name, each in one.metadata.items()} for one in found if one]


def evaluations(instance: dg.DagsterInstance, result: dg.ExecuteInProcessResult) -> list[tuple[bool, str]]:
    """Outcome and description of each evaluation of the check that a run has stored."""
    entries = instance.all_logs(result.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION)
    found = [entry.get_dagster_event().event_specific_data for entry in entries]
    return [(each.passed, str(each.description)) for each in found if isinstance(each, dg.AssetCheckEvaluation)]


# The job


def test_its_numbers_plot(variables: dict[str, str], instance: dg.DagsterInstance) -> None:
    result = run_job(instance)
    assert result.success
    (numbers,) = observations(instance)
    assert numbers["certificate_hours"] == pytest.approx(400 * 24, abs=0.1)
    assert numbers["api_token_hours"] == pytest.approx(30 * 24, abs=0.1)
    assert numbers["app_password_hours"] == pytest.approx(30 * 24, abs=0.1)
    assert numbers["secrets_replaced_with"] == "the bootstrap credential"
    health = check_health(access.settings_of(variables))
    for item in health.items:
        assert item.valid_until
        assert numbers[f"{item.name.lower().replace(' ', '_')}_valid_until"] == item.valid_until.timestamp()
    assert evaluations(instance, result) == [(True, health.summary)]
    checked = access_health()
    assert isinstance(checked, dg.AssetCheckResult)
    assert checked.passed
    assert checked.metadata["api_token_hours"].value == pytest.approx(30 * 24, abs=0.1)


def test_a_failing_refresh_is_shown_before_anything_expires(
    variables: dict[str, str],
    instance: dg.DagsterInstance,
    authentik: AuthentikServer,
    monkeypatch: pytest.MonkeyPatch,
    wind: Wind,
) -> None:
    run_job(instance)
    authentik.stop()
    wind(days=24)
    result = run_job(instance)
    assert result.success  # the certificate is good: a warning
    numbers = observations(instance)[-1]
    assert numbers["verdict"] == "failing"
    assert numbers["api_token_hours"] == pytest.approx(6 * 24, abs=0.1)
    assert numbers["rotation_failing_since"] == pytest.approx(clock.now().timestamp(), abs=60)
    ((passed, description),) = evaluations(instance, result)
    assert not passed
    assert "the stored secrets could not be renewed since" in description
    assert "Access works until" in description
    authentik.start()
    wind(days=24.1)
    assert evaluations(instance, run_job(instance))[0][0]


def test_without_access_the_run_fails_and_says_so_in_the_asset(
    variables: dict[str, str], instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ASC_AUTHENTIK_API_TOKEN")
    certificate_path(Path(variables["SLURM_EDGE_NODE_KEY_PATH"])).unlink()
    result = run_job(instance)
    assert not result.success
    failure = next(event for event in result.all_events if event.is_step_failure).step_failure_data
    assert failure.user_failure_data
    assert "One of these is enough, and none of them works" in str(failure.user_failure_data.description)
    ((passed, description),) = evaluations(instance, result)
    assert not passed
    assert "none of them works:  \n" in description  # a line of its own also in Markdown
    assert observations(instance)[-1]["verdict"] == "broken"


def test_no_secret_is_in_dagsters_storage(
    variables: dict[str, str],
    instance: dg.DagsterInstance,
    control: AuthentikControl,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    wind: Wind,
) -> None:
    run_job(instance)
    wind(days=24)
    run_job(instance)
    monkeypatch.setenv("ASC_OIDC_CLIENT_ID", "nobody")
    wind(days=50)
    assert not run_job(instance).success or observations(instance)[-1]["verdict"] == "failing"
    secrets = access.secrets_of(control)
    assert len(secrets) > 5
    content = b"".join(path.read_bytes() for path in (tmp_path / "dagster").rglob("*") if path.is_file())
    assert b"musica_access" in content
    assert not [secret for secret in secrets if secret.encode() in content]


# The sensor


def test_it_asks_when_something_is_due_and_says_when_that_will_be(
    variables: dict[str, str], instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, wind: Wind
) -> None:
    first = tick(instance, "of another version")  # it counts as none
    assert len(first.run_requests or ()) == 1
    run_job(instance)
    second = tick(instance, first.cursor)
    assert not second.run_requests
    assert "the next refresh is due at" in reason(second)
    assert "in 22 d 23 h" in reason(second)
    wind(days=22.9)
    assert not tick(instance, second.cursor).run_requests
    wind(days=23.1)
    third = tick(instance, second.cursor)
    assert len(third.run_requests or ()) == 1
    assert third.run_requests
    assert first.run_requests
    assert third.run_requests[0].run_key != first.run_requests[0].run_key


def test_a_tick_asks_nobody(
    variables: dict[str, str], instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, wind: Wind
) -> None:
    run_job(instance)
    monkeypatch.setattr(socket.socket, "connect", None)
    for days in (0, 24, 31, 500):
        wind(days=days)
        assert bool(tick(instance).run_requests) == (days > 0)


def add_run(instance: dg.DagsterInstance, status: dg.DagsterRunStatus) -> str:
    repository = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("musica_pipelines"), "__repository__")
    origin = RemoteJobOrigin(repository, refresh_credentials_job.name)
    run = instance.create_run_for_job(refresh_credentials_job, status=status, remote_job_origin=origin)
    return run.run_id


@pytest.mark.parametrize("status", [dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTED])
def test_it_never_asks_twice_for_one_need(
    variables: dict[str, str], instance: dg.DagsterInstance, status: dg.DagsterRunStatus
) -> None:
    run_id = add_run(instance, status)
    skipped = tick(instance)
    assert not skipped.run_requests
    assert f"run {run_id} does it" in reason(skipped)


def test_a_run_that_was_left_started_does_not_block(
    variables: dict[str, str], instance: dg.DagsterInstance, wind: Wind
) -> None:
    add_run(instance, dg.DagsterRunStatus.STARTED)
    wind(minutes=14)
    assert not tick(instance).run_requests
    for minutes in (16, -2):  # the clock was ahead when the run began
        wind(minutes=minutes)
        assert tick(instance).run_requests


def test_a_run_that_waits_in_the_queue_for_long_is_waited_for(
    variables: dict[str, str], instance: dg.DagsterInstance, wind: Wind
) -> None:
    run_id = add_run(instance, dg.DagsterRunStatus.QUEUED)
    wind(hours=10)
    assert f"run {run_id} does it" in reason(tick(instance))


def test_a_run_that_has_waited_in_the_queue_for_long_is_at_work(
    variables: dict[str, str], instance: dg.DagsterInstance, wind: Wind
) -> None:
    """What counts is since when it is at work, not since when it exists."""
    run_id = add_run(instance, dg.DagsterRunStatus.QUEUED)
    run = instance.get_run_by_id(run_id)
    assert run
    wind(hours=10)
    with freeze_time(clock.now()):
        instance.report_dagster_event(dg.DagsterEvent(dg.DagsterEventType.RUN_START.value, run.job_name), run_id)
    assert f"run {run_id} does it" in reason(tick(instance))
    wind(hours=10, minutes=16)
    assert tick(instance).run_requests


def test_a_failed_refresh_is_asked_for_again_less_and_less_often(
    variables: dict[str, str], instance: dg.DagsterInstance, authentik: AuthentikServer, wind: Wind,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("dagster_sbatch.auth.refresher.ISSUE_TRIES", 1)
    certificate_path(Path(variables["SLURM_EDGE_NODE_KEY_PATH"])).unlink()
    authentik.stop()
    cursor, asked = None, []
    for minute in range(100):
        wind(minutes=minute)
        result = tick(instance, cursor)
        cursor = result.cursor
        if result.run_requests:
            asked.append(minute)
            assert not run_job(instance).success
        else:
            assert "broken: " in reason(result)
            assert "the next refresh is due at" in reason(result)
    assert asked == [0, 1, 3, 7, 15, 31, 61, 91]


def test_a_run_that_dies_without_a_word_is_asked_for_again_less_and_less_often(
    variables: dict[str, str], instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, wind: Wind
) -> None:
    cursor, asked = None, []
    for minute in range(70):
        wind(minutes=minute)
        result = tick(instance, cursor)
        cursor = result.cursor
        if result.run_requests:
            asked.append(minute)
    assert asked == [0, 1, 3, 7, 15, 31, 61]


def test_a_failure_that_cannot_be_recorded_is_shown_after_the_second_try(
    variables: dict[str, str], instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, wind: Wind
) -> None:
    """The disk is full, or a command with sudo has left a lock of root's."""

    def refuse(path: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run_job(instance)
    cursor, shown = tick(instance).cursor, []
    with monkeypatch.context() as full:
        full.setattr(Path, "replace", refuse)
        for minute in (0, 1, 2):
            wind(days=24, minutes=minute)
            result = tick(instance, cursor)
            cursor = result.cursor
            shown += [(minute, each.passed, str(each.description)) for each in checks(result)]
            if result.run_requests:
                assert evaluations(instance, run_job(instance)) == [], "nothing contradicts the sensor"
    ((minute, passed, text),) = shown
    assert (minute, passed) == (1, False)
    assert "1 run of refresh_credentials has not changed that" in text
    assert run_job(instance).success
    assert [each.passed for each in checks(tick(instance, cursor))] == [True]


def test_failures_and_requests_of_a_clock_that_was_ahead_do_not_stop_it(
    variables: dict[str, str], instance: dg.DagsterInstance, control: AuthentikControl, wind: Wind
) -> None:
    control.disturb(Disturbance("error", status=400))
    wind(days=900)
    requested = tick(instance)
    assert requested.run_requests
    assert not run_job(instance).success
    wind(days=0)
    assert tick(instance, requested.cursor).run_requests


def test_the_first_tick_shows_how_access_is_and_later_ones_what_has_become_of_it(
    variables: dict[str, str], instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, wind: Wind
) -> None:
    def shown(result: dg.SensorResult) -> list[Any]:
        for event in result.asset_events:
            instance.report_runless_asset_event(event)
        return [each.passed for each in checks(result)]

    monkeypatch.delenv("ASC_AUTHENTIK_API_TOKEN")
    wind(days=1)
    first = tick(instance)
    assert shown(first) == [True]
    (observation,) = instance.fetch_observations(musica_access.key, limit=1).records
    assert observation.asset_observation
    assert observation.asset_observation.metadata["verdict"].value == "ok"
    second = tick(instance, first.cursor)
    assert shown(second) == []
    wind(days=401)
    third = tick(instance, second.cursor)
    assert shown(third) == [False]
    assert third.run_requests
    assert shown(tick(instance, third.cursor)) == []


def test_access_that_does_not_renew_itself_is_left_alone(
    variables: dict[str, str], instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, wind: Wind
) -> None:
    monkeypatch.delenv("ASC_AUTHENTIK_API_TOKEN")
    wind(days=399)
    assert "nothing renews access: it ends at" in reason(tick(instance))
    wind(days=401)
    assert tick(instance).run_requests  # whose run fails, visibly


def test_thirty_days_with_no_person(
    variables: dict[str, str],
    instance: dg.DagsterInstance,
    control: AuthentikControl,
    monkeypatch: pytest.MonkeyPatch,
    wind: Wind,
) -> None:
    """Both clocks move together; the sensor alone decides; the bootstrap token is gone after the first day."""
    cursor, runs, shift = None, [], 0.0
    for _ in range(4 * 30):
        wind(days=shift)
        result = tick(instance, cursor)
        cursor = result.cursor
        if result.run_requests:
            assert run_job(instance).success
            runs.append(shift)
        health = check_health(access.settings_of({k: v for k, v in variables.items() if "API_TOKEN" not in k}))
        assert health.verdict == "ok", f"day {shift}: {health.summary}"
        monkeypatch.delenv("ASC_AUTHENTIK_API_TOKEN", raising=False)
        shift += 0.25
        control.advance_clock(0.25 * access.DAY)
    assert runs == [0.0, 23.25]  # a week before their end
    assert len(access.made_here(control)) == 2
