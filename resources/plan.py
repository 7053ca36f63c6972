"""What a run will do, worked out before anything happens: pure, the same for a run, a preview and a test."""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resources.errors import ConfigurationError
from resources.launchers import Launcher
from resources.settings import Settings
from resources.slurm import Allocation, Site, SlurmRequest, allocate, load_site


@dataclass(frozen=True)
class Plan:
    """A workload with all that was left open filled in.

    Attributes:
        workload: absolute path of a Python program that parses.
        launcher: with the site's fields.
        site: the one that the request was checked against; in `development` the only one there is, or the one set.
        allocation: the complete request.
    """

    workload: Path
    launcher: Launcher
    site: Site
    allocation: Allocation


def make_plan(
    settings: Settings,
    site_overrides: Mapping[str, Any],
    workload: Path | str,
    launcher: Launcher,
    request: SlurmRequest,
) -> Plan:
    """Fill in and check everything that an asset passes to `ComputeResource.run`.

    In `development` with several sites and none chosen there is nothing to check a request against: it stays as it is.

    Raises:
        ConfigurationError: the workload, the launcher or the request cannot work; the text names the cause.
    """
    _check_types(workload, launcher, request)
    program = _check_workload(Path(workload))
    name = settings.supercomputer_site or (next(iter(site_overrides)) if len(site_overrides) == 1 else None)
    if name is None:
        return Plan(program, launcher, Site(), Allocation(request))
    site = load_site(site_overrides, name)
    allocation = allocate(request, site, settings.partition, settings.qos, settings.account, settings.reservation)
    complete = launcher.with_site(site.launchers)
    complete.check(allocation.request)
    return Plan(program, complete, site, allocation)


def _check_types(workload: object, launcher: object, request: object) -> None:
    if not isinstance(workload, str | Path):
        raise ConfigurationError(f"workload={workload!r} is no path. Write for instance WORKLOADS / 'flights.py'")
    if isinstance(launcher, type) and issubclass(launcher, Launcher):
        raise ConfigurationError(f"launcher={launcher.__name__} is a class. Write launcher={launcher.__name__}()")
    if not isinstance(launcher, Launcher):
        raise ConfigurationError(f"launcher={launcher!r} is no launcher. Write for instance launcher=ScriptLauncher()")
    if not isinstance(request, SlurmRequest):
        raise ConfigurationError(
            f"request={request!r} is no SlurmRequest. Write for instance request=SlurmRequest(cpus_per_task=2)"
        )


def _check_workload(workload: Path) -> Path:
    if not workload.is_file():
        raise ConfigurationError(f"the workload {workload} does not exist")
    try:
        ast.parse(workload.read_bytes(), filename=str(workload))
    except SyntaxError as error:
        raise ConfigurationError(
            f"{workload}, line {error.lineno}: {error.msg}\n    {(error.text or '').strip()}"
        ) from None
    return workload.resolve()
