"""Another attempt after a failure: whether there is one, and its request."""

import math
from dataclasses import dataclass
from datetime import timedelta

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.slurm.allocation import Allocation, cpus_with_memory
from dagster_sbatch.slurm.request import Fault, SlurmRequest
from dagster_sbatch.slurm.units import format_memory, format_time, parse_memory, show_value

RETRIED_FIELDS = ("mem", "mem_per_cpu", "time_limit", "exclude")
"""Fields of a request that may differ from attempt to attempt."""
_MIB = 1024


@dataclass(frozen=True)
class Next:
    """What follows a failed attempt."""

    request: SlurmRequest | None  # of the next attempt; None: there is none
    # What changes in it. Without it: the limit that was reached; empty if such a failure is never repeated
    text: str = ""

    @property
    def refusal(self) -> str:
        """Why there is no next attempt, to be added to the cause of the failure; empty if it is not repeated anyway."""
        return f". No other attempt follows: {self.text}" if self.text and not self.request else ""


def check_retries(request: SlurmRequest) -> None:
    """Refuse retries that could never change anything.

    `request`: after `allocate`.
    Raises ConfigurationError: the text says what to change.
    """
    retries, asked = request.retries, request.mem or request.mem_per_cpu
    if retries.max_mem is not None:
        if not asked or not parse_memory(asked):
            raise ConfigurationError(
                f"retries: max_mem={retries.max_mem!r} needs a request that names its memory. Add it: mem='16G', "
                "for instance"
            )
        if parse_memory(retries.max_mem) <= parse_memory(asked):
            raise ConfigurationError(
                f"retries: max_mem={retries.max_mem!r} is not more than the {asked} of the request. Write a larger one"
            )
    if retries.max_time_limit is not None and retries.max_time_limit <= request.time_limit:
        raise ConfigurationError(
            f"retries: max_time_limit={show_value(retries.max_time_limit)} is not more than the time limit "
            f"{format_time(request.time_limit)} of the request. Write a longer one"
        )
    if retries.exclude_failed_nodes and request.nodelist:
        raise ConfigurationError(
            f"retries: exclude_failed_nodes contradicts nodelist={request.nodelist!r}. Remove one of the two"
        )


def next_request(fault: Fault | None, failed: SlurmRequest, planned: Allocation, node: str, retried: int) -> Next:
    """Return what follows an attempt that has failed.

    `planned`: the request of the first attempt, with the partition's limits; its `retries` apply. `node`: on which the
    job ran, the first one of several; empty if not known. `retried`: how many attempts came before it.
    """
    retries = planned.request.retries
    if fault is None or not retries.repeats(fault):
        return Next(None)
    if retried >= retries.max_retries:
        return Next(None, f"max_retries={retries.max_retries}")
    if fault is Fault.MEMORY:
        return _with_memory(failed, planned)
    if fault is Fault.TIME:
        return _with_time(failed, planned)
    if fault is Fault.AGAIN or not retries.exclude_failed_nodes:
        return Next(failed, "the same request")
    return _without_node(fault, failed, node)


def _with_memory(failed: SlurmRequest, planned: Allocation) -> Next:
    retries, partition = planned.request.retries, planned.partition
    name = "mem" if failed.mem else "mem_per_cpu"
    asked = str(getattr(failed, name))
    most, limit = parse_memory(retries.max_mem or "0"), f"max_mem={retries.max_mem!r}"
    if partition:
        there = parse_memory(partition.mem) // cpus_with_memory(failed, partition) // _MIB * _MIB
        if there < most:
            most, limit = there, f"the {partition.mem} that a node of partition {failed.partition} has"
    had = parse_memory(asked)
    more = min(math.ceil(had * retries.factor / _MIB) * _MIB, most)
    if not had or more <= had:
        return Next(None, f"{name}={asked!r} has reached {limit}")
    return _replace(failed, name, format_memory(more))


def _with_time(failed: SlurmRequest, planned: Allocation) -> Next:
    retries, partition, had = planned.request.retries, planned.partition, failed.time_limit
    most = retries.max_time_limit or had
    limit = f"max_time_limit={show_value(most)}"
    allowed = partition.limits_of(failed.qos).time_limit if partition else None
    if allowed and allowed < most:
        most, limit = allowed, f"the {format_time(allowed)} that QoS {failed.qos} allows"
    more = min(timedelta(seconds=math.ceil(had.total_seconds() * retries.factor)), most)
    if more <= had:
        return Next(None, f"time_limit={show_value(had)} has reached {limit}")
    return _replace(failed, "time_limit", more)


def _replace(failed: SlurmRequest, field: str, value: object) -> Next:
    text = f"{field}={show_value(value)} instead of {show_value(getattr(failed, field))}"
    return Next(failed.model_copy(update={field: value}), text)


def _without_node(fault: Fault, failed: SlurmRequest, node: str) -> Next:
    """Exclude the node. Slurm names a node by its short host name, unless slurmd has been given another name."""
    name = node.partition(".")[0]
    if failed.nodes > 1 or not name:
        if fault is Fault.NODE:  # Slurm itself gives no job to a node that is down
            return Next(failed, "the same request")
        return Next(None, "the node with the broken GPU is not known")
    excluded = ",".join(filter(None, (failed.exclude, name)))
    return Next(failed.model_copy(update={"exclude": excluded}), f"exclude={excluded!r}")


def suggest(fault: Fault | None, failed: SlurmRequest) -> str:
    """Return what to request after a failure, to be added to its cause; empty if that is not known."""
    if fault is Fault.TIME:
        longer = f"time_limit={show_value(2 * min(failed.time_limit, timedelta.max // 2))}"
        return (
            f". It had time_limit={show_value(failed.time_limit)}. Request more, for instance {longer}, "
            "or let the workload save its state and resume from there"
        )
    if fault is Fault.MEMORY:
        name, asked = ("mem", failed.mem) if failed.mem else ("mem_per_cpu", failed.mem_per_cpu)
        if asked and (kib := parse_memory(asked)):
            return f". It had {name}={asked!r}. Request more, for instance {name}={format_memory(kib * 3 // 2)!r}"
        return ". Request more, for instance mem='32G'"
    return ""
