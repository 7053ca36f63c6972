"""The request that is submitted: an asset's request, completed and checked by the site's rules."""

from dataclasses import dataclass
from typing import Any

from dagster_sbatch.errors import ConfigurationError, nearest
from dagster_sbatch.slurm.request import SlurmRequest
from dagster_sbatch.slurm.site import Partition, Site
from dagster_sbatch.slurm.units import count_of, format_memory, format_time, parse_memory


@dataclass(frozen=True)
class Allocation:
    """A request with every gap filled."""

    request: SlurmRequest  # what is submitted; partition is always set, QoS where the site has any
    notes: tuple[str, ...] = ()  # warnings for the run's log, such as a shortened time limit
    partition: Partition | None = None  # the site's data on the partition; None if no site is known

    @property
    def share(self) -> float:
        """Share of each node that the job takes, from 0 to 1: the largest of its shares of cores, GPUs and memory."""
        request, node = self.request, self.partition
        if request.exclusive or node is None:
            return 1
        kib, gpus = request.mem_per_node, request.gpus_per_node
        shares = [request.cpus_per_node / node.cores, gpus / max(node.gpus, 1), kib / parse_memory(node.mem)]
        return 1 if request.mem and not kib else min(max(shares), 1)


def allocate(
    request: SlurmRequest,
    site: Site,
    partition: str | None = None,
    qos: str | None = None,
    account: str | None = None,
    reservation: str | None = None,
) -> Allocation:
    """Fill in the fields that the request leaves open, and check them against the site.

    `partition`: SLURM_PARTITION; used if its nodes fit the request (GPUs or none), else the site's first that does. A
    request without GPUs gets nodes with GPUs only if it names them, or if the site has no others. `qos`: SLURM_QOS;
    used if it belongs to the partition, else that of the same class (`dev_`, `idle_`, plain). `account`: SLURM_ACCOUNT;
    used if the request names none.
    Raises ConfigurationError: the site does not allow the request; the text names the limit and the choices.
    """
    name, nodes = choose_partition(request, site, partition)
    chosen_qos, from_environment = choose_qos(request, site, name, qos)
    filled: dict[str, Any] = {"partition": name, "qos": chosen_qos}
    notes, limits, asked = list[str](), nodes.limits_of(chosen_qos), request.time_limit
    if limits.nodes and request.nodes > limits.nodes:
        raise ConfigurationError(
            f"nodes={request.nodes}: QoS {chosen_qos} allows a user at most {limits.nodes}. Request fewer nodes"
        )
    if limits.time_limit and asked > limits.time_limit:
        longest = format_time(limits.time_limit)
        text = f"time_limit {format_time(asked)} is over the {longest} that QoS {chosen_qos} allows"
        if not from_environment:
            longer = [f", or QoS {name}" for name, qos in nodes.qos.items() if (qos.time_limit or asked) >= asked]
            raise ConfigurationError(f"{text}. Request less time{''.join(longer)}")
        notes.append(f"{text} (from SLURM_QOS): shortened to {longest}")
        filled["time_limit"] = limits.time_limit
    filled |= {"account": request.account or account, "reservation": request.reservation or reservation}
    filled["modules"] = (site.modules or None) if request.modules is None else request.modules
    return Allocation(_size(request, name, nodes).model_copy(update=filled), tuple(notes), nodes)


def choose_partition(request: SlurmRequest, site: Site, preferred: str | None) -> tuple[str, Partition]:
    """Return the partition to submit to, with its name; `preferred`: SLURM_PARTITION."""
    wants_gpus = request.gpus_per_node > 0
    for origin, name in (("partition", request.partition), ("SLURM_PARTITION", preferred)):
        if name and name not in site.partitions:
            raise ConfigurationError(f"{origin}={name!r} is no partition of this site{nearest(name, site.partitions)}")
    fitting = [name for name, nodes in site.partitions.items() if bool(nodes.gpus) == wants_gpus]
    fitting = fitting or ([] if wants_gpus else list(site.partitions))  # a site whose nodes all have GPUs
    if not site.partitions:
        raise ConfigurationError(
            "the site has no partition. Describe one in its entry of SUPERCOMPUTER_SITE_OVERRIDES:\n"
            "  scripts/docs another-site"
        )
    if not fitting:
        raise ConfigurationError(
            f"gpus_per_node={request.gpus_per_node}: this site has no GPUs. Leave gpus_per_node out"
        )
    chosen = request.partition or (preferred if preferred in fitting else fitting[0])
    if wants_gpus and chosen not in fitting:
        raise ConfigurationError(
            f"gpus_per_node={request.gpus_per_node}: partition {chosen} has no GPUs. Leave partition out, or write "
            f"partition={fitting[0]!r}"
        )
    return chosen, site.partitions[chosen]


def choose_qos(request: SlurmRequest, site: Site, partition: str, preferred: str | None) -> tuple[str | None, bool]:
    """Return the QoS to submit with (None: the site has none), and whether `preferred` (SLURM_QOS) decided it."""
    valid = site.partitions[partition].qos
    if request.qos:
        if request.qos not in valid:
            raise ConfigurationError(
                f"qos={request.qos!r} is not a QoS of partition {partition}{nearest(request.qos, valid)}"
            )
        return request.qos, False
    if not preferred:
        return next(iter(valid), None), False
    classes = {qos: qos.removesuffix(name) for name, nodes in site.partitions.items() for qos in nodes.qos}
    if preferred not in classes:
        raise ConfigurationError(f"SLURM_QOS={preferred!r} is not a QoS of this site{nearest(preferred, classes)}")
    chosen = preferred if preferred in valid else classes[preferred] + partition
    if chosen not in valid:
        raise ConfigurationError(
            f"SLURM_QOS={preferred}: partition {partition} has no QoS of that class, only {', '.join(valid) or 'none'}"
        )
    return chosen, True


def _size(request: SlurmRequest, name: str, partition: Partition) -> SlurmRequest:
    """Fill in CPUs and memory where the request leaves them open; check all sizes against a node of the partition."""
    gpus, tasks = request.gpus_per_node, request.ntasks_per_node
    if gpus > partition.gpus:
        raise ConfigurationError(
            f"gpus_per_node={gpus}: a node of partition {name} has {partition.gpus}. Request more nodes"
        )
    filled = dict[str, Any]()
    if request.exclusive:  # whole nodes: all GPUs (man sbatch), and all else unless the asset says less
        filled = {"gpus_per_node": partition.gpus, "cpus_per_task": partition.cores // tasks, "mem": "0"}
    elif gpus:
        if partition.cores_per_gpu:
            filled["cpus_per_task"] = max(partition.cores_per_gpu * gpus // tasks, 1)
        if partition.mem_per_gpu:
            filled["mem"] = format_memory(parse_memory(partition.mem_per_gpu) * gpus)
    named = {"cpus_per_task": request.cpus_per_task, "mem": request.mem or request.mem_per_cpu}
    sized = request.model_copy(update={field: value for field, value in filled.items() if named.get(field) is None})
    if sized.cpus_per_node > partition.cores:
        what, less = f"ntasks_per_node={tasks}", "fewer tasks per node"
        if tasks <= partition.cores:
            what += f" with cpus_per_task={sized.cpus_per_task or 1}"
            less = f"at most cpus_per_task={partition.cores // tasks}"
        cores = count_of(partition.cores, "CPU")
        raise ConfigurationError(
            f"{what}: a node of partition {name} gives a job {cores}. Request {less}, or more nodes"
        )
    cpus = cpus_with_memory(sized, partition)
    if parse_memory(sized.mem or sized.mem_per_cpu or "0") * cpus > parse_memory(partition.mem):
        what = f"mem={sized.mem}" if sized.mem else f"mem_per_cpu={request.mem_per_cpu} for {count_of(cpus, 'CPU')}"
        raise ConfigurationError(
            f"{what}: a node of partition {name} has {partition.mem}. Request less memory per node, or more nodes"
        )
    return sized


def cpus_with_memory(request: SlurmRequest, partition: Partition) -> int:
    """Return by how many CPUs Slurm multiplies the memory of a request: 1 for `mem`, all of a node for `exclusive`."""
    if request.mem_per_cpu is None:
        return 1
    return partition.cores if request.exclusive else request.cpus_per_node
