"""Which failures of a job a step repeats, and with what changes."""

from enum import StrEnum
from typing import Any

from pydantic import Field, NonNegativeInt

from dagster_sbatch.errors import CheckedModel
from dagster_sbatch.slurm.units import Memory, Time


class Fault(StrEnum):
    """Why a job failed, if another attempt may succeed."""

    MEMORY = "out of memory"
    TIME = "out of time"
    NODE = "a node failed"
    GPU = "a GPU is broken"
    AGAIN = "preempted, or the workload requests another attempt"


class Retries(CheckedModel):
    """Which failures of its job a step repeats, and with what changes; the step submits another job each time.

    After a node failure, a preemption and exit code 75, the step repeats the same request. All else is off unless a
    field of this class turns it on. No attempt requests more memory than a node of the partition has, or more time than
    the QoS allows. Nothing is repeated in `development`.

    Example:
        SlurmRequest(mem="16G", time_limit="01:00:00", retries=Retries(max_mem="64G", max_time_limit="04:00:00"))

    Raises:
        ConfigurationError: a field is unknown or has a wrong value; the text lists all problems.
    """

    max_retries: NonNegativeInt = Field(3, description="Attempts after the first one, for all causes together.")
    max_mem: Memory | None = Field(
        None,
        description="After the job ran out of memory, request `factor` times the memory, at most this: per node, or "
        "per CPU if the request has mem_per_cpu. None: such a job is not repeated.",
    )
    max_time_limit: Time | None = Field(
        None,
        description="After the job reached its time limit, request `factor` times the time, at most this. None: such a "
        "job is not repeated.",
    )
    factor: float = Field(2, gt=1, le=100, description="By how much memory or time grows from attempt to attempt.")
    exclude_failed_nodes: bool = Field(
        default=False,
        description="Exclude the node of a one-node job that failed, or that has a broken GPU. A broken GPU is a cause "
        "only with this: stderr has CUDA's or NVML's text of an uncorrectable error, or of a lost GPU.",
    )

    def __init__(self, **fields: Any) -> None:  # type checkers accept what the validators do
        super().__init__(**fields)

    def repeats(self, fault: Fault | None) -> bool:
        """Return whether a job that failed for this reason is repeated, as long as attempts are left."""
        if not self.max_retries or fault is None:
            return False
        asked = {
            Fault.MEMORY: self.max_mem is not None,
            Fault.TIME: self.max_time_limit is not None,
            Fault.GPU: self.exclude_failed_nodes,
        }
        return asked.get(fault, True)
