"""Many agents at once are no burden to the login nodes or to Slurm's controller."""

import json
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from dagster_sbatch.auth import ensure_certificate
from dagster_sbatch.slurm import SlurmRequest, allocate, render_job_script
from dagster_sbatch.slurm.gateway import Gateway, StoppedError, choose_channel
from resources import PROJECT
from slurm_in_a_box import CERTIFICATE_USER, CPU_PARTITION, SimulatedSite, wait_until
from support.background import STRESS, nobody_left

pytestmark = pytest.mark.cluster
RUNS, SECONDS = (50, 120) if STRESS else (6, 20)
TICKS = 100
"""Of CPU time a second, in /proc."""


@dataclass
class Agent:
    """What the kernel says of an agent: CPU seconds, and the most memory that it has had, in MB."""

    cpu: float
    memory: float


def agents(site: SimulatedSite) -> dict[tuple[str, int], Agent]:
    """By machine and pid."""
    found = {}
    for process in site.processes_on_login():
        if process.command.startswith("python3") and "zlib" in process.command:
            paths = f"/proc/{process.pid}/stat /proc/{process.pid}/status"
            text = site.run_on_node(process.machine, f"cat {paths}").stdout
            times = text.splitlines()[0].rpartition(")")[2].split()[11:13]
            peak = next(line for line in text.splitlines() if line.startswith("VmHWM:")).split()[1]
            found[process.machine, process.pid] = Agent(sum(map(int, times)) / TICKS, int(peak) / 1024)
    return found


def queries(site: SimulatedSite) -> int:
    """How often squeue has been called, on both login nodes, by their shared views."""
    calls = 0
    for node in ("login01", "login02"):
        view = f"{CERTIFICATE_USER.home}/runs/.queue-{node}.json"
        text = site.run_on_login(CERTIFICATE_USER, f"cat {view}", check=False).stdout
        calls += json.loads(text)["calls"] if text else 0
    return calls


@contextmanager
def followed_runs(site: SimulatedSite) -> Iterator[None]:
    """So many jobs that sleep, each followed over a connection of its own."""
    settings, stop, begun = PROJECT.load_settings(), threading.Event(), threading.Semaphore(0)
    supercomputer = PROJECT.load_site("musica")
    request = allocate(SlurmRequest(time_limit="30"), supercomputer, qos=CPU_PARTITION).request

    def follow() -> None:
        key = f"sleeper-{secrets.token_hex(4)}"
        script = render_job_script(
            request, supercomputer, job_name=key, about={}, environment={}, body="echo begun; exec sleep 1000"
        )
        gateway = Gateway(choose_channel(settings, ("python3",), ensure_certificate), stop)
        run, files = f"{CERTIFICATE_USER.home}/runs/{key}", {"job.sh": script}
        sinks = {"stdout": lambda _: begun.release(), "stderr": lambda _: None, "messages.jsonl": lambda _: None}
        with pytest.raises(StoppedError):
            gateway.run(run, files, sinks, "a-run")
        gateway.close()

    threads = [threading.Thread(target=follow) for _ in range(RUNS)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(RUNS):
            assert begun.acquire(timeout=180)
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.usefixtures("on_supercomputer")
def test_idle_agents_ask_rarely_and_take_little(site: SimulatedSite) -> None:
    with followed_runs(site):
        wait_until(lambda: queries(site) > 0, "the first look at the queue")
        asked, begun = queries(site), time.monotonic()
        before = agents(site)
        assert len(before) >= RUNS
        threading.Event().wait(SECONDS)
        after, calls = agents(site), queries(site) - asked
        seconds = time.monotonic() - begun  # on a busy machine, to look takes a while, too
    shares = [100 * (after[key].cpu - before[key].cpu) / seconds for key in before if key in after]
    peak = max(agent.memory for agent in after.values())
    counted = f"{calls} squeue calls in {seconds:.0f} s"
    print(f"{len(shares)} agents, {counted}, CPU {max(shares):.2f} %, memory {peak:.1f} MB")
    assert len(shares) == RUNS
    assert calls <= 2 * (seconds / 15 + 1)  # two login nodes, each every 15 s
    assert max(shares) < 1
    assert peak <= 20
    nobody_left(site)
