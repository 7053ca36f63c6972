"""What the last successful jobs of a step's assets have used, from Dagster's history, and the proposal that follows."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import dagster as dg

from dagster_sbatch.costs.proposal import Use, propose, split_text
from dagster_sbatch.run.array_results import MOST_ROWS
from dagster_sbatch.run.plan import Plan
from dagster_sbatch.run.reports import StepLog

MOST_RESULTS = 100  # materializations of an asset that are read, the latest ones
SHORTEST_JOB = 10  # seconds; reading past uses takes some 15 ms, a thousandth of that
PROPOSAL = "proposal"  # name of the metadata
_STORED = dg.DagsterEventType.ASSET_MATERIALIZATION


def uses_of(metadata: Mapping[str, Any], partitions: Sequence[str], slurm_partition: str | None) -> Iterator[Use]:
    """Return what the jobs behind a materialization have used.

    `metadata`: its values; of parameter sets, `tasks` has their rows. A table of MOST_ROWS may be cut: it tells
    nothing. `partitions`: of the asset; the first one names the job.
    """
    records = metadata.get("tasks")
    rows = [metadata]
    if isinstance(records, list):
        rows = [dict(record.data) for record in records if isinstance(record, dg.TableRecord)]
        rows = rows if len(rows) < MOST_ROWS else []
    for row in rows:
        use = Use.parse(row, slurm_partition or "", next(iter(partitions), str(row.get("task") or "")))
        if use:
            yield use


def past_uses(instance: dg.DagsterInstance, assets: Iterable[dg.AssetKey]) -> list[Use]:
    """Return what the jobs behind the last materializations have used; the numbers are those of one of the assets."""
    for key in sorted(assets):
        records = instance.fetch_materializations(key, limit=MOST_RESULTS).records
        found = [event for record in records if (event := record.asset_materialization)]
        uses = [use for event in found for use in _uses_of_event(event)]
        if uses:
            return uses
    return []


def _uses_of_event(event: dg.AssetMaterialization) -> Iterator[Use]:
    values = {
        name: value.records if isinstance(value, dg.TableMetadataValue) else value.value
        for name, value in event.metadata.items()
    }
    place = values.get("partition")
    return uses_of(values, [event.partition] if event.partition else [], place if isinstance(place, str) else None)


def proposal_metadata(step: dg.OpExecutionContext, plan: Plan, uses: Sequence[Use]) -> dict[str, Any]:
    """Return the proposal for a call as metadata of its materialization; empty without one.

    The history is read only if the call's own jobs are not what was requested, and one of them ran long enough
    that nobody notices the time for that.

    `uses`: of its jobs, which Dagster has not stored yet.
    """
    if max((use.seconds for use in uses), default=0) < SHORTEST_JOB:
        return {}
    own = propose(plan.request, plan.allocation, uses)
    if own is None or own.request is None:
        return {}
    try:
        past = past_uses(step.instance, step.selected_asset_keys)
    except Exception as error:  # noqa: BLE001 - each database has errors of its own; the run has succeeded
        StepLog(step).warning(f"Dagster's history could not be read, so there is no proposal: {error}")
        return {}
    found = propose(plan.request, plan.allocation, [*uses, *past])
    return {PROPOSAL: dg.MetadataValue.md(found.text)} if found and found.request else {}


def last_proposals(instance: dg.DagsterInstance, assets: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return what the last run of each asset proposes: what its jobs have used, and the code of a request.

    `assets`: keys as people write them; without those that this instance does not know, or that propose nothing.
    """
    found = {}
    for name in sorted(set(assets)):
        key = dg.AssetKey.from_user_string(name)
        for record in instance.fetch_materializations(key, limit=1).records:
            # All of its run: the first partition of an array has the proposal
            of_run = record.run_id and instance.get_records_for_run(record.run_id, of_type=_STORED).records
            for each in of_run or (record,):
                event = each.asset_materialization
                value = event.metadata.get(PROPOSAL) if event and event.asset_key == key else None
                if isinstance(value, dg.MarkdownMetadataValue) and value.value and split_text(value.value)[1]:
                    found[name] = split_text(value.value)
    return found
