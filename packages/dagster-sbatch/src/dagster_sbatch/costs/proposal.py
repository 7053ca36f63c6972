"""Propose another request for an asset, from what its last successful jobs have used. Pure functions."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from pydantic import BaseModel

from dagster_sbatch.slurm import Allocation, SlurmRequest
from dagster_sbatch.slurm.accounting import read_number
from dagster_sbatch.slurm.units import count_of, format_memory, format_time, parse_memory

TIME_MARGIN, MARGIN = 1.5, 1.25  # of the proposed time, and of everything else, to the most that a job has used
WORTH = 0.8  # a proposal for less time, memory or CPUs is at most this share of the request
TIME_STEP = 300  # seconds: proposed times are multiples
MANY_TIMES = 2  # partitions differ if one needs this many times what another needs
GIB = 1 << 20  # KiB of a GiB


@dataclass(frozen=True)
class Use:
    """What one successful job, or task of a job array, has used. Numbers that are not known are None."""

    slurm_partition: str  # where it ran
    partition: str  # of the asset; empty without partitions. Of several partitions, the first
    # nodes, gpus, cpus: that it had requested, on all nodes together
    nodes: int
    gpus: int
    cpus: int
    seconds: float  # for which it ran
    memory: float | None = None  # MiB of the job on a node
    cpu_efficiency: float | None = None  # share of the CPU time that it used, 0 to 1
    gpu_utilization: float | None = None  # of its GPUs, 0 to 1
    gpu_memory: float | None = None  # most MiB of one GPU
    sampled: bool = False  # whether its sampler has measured it; otherwise `memory` may be that of its largest task

    @classmethod
    def parse(cls, numbers: Mapping[str, Any], slurm_partition: str, partition: str) -> "Use | None":
        """Read the numbers of a job in the metadata of a materialization; None if they do not tell its size."""
        size = ("elapsed_seconds", "node_hours", "cpu_hours")
        seconds, hours, cpu_hours = (read_number(numbers, name) for name in size)
        if not (seconds and hours and cpu_hours):
            return None
        gpu_hours = read_number(numbers, "gpu_hours") or 0.0
        nodes, gpus, cpus = (round(each * 3600 / seconds) for each in (hours, gpu_hours, cpu_hours))
        others = ("max_rss_mib", "cpu_efficiency", "gpu_utilization", "gpu_memory_max_mib")
        memory, cpu, gpu, gpu_memory = (read_number(numbers, name) for name in others)
        sampled = isinstance(numbers.get("usage"), str)
        return cls(slurm_partition, partition, nodes, gpus, cpus, seconds, memory, cpu, gpu, gpu_memory, sampled)

    def memory_per_node(self, planned: SlurmRequest) -> float | None:
        """Return the KiB per node: of all of its tasks, if only the largest one is known, but not more than it had."""
        if self.memory is None or self.sampled:
            return self.memory and self.memory * 1024
        of_all, has = self.memory * planned.ntasks_per_node, (planned.mem_per_node or math.inf) / 1024
        return 1024 * max(self.memory, min(of_all, has))


@dataclass(frozen=True)
class Proposal:
    """What the last jobs of an asset have used, and a request that would be enough."""

    used: str  # for people: the most that a job has used, of what the asset requests
    request: SlurmRequest | None  # that would be enough; None if the asset requests little more, or numbers are missing
    code: str  # of the request, to paste into the asset; empty without one

    @property
    def text(self) -> str:
        """Both, as Markdown."""
        if self.request is None:
            return self.used
        return f"{self.used}\n\nThis request would be enough. {MARGINS}\n\n```python\n{self.code}\n```"


MARGINS = (
    f"Its changes leave {TIME_MARGIN - 1:.0%} more time, and {MARGIN - 1:.0%} more of everything else, "
    "than any of these jobs has used."
)


def split_text(text: str) -> tuple[str, str]:
    """Return what the jobs have used, and the code of the request (empty without one), from `Proposal.text`."""
    used, _, enough = text.partition("\n\n")
    return used, enough.partition("```python\n")[2].removesuffix("\n```")


def propose(request: SlurmRequest, allocation: Allocation, uses: Sequence[Use]) -> Proposal | None:
    """Return what jobs of the same size have used, and a request that is enough; None if there was no such job.

    The request is smaller; or larger, where a job that was repeated has used more than the asset requests.

    Jobs of another Slurm partition, or with other numbers of nodes, GPUs or CPUs, tell nothing: their time and their
    utilization would be others.

    `request`: as the asset wrote it.
    """
    planned = allocation.request
    size = (planned.nodes, planned.gpus, planned.cpus)
    alike = [
        use for use in uses
        if use.slurm_partition == planned.partition and (use.nodes, use.gpus, use.cpus) == size
    ]  # fmt: skip
    if not alike:
        return None
    changes = _changes(request, allocation, alike)
    enough = request.model_copy(update=changes) if changes else None
    return Proposal(_describe(request, planned, alike), enough, render(enough) if enough else "")


def render(request: BaseModel) -> str:
    """Return the Python code of a request: the fields that differ from the defaults."""
    words = []
    for name, field in type(request).model_fields.items():
        value = getattr(request, name)
        if value != field.get_default(call_default_factory=True):
            words.append(f"{name}={_render_value(value)}")
    return f"{type(request).__name__}({', '.join(words)})"


def _render_value(value: object) -> str:
    if isinstance(value, BaseModel):
        return render(value)
    if isinstance(value, timedelta):
        value = format_time(value)
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _changes(request: SlurmRequest, allocation: Allocation, uses: Sequence[Use]) -> dict[str, Any]:
    """Return the fields that differ; fewer CPUs and GPUs only where the time limit is enough for that."""
    planned, partition = allocation.request, allocation.partition
    node = parse_memory(partition.mem) if partition else None
    fewer: dict[str, Any] = {}
    factor = 1.0
    one = planned.ntasks_per_node == 1 and not planned.exclusive  # several tasks: the program may count on their GPUs
    if one and planned.gpus_per_node:
        fewer, factor = _fewer_gpus(request, planned, uses)
    elif one and request.cpus_per_task:
        fewer, factor = _fewer_cpus(request, planned, uses)
    slowest = max(use.seconds for use in uses)
    if _time(slowest * factor) > request.time_limit:
        fewer, factor = {}, 1.0
    time = _time(slowest * factor)
    most = (request.retries.max_time_limit, partition.limits_of(planned.qos).time_limit if partition else None)
    changes = {**fewer, **_other_memory(request, planned, node, uses)}
    if time <= WORTH * request.time_limit or timedelta(seconds=slowest) > request.time_limit:
        changes["time_limit"] = min(filter(None, (time, *most)))
    return {**changes, **_other_retries(request, planned, node, changes)}


def _time(seconds: float) -> timedelta:
    return timedelta(seconds=math.ceil(seconds * TIME_MARGIN / TIME_STEP) * TIME_STEP)


def _fewer_gpus(request: SlurmRequest, planned: SlurmRequest, uses: Sequence[Use]) -> tuple[dict[str, Any], float]:
    """Return fewer GPUs per node, which bring enough CPUs and memory, and how much longer the job may run with them.

    A job that kept `busy` of its GPUs busy takes at most 1 + busy/n times as long on n of them (Graham's bound).
    """
    gpus = planned.gpus_per_node
    busy = _most(uses, lambda use: use.gpu_utilization)
    if busy is None:
        return {}, 1.0
    shares = [busy * MARGIN]
    if not request.cpus_per_task:
        cpus = _most(uses, lambda use: use.cpu_efficiency)
        shares.append(1 if cpus is None else cpus * MARGIN)
    if not (request.mem or (request.mem_per_cpu and request.cpus_per_task)):
        memory, has = _memory_needed(uses, planned), planned.mem_per_node
        shares.append(memory / has if memory and has else 1)
    enough = max(1, math.ceil(max(shares) * gpus))
    return ({"gpus_per_node": enough}, 1 + busy * gpus / enough) if enough < gpus else ({}, 1.0)


def _fewer_cpus(request: SlurmRequest, planned: SlurmRequest, uses: Sequence[Use]) -> tuple[dict[str, Any], float]:
    """Return fewer CPUs, with the memory that must not shrink with them, and how much longer the job may run."""
    cpus, busy = planned.cpus_per_node, _most(uses, lambda use: use.cpu_efficiency)
    enough = cpus if busy is None else max(1, math.ceil(busy * cpus * MARGIN))
    if busy is None or enough > WORTH * cpus:
        return {}, 1.0
    changes: dict[str, Any] = {"cpus_per_task": enough}
    if not request.mem:
        memory = min(filter(None, (_memory_needed(uses, planned), planned.mem_per_node)), default=None)
        if memory is None:
            return {}, 1.0
        changes |= {"mem": format_memory(memory), "mem_per_cpu": None}
    return changes, 1 + busy * cpus / enough


def _other_memory(
    request: SlurmRequest, planned: SlurmRequest, node: int | None, uses: Sequence[Use]
) -> dict[str, Any]:
    """Return less memory where the asset names it (otherwise it comes with the GPUs or the CPUs), or more of it.

    `node`: KiB of a node; None if they are not known.
    """
    used, needed, has = _memory_used(uses, planned), _memory_needed(uses, planned), planned.mem_per_node
    if planned.exclusive or not used or not needed or not has:
        return {}
    if used > has or ((request.mem or request.mem_per_cpu) and needed <= WORTH * has):
        most = (_most_memory(request, planned, node), node)
        return {"mem": format_memory(min(filter(None, (needed, *most)))), "mem_per_cpu": None}
    return {}


def _other_retries(
    request: SlurmRequest, planned: SlurmRequest, node: int | None, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the retries, whose limits must stay above the request; `max_mem` is per node once the memory is."""
    retries, most, found = request.retries, _most_memory(request, planned, node), {}
    if most and "mem" in changes:
        found["max_mem"] = format_memory(most) if most > parse_memory(changes["mem"]) else None
    if retries.max_time_limit and changes.get("time_limit") == retries.max_time_limit:
        found["max_time_limit"] = None
    return {"retries": retries.model_copy(update=found)} if found else {}


def _most_memory(request: SlurmRequest, planned: SlurmRequest, node: int | None) -> int | None:
    """Return the KiB per node to which retries may raise the memory; None if they do not."""
    most = parse_memory(request.retries.max_mem or "0") * (planned.cpus_per_node if request.mem_per_cpu else 1)
    return min(filter(None, (most, node))) if most else None


def _memory_needed(uses: Sequence[Use], planned: SlurmRequest) -> int | None:
    """Return the KiB per node with their margin, in whole GiB."""
    used = _memory_used(uses, planned)
    return None if not used else math.ceil(used * MARGIN / GIB) * GIB


def _memory_used(uses: Sequence[Use], planned: SlurmRequest) -> float | None:
    """Return the most KiB per node that a job has used."""
    return _most(uses, lambda use: use.memory_per_node(planned))


def _most(uses: Sequence[Use], number: Callable[[Use], float | None]) -> float | None:
    """Return the largest number; None if no job has it."""
    return max((found for use in uses if (found := number(use)) is not None), default=None)


def _describe(request: SlurmRequest, planned: SlurmRequest, uses: Sequence[Use]) -> str:
    """Return the most that the jobs have used, of what is requested, and by which partition where they differ."""
    limit, has = format_time(request.time_limit), planned.mem_per_node
    of = f" of {has / GIB:.1f}" if has else ""
    parts = [
        _part(uses, lambda use: use.seconds, lambda most: f"{format_time(timedelta(seconds=round(most)))} of {limit}"),
        _part(uses, lambda use: use.memory_per_node(planned), lambda most: f"{most / GIB:.1f}{of} GiB per node"),
        _part(uses, lambda use: use.cpu_efficiency, lambda most: f"{most:.0%} of {count_of(planned.cpus, 'CPU')}"),
        _part(uses, lambda use: use.gpu_utilization, lambda most: f"{most:.0%} of {count_of(planned.gpus, 'GPU')}"),
        _part(uses, lambda use: use.gpu_memory, lambda most: f"{most / 1024:.1f} GiB of a GPU's memory"),
    ]
    jobs = "job" if len(uses) == 1 else f"{len(uses)} jobs"
    return f"The last {jobs} of this size used at most {', '.join(filter(None, parts))}."


def _part(uses: Sequence[Use], number: Callable[[Use], float | None], show: Callable[[float], str]) -> str:
    """Return the most of a number as text, with the partitions that need most and least if they differ."""
    known = [(found, use.partition) for use in uses if (found := number(use)) is not None]
    if not known:
        return ""
    (least, low), (most, high) = min(known), max(known)
    if high and low != high and most > MANY_TIMES * least:
        return f"{show(most)} ({high}; least: {show(least).partition(' of ')[0]} in {low})"
    return show(most)
