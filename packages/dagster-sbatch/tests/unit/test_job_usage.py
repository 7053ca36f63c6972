"""What the client makes of what a sampler has measured: metadata, a plot, and what it says of idle GPUs."""

import pytest

from dagster_sbatch.slurm import SlurmRequest
from dagster_sbatch.slurm.accounting import count, describe_idle, plot
from dagster_sbatch.slurm.gateway import JobEnd
from dagster_sbatch.slurm.outcome import judge

SERIES = [[0.0, None, 100.0], [50.0, 1.0, 200.0], [100.0, 2.0, 1024.0]]


def test_the_numbers_of_the_sampler_become_metadata() -> None:
    usage = {"memory_mib": 640.0, "cpu_seconds": 50.0, "gpu_percent": 31.25, "gpu_memory_mib": 9000.0}
    rows = [["7", "COMPLETED", "12800K", ""]]
    found = count(JobEnd(0, "COMPLETED", started=1, ended=101, rows=rows, usage=usage), SlurmRequest())
    assert found["max_rss_mib"] == 640.0
    assert found["cpu_efficiency"] == 0.5
    assert found["gpu_utilization"] == 0.3125
    assert found["gpu_memory_max_mib"] == 9000.0


@pytest.mark.parametrize("usage", [{}, {"memory_mib": None, "gpu_percent": "many", "series": 3}, {"series": []}])
def test_what_was_not_measured_is_left_out(usage: dict[str, object]) -> None:
    end = JobEnd(0, "COMPLETED", started=1, ended=101, usage=usage)
    assert count(end, SlurmRequest()).keys() == {"elapsed_seconds", "node_hours", "cpu_hours"}
    assert plot(usage, SlurmRequest()) == ""


@pytest.mark.parametrize("own", [{}, {"usage": None}], ids=["of before the upgrade", "shorter than three seconds"])
def test_a_job_that_was_not_measured_has_the_numbers_of_slurm(own: dict[str, object]) -> None:
    """Also one that has ended in the second of its start: Slurm charges nothing for it."""
    request = SlurmRequest(gpus_per_node=1)
    for ended, hours in ((37, 0.01), (1, 0.0)):
        end = JobEnd.parse({"code": 0, "state": "COMPLETED", "exit": "0:0", "times": [1, 1, ended], **own})
        assert count(end, request) == {
            "queue_seconds": 0, "elapsed_seconds": ended - 1,
            "node_hours": hours, "cpu_hours": hours, "gpu_hours": hours,
        }  # fmt: skip


def test_a_plot_is_a_line_of_bars() -> None:
    shown = plot({"series": SERIES}, SlurmRequest(cpus_per_task=2, gpus_per_node=1))
    assert shown == "GPU ▁▅█ 0 to 100 % · CPU ▅█ 1.0 to 2.0 of 2 · memory ▁▂█ at most 1.00 GiB"
    assert plot({"series": [[None, 1.0, None]] * 31}, SlurmRequest()).count("█") == 31


def test_a_job_that_its_sampler_has_ended_says_so() -> None:
    request = SlurmRequest(gpus_per_node=4, gpu_idle_limit="00:20:00")
    outcome = judge(JobEnd(None, "CANCELLED", usage={"ended_idle": 1200}), request)
    assert outcome
    assert "all of its 4 GPUs were idle for 00:20:00, and gpu_idle_limit='00:20:00' ends such a job" in outcome.cause
    assert outcome.fault is None
    assert "The job ends if they are idle for 00:20:00 (gpu_idle_limit)." in describe_idle(605.0, request)
    assert "SlurmRequest(gpu_idle_limit='00:20:00')" in describe_idle(605.0, SlurmRequest(gpus_per_node=1))
