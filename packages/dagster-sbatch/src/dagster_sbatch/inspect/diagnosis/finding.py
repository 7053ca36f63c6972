"""The result of a check, and the facts that a check leaves for those after it."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import dagster as dg

from dagster_sbatch.inspect.remote_runs import Runs
from dagster_sbatch.project import Project
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import Site
from dagster_sbatch.slurm.gateway import Projects, Usage


class Finding(NamedTuple):
    """The result of a check."""

    # `ok`; `warning`: jobs run all the same; `broken`: the doctor stops here
    state: Literal["ok", "warning", "broken"]
    found: str  # in words
    fix: str = ""  # what to do; empty if the state is ok


ok = partial(Finding, "ok")
warning = partial(Finding, "warning")
broken = partial(Finding, "broken")


@dataclass
class Facts:
    """What is known so far. Each check adds what those after it need."""

    project: Project
    open_instance: Callable[[], dg.DagsterInstance]  # opens Dagster's instance
    until_the_end: ExitStack  # closes what checks have opened for those after them
    instance: dg.DagsterInstance = field(init=False)
    settings: Settings = field(init=False)
    site: Site = field(init=False)
    survey: Mapping[str, Any] = field(init=False)  # see agent/survey.py
    runs: Runs = field(init=False)
    projects: Projects = field(init=False)
    usage: Usage | None = field(init=False)
