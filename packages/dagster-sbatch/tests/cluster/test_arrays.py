"""Arrays on the simulated site: a task per partition, partial success, adoption, faults of tasks, limits."""

import json
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from dagster_sbatch import JobArray, SlurmRequest
from slurm_in_a_box import CERTIFICATE_USER, CPU_PARTITION, SimulatedSite, wait_until
from support.array_asset import DAYS, ArrayAsset
from support.array_process import ArrayProcess
from support.background import STRESS, go_on, nobody_left, runs_there
from support.forked import Forked
from support.step import kill

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("on_supercomputer")]

FIRST, LAST = "2013-01-01", "2013-01-12"
KEYS = DAYS.get_partition_keys()
TWO_FAIL = """
import os, pathlib, sys
key, fixed = pipes.partition_key, pathlib.Path.home().joinpath("fixed").exists()
assert pipes.extras["partition_keys"] == [key]
print(f"line of {key}")
pathlib.Path(f"begun-{key}").touch()
if key == "2013-01-07" and not fixed:
    print("this is why", file=sys.stderr)
    raise ValueError(f"no weather on {key}")
if key == "2013-01-09" and not fixed:
    pipes.report_custom_message({"musica.partition": {"partition": "2013-01-01"}})
pipes.report_asset_materialization(metadata={"day": key})
"""


@pytest.fixture
def variables(on_supercomputer: dict[str, str]) -> dict[str, str]:
    """For processes of their own."""
    return {"PATH": os.environ["PATH"], **on_supercomputer}


def tasks_there(site: SimulatedSite) -> dict[str, list[str]]:
    """The names of the tasks of each run directory."""
    found = {}
    for run in runs_there(site):
        record = site.run_on_login(CERTIFICATE_USER, f"cat dagster-slurm/runs/{run}/submitted_with.json").stdout
        found[run] = [task["name"] for task in json.loads(record)["tasks"]]
    return found


@pytest.mark.smoke
def test_two_of_twelve_fail_and_run_again_alone(
    site: SimulatedSite, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One ends well, and its report is rejected. The limit per run counts the tasks that are submitted."""
    asset, failed = ArrayAsset(tmp_path, TWO_FAIL, JobArray()), ["2013-01-07", "2013-01-09"]
    monkeypatch.setenv("SLURM_MOST_NODE_HOURS_PER_RUN", "11.9")
    refused = asset.run(FIRST, LAST)
    assert "could cost 12 node-hours (12 tasks x 1 node x 01:00:00)" in refused.error
    assert runs_there(site) == []
    monkeypatch.setenv("SLURM_MOST_NODE_HOURS_PER_RUN", "12")
    first = asset.run(FIRST, LAST)
    assert not first.success
    assert sorted(str(key) for key in first.once) == [key for key in KEYS if key not in failed], first.error
    assert "1 task (2013-01-07): workload.py raised ValueError: no weather on 2013-01-07" in first.error
    assert "this is why" in first.error
    rejection = "what workload.py reported cannot be used: the partition '2013-01-01' is not of this task"
    assert f"1 task (2013-01-09): {rejection}" in first.error
    (job,) = {metadata["job_id"].partition("_")[0] for metadata in first.once.values()}
    assert f"Logs: scripts/job {job}_6 logs" in first.error
    for place, key in enumerate(KEYS):
        if key in first.once:
            metadata = first.once[key]
            assert (metadata["day"], metadata["job_id"]) == (key, f"{job}_{place}")
            assert metadata["run_directory"].endswith(f"/tasks/{place}")
            assert metadata["node_hours"] >= 0
    assert "[2013-01-03] line of 2013-01-03\n" in capfd.readouterr().out
    site.run_on_login(CERTIFICATE_USER, "touch fixed")
    monkeypatch.setenv("SLURM_MOST_NODE_HOURS_PER_RUN", "2")
    second = asset.run(FIRST, LAST, of=first.run_id, from_failure=True)
    assert second.error == ""
    assert sorted(str(key) for key in second.once) == KEYS
    assert {key: metadata["day"] for key, metadata in second.once.items()} == {key: key for key in KEYS}
    assert second.once["2013-01-01"]["job_id"] == f"{job}_0"
    assert sorted(tasks_there(site).values(), key=len) == [failed, KEYS]
    nobody_left(site)


# The step's process ends before its tasks


SIX = "2013-01-06"
HALF_WAITS = f"""
import pathlib, time
home = pathlib.Path("{CERTIFICATE_USER.home}")
with (home / f"count-{{pipes.partition_key}}").open("a") as count:
    count.write("once\\n")
print("begun", flush=True)
while pipes.partition_key > "2013-01-03" and not (home / "go-on").exists():
    time.sleep(0.1)
print("ended", flush=True)
pipes.report_asset_materialization(metadata={{"day": pipes.partition_key}})
"""


def each_ran_once(site: SimulatedSite, keys: Sequence[str]) -> None:
    text = site.run_on_login(CERTIFICATE_USER, "grep -c once count-*").stdout.split()
    assert sorted(text) == [f"count-{key}:1" for key in keys]


def half_is_over(site: SimulatedSite) -> bool:
    """Three tasks have recorded their ends, and three run."""
    events = site.run_on_login(CERTIFICATE_USER, "cat dagster-slurm/runs/*/tasks/*/events", check=False).stdout
    return (events.count('"started"'), events.count('"code": 0')) == (6, 3)


def test_after_a_kill_tasks_that_run_are_followed_and_results_of_the_others_are_used(
    site: SimulatedSite, tmp_path: Path, variables: dict[str, str]
) -> None:
    asset = ArrayProcess(tmp_path / "asset", variables, HALF_WAITS, FIRST, SIX)
    process = asset.start()
    wait_until(lambda: half_is_over(site), "three tasks are over", 90)
    kill(process)
    process = asset.start(of=asset.runs()[0], from_failure=True)
    wait_until(lambda: "attaching to 3, and using the results of 3 that have ended" in asset.log, "adopted", 90)
    go_on(site)
    outcome = asset.outcome(process)
    assert outcome.error == ""
    assert {key: metadata["day"] for key, metadata in outcome.once.items()} == {key: key for key in KEYS[:6]}
    for key in KEYS[:6]:
        lines = [line for line in asset.output.splitlines() if line.startswith(f"[{key}]")]
        assert lines == [f"[{key}] begun", f"[{key}] ended"]
    each_ran_once(site, KEYS[:6])
    assert len(tasks_there(site)) == 1
    again = asset.outcome(asset.start(of=outcome.run_id))  # all is stored now: everything runs again
    assert again.error == ""
    assert len(tasks_there(site)) == 2
    nobody_left(site)


def test_tasks_that_have_read_older_data_run_again(
    site: SimulatedSite, tmp_path: Path, variables: dict[str, str]
) -> None:
    """One of them has ended, the other one runs."""
    asset = ArrayProcess(tmp_path / "asset", variables, HALF_WAITS, FIRST, SIX)
    asset.renew_readings(*KEYS)
    process = asset.start()
    wait_until(lambda: half_is_over(site), "three tasks are over", 90)
    kill(process)
    newer = ["2013-01-02", "2013-01-05"]
    asset.renew_readings(*newer, "2013-01-09")
    process = asset.start(of=asset.runs()[0], from_failure=True)
    wait_until(lambda: "attaching to 2, and using the results of 2 that have ended" in asset.log, "adopted", 90)
    wait_until(lambda: "needs with other values or newer data (2013-01-05)" in asset.log, "one is cancelled", 90)
    go_on(site)
    outcome = asset.outcome(process)
    assert outcome.error == ""
    assert sorted(str(key) for key in outcome.once) == KEYS[:6]
    assert sorted(tasks_there(site).values(), key=len) == [newer, KEYS[:6]]
    nobody_left(site)


def test_a_task_that_was_adopted_and_requests_a_retry_runs_again(
    site: SimulatedSite, tmp_path: Path, variables: dict[str, str]
) -> None:
    """No environment was needed until then. It does not wait for the other task, which here waits for it."""
    workload = f"""
    import pathlib, sys, time
    home = pathlib.Path.home()
    first = pipes.partition_key == "{FIRST}"
    while not (home / ("go-on" if first else "again")).exists():
        time.sleep(0.1)
    if first and not (home / "tried").exists():
        (home / "tried").touch()
        sys.exit(75)
    (home / "again").touch()
    pipes.report_asset_materialization(metadata={{"day": pipes.partition_key}})
    """
    asset = ArrayProcess(tmp_path / "asset", variables, workload, FIRST, "2013-01-02")
    asset.array = {"max_running_tasks": 2}
    process = asset.start()
    wait_until(lambda: "2 tasks: 0 done, 2 running" in asset.log, "both run", 90)
    kill(process)
    process = asset.start(of=asset.runs()[0], from_failure=True)
    wait_until(lambda: "attaching to 2" in asset.log, "adopted", 90)
    go_on(site)
    outcome = asset.outcome(process)
    assert outcome.error == ""
    assert sorted(str(key) for key in outcome.once) == KEYS[:2]
    assert sorted(tasks_there(site).values(), key=len) == [[FIRST], KEYS[:2]]


def test_interrupted_by_a_person_all_tasks_are_cancelled_and_complete_partitions_are_kept(
    site: SimulatedSite, tmp_path: Path, variables: dict[str, str]
) -> None:
    asset = ArrayProcess(tmp_path / "asset", variables, HALF_WAITS, FIRST, SIX)
    process = asset.start()
    wait_until(lambda: asset.output.count("ended") == 3, "three tasks are over", 90)
    wait_until(lambda: "6 tasks: 3 done, 3 running" in asset.log, "their ends are known", 60)
    process.send_signal(signal.SIGINT)
    outcome = asset.outcome(process)
    assert not outcome.success
    assert sorted(str(key) for key in outcome.once) == KEYS[:3]
    assert site.squeue("--noheader", f"--user={CERTIFICATE_USER.name}") == ""
    go_on(site)
    again = asset.outcome(asset.start(of=outcome.run_id, from_failure=True))
    assert again.error == ""
    assert sorted(str(key) for key in again.once) == KEYS[:6]
    assert sorted(tasks_there(site).values(), key=len) == [KEYS[3:6], KEYS[:6]]


# Faults of tasks, limits of the site


def test_a_task_that_the_machine_ends_is_submitted_again_alone(site: SimulatedSite, tmp_path: Path) -> None:
    """Exit code 75 counts as a fault of the machine, as a failed node does; the fourth time it is final."""
    workload = """
    import pathlib, sys
    tries = pathlib.Path.home() / f"tries-{pipes.partition_key}"
    with tries.open("a") as file:
        file.write(".")
    number = len(tries.read_text())
    pipes.log.info(f"try {number}")
    if pipes.partition_key == "2013-01-02" and number <= 1 or pipes.partition_key == "2013-01-03":
        sys.exit(75)
    pipes.report_asset_materialization(metadata={"tries": number})
    """
    outcome = ArrayAsset(tmp_path, workload, JobArray()).run(FIRST, "2013-01-04")
    assert "1 of 4 tasks failed" in outcome.error
    assert "1 task (2013-01-03): it requests a retry (exit code 75)" in outcome.error
    assert {key: metadata["tries"] for key, metadata in outcome.once.items()} == {
        FIRST: 1, "2013-01-02": 2, "2013-01-04": 1,
    }  # fmt: skip
    submitted = Counter(name for names in tasks_there(site).values() for name in names)
    assert submitted == {FIRST: 1, "2013-01-02": 2, "2013-01-03": 4, "2013-01-04": 1}


def test_a_task_on_a_node_that_fails_and_one_that_is_preempted_run_again_alone(
    site: SimulatedSite, tmp_path: Path, variables: dict[str, str]
) -> None:
    """The step submits the first one, since Slurm does not put it back into the queue. Slurm runs the second one."""
    workload = """
import os, pathlib, time
begun = pathlib.Path.home() / f"begun-{os.environ['SLURM_JOB_QOS']}-{pipes.partition_key}"
again = begun.exists()
begun.touch()
if pipes.partition_key == "2013-01-02" and not again:
    time.sleep(3600)
pipes.report_asset_materialization(metadata={"again": again})
"""
    common, idle = {"time_limit": "00:30:00", "cpus_per_task": 100}, f"idle_{CPU_PARTITION}"  # more than half a node
    requests = {CPU_PARTITION: {**common, "options": ["--no-requeue"]}, idle: {**common, "qos": idle}}
    assets = {}
    for qos, request in requests.items():
        assets[qos] = ArrayProcess(tmp_path / qos, variables, workload, FIRST, "2013-01-04")
        assets[qos].request = request
    processes: dict[str, Forked] = {}

    def active() -> dict[str, list[str]]:
        """Job and node of the only task of each asset that is not over."""
        rows = site.squeue("--noheader", "--array", "--states=R,CF,CG,PD", "--format=%q %A %N").splitlines()
        return {row.split()[0]: row.split()[1:] for row in rows} if len(rows) == len(processes) else {}

    begun = "ls begun-*-2013-01-02 | wc -l"
    for qos, asset in assets.items():  # one after the other: tasks of the first would preempt those of the second
        processes[qos] = asset.start()
        wait_until(lambda: int(site.run_on_login(CERTIFICATE_USER, begun).stdout) == len(processes), "it has begun", 90)
        wait_until(active, "the others are over", 60)
    tasks = active()
    with site.faults.preemption(int(tasks[idle][0])), site.faults.node_down(tasks[CPU_PARTITION][1]):
        outcomes = {qos: asset.outcome(processes[qos]) for qos, asset in assets.items()}
    for outcome in outcomes.values():
        assert outcome.error == ""
        assert {key: metadata["again"] for key, metadata in outcome.once.items()} == {
            FIRST: False, "2013-01-02": True, "2013-01-03": False, "2013-01-04": False,
        }  # fmt: skip
    assert any("NODE_FAIL" in line and "it is submitted again" in line for line in outcomes[CPU_PARTITION].log)
    assert sorted(tasks_there(site).values(), key=len) == [["2013-01-02"], KEYS[:4], KEYS[:4]]

    def states() -> list[str]:
        return site.sacct("--duplicates", "-XnP", f"--jobs={tasks[idle][0]}", "--format=State").split()

    wait_until(lambda: states() == ["PREEMPTED", "COMPLETED"], "the accounting has both")


def test_a_range_longer_than_the_submit_limit_is_several_array_jobs(site: SimulatedSite, tmp_path: Path) -> None:
    """The others are submitted when there is room."""
    limit = ["sacctmgr", "-i", "modify", "qos", "zen4_0768", "set"]
    site.cluster.query(*limit, "MaxSubmitJobsPerUser=8")
    asset = ArrayAsset(tmp_path, "pipes.report_asset_materialization()", JobArray())
    try:
        outcome = asset.run(FIRST, LAST)
        asset.array = JobArray(max_running_tasks=9)
        refused = asset.run(FIRST, LAST)
    finally:
        site.cluster.query(*limit, "MaxSubmitJobsPerUser=-1")
    assert outcome.error == ""
    assert sorted(str(key) for key in outcome.once) == KEYS
    assert sorted(map(len, tasks_there(site).values())) == [2] * 6
    assert "is more than you may have submitted at once: 8 jobs" in refused.error
    assert "JobArray(max_running_tasks=8)" in refused.error


def test_an_array_that_slurm_refuses(site: SimulatedSite, tmp_path: Path) -> None:
    request = SlurmRequest(constraint="nosuch")
    outcome = ArrayAsset(tmp_path, "pass", JobArray(), request=request).run(FIRST, LAST)
    assert "12 of 12 tasks failed" in outcome.error
    assert "refused on the supercomputer: " in outcome.error
    assert "Invalid feature specification" in outcome.error


def test_results_by_name_are_adopted_by_a_retry(site: SimulatedSite, tmp_path: Path) -> None:
    """Dagster can store no part of them: what has succeeded is kept on the supercomputer."""
    workload = """
    import pathlib
    home, name = pathlib.Path.home(), pipes.extras["name"]
    with (home / f"count-{name}").open("a") as count:
        count.write("once\\n")
    if name == "b" and not (home / "fixed").exists():
        raise ValueError
    pipes.report_asset_materialization(metadata={"name": name})
    """
    sets = {name: {"name": name} for name in "abc"}
    asset = ArrayAsset(tmp_path, workload, JobArray(tasks=sets), partitions=None)
    first = asset.run()
    assert "1 of 3 tasks failed" in first.error
    site.run_on_login(CERTIFICATE_USER, "touch fixed")
    second = asset.run(of=first.run_id, from_failure=True)
    assert second.error == ""
    assert list(asset.completed[-1].tasks) == ["a", "b", "c"]
    counts = site.run_on_login(CERTIFICATE_USER, "grep -c once count-*").stdout.split()
    assert counts == ["count-a:1", "count-b:2", "count-c:1"]


# Random kills


LINES = 20
COUNTS = f"""
import pathlib, time
home = pathlib.Path("{CERTIFICATE_USER.home}")
with (home / f"count-{{pipes.partition_key}}").open("a") as count:
    count.write("once\\n")
for number in range({LINES}):
    print(f"line {{number}}", flush=True)
    time.sleep(0.1)
pipes.report_asset_materialization(metadata={{"day": pipes.partition_key}})
"""


@pytest.mark.timeout(3600 if STRESS else 600)
@pytest.mark.parametrize("kills", [100 if STRESS else 5])
def test_kills_at_random_moments(kills: int, site: SimulatedSite, tmp_path: Path, variables: dict[str, str]) -> None:
    """Of Dagster, of the connection, of tasks: a task runs again only if it was killed; nothing is lost or doubled."""
    for number, some in enumerate(range(0, kills, 5)):
        site.run_on_login(CERTIFICATE_USER, "rm -f count-*")
        asset = ArrayProcess(tmp_path / f"asset-{number}", variables, COUNTS, FIRST, LAST)
        asset.array = random.choice([{}, {"max_running_tasks": 5}])
        process, cancelled, begun, again = asset.start(), 0, 1, 0
        for _ in range(some, min(some + 5, kills)):
            threading.Event().wait(random.uniform(0.5, 9))
            fault = random.choice(["connection", "dagster", "task"])
            tasks = site.squeue("--noheader", "--array", "--format=%i").split() if fault == "task" else []
            if tasks:
                site.run_on_login(CERTIFICATE_USER, f"scancel {random.choice(tasks)}")
                cancelled += 1
            elif fault == "connection":
                site.faults.drop_connections()
            elif process.poll() is None:
                kill(process)
                before = latest(asset)
                begun += asset.step_succeeded(before)  # Dagster would not run it again; if asked to, all tasks run
                again += asset.half_stored(before)
                process = asset.start(of=before, from_failure=True)
        outcome = asset.outcome(process)
        for _ in range(cancelled):
            if not outcome.success:
                assert "cancelled on the cluster" in outcome.error
                outcome = asset.outcome(asset.start(of=outcome.run_id, from_failure=True))
        assert outcome.error == "", asset.log
        assert sorted(str(key) for key in outcome.once) == KEYS
        for key in KEYS:
            lines = [line for line in asset.output.splitlines() if line.startswith(f"[{key}]")]
            assert lines in ([], [f"[{key}] line {line}" for line in range(LINES)]), asset.log
        counted = site.run_on_login(CERTIFICATE_USER, "grep -c once count-*").stdout.split()
        runs = {line.rpartition(":")[0]: int(line.rpartition(":")[2]) for line in counted}
        assert sorted(runs) == [f"count-{key}" for key in KEYS]
        assert sum(runs.values()) <= begun * len(KEYS) + cancelled + again
    nobody_left(site)


def latest(asset: ArrayProcess) -> str | None:
    """The latest run, if Dagster has stored one before it was killed."""
    runs = asset.runs()
    return runs[0] if runs else None
