"""Inputs that decide the result of a step: those that Dagster knows. The asset passes the others to `compute.run`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import dagster as dg

from dagster_sbatch.run.array import Task
from dagster_sbatch.run.history import MOST_PARTITIONS, find_data_version, find_data_versions, find_successes
from dagster_sbatch.run.pipes import time_window
from dagster_sbatch.run.results import declared_checks, partitions_of

_SAME = (None, dg.IdentityPartitionMapping(), dg.TimeWindowPartitionMapping())
"""Mappings of a partition to the one with the same key, where both assets have the same partitions."""


def inputs_of_step(step: dg.OpExecutionContext, *, by_partition: bool = False) -> dict[str, Any]:
    """Return the step's inputs by name; JSON.

    They are its assets with their code versions, and its checks; the time of its partitions; and what it waits for
    without getting a value, because it reads what that has written: the data version of each asset, and the run in
    which each op has succeeded. A value counts as far as the asset passes it on.

    `by_partition`: for an array whose tasks compute partitions. The versions of assets that pass values are among them:
    a partition may be stored already. Assets before it with the same partitions are left out: each task reads its own;
    see `with_versions`.
    """
    assets, checks = sorted(step.selected_asset_keys), declared_checks(step)
    versions, partitions = step.assets_def.code_versions_by_key if step.has_assets_def else {}, partitions_of(step)
    # The keys of partitions stay the same if their hour or their time zone changes
    window = time_window(step.assets_def.partitions_def if partitions and step.has_assets_def else None, partitions)
    return {
        "assets": sorted(key.to_user_string() for key in assets),
        **({"checks": checks} if checks else {}),
        **{f"code_version of {key.to_user_string()}": versions[key] for key in assets if versions.get(key)},
        **({"time window of the partitions": [each.isoformat() for each in window]} if window else {}),
        **{f"upstream step {key}": run for key, run in _upstream_runs(step).items()},
        **_upstream_versions(step, by_partition=by_partition),
    }


def _upstream_runs(step: dg.OpExecutionContext) -> Mapping[str, str]:
    """Return the runs of ops. For an asset, its data version counts and not its run, whatever the run selects."""
    inputs, silent = step.get_step_execution_context().step.step_inputs, _inputs(step, silent=True)
    ops = {name for name, asset in silent.items() if asset is None}
    keys = {key for each in inputs if each.name in ops for key in each.dependency_keys}
    return find_successes(step.instance, step.run_id, keys) if keys else {}


def _upstream_versions(step: dg.OpExecutionContext, *, by_partition: bool) -> dict[str, Any]:
    """Return the data version of each asset that the step reads: another run may have materialized it again."""
    execution, found = step.get_step_execution_context(), {}
    for name, asset in assets_read(step, values=by_partition).items():
        if by_partition and _has_own_partitions(step, name, asset):
            continue
        version: Any = None
        if execution.has_asset_partitions_for_input(name):
            subset = execution.asset_partitions_subset_for_input(name, require_valid_partitions=False)
            own = set(partitions_of(step)) if asset in step.selected_asset_keys else set()
            partitions = [key for key in subset.get_partition_keys() if key not in own]
            if len(partitions) <= MOST_PARTITIONS:
                version = {key: each for key, (_, each) in find_data_versions(step.instance, asset, partitions).items()}
            else:
                version = find_data_version(step.instance, asset, partitioned=True)
        else:
            version = find_data_version(step.instance, asset, partitioned=False)
        if version:
            found[f"data version of {asset.to_user_string()}"] = version
    checked = {check.asset_key for check in step.selected_asset_check_keys} - step.selected_asset_keys
    for asset in sorted(checked - {*assets_read(step).values()}):  # of a multi-asset that computes only its checks
        if version := find_data_version(step.instance, asset, partitioned=True):
            found[f"data version of {asset.to_user_string()}"] = version
    return found


def with_versions(step: dg.OpExecutionContext, tasks: Sequence[Task]) -> tuple[Task, ...]:
    """Return the tasks of an array, each with the versions of the data that only this task reads.

    These are the partitions with its own keys, of assets that have the same partitions.
    """
    read: dict[str, list[str]] = {}
    keys = [key for task in tasks for key in task.partitions]
    for name, asset in assets_read(step, values=True).items() if keys else ():
        if _has_own_partitions(step, name, asset):
            for key, (_, version) in find_data_versions(step.instance, asset, keys).items():
                read.setdefault(key, []).append(f"{asset.to_user_string()} {version}")
    return tuple(replace(task, reads={key: read[key] for key in task.partitions if key in read}) for task in tasks)


def newest_reads(step: dg.OpExecutionContext, partitions: Sequence[str]) -> dict[str, int]:
    """Return the storage id of the newest data that each of some partitions reads; 0 if there is none."""
    newest = dict.fromkeys(partitions, 0)
    for name, asset in assets_read(step, values=True).items():
        if _has_own_partitions(step, name, asset):
            found = find_data_versions(step.instance, asset, partitions)
        else:
            found = dict.fromkeys(partitions, (int(find_data_version(step.instance, asset, partitioned=True) or 0), ""))
        newest |= {key: max(newest[key], number) for key, (number, _) in found.items()}
    return newest


def chained_assets(step: dg.OpExecutionContext) -> list[dg.AssetKey]:
    """Return the assets of the step on whose partitions in this run other partitions in this run depend."""
    partitions, execution, found = set(partitions_of(step)), step.get_step_execution_context(), []
    for name, asset in _inputs(step, silent=False).items():
        if asset and asset in step.selected_asset_keys and step.assets_def.get_partition_mapping(asset) not in _SAME:
            read = execution.asset_partitions_subset_for_input(name, require_valid_partitions=False)
            found += [] if partitions.isdisjoint(read.get_partition_keys()) else [asset]
    return found


def _has_own_partitions(step: dg.OpExecutionContext, name: str, asset: dg.AssetKey) -> bool:
    """Return whether each partition of the step reads that of an asset with the same key; `name`: of the input."""
    own = step.assets_def.partitions_def if step.has_assets_def else None
    if own is None or step.assets_def.get_partition_mapping(asset) is not None:
        return False
    partitioned = step.get_step_execution_context().has_asset_partitions_for_input(name)
    return partitioned and step.asset_partitions_def_for_input(name) == own


def assets_read(step: dg.OpExecutionContext, *, values: bool = False) -> dict[str, dg.AssetKey]:
    """Return the assets that the step reads, by the name of the input; `values`: also those of which it gets a value.

    Of a step that computes some of its assets, those that these depend on. What the step computes itself is none of
    them, unless its partitions depend on other ones.
    """
    own, inputs = step.selected_asset_keys, _inputs(step, silent=not values)
    found = {name: asset for name, asset in sorted(inputs.items()) if asset is not None}
    if not own:
        return found
    definition = step.assets_def
    needed = {each for key in own for each in definition.asset_deps[key]}
    needed -= {key for key in own if definition.get_partition_mapping(key) is None}
    return {name: asset for name, asset in found.items() if asset in needed}


def _inputs(step: dg.OpExecutionContext, *, silent: bool) -> dict[str, dg.AssetKey | None]:
    """Return the asset of each input of a step, None for an op; `silent`: only those that have no value."""
    execution = step.get_step_execution_context()
    names = [each.name for each in execution.op_def.input_defs if each.dagster_type.is_nothing or not silent]
    find = execution.job_def.asset_layer.get_asset_key_for_node_input
    return {name: find(execution.node_handle, name) for name in names}
