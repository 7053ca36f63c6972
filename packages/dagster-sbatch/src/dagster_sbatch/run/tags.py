"""The tags by which the engine finds a run of Dagster again: its deployment, and the Slurm jobs of its steps."""

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from datetime import datetime, timedelta
from pathlib import Path

import dagster as dg

from dagster_sbatch.costs.ledger import AssetOf, needs_record
from dagster_sbatch.run.calls import StepName
from dagster_sbatch.run.digests import digest_of
from dagster_sbatch.run.reports import StepLog
from dagster_sbatch.slurm.gateway import JobLife, Usage

_JOB_TAG = "slurm_job"
_LOCK_SECONDS = 10.0  # for others to add their tags
_LONGEST_NAME = 58  # characters of a step in a tag: Dagster takes 63, and the number of a call may follow
_LONGEST_WAIT = timedelta(days=60)  # between the creation of a run and the end of its job
_CLOCKS = timedelta(hours=6)  # by which the clocks of this machine and of the supercomputer may differ


def tag_deployment(context: dg.OpExecutionContext, deployment: str, site: str | None, data_root: str) -> None:
    """Tag the run of a step with DAGSTER_DEPLOYMENT, DATA_ROOT and, on a supercomputer, the site."""
    _tag(context, {"deployment": deployment, "data_root": data_root, **({"site": site} if site else {})})


def retried_elsewhere(step: dg.OpExecutionContext, site: str | None, data_root: str) -> str:
    """Return where a run was interrupted that Dagster itself retries by this one; empty if it still works there."""
    run = step.run
    while run.parent_run_id and (before := step.instance.get_run_by_id(run.parent_run_id)):
        if before.tags.get("dagster/auto_retry_run_id") != run.run_id:
            break  # a person who re-executes a run elsewhere wants that
        if step.instance.all_logs(before.run_id, of_type=dg.DagsterEventType.STEP_START):
            return _other_place(before, site, data_root)
        run = before  # one that came to no step has only tags that it has inherited
    return ""


def made_elsewhere(
    instance: dg.DagsterInstance, assets: Iterable[dg.AssetKey], site: str | None, data_root: str
) -> dict[str, str]:
    """Return those of some assets whose newest data another deployment has made, with its name and DATA_ROOT."""
    newest = {asset: instance.fetch_materializations(asset, limit=1).records for asset in assets}
    made_by = {asset: instance.get_run_by_id(each.run_id) for asset, records in newest.items() for each in records}
    places = {asset.to_user_string(): run and _other_place(run, site, data_root) for asset, run in made_by.items()}
    return {asset: place for asset, place in sorted(places.items()) if place}


def _other_place(run: dg.DagsterRun, site: str | None, data_root: str) -> str:
    """Return the deployment and the DATA_ROOT of a run; empty if its data are on this site and in this DATA_ROOT."""
    deployment, former_site, former_root = _place_of(run)
    same = deployment is None or (former_site == site and former_root in (None, data_root))
    return "" if same else f"{deployment} with DATA_ROOT={former_root}"


def is_same_place(one: dg.DagsterRun, other: dg.DagsterRun) -> bool:
    """Return whether two runs had the same deployment, site and DATA_ROOT. Older engines have not tagged DATA_ROOT."""
    *first, first_root = _place_of(one)
    *second, second_root = _place_of(other)
    return first == second and (first_root == second_root or None in (first_root, second_root))


def _place_of(run: dg.DagsterRun) -> list[str | None]:
    """Return DAGSTER_DEPLOYMENT, the site and DATA_ROOT of a run; None for what it has no tag of."""
    deployment, site, root = (run.tags.get(name) for name in ("deployment", "site", "data_root"))
    return [deployment, None if deployment == "development" else site, root]  # re-executions inherit tags


def tag_job(context: dg.OpExecutionContext, job: str, call: int) -> None:
    """Tag the run of a step with a Slurm job id, under the step's name; `call`: how many calls the step made before."""
    _tag(context, {job_tag(StepName.of(context).key) + (f".{call + 1}" if call else ""): job})


def job_tag(step: str) -> str:
    """Return the key of the tag with the Slurm jobs of a step; `.2` follows it for the step's second call."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", step)
    return f"{_JOB_TAG}/{name if len(name) <= _LONGEST_NAME else f'{name[: _LONGEST_NAME - 9]}-{digest_of(step, 8)}'}"


def _tag(context: dg.OpExecutionContext, tags: dict[str, str]) -> None:
    try:
        add_tags(context.instance, context.run_id, tags)
    except Exception as error:  # noqa: BLE001 - each database has errors of its own; a job must not be lost for a tag
        StepLog(context).warning(f"The run could not be tagged with {tags}: {error}")


def add_tags(instance: dg.DagsterInstance, run: str, tags: dict[str, str]) -> None:
    """Add tags to a run, and lose none that another step adds: Dagster reads all of them, and writes them again."""
    from filelock import FileLock

    path = Path(instance.root_directory, "run-tags.lock")
    with ExitStack() as held:
        with suppress(OSError, NotImplementedError):  # it takes too long, or the folder's disk has no locks
            held.enter_context(FileLock(path, timeout=_LOCK_SECONDS, poll_interval=0.01, fallback_to_soft=False))
        instance.add_run_tags(run, tags)


def recorded_assets(instance: dg.DagsterInstance, usage: Usage) -> AssetOf:
    """Return the function that names the assets of a job; it asks Dagster's database once, if a job needs that."""
    jobs = [job for job in usage.jobs or () if needs_record(job)]
    if not jobs:
        return lambda _: None
    first = min(job.start for job in jobs) - _LONGEST_WAIT
    found: dict[str, list[tuple[datetime, str]]] = {}
    for record in instance.get_run_records(dg.RunsFilter(created_after=first), ascending=True):
        for job, assets in _jobs_of(instance, record.dagster_run):
            found.setdefault(job, []).append((record.create_timestamp, assets))

    def find(job: JobLife) -> str | None:
        """Return the assets of the latest run that can have submitted it: Slurm uses ids again."""
        runs = found.get(job.job.partition("_")[0], ())
        fitting = [assets for created, assets in runs if job.start - _LONGEST_WAIT < created < job.start + _CLOCKS]
        return fitting[-1] if fitting else None

    return find


def _jobs_of(instance: dg.DagsterInstance, run: dg.DagsterRun) -> Iterator[tuple[str, str]]:
    """Return the Slurm jobs of a run, each with the keys of the assets of its step."""
    tags = {tag: jobs for tag, jobs in run.tags.items() if tag.startswith(f"{_JOB_TAG}/")}
    if not tags:
        return
    steps: dict[str, list[str]] = {}
    for record in instance.get_records_for_run(
        run.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED
    ).records:
        event = record.event_log_entry.get_dagster_event()
        if event.step_key and event.asset_key:
            steps.setdefault(job_tag(event.step_key), []).append(event.asset_key.to_user_string())
    for tag, jobs in tags.items():
        # The tag of a step's second call ends with `.2`.
        assets = steps.get(tag) or steps.get(re.sub(r"\.\d+$", "", tag))
        for job in jobs.split(", "):
            if assets:
                yield job, ", ".join(sorted(set(assets)))
