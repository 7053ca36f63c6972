"""What a run will do, decided before anything happens: pure, and the same for a run, a preview and a test."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dagster_sbatch.environments.groups import check_environment, is_path, lock_path
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.launchers import Launcher
from dagster_sbatch.project import Project
from dagster_sbatch.run.array import PARTITION_KEYS, JobArray, Task, make_tasks
from dagster_sbatch.run.digests import check_json
from dagster_sbatch.run.imports import find_hidden, find_missing
from dagster_sbatch.run.workload import UNFIT, Workload, fits, read_workload
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import Allocation, Site, SlurmRequest, allocate, render_start
from dagster_sbatch.slurm.retries import check_retries
from dagster_sbatch.slurm.units import count_of

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RESERVED = {
    "PATH": "Extend it in the workload, or call programs by their full path.",
    "PYTHONPATH": "Put modules into the code root, beside the workload.",
    "DATA_ROOT": "It is a setting of the deployment.",
    **dict.fromkeys(("PYTHONHOME", "PYTHONPLATLIBDIR", "PYTHONSAFEPATH", "PYTHON", "RAY_ADDRESS"), ""),
}
_RESERVED_PREFIXES = ("DAGSTER_PIPES_", "SLURM", "RAY_AUTH_", "RAY_JOB_", "JOB_TMPDIR")


@dataclass(frozen=True)
class Plan:
    """A call of `compute.run`, checked, with all that was left open filled in."""

    project: Project  # the code location
    workload: Workload  # the program, which parses
    launcher: Launcher  # with the site's fields
    site: Site  # the one that the request was checked against; in `development` the only one there is, or the one set
    allocation: Allocation  # the complete request
    env: Mapping[str, str]  # further variables for the workload
    # JSON values for the workload, with the partitions of the run as `partition_keys`, if it has any
    extras: Mapping[str, Any]
    # What deserves a warning: changes of the request, imports that cannot work on the supercomputer
    notes: tuple[str, ...]
    array: JobArray | None = None  # as the asset passed it; None: one job for everything
    tasks: tuple[Task, ...] = ()  # of the array
    # As the asset passed it: a group of packages, or the path of an interpreter; None: the default
    environment: str | None = None
    # The request as the asset wrote it, completed from a batch script's lines; the allocation is made from it
    request: SlurmRequest = field(default_factory=SlurmRequest)


def make_plan(  # noqa: PLR0913 - what an asset passes
    settings: Settings,
    project: Project,
    workload: Path | str,
    launcher: Launcher,
    request: SlurmRequest,
    *,
    args: Sequence[str] = (),
    extras: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    array: JobArray | None = None,
    environment: str | None = None,
) -> Plan:
    """Check what an asset passes to `ComputeResource.run`, and fill in what it leaves open.

    In `development` with several sites and none chosen there is nothing to check a request against: it stays as it is.
    Raises ConfigurationError: the workload, the launcher, the request, the array, the environment or a variable cannot
    work; the text says why.
    """
    _check_types(workload, launcher, request, array)
    name = settings.supercomputer_site or project.only_site
    site = project.load_site(name) if name else Site()
    launcher = launcher.with_site(site.launchers)
    _check_environment(environment, project, launcher)
    _check_variables(env or {}, launcher)
    program = read_workload(Path(workload), args, project.workloads, python=launcher.runs_python)
    launcher.check_program(program.path)
    request, notes = launcher.complete_request(program.path, request)
    extras = extras or {}
    plan = Plan(
        project=project,
        workload=program,
        launcher=launcher,
        site=site,
        allocation=Allocation(request),
        env=dict(env or {}),
        extras=extras,
        notes=(*notes, *_note_environment(program, project, launcher, settings, environment)),
        array=array,
        tasks=make_tasks(array, extras.get(PARTITION_KEYS, ())) if array else (),
        environment=environment,
        request=request,
    )
    plan = _allocate(plan, settings) if name else plan
    if plan.launcher.container:
        plan.launcher.container.check(plan.allocation.request, plan.site.container_runtime)
    return plan


def _allocate(plan: Plan, settings: Settings) -> Plan:
    """Return the plan with what its site adds: the rest of the request, and notes."""
    plan = with_request(plan, plan.request, settings)
    request = plan.allocation.request
    check_retries(request)
    if plan.array and (plan.request.qos or not settings.qos):  # in the QoS of SLURM_QOS, the others wait
        _check_running_tasks(plan.array, plan.allocation)
    notes = [*plan.allocation.notes, *plan.notes]
    if settings.deployment == "production_supercomputer" and (request.qos or "").startswith("dev_"):
        notes.append(f"QoS {request.qos} is for short tests, and this is {settings.deployment}. Check SLURM_QOS.")
    return replace(plan, notes=tuple(notes))


def with_request(plan: Plan, request: SlurmRequest, settings: Settings) -> Plan:
    """Return the plan of the same call with another request.

    Raises ConfigurationError: the site or the launcher does not allow it.
    """
    preferred = settings.partition, settings.qos, settings.account, settings.reservation
    allocation = allocate(request, plan.site, *preferred)
    plan.launcher.check(allocation.request)
    return replace(plan, request=request, allocation=allocation)


def _check_environment(environment: str | None, project: Project, launcher: Launcher) -> None:
    check_environment(environment, project)
    if environment is not None and launcher.container:
        raise ConfigurationError(
            f"environment={environment!r} has no effect with a container: the workload runs with the Python and the "
            "packages of the image. Remove one of the two; to use no container, not even the site's: container=None."
        )


def _note_environment(
    program: Workload, project: Project, launcher: Launcher, settings: Settings, environment: str | None
) -> list[str]:
    """Return what deserves a warning: imports that cannot work, an environment without effect."""
    notes = find_hidden(program)
    if launcher.runs_python:
        others = launcher.container or is_path(environment) or (environment is None and settings.python)
        notes += find_missing(program, project, None if others else lock_path(project, environment))
    if environment is not None and not settings.on_supercomputer:
        notes.append(
            f"environment={environment!r} is for the supercomputer. Here, the project's own environment is used."
        )
    return notes


def _check_running_tasks(array: JobArray, allocation: Allocation) -> None:
    """Refuse more running tasks than the QoS has nodes for a user, if each task has nodes of its own."""
    request, partition = allocation.request, allocation.partition
    limit = partition.limits_of(request.qos).nodes if partition else None
    shared = request.nodes == 1 and not request.exclusive
    if limit and not shared and (array.max_running_tasks or 0) * request.nodes > limit:
        raise ConfigurationError(
            f"max_running_tasks={array.max_running_tasks} with nodes={request.nodes} needs more than "
            f"{count_of(limit, 'node')}, the limit of QoS {request.qos} per user. "
            f"Write JobArray(max_running_tasks={max(1, limit // request.nodes)})."
        )


def _check_types(workload: object, launcher: object, request: object, array: object) -> None:
    if not isinstance(workload, str | Path):
        raise ConfigurationError(f"workload={workload!r} is not a path. Write for instance WORKLOADS / 'counts.py'")
    if isinstance(launcher, type) and issubclass(launcher, Launcher):
        raise ConfigurationError(f"launcher={launcher.__name__} is a class. Write launcher={launcher.__name__}()")
    if not isinstance(launcher, Launcher):
        raise ConfigurationError(
            f"launcher={launcher!r} is not a launcher. Write for instance launcher=ScriptLauncher()"
        )
    if not isinstance(request, SlurmRequest):
        raise ConfigurationError(
            f"request={request!r} is not a SlurmRequest. Write for instance request=SlurmRequest(cpus_per_task=2)"
        )
    if not isinstance(array, JobArray | None):
        raise ConfigurationError(f"array={array!r} is not a JobArray. Write for instance array=JobArray()")
    if array and launcher.not_in_arrays:
        raise ConfigurationError(f"{type(launcher).__name__} does not work in a job array: {launcher.not_in_arrays}")


def complete_extras(extras: Mapping[str, Any] | None, partitions: Sequence[str]) -> dict[str, Any]:
    """Return the extras as the workload gets them: JSON, with the partitions of the run.

    Raises ConfigurationError: they are not a dictionary, or a name is not a string, or a value is not JSON.
    """
    if not isinstance(extras, Mapping | None):
        raise ConfigurationError(f"extras={extras!r} is not a dictionary. Write for instance extras={{'trials': 3}}")
    values = dict(extras or {})
    for key, value in values.items():
        if not isinstance(key, str):
            raise ConfigurationError(
                f"extras: the name {key!r} is not a string. Write for instance extras={{'trials': 3}}"
            )
        try:
            check_json(f"extras[{key!r}]", value)
        except ValueError as error:
            raise ConfigurationError(str(error)) from None
    if PARTITION_KEYS in values:  # also without partitions: of what is there, the order does not count as an input
        raise ConfigurationError(f"extras[{PARTITION_KEYS!r}] holds the partitions of the run. Use another name.")
    return {**values, PARTITION_KEYS: list(partitions)} if partitions else values


def _check_variables(env: Mapping[str, str], launcher: Launcher) -> None:
    """Refuse variables that cannot be set everywhere."""
    if not isinstance(env, Mapping):
        raise ConfigurationError(f"env={env!r} is not a dictionary. Write for instance env={{'OMP_NUM_THREADS': '1'}}")
    for name, value in env.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigurationError(f"env[{name!r}] is not the name of a variable. Use letters, digits and _.")
        if name in _RESERVED or name.startswith(_RESERVED_PREFIXES):
            raise ConfigurationError(
                f"env[{name!r}]: the deployment sets this variable. {_RESERVED.get(name, '')}".rstrip()
            )
        if name in launcher.own_variables:
            raise ConfigurationError(f"env[{name!r}]: {type(launcher).__name__} sets this variable for each process.")
        if type(value) is not str:  # Dagster's EnvVar is one, and would be its name
            raise ConfigurationError(
                f"env[{name!r}] is not a string but {value!r} ({type(value).__name__}). Write a string."
            )
        if not fits(value):
            raise ConfigurationError(f"env[{name!r}] cannot be a variable: {UNFIT}")
    if not fits(render_start(env)):  # a function of bash, which is one variable of the job
        raise ConfigurationError("env cannot be passed: its variables have 128 KiB in all. Use extras.")
