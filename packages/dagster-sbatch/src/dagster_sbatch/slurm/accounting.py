"""Numbers of a job that Dagster plots: how long it waited and ran, what it used, how well it used it."""

import re
from collections.abc import Mapping
from typing import Any

from dagster_sbatch.slurm.gateway import ACCOUNTED, JobEnd
from dagster_sbatch.slurm.job_usage import number
from dagster_sbatch.slurm.request import SlurmRequest


def count(end: JobEnd, request: SlurmRequest) -> dict[str, float]:
    """Return the numbers that are known.

    Returns:
        `queue_seconds`, `elapsed_seconds`, `node_hours`, `cpu_hours` and `gpu_hours` (of what was requested),
        `max_rss_mib` (most memory of the job on a node, or of one of its tasks), `cpu_efficiency` (0 to 1: CPU time
        used, per CPU time requested), `gpu_utilization` (0 to 1: mean of all GPUs and samples), `gpu_memory_max_mib`
        (of one GPU).
    """
    found: dict[str, float] = {}
    rows = [dict(zip(ACCOUNTED, row, strict=True)) for row in end.rows if len(row) == len(ACCOUNTED)]
    if end.started is not None and end.ended is not None and end.started <= end.ended:
        elapsed = end.ended - end.started
        if end.submitted is not None:
            found["queue_seconds"] = end.started - end.submitted
        found["elapsed_seconds"] = elapsed
        found["node_hours"] = round(request.nodes * elapsed / 3600, 6)
        found["cpu_hours"] = round(request.cpus * elapsed / 3600, 6)
        if request.gpus_per_node:
            found["gpu_hours"] = round(request.gpus * elapsed / 3600, 6)
        used = _seconds(rows[0]["TotalCPU"]) if rows else None
        if used is None:
            used = number(end.usage, "cpu_seconds")
        if used is not None and elapsed:
            found["cpu_efficiency"] = round(used / (request.cpus * elapsed), 4)
    peaks = [_mebibytes(row["MaxRSS"]) for row in rows] + [number(end.usage, "memory_mib")]
    if most := max(filter(None, peaks), default=None):
        found["max_rss_mib"] = round(most, 1)
    return {**found, **_count_gpus(end.usage)}


def _count_gpus(usage: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    if (percent := number(usage, "gpu_percent")) is not None:
        found["gpu_utilization"] = round(percent / 100, 4)
    if (memory := number(usage, "gpu_memory_mib")) is not None:
        found["gpu_memory_max_mib"] = memory
    return found


def _mebibytes(size: str) -> float | None:
    """Return a size as sacct prints it (`12800K`, `12.50M`; KiB without a unit); None for any other text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGTPE]?)", size)
    return float(match[1]) * 1024.0 ** ("KMGTPE".index(match[2] or "K") - 1) if match else None


def _seconds(text: str) -> float | None:
    """Return the seconds of a CPU time as sacct prints it, `[DD-[HH:]]MM:SS[.mmm]`; None for any other text."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)", text)
    if not match:
        return None
    days, hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return days * 86400 + hours * 3600 + minutes * 60 + seconds
