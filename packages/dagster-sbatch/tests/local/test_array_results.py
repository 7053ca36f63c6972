"""What counts as computed already, and what Dagster stores, when tasks of an array in `development` have failed."""

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch import ComputeResource, JobArray, ScriptLauncher
from dagster_sbatch.run import interrupts, local_run
from dagster_sbatch.run.array_step import ArrayStep
from dagster_sbatch.run.local import Ended, LocalProcess
from resources import PROJECT
from slurm_in_a_box import wait_until
from support.array_asset import DAYS, ArrayAsset
from support.dagster_dev import gone
from support.workload_asset import PIPES

pytestmark = [pytest.mark.local, pytest.mark.usefixtures("data_root")]

FIRST, LAST = "2013-01-01", "2013-01-03"
KEYS = [FIRST, "2013-01-02", LAST]
LAST_FAILS = """
import os, pathlib
key, folder = pipes.partition_key, pathlib.Path(os.environ["DATA_ROOT"])
(folder / f"ran-{key}-{pipes.run_id}").touch()
if key == "2013-01-03" and not (folder / "fixed").exists():
    raise ValueError
"""
RANGE = {"dagster/asset_partition_range_start": "a", "dagster/asset_partition_range_end": "c"}
LETTERS = dg.StaticPartitionsDefinition(["a", "b", "c"])
PARTITION_OF_ALL = "report_custom_message({'musica.partition': {'partition': 'a', 'asset_key': 'all'}})"


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    """A place for a workload of assets that the test makes itself."""
    return tmp_path / "workload.py"


def ran(folder: Path, run_id: str) -> list[str]:
    return sorted(path.name[4:14] for path in folder.glob(f"ran-*-{run_id}"))


def test_only_a_re_execution_from_failure_leaves_out_what_is_stored(tmp_path: Path, data_root: Path) -> None:
    """Dagster's retry with the strategy ALL_STEPS has a retry number; re-executions of all steps inherit some tags."""
    asset = ArrayAsset(tmp_path, LAST_FAILS, JobArray())
    first = asset.run(FIRST, LAST)
    by_asset: dict[str, Any] = {"dagster/is_asset_resume_retry": "true"}  # Dagster selects assets that have checks
    selected = asset.run(FIRST, LAST, of=first.run_id, **by_asset)
    assert ran(data_root, selected.run_id) == [LAST]
    (data_root / "fixed").touch()
    number: dict[str, Any] = {"dagster/retry_number": "1"}
    retry = asset.run(FIRST, LAST, of=first.run_id, **number)
    assert ran(data_root, retry.run_id) == KEYS
    resumed = asset.run(FIRST, LAST, of=first.run_id, from_failure=True, **number)
    assert ran(data_root, resumed.run_id) == [LAST]
    assert ran(data_root, asset.run(FIRST, LAST, of=selected.run_id, **by_asset).run_id) == KEYS


def test_a_stored_partition_is_computed_again_if_there_is_newer_data_to_read(tmp_path: Path, data_root: Path) -> None:
    """Otherwise the end of the step would store the older result once more, as one of the newer data."""
    asset = ArrayAsset(tmp_path, LAST_FAILS, JobArray())
    first = asset.run(FIRST, LAST)
    (data_root / "fixed").touch()
    with dg.DagsterInstance.from_config(str(tmp_path / "dagster")) as instance:
        instance.report_runless_asset_event(dg.AssetMaterialization("readings", partition=FIRST))
    resumed = asset.run(FIRST, LAST, of=first.run_id, from_failure=True)
    assert ran(data_root, resumed.run_id) == [FIRST, LAST]
    assert sorted(map(str, resumed.once)) == KEYS
    assert "This run skips 1 partition that earlier runs have completed." in resumed.log
    assert any(line.startswith("This run computes 1 partition again") for line in resumed.log)


def test_what_is_stored_after_dagster_has_failed_the_run_is_not_computed_again(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails a run that exceeds `dagster/max_runtime` as soon as it has asked the run's process to end."""
    store = ArrayStep.store_completed

    def store_late(step: ArrayStep) -> None:
        step._context.instance.report_run_failed(step._context.run)
        store(step)

    asset = ArrayAsset(tmp_path, LAST_FAILS, JobArray())
    with monkeypatch.context() as patched:
        patched.setattr(ArrayStep, "store_completed", store_late)
        first = asset.run(FIRST, LAST)
    (data_root / "fixed").touch()
    resumed = asset.run(FIRST, LAST, of=first.run_id, from_failure=True)
    assert ran(data_root, resumed.run_id) == [LAST]


def test_what_another_deployment_has_stored_is_computed_again(tmp_path: Path, data_root: Path) -> None:
    """Its data are on another machine."""
    asset = ArrayAsset(tmp_path, LAST_FAILS, JobArray())
    first = asset.run(FIRST, LAST)
    with dg.DagsterInstance.from_config(str(tmp_path / "dagster")) as instance:
        instance.add_run_tags(first.run_id, {"deployment": "staging_supercomputer", "site": "musica"})
    (data_root / "fixed").touch()
    resumed = asset.run(FIRST, LAST, of=first.run_id, from_failure=True)
    assert ran(data_root, resumed.run_id) == KEYS


def test_partitions_with_a_blocking_check_that_failed_are_computed_again(tmp_path: Path, data_root: Path) -> None:
    """Otherwise the same outcome would fail each re-execution from failure."""
    workload = "import os, pathlib\npassed = pathlib.Path(os.environ['DATA_ROOT'], 'fixed').exists()"
    workload += "\npipes.report_asset_check('good', passed=passed)"
    asset = ArrayAsset(tmp_path, workload, JobArray(), checks=("good",), blocking=True)
    first = asset.run(FIRST, LAST)
    assert "1 blocking asset check failed" in first.error
    (data_root / "fixed").touch()
    assert asset.run(FIRST, LAST, of=first.run_id, from_failure=True).success


def test_what_was_stored_with_another_data_root_is_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its data are in another folder, and the other assets do not find them."""
    asset = ArrayAsset(tmp_path, LAST_FAILS, JobArray())
    first = asset.run(FIRST, LAST)
    other = tmp_path / "other"
    other.mkdir()
    (other / "fixed").touch()
    monkeypatch.setenv("DATA_ROOT", str(other))
    resumed = asset.run(FIRST, LAST, of=first.run_id, from_failure=True)
    assert ran(other, resumed.run_id) == KEYS


def test_a_re_execution_from_failure_leaves_out_what_is_stored_now(tmp_path: Path, data_root: Path) -> None:
    """Another run may have materialized a partition since, or a person may have wiped it."""
    asset = ArrayAsset(tmp_path, LAST_FAILS, JobArray())
    first = asset.run(FIRST, LAST)
    probe = dg.AssetKey("probe")
    with dg.DagsterInstance.from_config(str(tmp_path / "dagster")) as instance:
        instance.report_runless_asset_event(dg.AssetMaterialization(probe, partition=FIRST, metadata={"newer": True}))
    (data_root / "fixed").touch()
    resumed = asset.run(FIRST, LAST, of=first.run_id, from_failure=True)
    assert ran(data_root, resumed.run_id) == [LAST]
    assert [key for key, metadata in resumed.once.items() if "newer" in metadata] == [FIRST]
    with dg.DagsterInstance.from_config(str(tmp_path / "dagster")) as instance:
        instance.wipe_assets([probe])
    again = asset.run(FIRST, LAST, of=first.run_id, from_failure=True)
    assert ran(data_root, again.run_id) == KEYS


def test_what_another_run_has_stored_since_is_computed_again_if_there_is_newer_data(
    tmp_path: Path, data_root: Path
) -> None:
    """The end of that run's step has stored it, and with it no digest of its inputs."""
    asset = ArrayAsset(tmp_path, LAST_FAILS, JobArray())
    first = asset.run(FIRST, LAST)
    (data_root / "fixed").touch()

    def report_readings() -> None:
        with dg.DagsterInstance.from_config(str(tmp_path / "dagster")) as instance:
            instance.report_runless_asset_event(dg.AssetMaterialization("readings", partition=FIRST))

    report_readings()
    assert asset.run(FIRST).success
    resumed = asset.run(FIRST, LAST, of=first.run_id, from_failure=True)
    assert ran(data_root, resumed.run_id) == [LAST]
    assert asset.run(FIRST).success
    report_readings()
    again = asset.run(FIRST, LAST, of=first.run_id, from_failure=True)
    assert ran(data_root, again.run_id) == [FIRST, LAST]


def test_what_another_run_has_stored_since_by_another_code_version_is_computed_again(
    tmp_path: Path, data_root: Path
) -> None:
    asset = ArrayAsset(tmp_path, LAST_FAILS, JobArray(), code_version="1")
    first = asset.run(FIRST, LAST)
    (data_root / "fixed").touch()
    assert asset.run(FIRST).success
    resumed = ArrayAsset(tmp_path, LAST_FAILS, JobArray(), code_version="2").run(
        FIRST, LAST, of=first.run_id, from_failure=True
    )
    assert ran(data_root, resumed.run_id) == KEYS


def stored(folder: Path, run_id: str) -> dict[str | None, dg.AssetMaterialization]:
    """What a run has stored, by partition."""
    with dg.DagsterInstance.from_config(str(folder / "dagster")) as instance:
        kinds = {dg.DagsterEventType.ASSET_MATERIALIZATION}
        records = instance.get_records_for_run(run_id, of_type=kinds).records
    found = [record.event_log_entry.asset_materialization for record in records]
    return {each.partition: each for each in found if each}


def test_a_partition_that_is_stored_before_the_step_ends_has_its_data_version(tmp_path: Path) -> None:
    workload = f"{LAST_FAILS}\npipes.report_asset_materialization(data_version='of ' + key)"
    asset = ArrayAsset(tmp_path, workload, JobArray())
    found = stored(tmp_path, asset.run(FIRST, LAST).run_id)
    assert {key: (each.tags or {}).get("dagster/data_version") for key, each in found.items()} == {
        key: f"of {key}" for key in KEYS[:2]
    }


def test_a_partition_that_is_stored_once_more_keeps_its_data_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asset = ArrayAsset(tmp_path, "pipes.report_asset_materialization(data_version='mine')", JobArray())
    with monkeypatch.context() as refused:
        refused.setattr(ArrayStep, "_combine", lambda _: 1 / 0)
        first = asset.run(FIRST).run_id
    again = asset.run(FIRST, of=first, from_failure=True)
    assert again.success
    assert "This run skips 1 partition" in "\n".join(again.log)
    for run in (first, again.run_id):
        assert (stored(tmp_path, run)[FIRST].tags or {})["dagster/data_version"] == "mine"


def test_the_data_versions_that_parameter_sets_report(tmp_path: Path) -> None:
    workload = "pipes.report_asset_materialization(data_version=pipes.extras['version'])"
    array = JobArray(tasks={"one": {"version": "1"}, "two": {"version": "2"}})
    asset = ArrayAsset(tmp_path, workload, array, partitions=None)
    rows = [record.data for record in asset.run().once[None]["tasks"].records]
    assert [(row["task"], row["data_version"]) for row in rows] == [("one", "1"), ("two", "2")]
    assert asset.completed[0].tasks["two"].metadata["data_version"].value == "2"


def test_a_process_that_cannot_be_started_is_the_failure_of_its_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def start(*args: Any) -> LocalProcess:
        started.append(args)
        if len(started) == 2:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return LocalProcess(*args)

    monkeypatch.setattr(local_run, "LocalProcess", start)
    asset = ArrayAsset(tmp_path, "pipes.report_asset_materialization()", JobArray(max_running_tasks=1))
    outcome = asset.run(FIRST, LAST)
    assert "1 of 3 tasks failed. The other tasks have materialized 2 partitions." in outcome.error
    assert f"(2013-01-02): its process could not be started: [Errno {errno.EAGAIN}]" in outcome.error
    assert "Logs: none: it has not run" in outcome.error
    assert sorted(map(str, outcome.once)) == [FIRST, LAST]


def test_partitions_are_stored_whatever_ends_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[Ended] = []

    def end(process: LocalProcess) -> Ended:
        ended = end_process(process)
        ends.append(ended)
        if len(ends) == 2:
            raise PermissionError("the folder of the run is gone")
        return ended

    end_process = LocalProcess.end
    monkeypatch.setattr(LocalProcess, "end", end)
    asset = ArrayAsset(tmp_path, "pipes.report_asset_materialization()", JobArray(max_running_tasks=1))
    outcome = asset.run(FIRST, LAST)
    assert "the folder of the run is gone" in outcome.error
    assert list(outcome.once) == [FIRST]


ENDS_WELL_WHEN_TERMINATED = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
(pathlib.Path(os.environ["DATA_ROOT"]) / f"pid-{os.getpid()}").touch()
time.sleep(600)
"""


@pytest.mark.parametrize("array", [None, JobArray(max_running_tasks=2)])
def test_a_run_that_was_marked_as_terminated_has_no_result(
    array: JobArray | None, tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the UI does without a signal; nor does a signal reach a call in a thread of its own."""
    monkeypatch.setattr(interrupts, "LIFE_SECONDS", 0.1)
    asset, number = ArrayAsset(tmp_path, ENDS_WELL_WHEN_TERMINATED, array), 2 if array else 1

    def mark() -> None:
        wait_until(lambda: len([*data_root.glob("pid-*")]) == number, "the workload sleeps", 60)
        with dg.DagsterInstance.from_config(str(tmp_path / "dagster")) as instance:
            (run,) = instance.get_runs()
            instance.report_run_canceled(run)

    thread = threading.Thread(target=mark)
    thread.start()
    outcome = asset.run(FIRST, LAST)
    thread.join()
    assert "DagsterExecutionInterruptedError" in outcome.error
    assert outcome.metadata == {}
    pids = [int(path.name[4:]) for path in data_root.glob("pid-*")]
    assert len(pids) == number
    wait_until(lambda: all(map(gone, pids)), "no process is left")


def test_partitions_of_an_asset_that_later_ops_make_are_not_stored_before_these_have_run(workload: Path) -> None:
    workload.write_text(f"{PIPES}\n    assert pipes.partition_key != 'c'\n")

    @dg.op
    def compute_all(context: dg.OpExecutionContext, compute: ComputeResource) -> int:
        compute.run(context, workload=workload, launcher=ScriptLauncher(), array=JobArray())
        return 1

    @dg.op
    def join(number: int) -> int:
        return number

    @dg.graph_asset(partitions_def=LETTERS, backfill_policy=dg.BackfillPolicy.single_run())
    def joined() -> int:
        result: int = join(compute_all())
        return result

    result = dg.materialize(
        [joined], resources={"compute": ComputeResource.of(PROJECT)}, tags=RANGE, raise_on_error=False
    )
    (failure,) = (event.step_failure_data.user_failure_data for event in result.all_events if event.is_step_failure)
    assert failure
    assert "1 of 3 tasks failed." in str(failure.description)
    assert "materialized" not in str(failure.description)
    assert [event for event in result.all_events if event.is_step_materialization] == []


@pytest.mark.parametrize("report", ["report_asset_materialization({}, asset_key='all')", PARTITION_OF_ALL])
@pytest.mark.parametrize("array", [None, JobArray()])
def test_a_multi_asset_of_which_one_has_no_partitions(workload: Path, array: JobArray | None, report: str) -> None:
    """Nothing is stored under a partition that it does not have; its own numbers are not lost."""
    workload.write_text(f"{PIPES}\n    pipes.{report}\n")
    specs = [dg.AssetSpec("all", skippable=True), dg.AssetSpec("letters", skippable=True, partitions_def=LETTERS)]

    @dg.multi_asset(specs=specs, can_subset=True, backfill_policy=dg.BackfillPolicy.single_run())
    def both(context: dg.AssetExecutionContext, compute: ComputeResource) -> Iterator[Any]:
        done = compute.run(context, workload=workload, launcher=ScriptLauncher(), array=array)
        yield from done.get_results()

    resources = {"compute": ComputeResource.of(PROJECT)}
    result = dg.materialize([both], resources=resources, tags=RANGE, raise_on_error=False)
    errors = [str(event.step_failure_data.error) for event in result.all_events if event.is_step_failure]
    if array:
        assert "divides the partitions of the run among its tasks, and all has none" in errors[0]
    elif "custom" in report:
        assert "a report on a partition of all, which has none" in errors[0]
    else:
        assert errors == []
    found = {event.asset_key: event.materialization for event in result.get_asset_materialization_events()}
    assert bool(found) is not bool(errors)
    assert errors or "workload_seconds" in found[dg.AssetKey("all")].metadata


@pytest.mark.parametrize(
    ("offset", "last", "refused"),
    [(-1, "2013-01-03", True), (-1, "2013-01-01", False), (-3, "2013-01-03", False), (0, "2013-01-03", False)],
)
@pytest.mark.parametrize("before", ["later", "earlier"])
def test_partitions_that_depend_on_each_other_are_no_tasks(
    offset: int, last: str, before: str, *, refused: bool, workload: Path
) -> None:
    """Tasks run at the same time: one would read what another has not written yet, and all would succeed."""
    workload.write_text(f"{PIPES}\n    pass\n")
    mapping = dg.TimeWindowPartitionMapping(start_offset=offset, end_offset=offset)
    deps = [dg.AssetDep(before, partition_mapping=mapping)] if offset or before == "earlier" else []
    specs = [dg.AssetSpec("earlier", partitions_def=DAYS), dg.AssetSpec("later", deps=deps, partitions_def=DAYS)]

    @dg.multi_asset(specs=specs, backfill_policy=dg.BackfillPolicy.single_run())
    def both(context: dg.AssetExecutionContext, compute: ComputeResource) -> Iterator[Any]:
        done = compute.run(context, workload=workload, launcher=ScriptLauncher(), array=JobArray())
        yield from sorted(done.get_results(), key=lambda each: str(each.asset_key))  # as Dagster wants

    days = {"dagster/asset_partition_range_start": FIRST, "dagster/asset_partition_range_end": last}
    resources = {"compute": ComputeResource.of(PROJECT)}
    result = dg.materialize([both], resources=resources, tags=days, raise_on_error=False)
    failures = [event.step_failure_data.user_failure_data for event in result.all_events if event.is_step_failure]
    assert result.success is not refused
    assert [f"and these of {before} depend on each other" in str(each) for each in failures] == [True] * refused


def test_the_tasks_of_a_check_without_its_asset(workload: Path) -> None:
    workload.write_text(
        f"{PIPES}\n    pipes.report_asset_check('good', pipes.partition_key != 'b', asset_key='letters')\n"
    )

    @dg.asset(partitions_def=LETTERS, backfill_policy=dg.BackfillPolicy.single_run())
    def letters() -> None: ...

    @dg.asset_check(asset=letters, partitions_def=LETTERS)
    def good(context: dg.AssetCheckExecutionContext, compute: ComputeResource) -> dg.AssetCheckResult:
        done = compute.run(context.op_execution_context, workload=workload, launcher=ScriptLauncher(), array=JobArray())
        return done.get_asset_check_result()

    result = dg.materialize(
        [letters, good],
        selection=dg.AssetSelection.checks(good),
        resources={"compute": ComputeResource.of(PROJECT)},
        tags=RANGE,
        raise_on_error=False,
    )
    assert [str(event.step_failure_data.error) for event in result.all_events if event.is_step_failure] == []
    (check,) = result.get_asset_check_evaluations()
    assert (check.passed, check.metadata["tasks"].value, check.metadata["failed"].value) == (False, 3, 1)
