"""What a run costs beside its work: a trivial asset on the simulated site beside a bare login, sbatch and wait.

    ../../.venv/bin/python -m benchmarks.slurm [--runs 10]

As root. All are measured in turns in one run, from a random moment between Slurm's own ticks, once directly and once
with 25 ms on the way in each direction. The floor logs in, submits the same sleep, and waits for a file of it: by the
same SSH library, and by ssh(1). Slurm starts a job after 0.1 to 1 s, by its own ticks: that is taken out of each, and
the median of all put back into all before they are compared. What counts are the ratios; docs/performance.md has a
table of them.
"""

import argparse
import json
import logging
import os
import random
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import dagster as dg
import psutil
from rich.console import Console
from rich.table import Table

from dagster_sbatch.auth import ensure_certificate
from dagster_sbatch.launchers import ScriptLauncher
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import SlurmRequest, allocate, render_job_script
from dagster_sbatch.slurm.gateway import Gateway, StoppedError, make_gateway
from dagster_sbatch.ssh import connect
from resources import PROJECT, build_resources
from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite

SITE_NAME = "benchmark"
WORK_SECONDS = 1.0
WORKLOAD = f"""\
import time
from dagster_pipes import open_dagster_pipes
with open_dagster_pipes():
    time.sleep({WORK_SECONDS})
"""
LONGER = 5.0
"""Seconds of work after which the job measures itself: its sampler starts after three."""
MEGABYTES = 100
AT_ONCE = 50
RUNS = f"{CERTIFICATE_USER.home}/dagster-slurm/runs"
SITE = PROJECT.load_site("musica")
CONSOLE = Console(width=120)


@dataclass(frozen=True)
class Times:
    """Of one materialisation, or of the floor, in seconds.

    Attributes:
        overhead: wall time less the workload's own.
        slurm: from sbatch to the job's first word.
        reported: from the job's last word to the asset's; the floor has none.
    """

    overhead: float
    slurm: float
    reported: float = 0.0


@dataclass(frozen=True)
class _Ways:
    """Ours, the floor by two means, and seconds that Dagster takes for an asset that does nothing but tell as much."""

    ours: list[Times] = field(default_factory=list)
    floor: list[Times] = field(default_factory=list)
    by_ssh: list[Times] = field(default_factory=list)
    events: list[float] = field(default_factory=list)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, metavar="N", help="materialisations of each kind (default: 10)")
    asked = parser.parse_args()
    logging.getLogger("dagster").setLevel(logging.WARNING)
    SimulatedSite.down(SITE_NAME)
    site = SimulatedSite.up(SITE_NAME, install=True)
    try:
        with TemporaryDirectory() as home:
            settings = prepare(site, Path(home))
            _measure_overhead(site, settings, Path(home), asked.runs)
            _measure_output(site, settings)
            _measure_many(settings)
    finally:
        SimulatedSite.down(SITE_NAME)


def prepare(site: SimulatedSite, home: Path) -> Settings:
    """Make this process a user of the site; `home`: an empty folder for the user's files."""
    (home / ".ssh").mkdir()
    shutil.copy(site.login.known_hosts, home / ".ssh" / "known_hosts")
    os.environ.update({**site.environment(), "HOME": str(home)})
    settings = Settings.model_validate(os.environ)
    ensure_certificate(settings)
    return settings


# A trivial asset


def _measure_overhead(site: SimulatedSite, settings: Settings, home: Path, runs: int) -> None:
    (home / "workload").mkdir()
    workload = home / "workload" / "sleep.py"
    workload.write_text(WORKLOAD)
    ssh = site.login_command()
    measured = {}
    with dg.DagsterInstance.ephemeral() as instance:
        _materialize(site, instance, workload)  # imports and caches are warm
        for name, delay in (("direct", 0.0), ("50 ms round trip", 0.025)):
            with site.faults.login_slow(delay=delay) if delay else nullcontext():
                ways = measured[name] = _Ways()
                for _ in range(runs):
                    _pause()
                    ways.ours.append(_materialize(site, instance, workload))
                    _pause()
                    ways.floor.append(_run_bare(lambda command: _by_library(settings, command)))
                    _pause()
                    ways.by_ssh.append(_run_bare(lambda command: _by_ssh(ssh, command)))
                    _pause()
                    ways.events.append(_seconds(lambda: _materialize_nothing(instance)))
    every = [times for ways in measured.values() for times in (*ways.ours, *ways.floor, *ways.by_ssh)]
    slurm = statistics.median(each.slurm for each in every)
    table = Table(
        "", "ours", "floor", "ratio", "floor by ssh", "ratio", "Slurm's start", "Dagster's events", "our own part"
    )
    for name, ways in measured.items():
        events = statistics.median(ways.events)
        ours, floor, by_ssh = (_without_start(times) + slurm for times in (ways.ours, ways.floor, ways.by_ssh))
        reported = statistics.median(each.reported for each in ways.ours)
        seconds = [f"{value:.2f} s" for value in (slurm, events, ours - slurm - events)]
        against = [text for value in (floor, by_ssh) for text in (f"{value:.2f} s", f"{ours / value:.2f}")]
        table.add_row(name, f"{ours:.2f} s", *against, *seconds)
        CONSOLE.print(f"{name}, {runs} runs of each: Dagster knows of the end {reported:.2f} s after it (median)")
    CONSOLE.print(table)
    workload.write_text(WORKLOAD.replace(f"{WORK_SECONDS}", f"{LONGER}"))
    with dg.DagsterInstance.ephemeral() as instance:
        reported = statistics.median(_materialize(site, instance, workload).reported for _ in range(runs))
    CONSOLE.print(f"a job of {LONGER:.0f} s, which measures itself: Dagster knows of its end {reported:.2f} s after it")


def _without_start(times: list[Times]) -> float:
    return statistics.median(each.overhead - each.slurm for each in times)


def _pause() -> None:
    """Until another phase of Slurm's ticks."""
    time.sleep(random.uniform(0, 1))  # noqa: S311


def _materialize(site: SimulatedSite, instance: dg.DagsterInstance, workload: Path) -> Times:
    ended = 0.0

    @dg.asset
    def trivial(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        nonlocal ended
        done = compute.run(
            context, workload=workload, launcher=ScriptLauncher(), request=SlurmRequest(time_limit="5")
        ).get_materialize_result()
        ended = time.time()
        return done

    begun = time.perf_counter()
    result = dg.materialize([trivial], resources=build_resources(), instance=instance)
    seconds = time.perf_counter() - begun
    metadata = result.asset_materializations_for_node("trivial")[0].metadata
    run = site.layout.home / str(metadata["run_directory"].value).removeprefix("/home/")
    first, *_, last = map(json.loads, (run / "events").read_text().splitlines())
    submitted = (run / "tried").stat().st_mtime
    return Times(seconds - WORK_SECONDS, first["time"] - submitted, ended - last["time"])


def _materialize_nothing(instance: dg.DagsterInstance) -> None:
    @dg.asset
    def nothing(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        for word in ("submitted", "running", "opened"):
            context.log.info(word)
        return dg.MaterializeResult(metadata={"none": compute is None})

    dg.materialize([nothing], resources=build_resources(), instance=instance)


def _run_bare(run: Callable[[str], str]) -> Times:
    """Submit a sleep and wait for its file, by one command on the login node: a person's script of three lines."""
    name = f"floor-{random.randrange(1 << 40)}"  # noqa: S311 - a name
    script = f"#!/bin/sh\n#ASC --vanilla\ndate +%s.%N >{name}-begun\nsleep {WORK_SECONDS}\ntouch {name}\n"
    submit = f"sbatch --parsable -p zen4_0768 --qos=dev_zen4_0768 -t 5 -o /dev/null <<'E'\n{script}E"
    wait = f"until [ -e {name} ]; do sleep 0.05; done"
    command = f"set -e; submitted=$(date +%s.%N); {submit}\n{wait}; echo $submitted $(cat {name}-begun); rm {name}*"
    begun = time.perf_counter()
    *_, submitted, started = run(command).split()  # profiles and sbatch print, too
    return Times(time.perf_counter() - begun - WORK_SECONDS, float(started) - float(submitted))


def _by_library(settings: Settings, command: str) -> str:
    with connect(settings, ensure_certificate) as connection:
        return str(connection.run(command, hide=True).stdout)


def _by_ssh(ssh: list[str], command: str) -> str:
    return subprocess.run([*ssh, command], capture_output=True, text=True, check=True).stdout


# A lot of output


def _measure_output(site: SimulatedSite, settings: Settings) -> None:
    lines = MEGABYTES * (1 << 20) // 80
    with _gateway(settings) as gateway:
        run, files = _make_run(f"""yes {"x" * 79} | head -n {lines}""", "output")
        gateway.run(run, files, {"stdout": lambda _: None}, "benchmark")
        ours, floor, process = [], [], psutil.Process()
        before, size = process.memory_info().rss, 0

        def count(data: bytes) -> None:
            nonlocal size
            size += len(data)

        command = site.login_command("cat", f"{run}/stdout")
        for _ in range(5):
            ours.append(_seconds(lambda: gateway.run(run, None, {"stdout": count}, "benchmark")))
            floor.append(_seconds(lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True)))
        grown = process.memory_info().rss - before
        assert size == 5 * lines * 80, run
    ratio = statistics.median(ours) / statistics.median(floor)
    CONSOLE.print(
        f"{MEGABYTES} MB of stdout: {statistics.median(ours):.2f} s, ssh cat {statistics.median(floor):.2f} s, "
        f"ratio {ratio:.2f}; this process has grown by {grown / 1e6:.0f} MB"
    )


# Many at once


def _measure_many(settings: Settings) -> None:
    with _gateway(settings) as watcher:
        stop = threading.Event()
        threads = [threading.Thread(target=_follow_one, args=(settings, number, stop)) for number in range(AT_ONCE)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 120
        while len(_agents()) < AT_ONCE + 1 and time.monotonic() < deadline:
            time.sleep(1)
        before, begun = watcher.queue(RUNS)["calls"], time.monotonic()
        cpu = {pid: _cpu(pid) for pid in _agents()}
        while time.monotonic() < begun + 60:
            time.sleep(5)
            watcher.ping()  # a silent client would get another agent, perhaps on the other login node
        calls, seconds = watcher.queue(RUNS)["calls"] - before, time.monotonic() - begun
        memory = [psutil.Process(pid).memory_info().rss / 1e6 for pid in _agents()]
        busy = [_cpu(pid) - cpu[pid] for pid in _agents() if pid in cpu]
        stop.set()
        for thread in threads:
            thread.join()
    CONSOLE.print(
        f"{len(memory)} agents that follow jobs: {60 * calls / seconds:.1f} squeue calls per minute and login node, "
        f"{max(memory):.1f} MB each at most, {100 * max(busy) / seconds:.2f} % of a CPU each at most"
    )


def _follow_one(settings: Settings, number: int, stop: threading.Event) -> None:
    with _gateway(settings, stop) as gateway:
        run, files = _make_run("sleep 200", f"sleep-{number}")
        with suppress(StoppedError):
            gateway.run(run, files, {"stdout": lambda _: None}, "benchmark")


def _agents() -> list[int]:
    """Pids of the agents, as this machine counts them."""
    found = []
    for process in psutil.process_iter(["uids", "cmdline"]):
        command, uids = process.info["cmdline"] or [], process.info["uids"]
        if uids and uids.real == CERTIFICATE_USER.uid and "-u" in command and "zlib" in " ".join(command):
            found.append(process.pid)
    return found


def _cpu(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


# What they share


@contextmanager
def _gateway(settings: Settings, stop: threading.Event | None = None) -> Iterator[Gateway]:
    gateway = make_gateway(settings, SITE, stop)
    try:
        yield gateway
    finally:
        gateway.close()


def _make_run(body: str, name: str) -> tuple[str, dict[str, str]]:
    """Return a new run directory and its files."""
    key = f"{name}-{random.randrange(1 << 40)}"  # noqa: S311 - a name
    request = allocate(SlurmRequest(time_limit="5"), SITE, qos="zen4_0768").request
    script = render_job_script(request, SITE, job_name=key, about={}, environment={}, body=body)
    return f"{RUNS}/{key}", {"job.sh": script}


def _seconds(function: Callable[[], object]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
