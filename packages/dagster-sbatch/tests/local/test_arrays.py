"""Job arrays in `development`: many processes at once, with the results that the supercomputer would give."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest

from dagster_sbatch import ComputeResource, JobArray, ScriptLauncher
from dagster_sbatch.run import local_run
from resources import PROJECT
from slurm_in_a_box import wait_until
from support.array_asset import DAYS, ArrayAsset, ArrayOutcome

pytestmark = [pytest.mark.local, pytest.mark.usefixtures("data_root")]

FIRST, LAST = "2013-01-01", "2013-01-07"
KEYS = DAYS.get_partition_keys()[:7]
REPORTS = """
(key,) = pipes.extras["partition_keys"]
assert pipes.partition_key == key
assert pipes.partition_key_range == {"start": key, "end": key}
pipes.report_asset_materialization(metadata={"day": key, "begin": pipes.partition_time_window["start"][:10]})
"""
ONE_FAILS = """
import os, pathlib, sys
key = pipes.partition_key
pathlib.Path(os.environ["DATA_ROOT"], f"ran-{key}-{pipes.run_id}").touch()
if key == "2013-01-07" and not pathlib.Path(os.environ["DATA_ROOT"], "fixed").exists():
    print("this is why", file=sys.stderr)
    raise ValueError(f"no weather on {key}")
pipes.report_asset_materialization(metadata={"day": key})
"""


def sorted_keys(outcome: ArrayOutcome) -> list[str]:
    """The partitions of a run's materializations, each of which has one."""
    return sorted(str(key) for key in outcome.once)


def ran(folder: Path, run_id: str) -> list[str]:
    return sorted(path.name[4:14] for path in folder.glob(f"ran-*-{run_id}"))


def test_each_partition_has_its_own_task_and_its_own_numbers(tmp_path: Path) -> None:
    outcome = ArrayAsset(tmp_path, REPORTS, JobArray(max_running_tasks=4)).run(FIRST, LAST)
    assert outcome.error == ""
    assert sorted_keys(outcome) == KEYS
    for key, metadata in outcome.once.items():
        assert (metadata["day"], metadata["begin"]) == (key, key)
        assert metadata["workload_seconds"] > 0
        assert metadata["workload"].endswith("workload.py")
    assert "7 tasks: 7 done, 0 running, 0 waiting, 0 failed" in outcome.log


def test_as_many_tasks_run_at_once_as_the_asset_allows(tmp_path: Path, data_root: Path) -> None:
    """Each waits until three run; a fourth one would be seen by the others."""
    workload = """
    import os, pathlib, time
    folder = pathlib.Path(os.environ["DATA_ROOT"])
    mine = folder / f"running-{pipes.partition_key}"
    mine.touch()
    deadline = time.monotonic() + 60
    most = 0
    while most < 3 and time.monotonic() < deadline and not (folder / "three").exists():
        most = len(list(folder.glob("running-*")))
        time.sleep(0.01)
    (folder / "three").touch()
    most = max(most, len(list(folder.glob("running-*"))))
    time.sleep(0.1)
    mine.unlink()
    pipes.report_asset_materialization(metadata={"most": most})
    """
    outcome = ArrayAsset(tmp_path, workload, JobArray(max_running_tasks=3)).run(FIRST, LAST)
    assert outcome.error == ""
    assert max(metadata["most"] for metadata in outcome.once.values()) == 3


def test_several_partitions_per_task(tmp_path: Path) -> None:
    workload = """
    from datetime import datetime
    keys = pipes.extras["partition_keys"]
    assert pipes.partition_key_range == {"start": keys[0], "end": keys[-1]}
    begin, end = (datetime.fromisoformat(pipes.partition_time_window[name]) for name in ("start", "end"))
    days = (end - begin).days
    for number, key in enumerate(keys):
        pipes.report_custom_message({"musica.partition": {"partition": key, "metadata": {"number": number}}})
    pipes.report_asset_materialization(metadata={"days": days})
    """
    outcome = ArrayAsset(tmp_path, workload, JobArray(partitions_per_task=5)).run(FIRST, LAST)
    assert outcome.error == ""
    found = [outcome.once[key] for key in KEYS]
    assert [each["number"] for each in found] == [0, 1, 2, 3, 4, 0, 1]
    assert [each["days"] for each in found] == [5] * 5 + [2] * 2
    assert [KEYS[n] for n, each in enumerate(found) if "workload_seconds" in each] == [KEYS[0], KEYS[5]]


def test_a_run_of_one_partition_is_an_array_of_one_task(tmp_path: Path) -> None:
    asset = ArrayAsset(tmp_path, REPORTS, JobArray(partitions_per_task=5))
    outcome = asset.run("2013-01-03")
    assert outcome.error == ""
    assert outcome.once["2013-01-03"]["day"] == "2013-01-03"


def test_parameter_sets_by_name(tmp_path: Path) -> None:
    workload = """
    rate, seed = pipes.extras["lr"], pipes.extras["seed"]
    pipes.report_custom_message({"seed": seed})
    pipes.report_asset_materialization(metadata={"loss": rate * 2})
    """
    sets = {"lr=0.5": {"lr": 0.5}, "lr=0.25": {"lr": 0.25, "seed": 8}}
    asset = ArrayAsset(tmp_path, workload, JobArray(tasks=sets), partitions=None, extras={"seed": 7, "lr": None})
    outcome = asset.run()
    assert outcome.error == ""
    (done,) = asset.completed
    assert {name: task.metadata["loss"].value for name, task in done.tasks.items()} == {"lr=0.5": 1.0, "lr=0.25": 0.5}
    assert done.get_custom_messages() == [{"seed": 7}, {"seed": 8}]
    assert done.tasks["lr=0.25"].messages == [{"seed": 8}]
    rows = [record.data for record in outcome.once[None]["tasks"].records]
    assert [(row["task"], row["loss"]) for row in rows] == [("lr=0.5", 1.0), ("lr=0.25", 0.5)]
    assert outcome.once[None]["workload_seconds"] > 0


# One task fails


def test_the_other_partitions_are_materialized_and_only_the_failed_task_runs_again(
    tmp_path: Path, data_root: Path
) -> None:
    asset = ArrayAsset(tmp_path, ONE_FAILS, JobArray(max_running_tasks=2))
    first = asset.run(FIRST, LAST)
    assert not first.success
    others = [key for key in KEYS if key != "2013-01-07"]
    assert sorted_keys(first) == others
    assert "1 of 7 tasks failed. The other tasks have materialized 6 partitions." in first.error
    assert "1 task (2013-01-07): workload.py raised ValueError: no weather on 2013-01-07" in first.error
    assert "begin with [2013-01-07]" in first.error
    assert "this is why" in first.error
    (row,) = (record.data for record in first.failure["failed_tasks"].records)
    assert (row["task"], row["cause"]) == ("2013-01-07", "workload.py raised ValueError: no weather on 2013-01-07")
    (data_root / "fixed").touch()
    second = asset.run(FIRST, LAST, of=first.run_id, from_failure=True)
    assert second.error == ""
    assert ran(data_root, second.run_id) == ["2013-01-07"]
    assert sorted_keys(second) == KEYS
    assert {key: metadata["day"] for key, metadata in second.once.items()} == {key: key for key in KEYS}
    assert "workload_seconds" in second.once[KEYS[0]]
    third = asset.run(FIRST, LAST, of=second.run_id)
    assert ran(data_root, third.run_id) == KEYS


def test_the_retry_of_dagster_in_the_same_run_runs_only_the_failed_task(tmp_path: Path, data_root: Path) -> None:
    workload = ONE_FAILS.replace("    print(", "    pathlib.Path(os.environ['DATA_ROOT'], 'fixed').touch()\n    print(")
    asset = ArrayAsset(tmp_path, workload, JobArray(max_running_tasks=2), retry_policy=dg.RetryPolicy(1))
    outcome = asset.run(FIRST, LAST)
    assert outcome.error == ""
    assert "This run skips 6 partitions that earlier runs have completed." in outcome.log


def test_failures_are_grouped_by_cause(tmp_path: Path) -> None:
    workload = """
    import os
    day = int(pipes.partition_key[-2:])
    if day in (2, 3, 4):
        raise ValueError(f"no weather on {pipes.partition_key}, only {day} files")
    if day == 5:
        os._exit(0)
    if day == 6:
        pipes.report_custom_message({"musica.partition": {"partition": "2013-01-07", "metadata": {"x": 1}}})
    pipes.report_asset_materialization()
    """
    outcome = ArrayAsset(tmp_path, workload, JobArray()).run(FIRST, LAST)
    assert "5 of 7 tasks failed. The other tasks have materialized 2 partitions." in outcome.error
    first, *others = outcome.error.split("\n\n")[1:]
    assert first.startswith("3 tasks (2013-01-02, 2013-01-03, 2013-01-04): ")
    assert "raised ValueError: no weather on 2013-01-0" in first
    assert any("1 task (2013-01-05): workload.py ended without closing" in text for text in others)
    assert any("the partition '2013-01-07' is not of this task" in text for text in others)
    assert sorted_keys(outcome) == [FIRST, *KEYS[6:]]


def test_a_task_that_reports_nothing_fails_and_no_other(tmp_path: Path) -> None:
    asset = ArrayAsset(tmp_path, "", JobArray())
    (tmp_path / "workloads" / "workload.py").write_text("print('done')\n")
    outcome = asset.run(FIRST, "2013-01-02")
    assert "2 tasks (2013-01-01, 2013-01-02): workload.py ended without opening a Dagster Pipes session" in (
        outcome.error
    )
    assert outcome.metadata == {}


# Output


def test_output_has_the_name_of_its_task_and_a_repeated_warning_is_shown_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    workload = """
    import sys, warnings
    print(f"line of {pipes.partition_key}")
    print("half a line", end="")
    sys.stdout.flush()
    warnings.warn("old format")
    pipes.log.warning("no GPU")
    pipes.log.info(f"note of {pipes.partition_key}")
    """
    outcome = ArrayAsset(tmp_path, workload, JobArray(max_running_tasks=3)).run(FIRST, LAST)
    out, err = capfd.readouterr()
    for key in KEYS:
        assert f"[{key}] line of {key}\n" in out
        assert f"[{key}] half a line\n" in out
        assert f"[{key}] note of {key}" in outcome.log
    warned = [line for line in err.splitlines() if line.startswith("[") and "old format" in line]
    assert len(warned) == 2  # Python shows the text, then the line of the program
    assert sum(line.endswith("] no GPU") for line in outcome.log) == 1
    assert any("6 more times: no GPU" in line for line in outcome.log)


# Checks


def test_a_check_passes_if_it_passes_in_every_task(tmp_path: Path, data_root: Path) -> None:
    workload = """
    import os, pathlib
    day = int(pipes.partition_key[-2:])
    pipes.report_asset_check("full", passed=day != 6, severity="WARN", metadata={"rows": day})
    pipes.report_asset_check("new", passed=True)
    if day == 7 and not pathlib.Path(os.environ["DATA_ROOT"], "fixed").exists():
        raise ValueError
    pipes.report_asset_materialization()
    """
    asset = ArrayAsset(tmp_path, workload, JobArray(), checks=("full", "new"))
    first = asset.run(FIRST, LAST)
    assert first.once["2013-01-06"]["check full"] is False
    assert first.once["2013-01-05"]["check full"] is True
    (data_root / "fixed").touch()
    second = asset.run(FIRST, LAST, of=first.run_id, from_failure=True)
    assert second.error == ""
    (full,), (new,) = second.checks["full"], second.checks["new"]
    assert (full.passed, new.passed) == (False, True)
    assert (full.metadata["tasks"].value, full.metadata["failed"].value) == (7, 1)
    assert full.severity == dg.AssetCheckSeverity.WARN
    failures = full.metadata["failures"]
    assert isinstance(failures, dg.TableMetadataValue)
    assert [record.data for record in failures.records] == [
        {"task": "2013-01-06", "severity": "WARN", "reported": "rows=6"}
    ]


def test_a_check_that_is_not_declared_fails_its_task(tmp_path: Path) -> None:
    outcome = ArrayAsset(tmp_path, "pipes.report_asset_check('other', passed=True)", JobArray()).run(FIRST, LAST)
    assert "probe does not declare the check 'other'. The checks of this step are: none." in outcome.error


# Partitions of other kinds, and what ends a run


@pytest.mark.parametrize("key", ["a'; echo $HOME `id`", "../up", "é ü/ö", "x" * 200, "%d %a"])
def test_partition_keys_that_cannot_be_file_names(tmp_path: Path, key: str) -> None:
    workload = "print('a line')\npipes.report_asset_materialization(metadata={'key': pipes.partition_key})"
    asset = ArrayAsset(tmp_path, workload, JobArray(), partitions=dg.StaticPartitionsDefinition(["first", key, "last"]))
    outcome = asset.run("first", "last")
    assert outcome.error == ""
    assert {name: metadata["key"] for name, metadata in outcome.once.items()} == {
        name: name for name in ("first", key, "last")
    }


def test_partitions_of_two_dimensions(tmp_path: Path) -> None:
    workload = """
    metadata = {"key": pipes.partition_key, "begin": pipes.partition_time_window["start"][:10]}
    pipes.report_asset_materialization(metadata=metadata)
    """
    both = dg.MultiPartitionsDefinition({"day": DAYS, "model": dg.StaticPartitionsDefinition(["m"])})
    outcome = ArrayAsset(tmp_path, workload, JobArray(), partitions=both).run("2013-01-01|m", "2013-01-03|m")
    assert outcome.error == ""
    assert {key: each["begin"] for key, each in outcome.once.items()} == {f"{day}|m": day for day in KEYS[:3]}


def test_a_run_that_is_interrupted_leaves_nothing_and_keeps_what_is_complete(tmp_path: Path, data_root: Path) -> None:
    workload = """
    import os, pathlib, subprocess, time
    folder = pathlib.Path(os.environ["DATA_ROOT"])
    (folder / f"ran-{pipes.partition_key}-{pipes.run_id}").touch()
    if pipes.partition_key > "2013-01-02" and not (folder / "fixed").exists():
        child = subprocess.Popen(["sleep", "600"])
        (folder / pipes.partition_key).write_text(f"{os.getpid()} {child.pid}")
        (folder / pipes.partition_key).rename(folder / f"pids-{pipes.partition_key}")
        time.sleep(600)
    pipes.report_asset_materialization()
    """
    asset = ArrayAsset(tmp_path, workload, JobArray(max_running_tasks=2))

    def interrupt() -> None:
        wait_until(lambda: len([*data_root.glob("pids-*")]) == 2, "two tasks sleep", 60)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    outcome = asset.run(FIRST, LAST)
    thread.join()
    assert not outcome.success
    assert sorted_keys(outcome) == KEYS[:2]
    pids = [int(pid) for path in data_root.glob("pids-*") for pid in path.read_text().split()]
    assert len(pids) == 4
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids), "no process is left")
    (data_root / "fixed").touch()
    again = asset.run(FIRST, LAST, of=outcome.run_id, from_failure=True)
    assert ran(data_root, again.run_id) == KEYS[2:]
    assert sorted_keys(again) == KEYS


def test_a_thread_that_cannot_be_started_ends_the_other_tasks(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pool(ThreadPoolExecutor):
        def submit(self, call: Any, /, *args: Any, **options: Any) -> Any:
            if self._threads:
                raise RuntimeError("can't start new thread")
            return super().submit(call, *args, **options)

    monkeypatch.setattr(local_run, "ThreadPoolExecutor", Pool)
    workload = "import os, pathlib, time\ntime.sleep(20)\npathlib.Path(os.environ['DATA_ROOT'], 'at its end').touch()"
    outcome = ArrayAsset(tmp_path, workload, JobArray()).run(FIRST, LAST)
    assert "can't start new thread" in outcome.error
    assert not (data_root / "at its end").exists()


def test_a_step_has_one_array_of_its_partitions(tmp_path: Path) -> None:
    asset = ArrayAsset(tmp_path, REPORTS, JobArray())

    @dg.asset(partitions_def=DAYS, backfill_policy=dg.BackfillPolicy.single_run())
    def twice(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        for _ in range(2):
            done = compute.run(
                context,
                workload=tmp_path / "workloads" / "workload.py",
                launcher=ScriptLauncher(),
                array=asset.array,
            )
        return done.get_materialize_result()

    result = dg.materialize(
        [twice], resources={"compute": ComputeResource.of(PROJECT)}, partition_key=FIRST, raise_on_error=False
    )
    data = result.failure_data_for_node("twice")
    assert data
    assert data.user_failure_data
    assert "Make a separate asset for each call." in str(data.user_failure_data.description)
