"""The ledger: whose job it was, in which week, how many hours; and how long a budget lasts."""

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest

from dagster_sbatch.costs.budget import PACE_DAYS, Budget, days_left, describe, pace_of
from dagster_sbatch.costs.ledger import OTHER, UNKNOWN, find_asset, make_ledger, sum_by, total
from dagster_sbatch.inspect.asset_preview import preview_asset
from dagster_sbatch.launchers import ScriptLauncher
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.run.directory import RunInfo, render_job
from dagster_sbatch.run.tags import recorded_assets
from dagster_sbatch.slurm import Site
from dagster_sbatch.slurm.gateway import JobLife, Usage
from resources import PROJECT

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)  # a Thursday
HOUR = timedelta(hours=1)
KEY = "my_asset-0123456789-abcdef0123-1"
JOB = JobLife("17", "xy", "p1", NOW - 2 * HOUR, NOW - HOUR, 3600, {"node": 2, "gres/gpu": 8}, "gpu", KEY, "")
SITE = Site.model_validate(
    {
        "partitions": {
            "gpu": {"cores": 8, "mem": "8G", "gpus": 4, "tokens_per_node_hour": 1, "tokens_per_gpu_hour": 10},
            "cpu": {"cores": 8, "mem": "8G", "tokens_per_node_hour": 2},
            "free": {"cores": 8, "mem": "8G"},
            "gpus": {"cores": 8, "mem": "8G", "gpus": 4, "tokens_per_gpu_hour": 10},
        }
    }
)
USAGE = Usage(
    user="xy",
    projects=["p1", "p2"],
    default="p1",
    since=NOW - timedelta(days=30),
    now=NOW,
    jobs=[JOB],
    queue=[],
    shares=[],
    parents={},
    private=False,
    trouble=[],
)
BUDGET = Budget("p1", "p1", "gres/gpu", "", "GrpTRESMins of p1", 100, 30, 1, 2)


def entries(*jobs: JobLife, since: datetime = NOW - timedelta(days=30)) -> list[tuple[object, ...]]:
    made = make_ledger(replace(USAGE, jobs=jobs), SITE, lambda _: None, since)
    return [(each.week, each.used.jobs, each.used.node_hours, each.used.gpu_hours) for each in made]


@pytest.mark.parametrize(
    ("name", "comment", "asset"),
    [
        (KEY, f"key={KEY},run=r1,asset=group/my_asset", "group/my_asset"),
        (KEY, f"added by the site,asset=my_asset,key={KEY}", "my_asset"),
        (KEY, f"key={KEY},asset=a+group/b", "a, group/b"),  # of a step that makes both
        ("renamed", f"key={KEY},run=r1,asset=my_asset", "my_asset"),
        (KEY, "", "of Dagster's records"),
        ("my_asset-0123456789ab-3", "", OTHER),
        ("forgotten-0123456789-abcdef0123-2", "", UNKNOWN),
        ("interactive", "", OTHER),
        ("train-1", "dataset=my_asset", OTHER),
    ],
)
def test_whose_job_it_was(name: str, comment: str, asset: str) -> None:
    recorded = {KEY: "of Dagster's records"}
    assert find_asset(replace(JOB, name=name, comment=comment), lambda job: recorded.get(job.name)) == asset


def test_the_comment_of_a_job_names_all_assets_of_its_step() -> None:
    @dg.asset
    def a(context: dg.AssetExecutionContext, compute: ComputeResource) -> None:
        compute.run(context, workload=Path(__file__), launcher=ScriptLauncher())

    (shown,) = preview_asset(dg.Definitions([a], resources={"compute": ComputeResource.of(PROJECT)}), "a")
    text = render_job(shown.plan, shown.paths, RunInfo(run="r", root="r", asset="a, group/b", partitions=""))
    comment = text.partition("--comment=")[2].split()[0]
    assert find_asset(replace(JOB, comment=comment), lambda _: None) == "a, group/b"


def test_dagsters_records_name_the_asset_of_a_job() -> None:
    """The id of a job is used again: the run that was created last before the job counts."""

    @dg.asset(key_prefix="group")
    def my_asset() -> None: ...

    @dg.asset
    def another() -> None: ...

    with dg.DagsterInstance.ephemeral() as instance:
        dg.materialize([my_asset, another], instance=instance, tags={"slurm_job/group__my_asset": "17, 18"})
        dg.materialize([my_asset, another], instance=instance, tags={"slurm_job/another.2": "19"})
        start = datetime.now(UTC)
        jobs = [replace(JOB, job=job, start=start, end=start + HOUR) for job in ("17", "18_4", "19", "20")]
        jobs.append(replace(jobs[0], start=start - timedelta(days=1), end=start))
        find = recorded_assets(instance, replace(USAGE, jobs=jobs))
        assert [find(job) for job in jobs] == ["group/my_asset", "group/my_asset", "another", None, None]


def test_each_life_of_a_job_counts() -> None:
    """A requeued job, a task, and a job that is running: up to now, by the clock of the login node."""
    again = replace(JOB, start=NOW - HOUR, end=NOW - HOUR / 2, seconds=1800)
    running = replace(JOB, job="18_3", start=NOW - HOUR, end=None, seconds=3600)
    assert entries(JOB, again, running) == [("2026-W48", 3, 2 + 1 + 2, 8 + 4 + 8)]


def test_a_job_counts_in_the_weeks_in_which_it_ran() -> None:
    monday = datetime(2026, 11, 23, tzinfo=UTC)
    job = replace(JOB, start=monday - 2 * HOUR, end=monday + HOUR, seconds=3 * 3600)
    assert entries(JOB, job) == [("2026-W47", 1, 4, 16), ("2026-W48", 2, 4, 16)]
    assert entries(replace(job, end=monday, seconds=2 * 3600)) == [("2026-W47", 1, 4, 16)]
    assert entries(job, since=monday - HOUR) == [("2026-W47", 1, 2, 8), ("2026-W48", 1, 2, 8)]
    new_year = datetime(2027, 1, 1, tzinfo=UTC)
    assert entries(replace(JOB, start=new_year, end=new_year + HOUR))[0][0] == "2026-W53"


def test_a_job_that_failed_in_its_first_second_is_one_job() -> None:
    failed = replace(JOB, end=JOB.start, seconds=0)
    assert entries(JOB, failed) == [("2026-W48", 2, 2, 8)]
    assert entries(failed, since=JOB.start + HOUR) == []


def test_the_time_of_a_suspension_does_not_count() -> None:
    assert entries(replace(JOB, seconds=1800)) == [("2026-W48", 1, 1, 4)]


@pytest.mark.parametrize("offset", [-HOUR, HOUR])
def test_a_clock_that_is_an_hour_off(offset: timedelta) -> None:
    """That of the login node. Slurm itself says how long a job ran, by its own clock, also one that is running."""
    usage = replace(USAGE, now=NOW + offset)
    over = replace(JOB, start=NOW - HOUR, end=NOW)
    new = replace(JOB, start=NOW - HOUR / 2, end=None, seconds=1800)
    made = make_ledger(replace(usage, jobs=[over]), SITE, lambda _: None, NOW - timedelta(days=1))
    assert [each.used.gpu_hours for each in made] == [8]
    made = make_ledger(replace(usage, jobs=[new]), SITE, lambda _: None, NOW - timedelta(days=1))
    assert [each.used.gpu_hours for each in made] == [4]
    asked = replace(usage, jobs=[over], since=NOW - timedelta(days=PACE_DAYS + 1))  # by this machine's clock
    assert pace_of(asked, BUDGET) == pytest.approx(8 / 14)
    assert pace_of(replace(asked, jobs=[new]), BUDGET) == pytest.approx(4 / 14)


def test_sums_by_project_and_user() -> None:
    """A GPU-hour that Slurm does not count is unknown, and so is each sum with it; a node-hour is not."""
    unknown = replace(JOB, project="p2", user="ab", tres={"node": 1})
    made = make_ledger(replace(USAGE, jobs=[JOB, JOB, unknown]), SITE, lambda _: None, NOW - timedelta(days=1))
    sums = sum_by(made, ["project", "user"])
    assert [(values, used.node_hours, used.gpu_hours) for values, used in sums] == [
        (["p1", "xy"], 4, 16),
        (["p2", "ab"], 1, None),
    ]
    all_of_them = total([each.used for each in made])
    assert (all_of_them.jobs, all_of_them.node_hours, all_of_them.gpu_hours) == (3, 5, None)
    assert (total([]).jobs, total([]).node_hours, total([]).gpu_hours) == (0, 0, 0)


@pytest.mark.parametrize(
    ("partition", "tres", "tokens"),
    [
        ("gpu", {"node": 2, "gres/gpu": 8}, 2 + 80),
        ("cpu", {"node": 2}, 4),  # GPUs are not in the formula
        ("gpus", {"gres/gpu": 8}, 80),
        ("free", {"node": 2, "gres/gpu": 8}, None),
        ("gone", {"node": 2, "gres/gpu": 8}, None),
        ("gpu", {"node": 2}, None),
    ],
)
def test_tokens_by_the_formula_of_the_site(partition: str, tres: dict[str, int], tokens: float | None) -> None:
    job = replace(JOB, partition=partition, tres=tres)
    (made,) = make_ledger(replace(USAGE, jobs=[job]), SITE, lambda _: None, NOW - timedelta(days=1))
    assert made.used.tokens == tokens


def test_the_pace_of_two_weeks() -> None:
    before = replace(JOB, start=NOW - timedelta(days=15), end=NOW - timedelta(days=14) + HOUR, seconds=25 * 3600)
    usage = replace(USAGE, jobs=[JOB, before, replace(JOB, project="p2")])
    assert pace_of(usage, BUDGET) == pytest.approx(16 / 14)
    assert days_left(usage, BUDGET) == pytest.approx(70 / (16 / 14))
    spent = replace(BUDGET, used=120)
    assert days_left(usage, spent) == 0
    assert days_left(replace(usage, jobs=[]), spent) == 0  # its jobs do not start any more, so that the pace falls
    assert days_left(replace(usage, jobs=None), spent) == 0
    assert "p1: none of 100 GPU-hours are left, 120 are used (GrpTRESMins of p1)." in describe(usage, spent)
    assert days_left(replace(usage, jobs=[]), BUDGET) == math.inf


@pytest.mark.parametrize(
    "changes",
    [{"jobs": None}, {"private": True}, {"private": None}, {"since": NOW - timedelta(days=13)}, {"projects": ["p2"]}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_pace_that_is_not_known(changes: dict[str, object]) -> None:
    usage = replace(USAGE, **changes)  # type: ignore[arg-type]
    assert pace_of(usage, BUDGET) is None
    assert days_left(usage, BUDGET) is None
    assert "The last 14 days used ? per day." in describe(usage, BUDGET)
    hidden = "waiting jobs 2 (waiting jobs of others are not known)." in describe(usage, BUDGET)
    assert hidden is bool({"private", "projects"} & set(changes))


def test_jobs_of_a_project_below_the_one_with_the_limit_count_for_its_pace() -> None:
    usage = replace(USAGE, parents={"p3": "p2", "p2": "p1", "p4": "root"}, jobs=[replace(JOB, project="p3"), JOB])
    assert pace_of(usage, BUDGET) == pytest.approx(16 / 14)
    assert pace_of(replace(usage, jobs=[replace(JOB, project="p4")]), BUDGET) == 0


def test_the_pace_of_the_user_alone() -> None:
    usage = replace(USAGE, jobs=[JOB, replace(JOB, user="ab")], private=True)
    own = replace(BUDGET, user="xy")
    assert pace_of(usage, own) == pytest.approx(8 / 14)
    assert "p1: 70 of 100 GPU-hours are left (GrpTRESMins of p1, your own jobs in p1 only)." in describe(usage, own)
