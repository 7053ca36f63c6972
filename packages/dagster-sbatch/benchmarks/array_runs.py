"""What a whole Dagster run with an array costs: memory, Dagster's own events, and re-execution from failure.

    ../../.venv/bin/python -m benchmarks.array_runs [--tasks 1000]

As root, in `packages/dagster-sbatch`. An asset with one static partition per task runs on the simulated site, 32 tasks
at once; each task is a Python that opens a Pipes session and reports a number. Seven fail, and the run is re-executed
from failure. Each run has a process of its own, which executes the step itself. Before that, ten tasks do the same. The
times come from Dagster's event log, the number of submitted tasks from sacct. `benchmarks.arrays` compares an array job
with `sbatch --array` by hand; docs/performance.md has both tables.
"""

import argparse
import multiprocessing
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import dagster as dg
import psutil
from rich.table import Table

from benchmarks.arrays import AT_ONCE, CONSOLE, FEW
from benchmarks.slurm import prepare
from dagster_sbatch import ComputeResource, JobArray, ScriptLauncher, SlurmRequest
from resources import build_resources
from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite, wait_until

SITE_NAME = "benchmark-array-runs"
FAILED = 7
WORKLOAD = """\
from pathlib import Path
from dagster_pipes import open_dagster_pipes
with open_dagster_pipes() as pipes:
    if pipes.partition_key in pipes.extras["failing"] and not Path.home().joinpath("fixed").exists():
        raise ValueError("not yet")
    pipes.report_asset_materialization(metadata={"number": 1})
"""
SAMPLE_SECONDS = 0.5
KINDS = dg.DagsterEventType


@dataclass(frozen=True)
class Run:
    """A run that is over.

    Attributes:
        run_id: of Dagster.
        success: of the run.
        before: private memory of its process before it was created, in bytes.
        peak: the most private memory of its process.
    """

    run_id: str
    success: bool
    before: int
    peak: int


@dataclass(frozen=True)
class Times:
    """Of a run, in seconds, by Dagster's event log.

    Attributes:
        created: for storing the run, with one event per partition; the UI or the daemon does it in most runs.
        started: when Dagster started to execute the run, since 1970.
        executed: from then to its end.
        stored: of that, for the materializations that Dagster makes after the asset has returned.
    """

    created: float
    started: float
    executed: float
    stored: float


@dataclass(frozen=True)
class Array:
    """A run in which tasks failed, and its re-execution from failure."""

    first: Run
    again: Run
    first_times: Times
    again_times: Times
    submitted: Counter[str]
    seconds: float


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=1000, metavar="N", help="tasks of the array (default: 1000)")
    tasks = parser.parse_args().tasks
    SimulatedSite.down(SITE_NAME)
    site = SimulatedSite.up(SITE_NAME, install=True)
    try:
        with TemporaryDirectory() as home:
            prepare(site, Path(home))
            few, many = _measure(site, Path(home), FEW), _measure(site, Path(home), tasks)
    finally:
        SimulatedSite.down(SITE_NAME)
    table = Table("measure", "run with failed tasks", "re-execution")
    for name, values in {
        f"private memory with {FEW} tasks": [f"{each.peak / 1e6:.1f} MB" for each in (few.first, few.again)],
        f"private memory with {tasks} tasks": [f"{each.peak / 1e6:.1f} MB" for each in (many.first, many.again)],
        "of it before the run": [f"{each.before / 1e6:.1f} MB" for each in (many.first, many.again)],
        "growth": [
            f"{(many.first.peak - few.first.peak) / 1e6:.1f} MB",
            f"{(many.again.peak - few.again.peak) / 1e6:.1f} MB",
        ],
        "Dagster stores the run, before it starts": [
            f"{each.created:.1f} s" for each in (many.first_times, many.again_times)
        ],
        "from its start to its end": [f"{each.executed:.1f} s" for each in (many.first_times, many.again_times)],
        "of it Dagster stores materializations, after the asset has returned": [
            "while tasks run",
            f"{many.again_times.stored:.1f} s",
        ],
        "tasks by state (sacct)": ["", ", ".join(f"{number} {state}" for state, number in many.submitted.items())],
        "from its start to their submission": ["", f"{many.seconds:.1f} s"],
    }.items():
        table.add_row(name, *values)
    CONSOLE.print(table)


def _measure(site: SimulatedSite, home: Path, tasks: int) -> Array:
    folder = home / str(tasks)
    (folder / "dagster").mkdir(parents=True)
    (folder / "dagster" / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    (folder / "workloads").mkdir()
    (folder / "workloads" / "task.py").write_text(WORKLOAD)
    site.run_on_login(CERTIFICATE_USER, "rm -f fixed")
    first = _run_in_process(folder, tasks, None)
    submitted = _submitted(site)
    site.run_on_login(CERTIFICATE_USER, "touch fixed")
    again = _run_in_process(folder, tasks, first.run_id)
    if first.success or not again.success:
        raise SystemExit("The runs did not end as they should; their logs are above.")
    runs = site.layout.home / CERTIFICATE_USER.name / "dagster-slurm" / "runs"
    times = _times(folder, again)
    latest = max(path.stat().st_mtime for path in runs.glob("*/tried"))
    return Array(first, again, _times(folder, first), times, _submitted(site) - submitted, latest - times.started)


def _submitted(site: SimulatedSite) -> Counter[str]:
    """Return the tasks that are in the accounting, by state, once all are over."""
    options = ("-XnP", "--array", "--starttime=now-1days", "--format=State")
    wait_until(lambda: not {"PENDING", "RUNNING"} & set(site.sacct(*options).split()), "all tasks are over")
    return Counter(site.sacct(*options).split())


# A run, in a process of its own


def _run_in_process(folder: Path, tasks: int, of: str | None) -> Run:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run, folder, tasks, of).result()


def _run(folder: Path, tasks: int, of: str | None) -> Run:
    """Run all partitions, or re-execute the run `of` from failure."""
    job = dg.build_reconstructable_job(
        "benchmarks.array_runs", "make_job", None, {"folder": str(folder), "tasks": tasks}
    )
    keys = _keys(tasks)
    tags = {"dagster/asset_partition_range_start": keys[0], "dagster/asset_partition_range_end": keys[-1]}
    quiet = {"loggers": {"console": {"config": {"log_level": "WARNING"}}}}
    again = None
    if of:
        tags |= {"dagster/is_resume_retry": "true", "dagster/root_run_id": of}
        again = dg.ReexecutionOptions(parent_run_id=of)
    with (
        dg.DagsterInstance.from_config(str(folder / "dagster")) as instance,
        _Memory() as memory,
        dg.execute_job(job, instance, quiet, tags=tags, raise_on_error=False, reexecution_options=again) as result,
    ):
        return Run(result.run_id, result.success, memory.before, memory.peak)


def make_job(folder: str, tasks: int) -> dg.JobDefinition:
    """Return the job; Dagster calls this."""
    keys, failed = _keys(tasks), min(FAILED, tasks // 2)
    failing = [keys[tasks * number // failed] for number in range(failed)]

    @dg.asset(partitions_def=dg.StaticPartitionsDefinition(keys), backfill_policy=dg.BackfillPolicy.single_run())
    def many(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        return compute.run(
            context,
            workload=Path(folder) / "workloads" / "task.py",
            launcher=ScriptLauncher(),
            request=SlurmRequest(time_limit="5"),
            extras={"failing": failing},
            array=JobArray(max_running_tasks=AT_ONCE),
        ).get_materialize_result()

    job = dg.define_asset_job("all", selection="*", executor_def=dg.in_process_executor)
    return dg.Definitions(assets=[many], jobs=[job], resources=build_resources()).resolve_job_def("all")


def _keys(tasks: int) -> list[str]:
    return [f"{number:05}" for number in range(tasks)]


class _Memory:
    """Samples the private memory of this process (USS: what no other process shares)."""

    def __init__(self) -> None:
        self.before = self.peak = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> "_Memory":
        self.before = _private()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, _private())


def _private() -> int:
    return int(psutil.Process().memory_full_info().uss)


def _times(folder: Path, run: Run) -> Times:
    """Read the times of a run in Dagster's event log."""
    kinds = {KINDS.RUN_START, KINDS.RUN_SUCCESS, KINDS.RUN_FAILURE, KINDS.STEP_OUTPUT, KINDS.STEP_SUCCESS}
    with dg.DagsterInstance.from_config(str(folder / "dagster")) as instance:
        first = instance.get_records_for_run(run.run_id, limit=1, ascending=True).records[0].event_log_entry
        found = instance.get_records_for_run(run.run_id, of_type=kinds).records
    at = {record.event_log_entry.dagster_event_type: record.event_log_entry.timestamp for record in found}
    started = at[KINDS.RUN_START]
    ended = at[KINDS.RUN_SUCCESS if run.success else KINDS.RUN_FAILURE]
    stored = at[KINDS.STEP_SUCCESS] - at[KINDS.STEP_OUTPUT] if run.success else 0.0
    return Times(started - first.timestamp, started, ended - started, stored)


if __name__ == "__main__":
    main()
