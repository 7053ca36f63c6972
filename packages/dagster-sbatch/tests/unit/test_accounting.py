"""What a job's numbers mean."""

import pytest

from dagster_sbatch.slurm import SlurmRequest
from dagster_sbatch.slurm.accounting import count
from dagster_sbatch.slurm.gateway import JobEnd


@pytest.mark.parametrize(
    ("fields", "used", "efficiency"),
    [
        ({"cpus_per_task": 44, "gpus_per_node": 1}, "01:13:20", 1.0),  # Slurm allocates 88 hardware threads
        ({"cpus_per_task": 44, "gpus_per_node": 1}, "36:40.000", 0.5),
        ({"nodes": 2, "ntasks_per_node": 3, "cpus_per_task": 2}, "10:00", 0.5),
        ({}, "1-00:01:40", 865.0),
        ({}, "", None),
    ],
)
def test_cpu_efficiency_counts_the_cpus_that_were_requested(
    fields: dict[str, int], used: str, efficiency: float | None
) -> None:
    end = JobEnd(0, "COMPLETED", started=1000, ended=1100, rows=[["7", "COMPLETED", "", used]])
    assert count(end, SlurmRequest(**fields)).get("cpu_efficiency") == efficiency


@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        (["", "12800K"], 12.5),
        (["12.50M"], 12.5),
        (["0.50K", "1024"], 1.0),
        (["1.2P"], 1.2 * 1024**3),
        (["1E"], 1024.0**4),
        (["16?"], None),
        (["16?", "3M"], 3.0),
        (["12,5M", "-1", "0", "M", "1.2.3K", "many"], None),
    ],
)
def test_a_size_that_cannot_be_read_is_left_out(sizes: list[str], most: float | None) -> None:
    end = JobEnd(0, "COMPLETED", started=1, ended=2, rows=[["7", "COMPLETED", size, "1.2.3"] for size in sizes])
    found = count(end, SlurmRequest())
    assert found.get("max_rss_mib") == (most and pytest.approx(most, abs=0.05))


@pytest.mark.parametrize("used", ["00:1.2.3", "INVALID", "1:2:3:4", "-", "00:.."])
def test_times_and_rows_that_cannot_be_read_are_left_out(used: str) -> None:
    """A site's wrapper may print other columns."""
    for rows in ([["7", "COMPLETED", "", used]], [["7"]], [["7", "COMPLETED", "", used, "more"]]):
        assert "cpu_efficiency" not in count(JobEnd(0, "COMPLETED", started=1, ended=2, rows=rows), SlurmRequest())
