"""What decides the result of a step beside what its asset passes to `compute.run`: as Dagster knows it."""

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from dagster_sbatch.run.history import find_successes
from dagster_sbatch.run.results import partitions_of
from dagster_sbatch.run.task_contexts import time_window


def inputs_of_step(step: dg.OpExecutionContext) -> dict[str, Any]:
    """Return the step's inputs by name; JSON.

    They are its assets with their code versions; the time of its partitions; and, for each step that it waits for and
    that passes no value to it, the run in which that step has succeeded: it reads what that step has written. A value
    counts as far as the asset passes it on.
    """
    assets = sorted(step.selected_asset_keys)
    versions = step.assets_def.code_versions_by_key if step.has_assets_def else {}
    return {
        "assets": sorted(key.to_user_string() for key in assets),
        **{f"code_version of {key.to_user_string()}": versions[key] for key in assets if versions.get(key)},
        **_window(step, partitions_of(step)),
        **{f"upstream step {key}": run for key, run in _upstream_runs(step).items()},
    }


def _window(step: dg.OpExecutionContext, partitions: Sequence[str]) -> dict[str, Sequence[str]]:
    """Return the time of the partitions: their keys stay the same if their hour or their time zone changes."""
    definition = step.assets_def.partitions_def if partitions and step.has_assets_def else None
    window = time_window(definition, partitions)
    return {"time window of the partitions": [each.isoformat() for each in window]} if window else {}


def _upstream_runs(step: dg.OpExecutionContext) -> Mapping[str, str]:
    execution = step.get_step_execution_context()
    silent = {each.name for each in execution.op_def.input_defs if each.dagster_type.is_nothing}
    keys = {key for each in execution.step.step_inputs if each.name in silent for key in each.dependency_keys}
    return find_successes(step.instance, step.run_id, keys) if keys else {}
