"""What Dagster has recorded of steps: their ends, their Slurm jobs, the versions of data, stored partitions."""

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import takewhile
from math import inf
from operator import attrgetter

import dagster as dg

from dagster_sbatch.run.calls import StepName
from dagster_sbatch.run.tags import is_same_place, job_tag

_RESUMED, _BY_ASSET = ("dagster/is_resume_retry", "true"), ("dagster/is_asset_resume_retry", "true")
"""Tags of a re-execution from failure, and from asset failure; Dagster copies the second one to later re-executions."""
DATA_VERSION, _IS_REPORTED = "dagster/data_version", "dagster/data_version_is_user_provided"
CODE_VERSION = "dagster/code_version"  # tags of a materialization; the last one, if the end of a step has made it
_CHECKED = "DagsterAssetCheckFailedError"  # ends a step after a failed blocking check; all results are stored by then
MOST_PARTITIONS = 10_000  # that Dagster's storage is asked for at once
_MOST_OBSERVATIONS = 100  # the latest ones, among which one with a data version is searched
Stored = tuple[int, dg.AssetMaterialization]  # a materialization, and before it the storage id of its event
_DEAD = dg.DagsterEventType.RUN_FAILURE  # what a step does after it, it does for the run's retry
_ENDS = {dg.DagsterEventType.STEP_SUCCESS, dg.DagsterEventType.STEP_FAILURE, _DEAD}
_START, _STORED = dg.DagsterEventType.STEP_START, dg.DagsterEventType.ASSET_MATERIALIZATION
age_of = attrgetter("storage_id")  # the order of records in Dagster's database, also if the clock was set back


def is_stored(instance: dg.DagsterInstance, runs: Iterable[str], step: StepName) -> bool:
    """Return whether Dagster has stored the result of a step in some runs: also one that a blocking check fails."""
    ends = (end.get_dagster_event() for run in runs for end in _events_of(instance, run, step, _ENDS))
    return any(
        not each.is_step_failure or getattr(each.step_failure_data.error, "cls_name", "") == _CHECKED for each in ends
    )


def group_of(instance: dg.DagsterInstance, root: str) -> dict[str, dg.RunRecord]:
    """Return the run `root` with its retries and re-executions, by id."""
    wanted = (dg.RunsFilter(run_ids=[root]), dg.RunsFilter(tags={"dagster/root_run_id": root}))
    return {record.dagster_run.run_id: record for each in wanted for record in instance.get_run_records(each)}


def runs_since(instance: dg.DagsterInstance, root: str, followers: Collection[str]) -> set[str]:
    """Return the runs that followed a job, and those of its group since: they may have replaced its result.

    If no follower is known any more, these are all runs of the group.
    """
    group = group_of(instance, root)
    last = max((age_of(group[each]) for each in followers if each in group), default=0)
    return {*followers, *(each for each, record in group.items() if age_of(record) >= last)}


def shared_runs(instance: dg.DagsterInstance, run: dg.DagsterRun) -> set[str]:
    """Return the runs of a group that are not over, or were requested after `run`: what they store is also for it."""
    group = group_of(instance, run.root_run_id or run.run_id)
    own = age_of(group[run.run_id]) if run.run_id in group else inf  # it was deleted
    return {each for each, record in group.items() if age_of(record) >= own or not record.dagster_run.is_finished}


def find_successes(instance: dg.DagsterInstance, run_id: str, steps: set[str]) -> dict[str, str]:
    """Return the latest run in which each of some steps has succeeded: a run, or one of which it is a re-execution."""
    found: dict[str, str] = {}
    run = instance.get_run_by_id(run_id)
    while run and steps - found.keys():
        ends = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_SUCCESS)
        found |= dict.fromkeys({str(end.step_key) for end in ends} & steps - found.keys(), run.run_id)
        run = instance.get_run_by_id(run.parent_run_id) if run.parent_run_id else None
    return dict(sorted(found.items()))


def find_data_version(instance: dg.DagsterInstance, asset: dg.AssetKey, *, partitioned: bool) -> str | None:
    """Return the version of an asset's newest data; None if there is none.

    `asset`: that was materialized, or observed with a data version. `partitioned`: whether the step may read all
    partitions that there are: then the asset's newest event is the version. Otherwise, this returns None for an asset
    with partitions: it is one of another code location, and nobody knows which of them the step reads.
    """
    records = list(instance.fetch_materializations(asset, limit=1).records)
    records += instance.fetch_observations(asset, limit=_MOST_OBSERVATIONS).records
    newest = max((each for each in records if _data_version(each)), key=age_of, default=None)
    if newest is None or partitioned:
        return newest and str(newest.storage_id)
    return _data_version(newest) if newest.partition_key is None else None


def find_data_versions(
    instance: dg.DagsterInstance, asset: dg.AssetKey, partitions: Sequence[str]
) -> dict[str, tuple[int, str]]:
    """Return storage id and version of the newest data of each partition: materialized, or observed with a version."""
    newest = _newest(instance.fetch_materializations, asset, partitions)
    for key, record in _newest(instance.fetch_observations, asset, partitions).items():
        newest[key] = max(newest.get(key, record), record, key=age_of)
    return {key: (record.storage_id, str(_data_version(record))) for key, record in sorted(newest.items())}


def _newest(
    fetch: Callable[..., dg.EventRecordsResult], asset: dg.AssetKey, partitions: Sequence[str]
) -> dict[str, dg.EventLogRecord]:
    """Return the newest record of each partition that has a data version."""
    newest: dict[str, dg.EventLogRecord] = {}
    for first in range(0, len(partitions), MOST_PARTITIONS):
        left, cursor = set(partitions[first : first + MOST_PARTITIONS]), None
        while left:
            page = fetch(dg.AssetRecordsFilter(asset, sorted(left)), limit=MOST_PARTITIONS, cursor=cursor)
            newest |= {str(each.partition_key): each for each in reversed(page.records) if _data_version(each)}
            left, cursor = left - newest.keys() if page.has_more else set(), page.cursor
    return newest


def _data_version(record: dg.EventLogRecord) -> str | None:
    """Return the version of the data that was materialized or observed; None for an observation without one."""
    reported = reported_version(record.asset_materialization or record.asset_observation)
    return reported or (str(record.storage_id) if record.asset_materialization else None)


def reported_version(event: dg.AssetMaterialization | dg.AssetObservation | None) -> str | None:
    """Return the data version that a person, a workload or an observation has reported.

    Dagster computes another one from `code_version`, and that is the same if the asset was materialized again.
    """
    tags = (event and event.tags) or {}
    return None if CODE_VERSION in tags and _IS_REPORTED not in tags else tags.get(DATA_VERSION)


def key_in(instance: dg.DagsterInstance, run_id: str, step: StepName) -> str:
    """Return Dagster's key of a step in a run; the one that it has if the run has planned none of its assets."""
    entries = instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED)
    planned = ((entry.step_key, entry.get_dagster_event().asset_key) for entry in entries)
    return step.find_key((str(key), asset.to_user_string()) for key, asset in planned if asset)


def _events_of(
    instance: dg.DagsterInstance, run_id: str, step: StepName, kinds: set[dg.DagsterEventType]
) -> list[dg.EventLogEntry]:
    """Return events of a step; if _DEAD is among the kinds, only those before it."""
    found = [*takewhile(lambda event: event.dagster_event_type != _DEAD, instance.all_logs(run_id, of_type=kinds))]
    key = key_in(instance, run_id, step) if found else None  # it reads an event per partition of the run
    return [event for event in found if event.step_key == key]


def stored_partitions(step: dg.OpExecutionContext) -> dict[str, dict[dg.AssetKey, Stored]]:
    """Return the partitions that need not be computed again, if their inputs are the same; by asset, with storage ids.

    They are those that this run, or the runs of which it is a re-execution from failure, have stored in this step. A
    run that was requested to execute everything again begins anew, and so does a step that has come to its end before,
    or ran on another deployment or with another DATA_ROOT. Their materializations are the newest ones: another run may
    have made them, and what a person has wiped has none.
    """
    name, run, assets = StepName.of(step), step.instance.get_run_by_id(step.run_id), sorted(step.selected_asset_keys)
    found: dict[str, set[dg.AssetKey]] = {}
    last = run
    while run:
        for event in _events_of(step.instance, run.run_id, name, {_STORED}):
            if (stored := event.asset_materialization) and stored.partition is not None and stored.asset_key in assets:
                found.setdefault(stored.partition, set()).add(stored.asset_key)
        before = step.instance.get_run_by_id(run.parent_run_id) if run.parent_run_id else None
        copied = before is not None and _BY_ASSET in before.tags.items()
        resumed = _RESUMED in run.tags.items() or (_BY_ASSET in run.tags.items() and not copied)
        run = before if resumed else None
        if run and last and (is_stored(step.instance, [run.run_id], name) or not is_same_place(run, last)):
            break
    complete = [partition for partition, each in found.items() if len(each) == len(assets)]
    newest: dict[str, dict[dg.AssetKey, Stored]] = {}
    for asset in assets:
        for partition, record in _newest(step.instance.fetch_materializations, asset, complete).items():
            if record.asset_materialization:
                newest.setdefault(partition, {})[asset] = record.storage_id, record.asset_materialization
    return {partition: each for partition, each in newest.items() if len(each) == len(assets)}


def stored_before(instance: dg.DagsterInstance, runs: Iterable[str], step: StepName) -> set[str]:
    """Return the partitions that a step has stored in one of some runs."""
    events = (event for run in runs for event in _events_of(instance, run, step, {_STORED, _DEAD}))
    return {each.partition for event in events if (each := event.asset_materialization) and each.partition is not None}


def earlier_job(step: dg.OpExecutionContext) -> tuple[str | None, bool]:
    """Return the Slurm job that an earlier run submitted or followed in this step; None if there is none.

    Also returns whether the step was interrupted then: it has not ended in that run or a later one.
    """
    name, parent, interrupted = StepName.of(step), step.run.parent_run_id, True
    while parent and (run := step.instance.get_run_by_id(parent)):
        kinds = {each.dagster_event_type for each in _events_of(step.instance, parent, name, {_START, *_ENDS})}
        interrupted = interrupted and not kinds & _ENDS
        job = run.tags.get(job_tag(key_in(step.instance, parent, name)))
        if job and _START in kinds:  # else the run has inherited the tag, and has not come to the step
            return job, interrupted
        parent = run.parent_run_id
    return None, False
