"""The resources that an asset requests of Slurm, by Slurm's own names, and which failures its step repeats."""

import re
from datetime import timedelta
from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, model_validator

from dagster_sbatch.errors import CheckedModel, nearest
from dagster_sbatch.settings import Hours
from dagster_sbatch.slurm.modules import Modules
from dagster_sbatch.slurm.units import Memory, Time, format_time, parse_memory

FURTHER_OPTIONS = frozenset(
    """
    acctg-freq begin bb contiguous core-spec cores-per-socket cpu-freq deadline distribution gpu-bind
    gpu-freq hint licenses mail-type mail-user mem-bind mincpus network nice no-requeue ntasks-per-core
    ntasks-per-socket oversubscribe power prefer priority profile requeue sockets-per-node spread-job
    switches thread-spec threads-per-core tmp use-min-nodes wckey
    """.split()
)
"""Options of sbatch (man sbatch, Slurm 22.05) that `options` accepts. Options with a field of their own are not among
them, nor those that the job script sets itself (job-name, output, signal, export, array, ...)."""

COST_LIMITS = ("most_gpu_hours", "most_node_hours")  # fields that limit the cost of a call; Slurm does not see them


def word(pattern: str, what: str) -> AfterValidator:
    """Accept a text of this form; the error says of any other text what it is."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"{text!r} {what}")
        return text

    return AfterValidator(check)


# These need no quotes in a shell: no space, no quote, no newline.
Name = Annotated[str, word(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", "is not a name: write letters, digits, _ . and -")]
NodeList = Annotated[str, word(r"[A-Za-z0-9_.,\[\]-]+", "is not valid here: an example is 'n[4001-4003],n4007'")]
Constraint = Annotated[str, word(r"[A-Za-z0-9_.,&|*()\[\]-]+", "is not valid here: an example is 'hdr&nvme'")]
Dependency = Annotated[
    str,
    word(r"[a-z]+(:\d+(\+\d+)?)*([,?][a-z]+(:\d+(\+\d+)?)*)*", "is not valid here: an example is 'afterok:123:124'"),
]


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

    max_retries: NonNegativeInt = Field(3, description="How many attempts may follow the first one, for all causes.")
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
    factor: float = Field(2, gt=1, le=100, description="By which factor memory or time grows with each attempt.")
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


class SlurmRequest(CheckedModel):
    """The allocation that an asset needs. Most fields are the options of sbatch with that name (man sbatch).

    sbatch does not see `modules`, `retries`, `gpu_idle_limit`, `most_gpu_hours` and `most_node_hours`.

    The deployment and the site fill in what is left out: partition, QoS, and for GPU requests CPUs and memory per GPU.
    The request is checked in `development` too, so that a mistake is found on the laptop.

    Example:
        SlurmRequest(nodes=2, gpus_per_node=4, time_limit="02:00:00")

    Raises:
        ConfigurationError: a field is unknown or Slurm does not accept its value; the text lists all problems.
    """

    nodes: PositiveInt = Field(1, description="Number of nodes.")
    ntasks_per_node: PositiveInt = Field(1, description="Tasks per node; Ray needs 1.")
    cpus_per_task: PositiveInt | None = Field(
        None, description="CPUs per task. GPU requests: the site's cores_per_gpu per GPU."
    )
    gpus_per_node: int = Field(0, ge=0, description="GPUs per node; becomes --gres=gpu:N.")
    mem: Memory | None = Field(
        None, description="Memory per node, for instance 64G. GPU requests: the site's mem_per_gpu per GPU."
    )
    mem_per_cpu: Memory | None = Field(None, description="Memory per CPU; instead of mem.")
    time_limit: Time = Field(
        timedelta(hours=1),
        description="Limit of the run time, for instance '02:00:00' or '1-12', or a timedelta; becomes --time.",
    )
    partition: Name | None = Field(None, description="Partition, in place of SLURM_PARTITION.")
    qos: Name | None = Field(None, description="QoS, in place of SLURM_QOS.")
    account: Name | None = Field(None, description="The project that is charged, in place of SLURM_ACCOUNT.")
    reservation: Name | None = Field(None, description="A reservation of the site.")
    constraint: Constraint | None = Field(None, description="Features that the nodes must have.")
    exclude: NodeList | None = Field(None, description="Nodes that the job must not use.")
    nodelist: NodeList | None = Field(None, description="Nodes that the job must use.")
    exclusive: bool = Field(default=False, description="Whole nodes with all of their GPUs, shared with no other job.")
    dependency: Dependency | None = Field(None, description="Other jobs to wait for, for instance afterok:123.")
    modules: Modules | None = Field(
        None,
        description="Modules (Lmod) that the job loads before the workload, in this order, for instance "
        "['GCC/14.3.0', 'OpenMPI']. They replace the site's; [] loads none.",
    )
    most_gpu_hours: Hours | None = Field(
        None, description="GPU-hours that one call of compute.run may cost; replaces SLURM_MOST_GPU_HOURS_PER_RUN."
    )
    most_node_hours: Hours | None = Field(
        None, description="Node-hours that one call may cost; replaces SLURM_MOST_NODE_HOURS_PER_RUN."
    )
    gpu_idle_limit: Time | None = Field(
        None, description="End the job when all its GPUs have been idle for this long, for instance '00:20:00'."
    )
    options: tuple[str, ...] = Field((), description="Further options of sbatch, for instance ('--mail-type=END',).")
    retries: Retries = Field(Retries(), description="Which failures the step repeats, and with what changes.")

    def __init__(self, **fields: Any) -> None:  # type checkers accept what the validators do
        super().__init__(**fields)

    @model_validator(mode="after")
    def _check(self) -> "SlurmRequest":
        if self.mem and self.mem_per_cpu:
            raise ValueError("give mem or mem_per_cpu, not both")
        if self.gpu_idle_limit and not self.gpus_per_node:
            raise ValueError("gpu_idle_limit ends a job whose GPUs are idle: give gpus_per_node, too")
        for option in self.options:
            _check_option(option)
        return self

    @property
    def seconds(self) -> int:
        """The time limit as Slurm gets it."""
        return int(self.time_limit.total_seconds())

    @property
    def cpus_per_node(self) -> int:
        """CPUs of all tasks on a node."""
        return self.ntasks_per_node * (self.cpus_per_task or 1)

    @property
    def cpus(self) -> int:
        """CPUs on all nodes."""
        return self.nodes * self.cpus_per_node

    @property
    def gpus(self) -> int:
        """GPUs on all nodes."""
        return self.nodes * self.gpus_per_node

    @property
    def mem_per_node(self) -> int:
        """KiB on each node; 0 if Slurm decides, or if it is all that a node has."""
        return parse_memory(self.mem) if self.mem else parse_memory(self.mem_per_cpu or "0") * self.cpus_per_node


_NO_OPTIONS = {"options", "modules", "retries", "gpu_idle_limit", *COST_LIMITS}
"""Fields that are not an option of sbatch: `options` has several; the job script and the client act on the others."""
OPTIONS = {
    field: {"gpus_per_node": "gres", "time_limit": "time"}.get(field, field.replace("_", "-"))
    for field in SlurmRequest.model_fields
    if field not in _NO_OPTIONS
}
"""The option of sbatch by the field that it gets its value from."""


def render_options(request: SlurmRequest) -> list[str]:
    """Return the fields of a request as options of sbatch, without those of its `options`."""
    found = []
    for field, option in OPTIONS.items():
        value = getattr(request, field)
        if value in (None, False, 0):
            continue
        text = format_time(value) if isinstance(value, timedelta) else f"gpu:{value}" if option == "gres" else value
        found.append(f"--{option}" if value is True else f"--{option}={text}")
    return found


def _check_option(option: str) -> None:
    match = re.fullmatch(r"--([a-z][a-z-]*)(=[A-Za-z0-9@%_.,:+/*&|\[\]-]+)?", option)
    if not match:
        raise ValueError(f"options: {option!r} is not of the form '--name=value' or '--name' (no spaces, no quotes)")
    name = match[1]
    field = name.replace("-", "_")
    if field in SlurmRequest.model_fields or name in (*OPTIONS.values(), "gpus"):
        raise ValueError(f"options: --{name} has a field of its own in SlurmRequest")
    if name not in FURTHER_OPTIONS:
        raise ValueError(
            f"options: --{name} is not an option of sbatch that can be passed on{nearest(name, FURTHER_OPTIONS)}"
        )
