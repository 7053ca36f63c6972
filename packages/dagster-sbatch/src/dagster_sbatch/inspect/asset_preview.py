"""Previews what an asset would submit to Slurm: the plan and the batch script of each of its calls of compute.run."""

import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any, Never

import dagster as dg

from dagster_sbatch.costs.cost import explain_excess
from dagster_sbatch.costs.proposal import propose
from dagster_sbatch.errors import ConfigurationError, nearest
from dagster_sbatch.inspect.plan_summary import ANY_LIMITS, divide, place_run, summarise, summarise_proposal
from dagster_sbatch.run.compute import ComputeResource, intercept_runs
from dagster_sbatch.run.directory import RunInfo, RunPaths, render_job
from dagster_sbatch.run.past_use import past_uses
from dagster_sbatch.run.plan import Plan, with_request
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import ArrayShape
from dagster_sbatch.slurm.gateway import Limits

JOB = "preview_of_an_asset"
RANGE_TAGS = ("dagster/asset_partition_range_start", "dagster/asset_partition_range_end")
"""Of a run over several partitions, as Dagster tags it."""
MOST_NAMES = 12  # partition keys that an error lists; of more than these it names the first and the last
LIBRARY = re.compile(r'File "[^"]*/(dagster_sbatch|python3\.\d+)/')  # a frame outside the project's own code


@dataclass(frozen=True)
class Preview:
    """A submission that is not made."""

    plan: Plan  # the complete request and launcher
    summary: Mapping[str, str]  # for people: what is asked for, by heading
    paths: RunPaths  # on the supercomputer
    step: str  # its name
    # The plan of a request that would be enough, if the history has what is needed to propose one
    proposed: Plan | None
    settings: Settings

    @property
    def refusal(self) -> str | None:
        """Why a run would submit nothing: it could cost more than a limit per run; None if it would submit."""
        return explain_excess(self.plan.allocation, self.tasks, self.settings)

    @property
    def tasks(self) -> int:
        """The number of jobs, or of array tasks."""
        return len(self.plan.tasks) or 1

    @property
    def script(self) -> str:
        """The batch script; of an array, that of the first array job, whose size is not checked with the site."""
        return self.render(ANY_LIMITS)

    def render(self, limits: Limits) -> str:
        """Return the batch script; of an array, that of the first array job within some limits."""
        batches = divide(self.plan, limits)
        tasks, max_running = batches.take((), 0) if batches else ([], None)
        shape = ArrayShape(len(tasks), max_running) if batches else None
        return render_job(self.plan, self.paths, RunInfo(run="", root="", asset=self.step, partitions=""), shape)


class NotPreviewedError(ConfigurationError):
    """The preview failed for a reason that need not make a run of the asset fail."""


class _Intercepted(BaseException):
    """Ends a step that has called compute.run."""


def preview_asset(
    definitions: dg.Definitions,
    asset: str,
    partition: str | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    last: str | None = None,
    history: dg.DagsterInstance | None = None,
) -> list[Preview]:
    """Run an asset in a temporary Dagster instance up to its calls of compute.run, and return what they would submit.

    This runs the asset's own code before the call, and the resources and IO managers that it needs.

    `asset`: its key as people write it, `a/b`; or an asset check, `a/b:check`. `last`: key of the last partition of a
    run over several, which begins with `partition`. `history`: Dagster's instance, for what earlier runs have used and
    for the proposal that follows.
    Returns one preview for each step that calls compute.run; only a graph asset has more than one.
    Raises ConfigurationError: there is no such asset, check or partition, or the client would refuse its run.
    Raises NotPreviewedError: its code did not get to a call of compute.run here.
    """
    definition = _find(definitions, asset)
    keys = {key for key in definition.keys if key.to_user_string() == asset or not definition.can_subset}
    selection = dg.AssetSelection.assets(*keys) if keys else dg.AssetSelection.checks(*definition.check_keys)
    job = dg.Definitions(jobs=[dg.define_asset_job(JOB, selection=selection)])
    found: list[Preview] = []
    uses = past_uses(history, keys) if history else []

    def record(step: str, settings: Settings, plan: Plan) -> Never:
        paths = place_run(settings, "preview-" + re.sub(r"[^A-Za-z0-9_.-]", "_", step), plan.environment)
        proposal = propose(plan.request, plan.allocation, uses)
        summary = {**summarise(step, plan, settings), **summarise_proposal(proposal)}
        proposed = with_request(plan, proposal.request, settings) if proposal and proposal.request else None
        found.append(Preview(plan, summary, paths, step, proposed, settings))
        raise _Intercepted

    with dg.DagsterInstance.ephemeral() as instance, intercept_runs(record), _quiet():
        begin = _check_partition(definition.partitions_def, partition, instance)
        if last and begin > _check_partition(definition.partitions_def, last, instance):
            raise NotPreviewedError(f"{partition} comes after {last}. Write the range as {last}...{partition}")
        result = _run_job([definitions, job], instance, partition, last, config)
    if not found:
        raise _explain(result, asset)
    return found


def _run_job(
    definitions: Sequence[dg.Definitions],
    instance: dg.DagsterInstance,
    partition: str | None,
    last: str | None,
    config: Mapping[str, Any] | None,
) -> dg.ExecuteInProcessResult:
    """Run the job of a preview; see `preview_asset`."""
    try:
        job = dg.Definitions.merge(*definitions).resolve_job_def(JOB)
        return job.execute_in_process(
            instance=instance,
            partition_key=None if last else partition,
            tags=dict(zip(RANGE_TAGS, (str(partition), last), strict=True)) if last else None,
            run_config=dict(config or {}),
            raise_on_error=False,
        )
    except dg.DagsterInvalidConfigError as error:
        problems = "\n".join(problem.message for problem in error.errors)
        raise NotPreviewedError(
            f"its config is incomplete or wrong. Give it with --config-json, as in Dagster's launchpad.\n{problems}"
        ) from None
    except dg.DagsterError as error:
        raise NotPreviewedError(f"Dagster refuses to run it: {error}") from None


def find_submitting(definitions: dg.Definitions, instance: dg.DagsterInstance) -> list[tuple[str, str | None]]:
    """Return the assets and asset checks that submit jobs, one for each function, each with its last partition.

    `instance`: has the keys of dynamic partitions.
    """
    found = []
    for each in _with_code(definitions):
        if _submits(each, definitions):
            partitions = each.partitions_def
            keys = partitions.get_partition_keys(dynamic_partitions_store=instance) if partitions else ()
            found.append((min(_names(each)), keys[-1] if keys else None))
    return found


@contextmanager
def supercomputer_deployment(settings: Settings) -> Iterator[None]:
    """Let `load_settings` read the supercomputer's settings, also if DAGSTER_DEPLOYMENT is `development` or unset."""
    before = os.environ.get("DAGSTER_DEPLOYMENT", "")
    os.environ["DAGSTER_DEPLOYMENT"] = settings.deployment if settings.on_supercomputer else "staging_supercomputer"
    try:
        yield
    finally:
        os.environ["DAGSTER_DEPLOYMENT"] = before


def _find(definitions: dg.Definitions, asset: str) -> dg.AssetsDefinition:
    by_name = {name: each for each in _with_code(definitions) for name in _names(each)}
    if asset not in by_name:
        if asset in {spec.key.to_user_string() for spec in definitions.resolve_all_asset_specs()}:
            raise ConfigurationError("no code of this project makes it, so there is nothing to submit")
        check = asset.rpartition(":")[2]
        found = {name for name, each in by_name.items() for key in each.check_keys if key.name == check}
        raise ConfigurationError(f"there is no such asset{nearest(asset, found or by_name)}")
    if not _submits(by_name[asset], definitions):
        raise ConfigurationError(
            "none of its resources is a ComputeResource, so it submits nothing. "
            "Preview runs no such asset. One that submits has the parameter `compute: ComputeResource`"
        )
    return by_name[asset]


def _with_code(definitions: dg.Definitions) -> list[dg.AssetsDefinition]:
    parts = (*(definitions.assets or ()), *(definitions.asset_checks or ()))
    return [each for each in parts if isinstance(each, dg.AssetsDefinition)]


def _names(definition: dg.AssetsDefinition) -> list[str]:
    """Return the keys of its assets; of a function with asset checks only, those of the checks."""
    return [key.to_user_string() for key in definition.keys or definition.check_keys]


def _submits(asset: dg.AssetsDefinition, definitions: dg.Definitions) -> bool:
    resources = definitions.resources or {}
    return any(_holds_compute(resources.get(name)) for name in asset.required_resource_keys)


def _holds_compute(resource: object) -> bool:
    """Return whether a resource is a ComputeResource, or has one as a field."""
    if isinstance(resource, ComputeResource):
        return True
    return isinstance(resource, dg.ConfigurableResource) and any(_holds_compute(value) for _, value in resource)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Dagster's events off the terminal, and what the asset prints off stdout."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logging.disable(before)


def _check_partition(
    partitions: dg.PartitionsDefinition[Any] | None, key: str | None, instance: dg.DagsterInstance
) -> int:
    """Return the place of a partition in the order of all; 0 for an asset that has none."""
    if partitions is None:
        if key:
            raise NotPreviewedError("the asset has no partitions. Leave --partition out")
        return 0
    _add_dynamic(partitions, key or "", instance)
    keys = partitions.get_partition_keys(dynamic_partitions_store=instance)
    if key in keys:
        return keys.index(key)
    what = f"{key!r} is not a partition of the asset" if key else "the asset is partitioned. Give --partition"
    if isinstance(partitions, dg.MultiPartitionsDefinition):
        what += f". A key is {'|'.join(each.name for each in partitions.partitions_defs)}"
    if keys:
        valid = ", ".join(keys) if len(keys) <= MOST_NAMES else f"{keys[0]} to {keys[-1]}"
        raise NotPreviewedError(f"{what}. Valid are {valid}")
    if isinstance(partitions, dg.TimeWindowPartitionsDefinition):
        raise NotPreviewedError(f"the asset has no partition yet: its first one begins at {partitions.start}")
    raise NotPreviewedError(
        f"{what}. Dynamic partitions are added while Dagster runs: any key of them can be previewed"
    )


def _add_dynamic(partitions: dg.PartitionsDefinition[Any], key: str, instance: dg.DagsterInstance) -> None:
    """Add a key of dynamic partitions to the temporary instance: only Dagster's own instance has them."""
    if isinstance(partitions, dg.DynamicPartitionsDefinition) and partitions.name and key:
        instance.add_dynamic_partitions(partitions.name, [key])
    elif isinstance(partitions, dg.MultiPartitionsDefinition):
        for dimension, part in zip(partitions.partitions_defs, key.split("|"), strict=False):
            _add_dynamic(dimension.partitions_def, part, instance)


def _explain(result: dg.ExecuteInProcessResult, asset: str) -> ConfigurationError:
    """Return the error that says why no step has called compute.run."""
    event = next((event for event in result.all_events if event.is_failure), None)
    if event is None:
        return NotPreviewedError("it ran to its end without calling compute.run, so there is nothing to submit")
    refusal = event.step_failure_data.user_failure_data if event.is_step_failure else None
    if refusal:
        return ConfigurationError(str(refusal.description).removeprefix(f"{asset}: "))
    error = event.step_failure_data.error if event.is_step_failure else event.job_failure_data.error
    kind, root = (error.cls_name, error) if error else ("", None)
    if kind == "DagsterExecutionInterruptedError":
        raise KeyboardInterrupt
    while root and root.cause:
        root = root.cause
    frames = [frame for frame in root.stack if not LIBRARY.search(frame)] or root.stack if root else []
    why = f"{root.message.strip()}\n{''.join(frames[-1:]).rstrip()}" if root else "Dagster gives no details"
    if kind == "DagsterExecutionLoadInputError":
        return NotPreviewedError(
            "it gets the value of another asset from an IO manager, and a preview cannot load that value. Name it in "
            "`deps=`, and let the workload read its file; or materialize this asset to see its request in the run's "
            f"log.\n{why}"
        )
    if kind == "DagsterResourceFunctionError":
        return NotPreviewedError(f"one of its resources cannot be made here. Set the variables that it reads.\n{why}")
    refused = ConfigurationError if root and root.cls_name == "ConfigurationError" else NotPreviewedError
    return refused(f"preview runs the asset's own code, which failed before it called compute.run. Correct it.\n{why}")
