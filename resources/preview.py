"""What an asset would submit to Slurm: its plan and its batch script, worked out offline."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Never

import dagster as dg

from resources.compute import ComputeResource
from resources.errors import ConfigurationError, nearest
from resources.launchers import Launcher
from resources.plan import Plan, make_plan
from resources.settings import Settings, load_settings
from resources.slurm import SlurmRequest
from resources.submission import About, Place, render_job


@dataclass(frozen=True)
class Preview:
    """A submission that is not made.

    Attributes:
        plan: the complete request and launcher.
        summary: for people: what is asked for, by heading.
        script: the batch script.
    """

    plan: Plan
    summary: Mapping[str, str]
    script: str


class _RunCallError(Exception):
    """Carries the arguments of `ComputeResource.run` out of an asset that is being previewed."""

    def __init__(self, workload: Path | str, launcher: Launcher, request: SlurmRequest) -> None:
        super().__init__("the asset has called compute.run")
        self.workload = Path(workload)
        self.launcher = launcher
        self.request = request


class _RecordingCompute(ComputeResource):
    def run(  # the signature of ComputeResource.run
        self,
        context: dg.AssetExecutionContext,  # noqa: ARG002
        *,
        workload: Path | str,
        launcher: Launcher,
        request: SlurmRequest | None = None,
        extras: Mapping[str, Any] | None = None,  # noqa: ARG002
        env: Mapping[str, str] | None = None,  # noqa: ARG002
    ) -> Never:
        raise _RunCallError(workload, launcher, request or SlurmRequest())


def preview_asset(assets: Sequence[object], resources: Mapping[str, Any], asset: str, partition: str | None) -> Preview:
    """Work out what materialising an asset would submit.

    Args:
        assets: of the code location; what is not run by it (an AssetSpec) is passed over.
        resources: of the code location, with a ComputeResource named `compute`.
        asset: its key as people write it, `a/b`.
        partition: key of one partition, for a partitioned asset.

    Raises:
        ConfigurationError: there is no such asset or partition, or its run would be refused; the text says why.
    """
    definitions = [definition for definition in assets if isinstance(definition, dg.AssetsDefinition)]
    by_key = {key.to_user_string(): definition for definition in definitions for key in definition.keys}
    if asset not in by_key:
        raise ConfigurationError(f"there is no such asset{nearest(asset, by_key)}")
    _check_partition(by_key[asset], partition)
    call = _record_call(by_key[asset], resources, partition)
    sites = resources["compute"].site_overrides
    settings = load_settings(sites)
    plan = make_plan(settings, sites, call.workload, call.launcher, call.request)
    return Preview(plan, _summarise(plan, settings), _render(plan, settings, asset))


def _check_partition(definition: dg.AssetsDefinition, partition: str | None) -> None:
    if definition.partitions_def is None:
        if partition:
            raise ConfigurationError("the asset has no partitions: leave --partition out")
        return
    keys = definition.partitions_def.get_partition_keys()
    if partition not in keys:
        given = f"{partition!r} is not a partition" if partition else "the asset is partitioned: give --partition"
        raise ConfigurationError(f"{given}; valid are {keys[0]} to {keys[-1]}")


def _record_call(definition: dg.AssetsDefinition, resources: Mapping[str, Any], partition: str | None) -> _RunCallError:
    used = {name: resource for name, resource in resources.items() if name in definition.required_resource_keys}
    recorded = {**used, "compute": _RecordingCompute(site_overrides={})}
    with dg.build_asset_context(partition_key=partition, resources=recorded) as context:
        try:
            definition(context)
        except _RunCallError as call:
            return call
    raise ConfigurationError("the asset does not call compute.run: there is nothing to submit")


def _base(settings: Settings) -> str:
    return settings.deployment_base_path or "<SLURM_DEPLOYMENT_BASE_PATH>"


def _place(settings: Settings, run: str) -> Place:
    base = _base(settings)
    environment = f"{base}/environments/<hash of its content>"
    python = settings.python or f"{environment}/bin/python"
    return Place(f"{base}/runs/{run}", python, f"{environment}/workloads", settings.data_root or f"{base}/data")


def _summarise(plan: Plan, settings: Settings) -> dict[str, str]:
    request, allocation = plan.allocation.request, plan.allocation
    size = f"{request.nodes} node(s), {request.ntasks_per_node} task(s) a node"
    for value, unit in (
        (request.cpus_per_task, "CPUs a task"),
        (request.gpus_per_node, "GPUs a node"),
        (request.mem, "a node"),
    ):
        size += f", {value} {unit}" if value else ""
    gpu_hours = f"{allocation.gpu_hours:.2f}"
    return {
        "where": f"{settings.supercomputer_site or 'the only site'}: partition {request.partition}, QoS {request.qos}",
        "what": size,
        "how": type(plan.launcher).__name__,
        "time limit": f"{request.time_limit}; up to {allocation.node_hours:.2f} node-hours and {gpu_hours} GPU-hours",
        "sent": f"job.sh, context.json -> {_base(settings)}/runs/",
        "run by": _place(settings, "").python,
    }


def _render(plan: Plan, settings: Settings, asset: str) -> str:
    key = "preview-" + re.sub(r"[^A-Za-z0-9_.-]", "_", asset)
    return render_job(plan, _place(settings, key), About(run="", root="", asset=asset, partitions=""), {})
