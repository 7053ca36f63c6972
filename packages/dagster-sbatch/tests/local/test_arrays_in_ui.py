"""What a person sees of a job array in Dagster's UI: 1,000 partitions in 100 tasks, of which four fail at first.

With UPDATE_SCREENSHOTS=1 the picture of docs/many-partitions.md is taken anew.
"""

from pathlib import Path

import dagster as dg
import pytest
from playwright.sync_api import expect

from support.browser import expect_partitions, open_failure, open_ui, take
from support.dagster_dev import DagsterDev, wait_for

pytestmark = pytest.mark.local
DAYS = dg.DailyPartitionsDefinition("2021-01-01", end_date="2023-09-28").get_partition_keys()
DAY = "2022-02-17"
"""One of those whose observations are missing at first."""


def tasks_of(server: DagsterDev, run_id: str) -> list[str]:
    """The first day of each task that a run has started."""
    return sorted(path.name.removeprefix(f"weather-{run_id}-") for path in server.data_root.glob(f"weather-{run_id}-*"))


def test_a_backfill_of_1000_partitions_with_failures_and_its_re_execution(
    dagster_dev: DagsterDev, tmp_path: Path
) -> None:
    with open_ui(dagster_dev.url) as page:
        first = dagster_dev.backfill("weather", DAYS)
        wait_for(lambda: len(tasks_of(dagster_dev, first)) == 100, 180, "all tasks have begun; the last one waits")
        expect_partitions(page, "weather", DAY, failed=0, materialized=950, materializing=50)
        (dagster_dev.data_root / "weather-seen").touch()
        assert dagster_dev.wait(first) == "FAILURE"

        expect_partitions(page, "weather", DAY, failed=40, materialized=960, materializing=0, missing=0)
        expect(page.get_by_text("failed, and did not materialize this asset.")).to_be_visible()
        take(page, "many-partitions.png", tmp_path)
        failure = open_failure(page, first)
        expect(failure.get_by_text("4 of 100 tasks failed. The 960 partitions of the other tasks")).to_be_visible()
        for cause in ("FileNotFoundError: no observations of 2022-02-28", "ValueError: temperature of 451.0 degrees"):
            expect(failure.get_by_role("cell", name=f"weather.py raised {cause}", exact=True)).to_be_visible()

        (dagster_dev.data_root / "weather-fixed").touch()
        second = dagster_dev.re_execute_from_failure(first)
        assert dagster_dev.wait(second) == "SUCCESS"
        assert tasks_of(dagster_dev, second) == ["2021-07-30", "2022-02-15", "2022-02-25", "2023-03-02"]
        expect_partitions(page, "weather", DAY, failed=0, materialized=1000)
        expect(page.get_by_text("mean_temperature", exact=True)).to_be_visible()
