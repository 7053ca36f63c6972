"""What a run on the supercomputer consists of: its name, its files, its batch script. Pure, the same for a preview."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from dagster_pipes import DAGSTER_PIPES_CONTEXT_ENV_VAR, DAGSTER_PIPES_MESSAGES_ENV_VAR, encode_param

from dagster_sbatch.run.plan import Plan
from dagster_sbatch.slurm import render_job_script
from dagster_sbatch.slurm.gateway.agent.disk import FORMAT

CONTEXT, MESSAGES, RECORD = "context.json", "messages.jsonl", "submitted_with.json"
"""Names in a run directory."""
LONGEST_NAME = 40


@dataclass(frozen=True)
class About:
    """Whose run it is; kept beside it as `about.json`, and in the job's comment.

    Attributes:
        run: id of the Dagster run that submitted it.
        root: id of the first run of which that one is a retry or a re-execution.
        asset: keys of the assets.
        partitions: first and last partition key; empty without partitions.
        environment: name of the one that it uses; empty in what has none yet.
        step: Dagster's key of the step; empty in what an older version has submitted.
        format: of the file; 0 in those from before there was one.
    """

    run: str
    root: str
    asset: str
    partitions: str
    environment: str = ""
    step: str = ""
    format: int = FORMAT

    @classmethod
    def parse(cls, said: Mapping[str, Any]) -> "About":
        """Take what this version knows of a file, which may be of another one."""
        known = {field.name: said.get(field.name, "") for field in fields(cls) if field.name != "format"}
        return cls(**known, format=said.get("format", 0))

    @property
    def comment(self) -> dict[str, str]:
        """For the job's comment."""
        return {name: value for name, value in (("run", self.run), ("asset", self.asset)) if value}


@dataclass(frozen=True)
class Place:
    """Where a run lies on the supercomputer.

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


def step_prefix(root: str, step: str) -> str:
    """Return the beginning of the submission keys of a step, of its retries and of its re-executions.

    Args:
        root: id of the first run.
        step: Dagster's key of the step.
    """
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", step)[:LONGEST_NAME].strip("-_") or "step"
    return f"{slug}-{_short([root, step])}"


def family_of(root: str, step: str, digest: str, twin: int) -> str:
    """Return the first part of the submission keys of all attempts at the same work.

    Args:
        root: id of the first run.
        step: Dagster's key of the step.
        digest: of everything that decides the result.
        twin: number of the call among those of the step with that digest.
    """
    return f"{step_prefix(root, step)}-{_short([digest, twin])}"


def former_family_of(root: str, assets: Iterable[str], partitions: Iterable[str], call: int) -> str:
    """Return the same as versions before November 2026 made it: their jobs may still be running."""
    names = sorted(assets)
    what = json.dumps([root, names, sorted(partitions), call])
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", "-".join(names))[:LONGEST_NAME].strip("-_") or "asset"
    return f"{slug}-{hashlib.sha256(what.encode()).hexdigest()[:12]}"


def _short(what: object) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:10]


def render_job(plan: Plan, place: Place, about: About) -> str:
    """The batch script of a run.

    Args:
        plan: the complete request and launcher.
        place: where it lies.
        about: whose it is.
    """
    environment = {
        "PYTHON": place.python,
        "PYTHONPATH": place.workloads,
        "PYTHONUNBUFFERED": "1",
        "DATA_ROOT": place.data_root,
        DAGSTER_PIPES_CONTEXT_ENV_VAR: encode_param({"path": f"{place.run}/{CONTEXT}"}),
        DAGSTER_PIPES_MESSAGES_ENV_VAR: encode_param(
            {"path": f"{place.run}/{MESSAGES}", "include_stdio_in_messages": False}
        ),
    }
    request = plan.allocation.request
    return render_job_script(
        request,
        plan.site,
        job_name=place.run.rpartition("/")[2],
        about=about.comment,
        environment=environment,
        body=plan.launcher.render(request, plan.workload.command(place.workloads)),
        variables=plan.env,
    )


def files_of(plan: Plan, place: Place, about: About, context: str, record: Mapping[str, Any]) -> dict[str, str]:
    """Return all files of a run directory by name.

    Args:
        plan: the complete request and launcher.
        place: where it lies.
        about: whose it is.
        context: the Pipes context.
        record: what a later attempt compares its own inputs with: `run`, `call`, `inputs`, `request`.
    """
    return {
        **plan.launcher.files(plan.allocation.request),
        "job.sh": render_job(plan, place, about),
        CONTEXT: context,
        "about.json": json.dumps(asdict(about)),
        RECORD: json.dumps(record),
    }
