"""What a job's numbers mean."""

import pytest

from resources.slurm import SlurmRequest
from resources.slurm.accounting import count
from resources.slurm.gateway import JobEnd


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
