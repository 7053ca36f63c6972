"""The run directory on the supercomputer: the files that a step sends. Pure, and the same for a preview."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from dagster_pipes import DAGSTER_PIPES_CONTEXT_ENV_VAR, DAGSTER_PIPES_MESSAGES_ENV_VAR, encode_param

from dagster_sbatch.run.plan import Plan
from dagster_sbatch.slurm import render_job_script
from dagster_sbatch.slurm.gateway import MESSAGES
from dagster_sbatch.slurm.gateway.agent.disk import FORMAT

CONTEXT, RECORD = "context.json", "submitted_with.json"
"""Names of files in it."""


@dataclass(frozen=True)
class RunInfo:
    """Which Dagster run a run directory belongs to: `about.json` in it, and the job's comment.

    Attributes:
        run: id of the Dagster run that submitted it.
        root: id of the first run of which that one is a retry or a re-execution.
        asset: keys of the assets.
        partitions: first and last partition key; empty without partitions.
        environment: name of its environment; empty before it has one.
        step: Dagster's key of the step; empty if an older version submitted it.
        format: of the file; 0 before there was one.
    """

    run: str
    root: str
    asset: str
    partitions: str
    environment: str = ""
    step: str = ""
    format: int = FORMAT

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> "RunInfo":
        """Take what this version knows of a file, which another version may have written."""
        known = {field.name: document.get(field.name, "") for field in fields(cls) if field.name != "format"}
        return cls(**known, format=document.get("format", 0))


@dataclass(frozen=True)
class RunPaths:
    """Paths on the supercomputer.

    Attributes:
        run: the run directory; its last part is the submission key.
        python: interpreter for the workload.
        workloads: the code root there.
        data_root: DATA_ROOT there.
    """

    run: str
    python: str
    workloads: str
    data_root: str


def render_job(plan: Plan, paths: RunPaths, info: RunInfo) -> str:
    """Return the batch script of a run."""
    environment = {
        "PYTHON": paths.python,
        "PYTHONPATH": paths.workloads,
        "PYTHONUNBUFFERED": "1",
        "DATA_ROOT": paths.data_root,
        DAGSTER_PIPES_CONTEXT_ENV_VAR: encode_param({"path": f"{paths.run}/{CONTEXT}"}),
        DAGSTER_PIPES_MESSAGES_ENV_VAR: encode_param(
            {"path": f"{paths.run}/{MESSAGES}", "include_stdio_in_messages": False}
        ),
    }
    request = plan.allocation.request
    return render_job_script(
        request,
        plan.site,
        job_name=paths.run.rpartition("/")[2],
        about={name: value for name, value in (("run", info.run), ("asset", info.asset)) if value},
        environment=environment,
        body=plan.launcher.render(request, plan.workload.command(paths.workloads)),
        variables=plan.env,
    )


def files_of(plan: Plan, paths: RunPaths, info: RunInfo, context: str, record: Mapping[str, Any]) -> dict[str, str]:
    """Return all files of a run directory by name.

    Args:
        plan: of the run.
        paths: of the run.
        info: whose it is.
        context: the Pipes context.
        record: what a later attempt compares its own inputs with: `call`, `inputs`, `request`.
    """
    return {
        **plan.launcher.files(plan.allocation.request),
        "job.sh": render_job(plan, paths, info),
        CONTEXT: context,
        "about.json": json.dumps(asdict(info)),
        RECORD: json.dumps(record),
    }
