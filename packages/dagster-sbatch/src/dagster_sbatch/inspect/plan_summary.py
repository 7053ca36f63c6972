"""What a plan asks for, as text: the place, the request, the tasks of an array and the highest possible cost."""

from dagster_sbatch.costs.cost import highest_cost, show_hours
from dagster_sbatch.costs.proposal import MARGINS, Proposal
from dagster_sbatch.environments.groups import is_path, lock_path
from dagster_sbatch.run.array import USUAL_LIMIT, Batches
from dagster_sbatch.run.directory import RunPaths
from dagster_sbatch.run.plan import Plan
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import Retries
from dagster_sbatch.slurm.gateway import Limits
from dagster_sbatch.slurm.units import count_of, format_time

ANY_LIMITS = Limits(None, None)  # of a site that is not asked


def place_run(settings: Settings, run: str, environment: str | None = None) -> RunPaths:
    """Return where a run would lie; what is not known yet stands in angle brackets.

    `environment`: that of the plan; see `ComputeResource.run`.
    """
    if not settings.deployment_base_path:
        settings = settings.model_copy(update={"deployment_base_path": "<SLURM_DEPLOYMENT_BASE_PATH>"})
    folder = f"{settings.deployment_base_path}/environments/<hash of its content>"
    named = environment if is_path(environment) else None if environment else settings.python
    python = named or f"{folder}/bin/python"
    return RunPaths(f"{settings.runs_folder}/{run}", python, f"{folder}/workloads", settings.data_folder)


def summarise(step: str, plan: Plan, settings: Settings) -> dict[str, str]:
    """Return for people what a step asks for, by heading."""
    request, place = plan.allocation.request, place_run(settings, "", plan.environment)
    site, container = settings.supercomputer_site or plan.project.only_site, plan.launcher.container
    image = container.remote_image(place.data_root) if container else ""
    group = None if is_path(plan.environment) else plan.environment
    lock = lock_path(plan.project, group).relative_to(plan.project.root)
    return {
        "step": step,
        "how": f"{plan.workload.name} with {type(plan.launcher).__name__}",
        **({"container": f"{image} (--test-only asks whether it is there)"} if image else {}),
        "where": f"{site}: partition {request.partition}, QoS {request.qos or 'of the partition'}"
        if request.partition
        else "no site is chosen, so partition and limits are not known: set SLURM_SUPERCOMPUTER_SITE",
        **({"array": _summarise_array(plan)} if plan.array else {}),
        **_summarise_nodes(plan),
        "project": request.account
        or "SBATCH_ACCOUNT of your login shell there, or your default project (--test-only says which)",
        "time limit": format_time(request.time_limit),
        "cost": _summarise_cost(plan),
        **_summarise_retries(request.retries),
        "files": f"job.sh, {'tasks.jsonl' if plan.array else 'context.json'}, ... in {place.run}",
        "python": f"{container.python} of the image" if container else place.python,
        **({"packages": f"{group}: {lock}"} if group else {}),
        **({"modules": f"{', '.join(request.modules)} (with Lmod, in the job)"} if request.modules else {}),
    }


def _summarise_array(plan: Plan) -> str:
    """Return how many tasks there are, of what, and how many of them run at once."""
    tasks, array = plan.tasks, plan.array
    assert array
    ends = " to ".join(dict.fromkeys((tasks[0].label, tasks[-1].label)))
    what = "one per parameter set" if array.tasks else "one per partition"
    if array.partitions_per_task > 1:
        what = f"one per {array.partitions_per_task} partitions"
    most = f"; at most {array.max_running_tasks} run at once" if array.max_running_tasks else ""
    number = count_array_jobs(plan, ANY_LIMITS)
    if len(tasks) > USUAL_LIMIT:
        number += f" of {USUAL_LIMIT} (--test-only asks for the limit of the site)"
    return f"{number}, {what} ({ends}){most}. The request is that of each task"


def count_array_jobs(plan: Plan, limits: Limits) -> str:
    """Return the number of tasks and of the array jobs that they are divided into."""
    batches, number, queued = divide(plan, limits), 0, 0
    while batches and (taken := batches.take((), queued)[0]):
        number, queued = number + 1, queued + len(taken)
    return f"{count_of(len(plan.tasks), 'task')} in {count_of(number, 'array job')}"


def divide(plan: Plan, limits: Limits) -> Batches | None:
    """Return the tasks of an array as array jobs within some limits; None without an array.

    Raises ConfigurationError: Slurm does not let so many tasks run at once.
    """
    return Batches(range(len(plan.tasks)), limits, plan.array.max_running_tasks) if plan.array else None


def name_limits(limits: Limits) -> str:
    """Return what Slurm accepts, as text."""
    array = (
        f"{count_of(limits.array, 'task')} per array job" if limits.array else "no known number of tasks per array job"
    )
    submit = f"{count_of(limits.submit, 'submitted job')} at once" if limits.submit else "any number of submitted jobs"
    return f"Slurm accepts {array} and {submit}"


def _summarise_nodes(plan: Plan) -> dict[str, str]:
    """Return what the job requests of each node, of how much, and whether others may use the rest."""
    request, node = plan.allocation.request, plan.allocation.partition
    cores = request.cpus_per_node
    mem = "all" if request.mem == "0" else request.mem or (request.mem_per_cpu and f"{request.mem_per_cpu} per core")
    if mem:
        memory = f"memory {mem} of {node.mem}" if node else f"memory {mem}"
    else:
        memory = f"Slurm's default memory (a node has {node.mem})" if node else "Slurm's default memory"
    if request.exclusive:
        shared = "not shared: `exclusive` reserves whole nodes"
    elif node and cores == node.cores:
        shared = "not shared: all cores are requested"
    else:
        shared = "shared: other jobs may use the rest"
    tasks = f", {request.ntasks_per_node} tasks per node" if request.ntasks_per_node > 1 else ""
    return {
        "nodes": f"{request.nodes}{tasks}; {shared}",
        "per node": f"{_part_of(cores, node.cores if node else None, 'core')}, "
        f"{_part_of(request.gpus_per_node, node.gpus if node else None, 'GPU')}, {memory}",
    }


def _part_of(number: int, total: int | None, noun: str) -> str:
    """Return a number of things, of how many if that is known."""
    return count_of(number, noun) if total is None else f"{number} of {count_of(total, noun)}"


def _summarise_cost(plan: Plan) -> str:
    allocation, number = plan.allocation, len(plan.tasks) or 1
    cost = highest_cost(allocation, number)
    text = f"at most {show_hours(cost.node_hours, 'node-hours')}"
    if cost.gpu_hours:
        text += f" and {show_hours(cost.gpu_hours, 'GPU-hours')}"
    if number > 1:
        text += f" for all {number} tasks"
    if allocation.share < 1:
        part = show_hours(cost.node_hours * allocation.share, "node-hours")
        text += f"; {part} where shares of a node are charged"
    return text


def summarise_proposal(proposal: Proposal | None) -> dict[str, str]:
    """Return what earlier runs have used, and the request that would be enough; empty if nothing is known."""
    if proposal is None:
        return {}
    found = {"used": proposal.used}
    return {**found, "enough": f"{proposal.code}\n{MARGINS}"} if proposal.request else found


def _summarise_retries(retries: Retries) -> dict[str, str]:
    """Return what the request changes for further attempts, if it names anything."""
    words = [
        f"up to {retries.max_mem} of memory" if retries.max_mem else "",
        f"up to {format_time(retries.max_time_limit)} of time" if retries.max_time_limit else "",
        "without failed nodes" if retries.exclude_failed_nodes else "",
    ]
    text = ", ".join(filter(None, words))
    return {"retries": f"at most {retries.max_retries}, {text}; each adds to the cost"} if text else {}
