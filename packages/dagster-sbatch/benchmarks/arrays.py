"""What an array job costs beside its tasks: 1,000 empty tasks by a gateway beside `sbatch --array` by hand.

    ../../.venv/bin/python -m benchmarks.arrays [--tasks 1000] [--rounds 2]

As root. Both are measured in turns in one run, on the simulated site, whose nodes share the cores of this machine. The
floor submits as many equally empty tasks, and waits for the last one's file. Both let as many run at once, and write
stdout and stderr to files. What counts are the ratio and the numbers that are counted; docs/performance.md has a table
of them.
"""

import argparse
import statistics
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.slurm import RUNS, SITE, prepare
from dagster_sbatch.auth import ensure_certificate
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import ArrayShape, SlurmRequest, allocate, render_job_script
from dagster_sbatch.slurm.gateway import (
    Gateway,
    JobEnd,
    JobHandler,
    JobToFollow,
    OpenChannel,
    choose_channel,
    follow_jobs,
)
from dagster_sbatch.slurm.gateway.channel import Channel
from slurm_in_a_box import SimulatedSite

SITE_NAME = "benchmark-arrays"
AT_ONCE = 32
"""Tasks that run at once: more overload the two cores, and Slurm starts some of them again."""
FEW = 10
SAMPLE_SECONDS = 2.0
CONSOLE = Console(width=120)


class _Measured(JobHandler):
    """Keeps the states of the tasks of one array job, and nothing else."""

    def __init__(self, run: JobToFollow) -> None:
        self.next: JobToFollow | None = run
        self.states: dict[tuple[str, int], str] = {}

    def take(self) -> JobToFollow | None:
        run, self.next = self.next, None
        return run

    def waiting(self, run: str, text: str) -> None:
        raise SystemExit(f"{run}: {text}")

    def ended(self, run: str, task: int, end: JobEnd) -> None:
        self.states[run, task] = end.state


class _Watch:
    """Samples this process's memory, and the agents on the login node."""

    def __init__(self, site: SimulatedSite) -> None:
        self.memory, self.agents, self.agent_cpu, self.agent_memory = 0, 0, 0.0, 0.0
        self._site, self._over = site, threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        own, over = psutil.Process(), False
        while not over:
            over = self._over.wait(SAMPLE_SECONDS)
            self.memory = max(self.memory, own.memory_info().rss)
            found = [
                each
                for each in self._site.processes_on_login()
                if "zlib" in each.command and "-u" in each.command.split()[:6]
            ]
            self.agents = max(self.agents, len(found))
            for each in found:
                shown = self._site.run_on_node(
                    each.machine, f"cat /proc/{each.pid}/stat /proc/{each.pid}/status", check=False
                )
                if shown.returncode == 0:
                    fields = shown.stdout.partition(") ")[2].split()
                    self.agent_cpu = max(self.agent_cpu, (int(fields[11]) + int(fields[12])) / 100)
                    peak = shown.stdout.partition("VmHWM:")[2].split()
                    self.agent_memory = max(self.agent_memory, int(peak[0]) / 1000)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=1000, metavar="N", help="tasks of an array job (default: 1000)")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="array jobs of each kind (default: 2)")
    asked = parser.parse_args()
    SimulatedSite.down(SITE_NAME)
    site = SimulatedSite.up(SITE_NAME, install=True)
    try:
        with TemporaryDirectory() as home:
            _measure(site, prepare(site, Path(home)), asked.tasks, asked.rounds)
    finally:
        SimulatedSite.down(SITE_NAME)


def _measure(site: SimulatedSite, settings: Settings, tasks: int, rounds: int) -> None:
    channel, opened = choose_channel(settings, SITE.python_candidates, ensure_certificate), 0

    def count() -> Channel:
        nonlocal opened
        opened += 1
        return channel()

    with _Watch(site) as few:
        _run(count, FEW)
    ours, floor, calls, opened = [], [], 0, 0
    with _Watch(site) as many:
        for _ in range(rounds):
            floor.append(_seconds(lambda: _by_hand(site, tasks)))
            begun = time.perf_counter()
            calls += _run(count, tasks)
            ours.append(time.perf_counter() - begun)
    table = Table("measure", "value")
    ratio = statistics.median(ours) / statistics.median(floor)
    for name, value in {
        f"{tasks} empty tasks, from submission to the end": f"{statistics.median(ours):.1f} s",
        "the floor": f"{statistics.median(floor):.1f} s",
        "ratio": f"{ratio:.2f}",
        f"growth of this process's memory from {FEW} to {tasks} tasks": f"{(many.memory - few.memory) / 1e6:.1f} MB",
        "agents on the login node": str(many.agents),
        "CPU time of an agent": f"{many.agent_cpu:.1f} s",
        "memory of an agent": f"{many.agent_memory:.1f} MB",
        "squeue calls per minute": f"{60 * calls / sum(ours):.1f}",
        "SSH connections, each with one channel, per array job": f"{opened / rounds:.0f}",
    }.items():
        table.add_row(name, value)
    CONSOLE.print(table)
    CONSOLE.print("each round:", *(f"{one:.1f}/{other:.1f} s" for one, other in zip(ours, floor, strict=True)))


def _run(open_channel: OpenChannel, tasks: int) -> int:
    """Run an array job by a gateway; return how often squeue was called."""
    key = f"array{time.time_ns()}-1"
    request = allocate(SlurmRequest(time_limit="5"), SITE, qos="zen4_0768").request
    script = render_job_script(
        request, SITE, job_name=key, about={}, environment={}, body="true", array=ArrayShape(tasks, AT_ONCE)
    )
    files: dict[str, str] = {
        "job.sh": script,
        "context.head": "{",
        "tasks.jsonl": "}\n" * tasks,
        "tasks.pipes": "context messages\n" * tasks,
    }
    gateway = Gateway(open_channel)
    try:
        before = gateway.queue(RUNS)["calls"]
        arrays = _Measured(JobToFollow(f"{RUNS}/{key}", files, range(tasks)))
        follow_jobs(gateway, arrays, "benchmark")
        ends = Counter(arrays.states.values())
        if ends != {"COMPLETED": tasks}:
            raise SystemExit(f"tasks did not end as they should: {ends}")
        return int(gateway.queue(RUNS)["calls"]) - int(before)
    finally:
        gateway.close()


def _by_hand(site: SimulatedSite, tasks: int) -> None:
    """Submit as many empty tasks, and wait for the file of the last one: a person's script of three lines."""
    folder = f"floor-{time.time_ns()}"
    script = f"#!/bin/bash\n#ASC --vanilla\ntrue\ntouch {folder}/end-$SLURM_ARRAY_TASK_ID\n"
    options = f"--array=0-{tasks - 1}%{AT_ONCE} -p zen4_0768 --qos=zen4_0768 -t 5"
    options += f" -o {folder}/out/%a.stdout -e {folder}/out/%a.stderr"
    wait = f"until [ $(ls {folder} | grep -c end) = {tasks} ]; do sleep 0.1; done"
    command = f"set -e; mkdir -p {folder}/out; sbatch {options} <<'E'\n{script}E\n{wait}"
    subprocess.run(site.login_command(command), capture_output=True, check=True)


def _seconds(function: Callable[[], object]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
