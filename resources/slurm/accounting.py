"""Numbers of a job that plot over time: how long it waited and ran, what it took, how well it used it."""

import re

from resources.slurm.gateway import ACCOUNTED, JobEnd
from resources.slurm.request import SlurmRequest
from resources.slurm.units import parse_memory


def count(end: JobEnd, request: SlurmRequest) -> dict[str, float]:
    """The numbers as far as they are known; what is not is left out.

    Args:
        end: of the job, with its times and what the accounting said.
        request: its nodes and GPUs.

    Returns:
        `queue_seconds`, `elapsed_seconds`, `node_hours`, `gpu_hours`, `max_rss_mib` (of the step's largest task),
        `cpu_efficiency` (0 to 1: CPU time over what was allocated).
    """
    found: dict[str, float] = {}
    if end.started is not None and end.ended is not None and end.started <= end.ended:
        elapsed = end.ended - end.started
        if end.submitted is not None:
            found["queue_seconds"] = end.started - end.submitted
        found["elapsed_seconds"] = elapsed
        found["node_hours"] = round(request.nodes * elapsed / 3600, 6)
        if request.gpus_per_node:
            found["gpu_hours"] = round(request.nodes * request.gpus_per_node * elapsed / 3600, 6)
    rows = [dict(zip(ACCOUNTED, row, strict=True)) for row in end.rows]
    peaks = [parse_memory(_whole(row["MaxRSS"])) for row in rows if row["MaxRSS"] not in ("", "0")]
    if peaks:
        found["max_rss_mib"] = round(max(peaks) / 1024, 1)
    if rows and rows[0]["CPUTimeRAW"].isdecimal() and int(rows[0]["CPUTimeRAW"]):
        used = _seconds(rows[0]["TotalCPU"])
        if used is not None:
            found["cpu_efficiency"] = round(used / int(rows[0]["CPUTimeRAW"]), 4)
    return found


def _whole(size: str) -> str:
    """sacct prints `12.50M` as well as `12800K`."""
    number, unit = re.fullmatch(r"([\d.]+)([KMGT]?)", size).groups()  # type: ignore[union-attr]
    if "." not in number:
        return f"{number}{unit or 'K'}"
    smaller = {"T": "G", "G": "M", "M": "K"}[unit]
    return f"{round(float(number) * 1024)}{smaller}"


def _seconds(text: str) -> float | None:
    """Of `[DD-[HH:]]MM:SS[.mmm]`, as sacct writes CPU times."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):([\d.]+)", text)
    if not match:
        return None
    days, hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return days * 86400 + hours * 3600 + minutes * 60 + seconds
