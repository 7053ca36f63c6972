"""What the sampler of a job has measured (`job/sampler.py`): numbers, a small plot, and what to say of idle GPUs."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from dagster_sbatch.slurm.request import SlurmRequest
from dagster_sbatch.slurm.units import format_time

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 32  # most bars of a plot


def number(usage: Mapping[str, Any], name: str) -> float | None:
    """Return a number of a job's usage; None if it is not there, or is none."""
    value = usage.get(name)
    return float(value) if isinstance(value, int | float) else None


def plot(usage: Mapping[str, Any], request: SlurmRequest) -> str:
    """Return a line of text with a bar per moment for GPUs, CPUs and memory; empty if too little was measured.

    The bars of GPUs and CPUs are of what was requested, those of memory of its maximum.
    """
    series = usage.get("series")
    columns = zip(*series, strict=True) if isinstance(series, list) and series else ()
    gpus, cpus, memory = [_known(column) for column in columns] or [[], [], []]
    parts = []
    if gpus:
        parts.append(f"GPU {_bars(gpus, 100)} {min(gpus):.0f} to {max(gpus):.0f} %")
    if cpus:
        parts.append(f"CPU {_bars(cpus, request.cpus)} {min(cpus):.1f} to {max(cpus):.1f} of {request.cpus}")
    if memory:
        parts.append(f"memory {_bars(memory, max(memory))} at most {max(memory) / 1024:.2f} GiB")
    return " · ".join(parts)


def _known(column: Sequence[float | None]) -> list[float]:
    return [value for value in column if value is not None]


def _bars(values: Sequence[float], full: float) -> str:
    """Return bars of Unicode; several values that share one are averaged."""
    share = -(-len(values) // _WIDTH)
    groups = [values[place : place + share] for place in range(0, len(values), share)]
    heights = [sum(group) / len(group) / full if full else 0.0 for group in groups]
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
    seconds = number(usage, "ended_idle")
    if seconds is None:
        return None
    limit = format_time(timedelta(seconds=seconds))
    which = "its GPU was" if request.gpus == 1 else f"all of its {request.gpus} GPUs were"
    return (
        f"{which} idle for {limit}, and gpu_idle_limit={limit!r} ends such a job. Check that the workload uses GPUs, "
        "and that it does not wait for data; or request a longer gpu_idle_limit"
    )
