"""Numbers of a job that Dagster plots: how long it waited and ran, what it used, how well it used it."""

import math
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from dagster_sbatch.slurm.gateway import ACCOUNTED, JobEnd
from dagster_sbatch.slurm.request import SlurmRequest
from dagster_sbatch.slurm.units import format_time, parse_duration


def count(end: JobEnd, request: SlurmRequest) -> dict[str, float]:
    """Return the numbers that are known.

    Returns `queue_seconds`, `elapsed_seconds`, `node_hours`, `cpu_hours` and `gpu_hours` (of what was requested),
    `max_rss_mib` (most memory of the job on a node, or of one of its tasks), `cpu_efficiency` (0 to 1: CPU time used,
    per CPU time requested), `gpu_utilization` (0 to 1: mean of all GPUs and samples), `gpu_memory_max_mib` (of one
    GPU).
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
        used = parse_duration(rows[0]["TotalCPU"]) if rows else None
        if used is None:
            used = read_number(end.usage, "cpu_seconds")
        if used is not None and elapsed:
            found["cpu_efficiency"] = round(used / (request.cpus * elapsed), 4)
    peaks = [_mebibytes(row["MaxRSS"]) for row in rows] + [read_number(end.usage, "memory_mib")]
    if most := max(filter(None, peaks), default=None):
        found["max_rss_mib"] = round(most, 1)
    if (percent := read_number(end.usage, "gpu_percent")) is not None:
        found["gpu_utilization"] = round(percent / 100, 4)
    if (memory := read_number(end.usage, "gpu_memory_mib")) is not None:
        found["gpu_memory_max_mib"] = memory
    return found


def _mebibytes(size: str) -> float | None:
    """Return a size as sacct prints it (`12800K`, `12.50M`; KiB without a unit); None for any other text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGTPE]?)", size)
    return float(match[1]) * 1024.0 ** ("KMGTPE".index(match[2] or "K") - 1) if match else None


_BARS = "▁▂▃▄▅▆▇█"


def read_number(numbers: Mapping[str, Any], name: str) -> float | None:
    """Return a number of a job's usage, or of its metadata; None if it is missing, or is not a number from 0 on."""
    found = numbers.get(name)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found < math.inf:
        return None
    return float(found)


def plot(usage: Mapping[str, Any], request: SlurmRequest) -> str:
    """Return a line of text with a bar per moment for GPUs, CPUs and memory; empty if too little was measured.

    A full bar stands for all requested GPUs or CPUs, and for the highest use of memory.
    """
    series = usage.get("series")
    columns = zip(*series, strict=True) if isinstance(series, list) and series else ()
    gpus, cpus, memory = [[each for each in column if each is not None] for column in columns] or [[], [], []]
    parts = []
    if gpus:
        parts.append(f"GPU {_bars(gpus, 100)} {min(gpus):.0f} to {max(gpus):.0f} %")
    if cpus:
        parts.append(f"CPU {_bars(cpus, request.cpus)} {min(cpus):.1f} to {max(cpus):.1f} of {request.cpus}")
    if memory:
        parts.append(f"memory {_bars(memory, max(memory))} at most {max(memory) / 1024:.2f} GiB")
    return " · ".join(parts)


def _bars(values: Sequence[float], full: float) -> str:
    """Return a bar of Unicode for each value."""
    heights = [value / full if full else 0.0 for value in values]
    return "".join(_BARS[min(max(int(height * len(_BARS)), 0), len(_BARS) - 1)] for height in heights)


def describe_idle(seconds: float, request: SlurmRequest) -> str:
    """Return a warning about a job whose GPUs have all been idle for this long."""
    which = "The GPU of the job has" if request.gpus == 1 else f"All {request.gpus} GPUs of the job have"
    limit = request.gpu_idle_limit
    then = (
        f"The job ends if they are idle for {format_time(limit)} (gpu_idle_limit)."
        if limit
        else "SlurmRequest(gpu_idle_limit='00:20:00') would end such a job."
    )
    return (
        f"{which} been idle for {seconds / 60:.0f} min, and the project is charged for them. The workload may wait for "
        f"data, or not use GPUs at all: check that it finds them, or request none. {then}"
    )


def explain_idle_end(usage: Mapping[str, Any], request: SlurmRequest) -> str | None:
    """Return why a job was ended by its sampler; None if it was not."""
    seconds = read_number(usage, "ended_idle")
    if seconds is None:
        return None
    limit = format_time(timedelta(seconds=seconds))
    which = "its GPU was" if request.gpus == 1 else f"all of its {request.gpus} GPUs were"
    return (
        f"{which} idle for {limit}, and gpu_idle_limit={limit!r} ends such a job. Check that the workload uses GPUs, "
        "and that it does not wait for data; or request a longer gpu_idle_limit"
    )
