"""What a run costs on the machine that Dagster runs on while its Slurm job waits: by each run launcher, in one run.

    PYTHONPATH=tests ../../.venv/bin/python -m benchmarks.runs [--runs 10] [--many 200]

As root, in `packages/dagster-sbatch`. A real `dagster dev` launches the runs; each submits a job to the simulated site
and follows it. What is measured is each run's process once all runs follow their jobs: its private memory (USS: what no
other process shares) and the CPU time since its start, connecting and submitting included. `--many` runs are launched
with the forking launcher alone; the total is the PSS of all processes of Dagster, in which shared memory counts once.
"""

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import dagster as dg
import psutil
from rich.console import Console
from rich.table import Table

from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite
from support.dagster_dev import DagsterDev, beside_location, wait_for

SITE_NAME = "benchmark"
CONSOLE = Console(width=120)
LOCATION = """\
from pathlib import Path
import dagster as dg
from dagster_sbatch import ComputeResource, ScriptLauncher, SlurmRequest
from resources import build_resources

@dg.asset
def waiter(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    request = SlurmRequest(time_limit="60", mem="1G")
    workload = Path(__file__).parent / "waiting" / "waiter.py"
    return compute.run(context, workload=workload, launcher=ScriptLauncher(), request=request).get_materialize_result()

defs = dg.Definitions(assets=[waiter], resources=build_resources(), executor=dg.in_process_executor)
"""
WAITER = """\
import time
from dagster_pipes import open_dagster_pipes
with open_dagster_pipes():
    time.sleep(3600)
"""
LAUNCHERS = {"Dagster's default": "{module: dagster, class: DefaultRunLauncher}", "forking": ""}
"""What stands in dagster.yaml instead of the project's own run launcher; empty: that one."""


@dataclass(frozen=True)
class Costs:
    """Of waiting runs.

    Attributes:
        private: MB of each run's process.
        cpu: seconds of each run's process since its start.
        total: MB of all processes of Dagster, the runs included.
        seconds: from the first launch until all runs follow their jobs.
    """

    private: list[float]
    cpu: list[float]
    total: float
    seconds: float


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, metavar="N", help="runs by each launcher (default: 10)")
    parser.add_argument("--many", type=int, default=0, metavar="N", help="further runs by the forking one (default: 0)")
    asked = parser.parse_args()
    SimulatedSite.down(SITE_NAME)
    site = SimulatedSite.up(SITE_NAME, install=True)
    try:
        measured = {name: _measure(site, text, asked.runs) for name, text in LAUNCHERS.items()}
        if asked.many:
            measured[f"forking, {asked.many} runs"] = _measure(site, "", asked.many)
    finally:
        SimulatedSite.down(SITE_NAME)
    table = Table("", "private per run", "CPU per run", "all of Dagster", "all runs wait after")
    for name, costs in measured.items():
        private, cpu = statistics.median(costs.private), statistics.median(costs.cpu)
        memory = f"{private:.1f} MB (at most {max(costs.private):.1f})"
        table.add_row(name, memory, f"{cpu:.2f} s", f"{costs.total / 1000:.2f} GB", f"{costs.seconds:.0f} s")
    CONSOLE.print(table)


def _measure(site: SimulatedSite, launcher: str, runs: int) -> Costs:
    with TemporaryDirectory() as folder, _dagster(site, Path(folder), launcher, runs) as server:
        before = len(_jobs(site))
        begun = time.monotonic()
        ids = [server.launch("waiter", location="waiting") for _ in range(runs)]
        wait_for(lambda: len(_jobs(site)) == before + runs, 60 + 5 * runs, "every run has its job")
        seconds = time.monotonic() - begun
        time.sleep(5)  # the last ones read the state of their jobs
        workers = _workers(server, ids)
        dagster = [each for each in psutil.process_iter() if _is_dagster(each)]
        costs = Costs(
            [worker.memory_full_info().uss / 1e6 for worker in workers],
            [sum(worker.cpu_times()[:2]) for worker in workers],
            sum(each.memory_full_info().pss for each in dagster) / 1e6,
            seconds,
        )
        site.run_on_login(CERTIFICATE_USER, "scancel --me")
        psutil.wait_procs(workers, timeout=60 + 5 * runs)  # `dagster dev` stops at once without runs
        return costs


def _jobs(site: SimulatedSite) -> list[str]:
    return site.squeue("--noheader", "--format=%i").split()


def _workers(server: DagsterDev, ids: list[str]) -> list[psutil.Process]:
    os.chdir(server.folder)  # its history lies relative to it
    with dg.DagsterInstance.from_config(str(server.folder)) as instance:
        started = [instance.all_logs(run_id, of_type=dg.DagsterEventType.RUN_START)[0] for run_id in ids]
    os.chdir("/")
    return [psutil.Process(entry.get_dagster_event().pid) for entry in started]


def _is_dagster(process: psutil.Process) -> bool:
    try:
        return process.environ().get("BENCHMARK_OF_RUNS") == str(os.getpid())
    except psutil.Error:
        return False


@contextmanager
def _dagster(site: SimulatedSite, folder: Path, launcher: str, runs: int) -> Iterator[DagsterDev]:
    """Yield a `dagster dev` with that launcher."""
    (folder / "home" / ".ssh").mkdir(parents=True)
    shutil.copy(site.login.known_hosts, folder / "home" / ".ssh" / "known_hosts")
    (folder / "waiting").mkdir()
    (folder / "waiting" / "waiter.py").write_text(WAITER)
    (folder / "location.py").write_text(LOCATION)
    variables = {**site.environment(), "HOME": str(folder / "home"), "BENCHMARK_OF_RUNS": str(os.getpid())}
    variables["DATA_ROOT"] = f"{CERTIFICATE_USER.home}/data"
    with beside_location(
        folder / "location.py", folder / "project", variables, "waiting", lambda text: _adapt(text, launcher, runs)
    ) as server:
        yield server


def _adapt(text: str, launcher: str, runs: int) -> str:
    """Return the text of dagster.yaml with another launcher, and with room for that many runs."""
    lines = [line for line in text.splitlines() if "max_concurrent_runs" not in line and "granularity" not in line]
    lines[lines.index("concurrency:")] = (
        f"concurrency: {{pools: {{granularity: op, default_limit: {runs}}}, runs: {{max_concurrent_runs: {runs}}}}}"
    )
    if launcher:
        begin = lines.index("run_launcher:")
        lines[begin : begin + 4] = [f"run_launcher: {launcher}"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
