"""The run directory on the supercomputer: the files that a step sends. Pure, and the same for a preview."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from dagster_sbatch.run.calls import StepName
from dagster_sbatch.run.pipes import pipes_variables
from dagster_sbatch.run.plan import Plan
from dagster_sbatch.slurm import SAMPLER_FILES, ArrayShape, render_job_script, render_start
from dagster_sbatch.slurm.gateway.agent.disk import FORMAT

CHECKS = "checks.json"  # name of a file in it


@dataclass(frozen=True)
class RunInfo:
    """Which Dagster run a run directory belongs to: `about.json` in it, and the job's comment."""

    run: str  # id of the Dagster run that submitted it
    root: str  # id of the first run of which that one is a retry or a re-execution
    asset: str  # keys of the assets
    partitions: str  # first and last partition key; empty without partitions
    environment: str = ""  # name of its environment; empty before it has one
    step: str = ""  # Dagster's key of the step in the run `root`; empty in a preview

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> "RunInfo":
        """Read the fields that are known here: another version of the engine may have written the file."""
        return cls(**{field.name: document.get(field.name, "") for field in fields(cls)})

    @property
    def step_name(self) -> StepName:
        """Of the step."""
        return StepName(self.step, self.asset.split(", "))

    @property
    def text(self) -> str:
        """The content of the file."""
        return json.dumps({**asdict(self), "format": FORMAT})


@dataclass(frozen=True)
class RunPaths:
    """Paths on the supercomputer."""

    run: str  # the run directory; its last part is the submission key
    python: str  # interpreter for the workload
    workloads: str  # the code root there
    data_root: str  # DATA_ROOT there


def render_job(plan: Plan, paths: RunPaths, info: RunInfo, array: ArrayShape | None = None) -> str:
    """Return the batch script of a run; each task of an array reads its variables of Pipes from a file."""
    environment = {
        "PYTHON": paths.python,
        "PYTHONPATH": paths.workloads,
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
        "DATA_ROOT": paths.data_root,
        **({} if array else pipes_variables(paths.run)),
    }
    request, runtime, container = plan.allocation.request, plan.site.container_runtime, plan.launcher.container
    body, start = plan.launcher.render(request, plan.workload.command(paths.workloads)), render_start(plan.env)
    if container:
        body = f"{container.render_check(runtime, paths.run)}\n{body}"
        start = container.render_start(request, runtime, paths.run, paths.workloads)
    return render_job_script(
        request,
        plan.site,
        job_name=paths.run.rpartition("/")[2],
        about={name: value for name, value in (("run", info.run), ("asset", info.asset.replace(", ", "+"))) if value},
        environment=environment,
        body=body,
        start=start,
        run=paths.run,
        array=array,
    )


def files_of_commands(plan: Plan) -> dict[str, str]:
    """Return the files that the job script and the commands of the launcher and its container need."""
    container = plan.launcher.container
    own = plan.launcher.files(plan.allocation.request)
    return {**SAMPLER_FILES, **own, **(container.files(plan.env) if container else {})}
