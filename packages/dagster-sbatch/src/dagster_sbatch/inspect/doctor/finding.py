"""What a check says, and what the checks before it have found out."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import dagster as dg

from dagster_sbatch.inspect.doctor.survey import Answer
from dagster_sbatch.inspect.runs import Runs
from dagster_sbatch.project import Project
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import Site
from dagster_sbatch.slurm.gateway import Projects

if TYPE_CHECKING:
    import fabric


@dataclass(frozen=True)
class Finding:
    """What a check says.

    Attributes:
        name: of the check.
        state: `ok`; `warning`: jobs run all the same; `broken`: the checks after it were not made.
        found: in words.
        fix: what to do; empty if it is ok.
    """

    name: str
    state: Literal["ok", "warning", "broken"]
    found: str
    fix: str = ""


@dataclass
class Facts:
    """What is known so far. Each check fills in what those after it need.

    Attributes:
        project: the code location.
        open_instance: opens Dagster's instance.
        until_the_end: closes what checks have opened for those after them.
        definitions: of the code location; None: no job scripts are tried.
    """

    project: Project
    open_instance: Callable[[], dg.DagsterInstance]
    until_the_end: ExitStack
    definitions: dg.Definitions | None = None
    instance: dg.DagsterInstance = field(init=False)
    settings: Settings = field(init=False)
    site: Site = field(init=False)
    connection: "fabric.Connection" = field(init=False)
    survey: dict[str, Answer] = field(init=False)
    runs: Runs = field(init=False)
    projects: Projects = field(init=False)


Verdict = tuple[Literal["ok", "warning", "broken"], str, str]
"""The last three fields of a Finding."""


def ok(found: str) -> Verdict:
    """Return the verdict of a check that found nothing wrong."""
    return "ok", found, ""


def warning(found: str, fix: str) -> Verdict:
    """Return the verdict for what jobs can live with."""
    return "warning", found, fix


def broken(found: str, fix: str) -> Verdict:
    """Return the verdict for what keeps jobs from running."""
    return "broken", found, fix
