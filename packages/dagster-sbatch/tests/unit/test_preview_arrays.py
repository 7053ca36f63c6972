"""The preview of a run over several partitions."""

import re
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.inspect.asset_preview import Preview, preview_asset
from dagster_sbatch.inspect.dry_run import try_script
from dagster_sbatch.launchers import ScriptLauncher
from dagster_sbatch.run.array import JobArray
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.slurm import SlurmRequest
from dagster_sbatch.slurm.gateway import Limits, Projects
from resources import PROJECT

WORKLOAD = Path(__file__)
"""Any program that parses."""
MONTHS = dg.MonthlyPartitionsDefinition(start_date="2013-01", end_date="2014-01", fmt="%Y-%m")


@dg.asset(partitions_def=MONTHS, backfill_policy=dg.BackfillPolicy.single_run())
def counts(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    return compute.run(context, workload=WORKLOAD, launcher=ScriptLauncher()).get_materialize_result()


@dg.asset(partitions_def=MONTHS, backfill_policy=dg.BackfillPolicy.single_run())
def monthly(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    return compute.run(
        context,
        workload=WORKLOAD,
        launcher=ScriptLauncher(),
        request=SlurmRequest(cpus_per_task=19, time_limit="01:00:00"),
        array=JobArray(max_running_tasks=4),
    ).get_materialize_result()


@dg.asset(partitions_def=MONTHS, backfill_policy=dg.BackfillPolicy.single_run())
def quarterly(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    array = JobArray(partitions_per_task=3)
    return compute.run(context, workload=WORKLOAD, launcher=ScriptLauncher(), array=array).get_materialize_result()


@dg.asset
def rates(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    array = JobArray(tasks={f"rate={number}": {"rate": number} for number in range(2500)})
    return compute.run(context, workload=WORKLOAD, launcher=ScriptLauncher(), array=array).get_materialize_result()


class Slurm:
    """Accepts some numbers of tasks, and keeps the scripts that it is asked about."""

    def __init__(self, limits: Limits) -> None:
        self.answer, self.scripts = limits, list[str]()

    def limits(self, *_: str) -> Limits:
        return self.answer

    def test(self, script: str) -> tuple[bool, str]:
        self.scripts.append(script)
        return True, "sbatch: Job 1 to start at 1700000000 using 19 processors"

    def ask(self, **_: Any) -> dict[str, Any]:
        """Find the environment."""
        return {}


def ask(shown: Preview, limits: Limits) -> tuple[bool, str, list[str]]:
    slurm: Any = Slurm(limits)
    accepted, said = try_script(slurm, shown, Projects({}, default="p1"))
    options = [re.findall(r"^#SBATCH --array=(.*)", script, re.MULTILINE) for script in slurm.scripts]
    return accepted, said.splitlines()[0], [each for found in options for each in found]


def preview(asset: str, first: str | None = None, last: str | None = None) -> Preview:
    definitions = dg.Definitions(
        assets=[counts, monthly, quarterly, rates], resources={"compute": ComputeResource.of(PROJECT)}
    )
    (shown,) = preview_asset(definitions, asset, first, last=last)
    return shown


def test_a_range_is_one_run_over_its_partitions() -> None:
    assert preview("counts", "2013-02", "2013-04").plan.extras["partition_keys"] == ["2013-02", "2013-03", "2013-04"]
    assert preview("counts", "2013-02", "2013-02").plan.extras["partition_keys"] == ["2013-02"]


@pytest.mark.parametrize(
    ("first", "last", "text"),
    [
        ("2012-12", "2013-03", "'2012-12' is not a partition of the asset. Valid are 2013-01, "),
        ("2013-01", "2014-01", "'2014-01' is not a partition of the asset"),
        ("2013-04", "2013-02", "2013-04 comes after 2013-02. Write the range as 2013-02...2013-04"),
    ],
)
def test_a_range_that_is_none_says_what_to_write(first: str, last: str, text: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        preview("counts", first, last)
    assert text in str(error.value)


def test_an_array_shows_its_tasks_and_their_costs_together() -> None:
    shown = preview("monthly", "2013-01", "2013-12")
    assert shown.summary["array"] == (
        "12 tasks in 1 array job, one per partition (2013-01 to 2013-12); at most 4 run at once. "
        "The request is that of each task"
    )
    assert shown.summary["cost"] == (
        "at most 12 node-hours for all 12 tasks; 1.20 node-hours where shares of a node are charged"
    )
    assert "#SBATCH --array=0-11%4\n" in shown.script
    assert "#SBATCH --output=tasks/%a.stdout\n" in shown.script
    assert "tasks.jsonl" in shown.summary["files"]


def test_chunks_parameter_sets_and_single_partitions_are_named() -> None:
    chunks = preview("quarterly", "2013-01", "2013-12")
    assert chunks.summary["array"].startswith("4 tasks in 1 array job, one per 3 partitions (2013-01..2013-03 to ")
    assert "#SBATCH --array=0-3\n" in chunks.script
    sets = preview("rates").summary["array"]
    assert sets.startswith("2500 tasks in 3 array jobs of 1000 (--test-only asks for the limit of the site), ")
    assert ", one per parameter set (rate=0 to rate=2499). " in sets
    one = preview("monthly", "2013-05")
    assert one.summary["array"].startswith("1 task in 1 array job, one per partition (2013-05); at most 4 ")
    assert "array" not in preview("counts", "2013-05").summary


def test_slurm_is_asked_about_the_first_array_job_within_its_limits() -> None:
    shown = preview("rates")
    assert ask(shown, Limits(500, None)) == (
        True, "2500 tasks in 5 array jobs; Slurm accepts 500 tasks per array job and any number of submitted jobs",
        ["0-499"],
    )  # fmt: skip
    accepted, said, options = ask(shown, Limits(1001, 400))
    assert (accepted, options) == (True, ["0-99"])
    assert said == "2500 tasks in 25 array jobs; Slurm accepts 1001 tasks per array job and 400 submitted jobs at once"


def test_more_running_tasks_than_submitted_jobs_are_refused_before_slurm_is_asked() -> None:
    accepted, said, options = ask(preview("monthly", "2013-01", "2013-12"), Limits(1001, 3))
    assert (accepted, options) == (False, [])
    assert said.startswith("max_running_tasks=4 is more than you may have submitted at once: 3 jobs")
