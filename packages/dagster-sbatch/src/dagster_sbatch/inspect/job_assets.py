"""The assets of Slurm jobs whose comments are not stored: by the tags of the Dagster runs that submitted them."""

import re
from collections.abc import Iterator
from datetime import datetime, timedelta

import dagster as dg

from dagster_sbatch.costs.ledger import AssetOf, needs_record
from dagster_sbatch.run.history import JOB_TAG, job_tag
from dagster_sbatch.slurm.gateway import JobLife, Usage

LONGEST_WAIT = timedelta(days=60)  # between the creation of a run and the end of its job
CLOCKS = timedelta(hours=6)  # by which the clocks of this machine and of the supercomputer may differ


def recorded_assets(instance: dg.DagsterInstance, usage: Usage) -> AssetOf:
    """Return the function that names the assets of a job; it asks Dagster's database once, if a job needs that."""
    jobs = [job for job in usage.jobs or () if needs_record(job)]
    if not jobs:
        return lambda _: None
    first = min(job.start for job in jobs) - LONGEST_WAIT
    found: dict[str, list[tuple[datetime, str]]] = {}
    for record in instance.get_run_records(dg.RunsFilter(created_after=first), ascending=True):
        for job, assets in _jobs_of(instance, record.dagster_run):
            found.setdefault(job, []).append((record.create_timestamp, assets))

    def find(job: JobLife) -> str | None:
        """Return the assets of the latest run that can have submitted it: Slurm uses ids again."""
        runs = found.get(job.job.partition("_")[0], ())
        fitting = [assets for created, assets in runs if job.start - LONGEST_WAIT < created < job.start + CLOCKS]
        return fitting[-1] if fitting else None

    return find


def _jobs_of(instance: dg.DagsterInstance, run: dg.DagsterRun) -> Iterator[tuple[str, str]]:
    """Return the Slurm jobs of a run, each with the keys of the assets of its step."""
    tags = {tag: jobs for tag, jobs in run.tags.items() if tag.startswith(f"{JOB_TAG}/")}
    if not tags:
        return
    steps: dict[str, list[str]] = {}
    planned = dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED
    for record in instance.get_records_for_run(run.run_id, of_type=planned).records:
        event = record.event_log_entry.get_dagster_event()
        if event.step_key and event.asset_key:
            steps.setdefault(job_tag(event.step_key), []).append(event.asset_key.to_user_string())
    for tag, jobs in tags.items():
        # The tag of a step's second call ends with `.2`.
        assets = steps.get(tag) or steps.get(re.sub(r"\.\d+$", "", tag))
        for job in jobs.split(", "):
            if assets:
                yield job, ", ".join(sorted(set(assets)))
