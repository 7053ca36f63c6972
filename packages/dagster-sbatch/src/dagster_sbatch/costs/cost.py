"""The highest possible cost of a call of `compute.run`, and the limit per run that it must not exceed. Pure."""

import math
from dataclasses import dataclass

from dagster_sbatch.costs.hours import MOST_DIGITS, show_hours
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import Allocation
from dagster_sbatch.slurm.units import count_of, format_time

MINUTE = 60  # Slurm rounds time limits up to whole minutes (man sbatch, --time)


@dataclass(frozen=True)
class Cost:
    """A cost in hours of whole nodes and of GPUs, as `node_hours` and `gpu_hours` of an asset's metadata count them."""

    node_hours: float
    gpu_hours: float


def highest_cost(allocation: Allocation, tasks: int = 1) -> Cost:
    """Return the cost if every job runs to its time limit, once.

    `tasks`: number of array tasks; each has the allocation.
    """
    minutes = math.ceil(allocation.request.seconds / MINUTE)
    nodes = tasks * allocation.request.nodes * minutes / 60
    return Cost(nodes, nodes * allocation.request.gpus_per_node)


def explain_excess(allocation: Allocation, tasks: int, settings: Settings) -> str | None:
    """Return why jobs are not submitted: their highest possible cost exceeds a limit per run; None if it does not.

    A limit of the request replaces the setting, in both directions.

    `tasks`: number of array tasks that would be submitted; 1 without an array.
    """
    request, cost = allocation.request, highest_cost(allocation, tasks)
    limits = [
        (cost.gpu_hours, True, "fewer GPUs or nodes",
         "most_gpu_hours", request.most_gpu_hours, "SLURM_MOST_GPU_HOURS_PER_RUN", settings.most_gpu_hours_per_run),
        (cost.node_hours, False, "fewer nodes",
         "most_node_hours", request.most_node_hours, "SLURM_MOST_NODE_HOURS_PER_RUN", settings.most_node_hours_per_run),
    ]  # fmt: skip
    for hours, gpus, less, field, own, variable, setting in limits:
        limit = setting if own is None else own
        if limit is not None and round(hours - limit, MOST_DIGITS) > 0:
            name = variable if own is None else f"{field} of the request"
            return (
                f"{describe_cost(allocation, tasks, limit, gpus=gpus)}. "
                f"{name} allows {show_hours(limit, beside=[hours])}, so nothing is submitted. "
                f"Request a shorter time_limit or {less}{', or divide the tasks' if tasks > 1 else ''}; "
                f"or allow this asset more: SlurmRequest({field}={math.ceil(hours)}, ...)"
            )
    return None


def describe_cost(allocation: Allocation, tasks: int, limit: float, *, gpus: bool) -> str:
    """Return what a call could cost, with its factors, as the beginning of a sentence.

    `limit`: what the cost exceeds; the reader can tell the two numbers apart. `gpus`: whether both are GPU-hours;
    otherwise node-hours.
    """
    request, cost = allocation.request, highest_cost(allocation, tasks)
    factors = [count_of(tasks, "task")] if tasks > 1 else []
    factors.append(count_of(request.nodes, "node"))
    factors += [count_of(request.gpus_per_node, "GPU")] if gpus else []
    product = " x ".join([*factors, format_time(request.time_limit)])
    hours, unit = (cost.gpu_hours, "GPU-hours") if gpus else (cost.node_hours, "node-hours")
    return f"This call of compute.run could cost {show_hours(hours, unit, beside=[limit])} ({product})"
