"""The asset musica_budget: its numbers, and the check that warns before a budget ends. Slurm's answers are made up."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch import upkeep
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm.gateway import RefusedError, Share, Usage
from dagster_sbatch.upkeep import budget_asset
from resources import PROJECT
from unit.test_ledger import HOUR, JOB, USAGE

SHARE = Share("p1", "", "gres/gpu", 6000, 1800, 60)
Tick = Callable[..., dg.SensorResult]


@pytest.fixture
def tick(monkeypatch: pytest.MonkeyPatch, instance: dg.DagsterInstance) -> Tick:
    """`tick(usage)` evaluates the sensor; an error in place of the usage is raised."""
    health = SimpleNamespace(verdict="ok", summary="")
    settings = Settings.model_validate({"SLURM_SUPERCOMPUTER_SITE": "musica"})
    monkeypatch.setattr(upkeep, "check_health", lambda _: health)
    monkeypatch.setattr(type(PROJECT), "load_settings", lambda *_, **__: settings)

    def make(answer: Usage | Exception, verdict: str = "ok") -> dg.SensorResult:
        def usage(_: object) -> Usage:
            if isinstance(answer, Exception):
                raise answer
            return answer

        @contextmanager
        def open_runs(*_: object) -> Iterator[Any]:
            yield SimpleNamespace(gateway=SimpleNamespace(usage=usage))

        monkeypatch.setattr(budget_asset, "open_runs", open_runs)
        health.verdict = verdict
        said = budget_asset.make_budget_sensor(PROJECT)(dg.build_sensor_context(instance))
        assert isinstance(said, dg.SensorResult)
        return said

    return make


def execute_check() -> dg.ExecuteInProcessResult:
    """Execute the check, as a person does in the UI."""
    return (
        dg.Definitions(
            assets=[budget_asset.MUSICA_BUDGET],
            asset_checks=[budget_asset.make_budget_check(PROJECT)],
            jobs=[dg.define_asset_job("now", dg.AssetSelection.all_asset_checks())],
        )
        .resolve_job_def("now")
        .execute_in_process()
    )


@pytest.mark.parametrize(("jobs", "days", "lasts"), [(1, 122.5, True), (8, 15.3125, True), (9, 13.6111, False)])
def test_a_tick_records_numbers_and_the_check(tick: Tick, jobs: int, days: float, lasts: bool) -> None:
    """70 GPU-hours are left, and each job has used 8 in the last two weeks."""
    observation, check = tick(replace(USAGE, jobs=[JOB] * jobs, shares=[SHARE])).asset_events
    assert isinstance(observation, dg.AssetObservation)
    numbers = {name: value.value for name, value in observation.metadata.items() if "days/" not in name}
    assert numbers.pop("hours_by_week")
    assert numbers == {
        "p1_gpu_hours_used": 30,
        "p1_gpu_hours_left": 70,
        "p1_gpu_hours_per_day": pytest.approx(jobs * 8 / 14, abs=1e-3),
        "p1_gpu_hours_days_left": pytest.approx(days, abs=1e-3),
    }
    assert isinstance(check, dg.AssetCheckEvaluation)
    assert (check.asset_key.to_user_string(), check.check_name, check.passed) == (
        "musica_budget",
        "budget_lasts",
        lasts,
    )
    assert "p1: 70 of 100 GPU-hours are left" in str(check.description)
    assert str(check.description).endswith(f": it lasts {int(days)} days.")
    run = execute_check()
    assert [each.passed for each in run.get_asset_check_evaluations()] == [lasts]
    (event,) = (event for event in run.all_events if event.is_asset_observation)
    assert event.asset_observation_data.asset_observation.metadata == observation.metadata


def test_limits_of_a_user_and_above_a_project_have_other_names(tick: Tick) -> None:
    shares = [replace(SHARE, user="xy"), replace(SHARE, project="physics", tres="node"), replace(SHARE, used=None)]
    usage = replace(USAGE, jobs=None, projects=["p1"], parents={"p1": "physics"}, shares=shares, trouble=["sacct: off"])
    observation, check = tick(usage).asset_events
    assert isinstance(observation, dg.AssetObservation)
    assert set(observation.metadata) == {
        "p1_gpu_hours_own_used",
        "p1_gpu_hours_own_left",
        "p1_node_hours_in_physics_used",
        "p1_node_hours_in_physics_left",
    }  # what is not known is missing
    assert isinstance(check, dg.AssetCheckEvaluation)
    assert check.passed
    assert str(check.description).endswith("The last 14 days used ? per day.  \nNot known: sacct: off")


def test_the_hours_of_assets_projects_and_users_plot(tick: Tick) -> None:
    """Of the last seven days; 0 if all jobs are older. The table has this week and the one before, each from Monday."""
    asset, day = replace(JOB, comment="asset=group/a"), timedelta(days=1)
    older = replace(asset, user="ab", project="p2", start=asset.start - 8 * day, end=asset.start - 8 * day + HOUR)
    before = replace(asset, start=asset.start - 11 * day, end=asset.start - 11 * day + HOUR)  # a Sunday
    without = replace(asset, comment="asset=b", project="p2", tres={"node": 1})
    (observation,) = tick(replace(USAGE, jobs=[asset, asset, older, before, without])).asset_events
    assert isinstance(observation, dg.AssetObservation)
    numbers = {name: value.value for name, value in observation.metadata.items() if "days/" in name}
    assert numbers == {
        "node_hours_7_days/asset/group/a": 4,
        "gpu_hours_7_days/asset/group/a": 16,
        "node_hours_7_days/asset/b": 1,
        "node_hours_7_days/project/p1": 4,
        "gpu_hours_7_days/project/p1": 16,
        "node_hours_7_days/project/p2": 1,
        "node_hours_7_days/user/xy": 5,
        "node_hours_7_days/user/ab": 0,
        "gpu_hours_7_days/user/ab": 0,
    }
    rows = observation.metadata["hours_by_week"]
    assert isinstance(rows, dg.TableMetadataValue)
    assert [list(row.data.values()) for row in rows.records] == [
        ["2026-W48", "b", "p2", "xy", 1, 1, None],
        ["2026-W48", "group/a", "p1", "xy", 2, 4, 16],
        ["2026-W47", "group/a", "p2", "ab", 1, 2, 8],
    ]
    (observation,) = tick(replace(USAGE, private=True)).asset_events
    assert isinstance(observation, dg.AssetObservation)
    assert {name.split("/")[1] for name in observation.metadata if "days/" in name} == {"asset"}


def test_a_tick_without_numbers_records_nothing(tick: Tick) -> None:
    said = tick(replace(USAGE, jobs=None, shares=None, trouble=["sacct: Connection refused"]))
    assert not said.asset_events
    assert "sacct: Connection refused" in str(said.skip_reason)
    assert not tick(RefusedError("no way")).asset_events
    for verdict in ("due", "broken"):
        said = tick(AssertionError("it was asked"), verdict=verdict)
        assert "waits until access is in order" in str(said.skip_reason)


def test_a_check_for_which_slurm_does_not_answer_has_not_passed(tick: Tick) -> None:
    tick(replace(USAGE, jobs=None, shares=None, trouble=["sshare: Unable to contact slurm controller"]))
    (check,) = execute_check().get_asset_check_evaluations()
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert str(check.description).startswith("Slurm has not said whether it limits your projects, and ")
    assert "sshare: Unable to contact slurm controller" in str(check.description)
    tick(replace(USAGE, jobs=None, shares=[], trouble=["sacct: off"]))
    (check,) = execute_check().get_asset_check_evaluations()
    assert check.passed
    assert str(check.description).startswith("Slurm limits no project of yours, and ")


def test_a_renewal_that_fails_stops_nothing_while_access_works(tick: Tick) -> None:
    """A stored secret that cannot be renewed is good for weeks, and so may be a certificate."""
    assert tick(USAGE, verdict="failing").asset_events
