"""Tags by which the UI finds a run: where its workloads run, and the Slurm jobs of its steps."""

import re

from dagster_sbatch.run.calls import step_key
from dagster_sbatch.run.history import has_ended
from dagster_sbatch.run.results import StepContext, op_context
from dagster_sbatch.run.steplog import StepLog

DEPLOYMENT = "deployment"
JOB = "slurm_job"
_LONGEST = 63
"""Characters of each half of a tag's key, for Dagster."""


def tag_deployment(context: StepContext, deployment: str, site: str | None) -> None:
    """Tag the run of a step with DAGSTER_DEPLOYMENT and, on a supercomputer, the site."""
    _tag(context, {DEPLOYMENT: deployment, **({"site": site} if site else {})})


def tag_job(context: StepContext, job: str, call: int) -> None:
    """Tag the run of a step with a Slurm job id, under the step's name.

    Args:
        context: of the step.
        job: its id.
        call: how many calls of `compute.run` the step made before this one.
    """
    _tag(context, {_job_tag(step_key(op_context(context)) + (f".{call + 1}" if call else "")): job})


def left_job(context: StepContext) -> str | None:
    """Return the Slurm job that an earlier run submitted or followed when this step was interrupted in it.

    None if there is no such run, or if the step has ended in it.
    """
    step = op_context(context)
    key, parent = step_key(step), step.run.parent_run_id
    while parent:
        run = step.instance.get_run_by_id(parent)
        if run is None or has_ended(step.instance, parent, key):
            return None
        if job := run.tags.get(_job_tag(key)):
            return job
        parent = run.parent_run_id
    return None


def _job_tag(step: str) -> str:
    return f"{JOB}/{re.sub(r'[^A-Za-z0-9_.-]', '_', step)[-_LONGEST:]}"


def _tag(context: StepContext, tags: dict[str, str]) -> None:
    run = context.run_id
    try:
        if context.instance.has_run(run):  # an asset that is called directly has none
            context.instance.add_run_tags(run, tags)
    except Exception as error:  # noqa: BLE001 - of whatever database it is; a job must not be lost for a tag
        StepLog(context).warning(f"The run could not be tagged with {tags}: {error}")
