"""What decides the result of a step beside what its asset passes to `compute.run`: as Dagster knows it."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import dagster as dg

from dagster_sbatch.run.array import Task
from dagster_sbatch.run.history import MOST_PARTITIONS, find_data_version, find_data_versions, find_successes
from dagster_sbatch.run.results import partitions_of
from dagster_sbatch.run.task_contexts import time_window


def inputs_of_step(step: dg.OpExecutionContext, *, by_partition: bool = False) -> dict[str, Any]:
    """Return the step's inputs by name; JSON.

    They are its assets with their code versions; the time of its partitions; and, of what the step waits for without
    getting a value, the run in which each step has succeeded, and the data version of each asset: it reads what they
    have written. A value counts as far as the asset passes it on.

    Args:
        step: the step.
        by_partition: for an array whose tasks compute partitions. Assets before it with the same partitions are left
            out: each task reads its own; see `with_versions`.
    """
    assets = sorted(step.selected_asset_keys)
    versions = step.assets_def.code_versions_by_key if step.has_assets_def else {}
    return {
        "assets": sorted(key.to_user_string() for key in assets),
        **{f"code_version of {key.to_user_string()}": versions[key] for key in assets if versions.get(key)},
        **_window(step, partitions_of(step)),
        **{f"upstream step {key}": run for key, run in _upstream_runs(step).items()},
        **_upstream_versions(step, by_partition=by_partition),
    }


def _window(step: dg.OpExecutionContext, partitions: Sequence[str]) -> dict[str, Sequence[str]]:
    """Return the time of the partitions: their keys stay the same if their hour or their time zone changes."""
    definition = step.assets_def.partitions_def if partitions and step.has_assets_def else None
    window = time_window(definition, partitions)
    return {"time window of the partitions": [each.isoformat() for each in window]} if window else {}


def _upstream_runs(step: dg.OpExecutionContext) -> Mapping[str, str]:
    execution, silent = step.get_step_execution_context(), _silent_inputs(step)
    keys = {key for each in execution.step.step_inputs if each.name in silent for key in each.dependency_keys}
    return find_successes(step.instance, step.run_id, keys) if keys else {}


def _upstream_versions(step: dg.OpExecutionContext, *, by_partition: bool) -> dict[str, Any]:
    """Return the data version of each asset that the step reads: another run may have materialized it again."""
    execution, found = step.get_step_execution_context(), {}
    for name, asset in _silent_assets(step):
        if by_partition and _has_own_partitions(step, name, asset):
            continue
        version: Any = None
        if execution.has_asset_partitions_for_input(name):
            subset = execution.asset_partitions_subset_for_input(name, require_valid_partitions=False)
            partitions = list(subset.get_partition_keys())
            if len(partitions) <= MOST_PARTITIONS:
                version = find_data_versions(step.instance, asset, partitions)
            else:
                version = find_data_version(step.instance, asset, partitioned=True)
        else:
            version = find_data_version(step.instance, asset, partitioned=False)
        if version:
            found[f"data version of {asset.to_user_string()}"] = version
    return found


def with_versions(step: dg.OpExecutionContext, tasks: Sequence[Task]) -> tuple[Task, ...]:
    """Return the tasks of an array with the versions of the data that each reads beside what all of them read.

    These are the partitions with its own keys, of assets that have the same partitions.
    """
    read: dict[str, list[str]] = {key: [] for task in tasks for key in task.partitions}
    for name, asset in _silent_assets(step):
        if read and _has_own_partitions(step, name, asset):
            for key, version in find_data_versions(step.instance, asset, list(read)).items():
                read[key].append(f"{asset.to_user_string()} {version}")
    return tuple(replace(task, reads=[each for key in task.partitions for each in read[key]]) for task in tasks)


def _has_own_partitions(step: dg.OpExecutionContext, name: str, asset: dg.AssetKey) -> bool:
    """Return whether each partition of the step reads that of an asset with the same key; `name`: of the input."""
    own = step.assets_def.partitions_def if step.has_assets_def else None
    if own is None or step.assets_def.get_partition_mapping(asset) is not None:
        return False
    partitioned = step.get_step_execution_context().has_asset_partitions_for_input(name)
    return partitioned and step.asset_partitions_def_for_input(name) == own


def _silent_assets(step: dg.OpExecutionContext) -> list[tuple[str, dg.AssetKey]]:
    """Return the assets that the step waits for without getting a value, each with the name of the input."""
    found = []
    for name in sorted(_silent_inputs(step)):
        with suppress(Exception):  # Dagster's CheckError, which it does not export: the input comes from an op
            found.append((name, step.asset_key_for_input(name)))
    return found


def _silent_inputs(step: dg.OpExecutionContext) -> set[str]:
    """Return the names of the inputs by which a step waits for others, and gets no value."""
    definitions = step.get_step_execution_context().op_def.input_defs
    return {each.name for each in definitions if each.dagster_type.is_nothing}
