"""What a step adds to the events of its assets: metadata of single partitions, and the costs of its job."""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Any

import dagster as dg
from dagster_pipes import PIPES_METADATA_TYPE_INFER, PIPES_PROTOCOL_VERSION, PipesMessage

from dagster_sbatch.launchers.command.job.pipes_command import explain_undeclared
from dagster_sbatch.run.calls import calls_of
from dagster_sbatch.run.reports import StepLog

PARTITION = "musica.partition"
"""The only key of the custom message by which a workload reports on one partition; see docs/assets.md."""
OWN_NAMES = frozenset(
    """
    host workload partition qos account job_id run_directory attach dashboard tasks attempts usage proposal
    queue_seconds elapsed_seconds workload_seconds node_hours cpu_hours gpu_hours
    max_rss_mib cpu_efficiency gpu_utilization gpu_memory_max_mib
    """.split()
)
"""Names of the metadata that the engine itself adds, on one deployment or another; see docs/assets.md."""
_adding = threading.Lock()  # Dagster loses metadata that threads add at the same time
_SHOWN = 200  # characters of a wrong value
_FIELDS = ("partition", "metadata", "asset_key", "data_version")


def make_message(method: str, params: Mapping[str, Any]) -> PipesMessage:
    """Return a message of Dagster Pipes."""
    return {"__dagster_pipes_version": PIPES_PROTOCOL_VERSION, "method": method, "params": params}


def partitions_of(context: dg.OpExecutionContext) -> Sequence[str]:
    """Return the partition keys of the step; none for an asset without partitions, also in a run over partitions."""
    if not (context.has_partition_key or context.has_partition_key_range):
        return []
    unpartitioned = context.has_assets_def and context.assets_def.partitions_def is None
    return [] if unpartitioned else list(context.partition_keys)


def unpartitioned_assets(context: dg.OpExecutionContext) -> list[dg.AssetKey]:
    """Return the assets of the step that have no partitions; a multi-asset may have both kinds."""
    keys = sorted(context.selected_asset_keys)
    return [key for key in keys if context.assets_def.specs_by_key[key].partitions_def is None]


def declared_checks(context: dg.OpExecutionContext) -> dict[str, list[str]]:
    """Return the names of the asset checks that the step may report, by asset key as Pipes writes it."""
    found: dict[str, list[str]] = {}
    for check in sorted(context.selected_asset_check_keys):
        found.setdefault(check.asset_key.to_escaped_user_string(), []).append(check.name)
    return found


class _Unread(dg.PipesMessageReader):
    """In place of a reader of Dagster's: the step itself follows the file with the messages, and hands them over."""

    @contextmanager
    def read_messages(self, handler: dg.PipesMessageHandler) -> Iterator[dict[str, Any]]:  # noqa: ARG002
        yield {}

    @property
    def expected_writer_count(self) -> int:
        return 1  # as by default, where Dagster warns each run that this is a preview

    def no_messages_debug_text(self) -> str:
        return ""


UNREAD = _Unread()


def hand_over(context: dg.OpExecutionContext, message: PipesMessage, handle: Callable[[PipesMessage], None]) -> None:
    """Check a report and hand it to Dagster; `handle`: of Dagster's handler. Warn of what Dagster does not store.

    Raises ValueError: it is on what is not of this step; the text names what the step has. Or Dagster cannot read it;
    the text names the metadata with which it cannot.
    """
    params = dict(message["params"] or {})
    if isinstance(params.get("metadata"), dict):
        params["metadata"] = {name: _typed(value) for name, value in params["metadata"].items()}
    names = ", ".join(sorted(OWN_NAMES.intersection(params.get("metadata") or ())))
    if names and calls_of(context).claim_once(f"metadata: {names}"):
        StepLog(context).warning(
            f"The workload reports metadata that the engine adds, too, under the same name: {names}. Dagster stores "
            "only one value of each name. Use another name in the workload."
        )
    if message["method"] == "report_asset_materialization":
        _check_asset(context, params.get("asset_key"))
    elif message["method"] == "report_asset_check":
        problem = explain_undeclared(declared_checks(context), params.get("check_name"), params.get("asset_key"))
        if problem:  # Dagster would refuse it when it has stored the materializations
            raise ValueError(problem)
    message = make_message(message["method"], params)
    try:
        handle(message)
    except Exception as error:
        raise ValueError(_find_unreadable(context, message) or str(error)) from error


def _check_asset(context: dg.OpExecutionContext, asset: str | None) -> None:
    """Refuse an asset that is not of the step: Dagster would when it has stored the others. Warn of one of another op.

    `asset`: the key as Pipes writes it.
    """
    keys = [key.to_escaped_user_string() for key in sorted(context.selected_asset_keys)]
    if asset not in keys:
        raise ValueError(f"a report on the asset {asset!r}; the assets of this run are {', '.join(keys) or 'none'}")
    own = {key.to_escaped_user_string() for key in _made_by(context) if isinstance(key, dg.AssetKey)}
    if asset not in own and calls_of(context).claim_once(f"another op makes {asset}"):
        StepLog(context).warning(
            f"The workload reports on {asset}, but another op makes this asset, so Dagster drops the report. Report "
            "it in the workload of that op."
        )


def _made_by(context: dg.OpExecutionContext) -> set[dg.AssetKey | dg.AssetCheckKey]:
    """Return the assets and checks that the op of the step makes: of a graph asset, a later op may make them."""
    step = context.get_step_execution_context()
    find = step.job_def.asset_layer.get_entity_key_for_node_output
    found = (find(step.node_handle, each.name) for each in step.op_def.output_defs)
    return {key for key in found if key is not None}


def in_json(value: Any) -> Any:
    """Return a value as the UI can read it: JSON has no number for a loss that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: in_json(each) for name, each in value.items()}
    return [in_json(each) for each in value] if isinstance(value, list) else value


def _find_unreadable(context: dg.OpExecutionContext, message: PipesMessage) -> str | None:
    """Return which metadata of a report Dagster cannot read, and why; None if it can read all."""
    params = message["params"] or {}
    metadata = params.get("metadata")
    for name, value in metadata.items() if isinstance(metadata, Mapping) else ():
        alone = make_message(message["method"], {**params, "metadata": {name: value}})
        try:
            dg.PipesMessageHandler(context, UNREAD).handle_message(alone)
        except Exception as error:  # noqa: BLE001 - Dagster raises its own for each kind of wrong metadata
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            return f"the metadata {name!r}, {str(value)[:_SHOWN]}: {reason}"
    return None


@dataclass(frozen=True, slots=True)
class PartitionReport:
    """What a workload reported of one partition of an asset."""

    asset: dg.AssetKey
    partition: str
    metadata: Mapping[str, Any]
    data_version: str | None


def read_partitions(
    context: dg.OpExecutionContext, reports: Sequence[Any], of_task: Sequence[str] = ()
) -> list[PartitionReport]:
    """Read the workload's reports on single partitions.

    `reports`: the values of the PARTITION messages, in the order in which they came. `of_task`: the partitions of the
    task of an array that has reported them; without these, it may be any of the run.
    Raises ValueError: a report does not have the documented form, or names an asset or a partition that the run has
    not.
    """
    known = dict.fromkeys(of_task or partitions_of(context))
    handler = dg.PipesMessageHandler(context, UNREAD)  # reads metadata of all types
    for report in reports:
        key = _find_asset(context, report)
        if report["partition"] not in known:
            raise ValueError(f"the partition {report['partition']!r} is not of this {'task' if of_task else 'run'}")
        if key in unpartitioned_assets(context):
            raise ValueError(f"a report on a partition of {key.to_user_string()}, which has none")
        params = {"asset_key": key.to_escaped_user_string(), "data_version": report.get("data_version")}
        params["metadata"] = report.get("metadata") or {}
        hand_over(context, make_message("report_asset_materialization", params), handler.handle_message)
    results = zip(reports, handler.get_reported_results(), strict=True)
    return [report_on(each, report["partition"]) for report, each in results if isinstance(each, dg.MaterializeResult)]


def report_on(result: dg.MaterializeResult[Any], partition: str) -> PartitionReport:
    """Return a report on a partition from a report on its asset."""
    assert result.asset_key is not None
    version = result.data_version.value if result.data_version else None
    return PartitionReport(result.asset_key, partition, dict(result.metadata or {}), version)


ByPartition = dict[tuple[str, dg.AssetKey], dict[str, Any]]
"""Metadata by partition and asset."""


def merge(reports: Iterable[PartitionReport], metadata: ByPartition) -> ByPartition:
    """Add the metadata in reports to what there is; a partition may have several reports."""
    for report in reports:
        metadata.setdefault((report.partition, report.asset), {}).update(report.metadata)
    return metadata


def attach(context: dg.OpExecutionContext, reports: Iterable[PartitionReport], metadata: ByPartition) -> None:
    """Attach metadata and the data versions in reports to the materializations that Dagster makes at the step's end."""
    one = len(partitions_of(context)) == 1
    for report in reports:
        if report.data_version and one:
            context.set_data_version(report.asset, dg.DataVersion(report.data_version))
        elif report.data_version:  # Dagster stores one per asset and step
            metadata[report.partition, report.asset]["data_version"] = report.data_version
    for (partition, key), each in metadata.items():
        add_metadata(context, key, partition, each)


def add_metadata(
    context: dg.OpExecutionContext, asset: dg.AssetKey, partition: str | None, metadata: Mapping[str, Any]
) -> None:
    """Add metadata to the materialization of an asset, or of one of its partitions, that Dagster makes at the end."""
    with _adding:
        dg.AssetExecutionContext(context).add_asset_metadata(metadata, asset_key=asset, partition_key=partition)


def _find_asset(context: dg.OpExecutionContext, report: Any) -> dg.AssetKey:
    """Check the form of a report, and return its asset."""
    form = f'{{"{PARTITION}": {{"partition": KEY, "metadata": {{...}}, "asset_key": KEY, "data_version": TEXT}}}}'
    known = isinstance(report, dict) and report.keys() <= set(_FIELDS) and isinstance(report.get("partition"), str)
    if not known or not isinstance(report.get("metadata") or {}, dict):
        raise ValueError(f"not a report on a partition: {str(report)[:_SHOWN]}; its form is {form}")
    keys: dict[str, dg.AssetKey] = {key.to_escaped_user_string(): key for key in sorted(context.selected_asset_keys)}
    name = report.get("asset_key")
    if name is None and len(keys) == 1:
        return next(iter(keys.values()))
    if name not in keys:
        said = "without an asset_key" if name is None else f"for the asset {name!r}"
        raise ValueError(f"a report on a partition {said}; the assets of this run are {', '.join(keys) or 'none'}")
    return keys[name]


def _typed(value: Any) -> Any:
    """Return a metadata value as Pipes sends it; a plain one gets the type that Dagster infers.

    The UI can read it then; a number that is not finite is blank there.
    """
    known = isinstance(value, dict) and "raw_value" in value
    typed = value if known else {"raw_value": value, "type": PIPES_METADATA_TYPE_INFER}
    raw = typed["raw_value"]
    return {**typed, "raw_value": in_json(raw) if isinstance(raw, dict | list) else raw}


def note_missing_checks(context: dg.OpExecutionContext, reported: Iterable[object]) -> None:
    """Log which asset checks of the step have no result: Dagster fails the step then, and does not say why."""
    known = {(each.asset_key, each.check_name) for each in reported if isinstance(each, dg.AssetCheckResult)}
    own = context.selected_asset_check_keys & _made_by(context)
    missing = [each for each in sorted(own) if (each.asset_key, each.name) not in known]
    if missing:
        names = ", ".join(f"{each.name} of {each.asset_key.to_user_string()}" for each in missing)
        StepLog(context).info(
            f"The workload has not reported these asset checks: {names}. If the function that calls compute.run does "
            "not return their results, the step fails. Report them: pipes.report_asset_check(...)."
        )


class Completed(dg.PipesClientCompletedInvocation):
    """The results of a workload in an order that Dagster accepts: each asset after those that it depends on."""

    def __init__(self, context: dg.OpExecutionContext, session: dg.PipesSession, metadata: Mapping[str, Any]) -> None:
        super().__init__(session, dict(metadata))
        specs = context.assets_def.specs if context.has_assets_def else ()
        above = {spec.key: {each.asset_key for each in spec.deps} - {spec.key} for spec in specs}
        self._order = list(TopologicalSorter(above).static_order())

    def get_results(self, *, implicit_materializations: bool = True) -> Sequence[Any]:
        """Return what the workload reported, and a result for each asset that it did not report."""
        found = super().get_results(implicit_materializations=implicit_materializations)
        return sorted(found, key=lambda each: self._order.index(each.asset_key) if each.asset_key in self._order else 0)


def complete(
    context: dg.OpExecutionContext, session: dg.PipesSession, where: Mapping[str, Any], costs: Mapping[str, Any]
) -> Completed:
    """Return the completed invocation; Dagster shows the costs once.

    `where`: metadata for all results. `costs`: metadata of the whole job, for the first partition of the first asset
    only, so that sums are right.
    """
    results = session.get_reported_results()
    note_missing_checks(context, results)
    reported = [each.asset_key for each in results if isinstance(each, dg.MaterializeResult)]
    keys = sorted(key for key in reported if key) or sorted(context.selected_asset_keys)
    if not keys:  # an op, or the function of an asset check: there is no other place for them
        return Completed(context, session, {**where, **costs})
    partitions = [] if keys[0] in unpartitioned_assets(context) else partitions_of(context)
    add_metadata(context, keys[0], next(iter(partitions), None), costs)
    return Completed(context, session, where)
