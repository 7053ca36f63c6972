"""Which run directories may go, and when."""

from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest

from dagster_sbatch.inspect.remote_runs import RunRecord
from dagster_sbatch.run.directory import RunInfo
from dagster_sbatch.slurm.gateway import JobEnd
from dagster_sbatch.upkeep.cleaning import KEEP_DAYS, KEEP_FAILED_DAYS, is_obsolete


@pytest.mark.parametrize(
    ("end", "days", "goes"),
    [
        (JobEnd(1, "FAILED"), KEEP_DAYS + 1, False),
        (JobEnd(1, "FAILED"), KEEP_FAILED_DAYS - 1, False),
        (JobEnd(1, "FAILED"), KEEP_FAILED_DAYS + 1, True),
        (JobEnd(0, "COMPLETED"), KEEP_DAYS + 1, False),  # this Dagster has not stored its result
        (JobEnd(0, "COMPLETED"), KEEP_FAILED_DAYS + 1, False),
        (None, KEEP_FAILED_DAYS + 1, False),  # its job may be running
    ],
)
def test_old_directories_of_jobs_that_have_ended_go(end: JobEnd | None, days: int, goes: bool) -> None:
    about, age = RunInfo(run="r", root="r", asset="a", partitions=""), timedelta(days=days)
    run = RunRecord("/runs/a-1", "17", about, end, datetime.now(UTC) - age, ("r",))
    with dg.DagsterInstance.ephemeral() as instance:
        assert is_obsolete(instance, run, age) is goes
