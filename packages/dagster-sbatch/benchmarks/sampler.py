"""What the sampler of a job costs: CPU time of its process, in percent of one core, over some minutes.

    ../../.venv/bin/python -m benchmarks.sampler [--minutes 5] [--processes 200]

It runs as in a job without cgroups, which costs most: it then reads the processes of the machine. So many of them
belong to the job, and sleep. With a GPU, nvidia-smi is a process of its own: its CPU time is not among this.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

import dagster_sbatch

BAR_PERCENT = 0.2
JOB = "4711"
PROGRAM = Path(dagster_sbatch.__file__).parent / "slurm" / "job" / "sampler.py"


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long (default: 5)")
    parser.add_argument("--processes", type=int, default=200, help="of the job (default: 200)")
    asked = parser.parse_args()
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": JOB}
    members = [subprocess.Popen(["sleep", "86400"], env=environment) for _ in range(asked.processes)]
    command = [sys.executable, "-B", "-E", "-s", "-S", str(PROGRAM), "job", "1", "0"]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        seconds, memory = _measure(psutil.Process(process.pid), 60 * asked.minutes)
    finally:
        for each in members:
            each.kill()
            each.wait()
        process.communicate()
    percent = 100 * seconds / (60 * asked.minutes)
    table = Table("processes of the job", "of the machine", "minutes", "CPU time", "of one core", "bar", "memory")
    table.add_row(
        str(asked.processes),
        str(len(psutil.pids())),
        f"{asked.minutes:g}",
        f"{seconds:.2f} s",
        f"{percent:.3f} %",
        f"{BAR_PERCENT} %",
        f"{memory / (1 << 20):.1f} MiB",
    )
    Console(width=120).print(table)


def _measure(process: psutil.Process, seconds: float) -> tuple[float, int]:
    """Return the CPU time of a process from its start until so many seconds later, and its memory then, in bytes."""
    time.sleep(seconds)
    times = process.cpu_times()
    return times.user + times.system, process.memory_info().rss


if __name__ == "__main__":
    main()
