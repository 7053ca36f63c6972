"""Runs in the background, while something is done to the supercomputer."""

import os
import threading
from collections.abc import Callable
from typing import Any

from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite, wait_until
from support.workload_asset import PIPES, Outcome

STRESS = os.environ.get("STRESS") == "1"
"""Whether loops for chance have their full count, and waits their full length."""

REPORTS = PIPES + "    pipes.report_asset_materialization(metadata={'rows': 7})\n"
SLEEPS = PIPES + "    import time\n    print('begun', flush=True)\n    time.sleep(600)\n"
WAITS = (
    PIPES
    + f"""
    import pathlib, time
    print("begun", flush=True)
    while not pathlib.Path("{CERTIFICATE_USER.home}/go-on").exists():
        time.sleep(0.1)
    print("gone on", flush=True)
    pipes.report_asset_materialization(metadata={{"rows": 7}})
    """
)
"""Until `go_on`."""
MEASURED = """
import os, time
from pathlib import Path

def wait_until_measured(seconds, pause=0):
    own = f"SLURM_JOB_ID={os.environ['SLURM_JOB_ID']}\\0".encode()

    def is_sampler(process):
        return b"sampler.py" in (process / "cmdline").read_bytes() and own in (process / "environ").read_bytes()

    def has_read_gpus(process):  # it has written, and sleeps
        ours = b"nvidia-smi" in (process / "cmdline").read_bytes() and own in (process / "environ").read_bytes()
        sleeps = ours and ") S " in (process / "stat").read_text()
        return sleeps and "wchar: 0\\n" not in (process / "io").read_text()

    def is_any(kind):
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if kind(process):
                    return True
            except OSError:  # of another user, or it has ended
                pass
    for kind in (is_sampler, *([has_read_gpus] if "CUDA_VISIBLE_DEVICES" in os.environ else [])):
        while not is_any(kind):
            time.sleep(0.2)
    until = time.time() + seconds
    while time.time() < until:
        sum(range(100_000))
        time.sleep(pause)
"""
"""Beginning of a workload that waits until the sampler of its job runs and its GPUs, if it has any, were read, and
then computes for some seconds, with pauses."""


def kill_on_node(site: SimulatedSite, node: str, victims: str) -> None:
    """Kill the processes whose pids a command prints on a node, at least one; one of them may end meanwhile."""
    each = "kill -KILL $pid || [ ! -e /proc/$pid ]"
    site.run_on_node(node, f"pids=$({victims}) && for pid in $pids; do {each} || exit 1; done")


def go_on(site: SimulatedSite) -> None:
    """Let every workload that waits end."""
    site.run_on_login(CERTIFICATE_USER, "touch go-on")


class Background:
    """A run in a thread of its own."""

    def __init__(self, run: Callable[[], Outcome]) -> None:
        self._outcomes: list[Outcome] = []
        self._thread = threading.Thread(target=lambda: self._outcomes.append(run()), daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return not self._thread.is_alive()

    def outcome(self, seconds: float = 120) -> Outcome:
        """What came of it."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the run does not end"
        return self._outcomes[0]


def rows_of(site: SimulatedSite, shown: str, *options: str) -> list[list[str]]:
    """The words of squeue's lines, of all jobs that the controller remembers."""
    listing = site.squeue("--noheader", "--states=all", f"--format={shown}", *options)
    return [row.split() for row in listing.splitlines()]


def only_job(site: SimulatedSite, state: str, seconds: float = 60) -> int:
    """The id of the only job that has that state, as soon as there is one."""
    found: list[int] = []

    def look() -> bool:
        found[:] = [int(job) for job, its in rows_of(site, "%i %T") if its == state]
        return bool(found)

    wait_until(look, f"a job that is {state}", seconds)
    (job,) = found
    return job


def jobs_of(site: SimulatedSite, run_directory: str) -> list[str]:
    """The jobs that have ever been submitted for a run directory; the controller forgets them after five minutes."""
    key = run_directory.rpartition("/")[2]
    options = ("--noheader", "--allocations", "--starttime=now-1day", f"--name={key}", "--format=JobID")
    return [row[0] for row in rows_of(site, "%i", f"--name={key}")] or site.sacct(*options).split()


def runs_there(site: SimulatedSite) -> list[str]:
    """Names of all run directories."""
    listing = site.run_on_login(CERTIFICATE_USER, "ls dagster-slurm/runs").stdout.split()
    return [name for name in listing if not name.endswith(".holder")]


def output_there(site: SimulatedSite) -> str:
    """The stdout of all runs, as it is in their directories."""
    return site.run_on_login(CERTIFICATE_USER, "cat dagster-slurm/runs/*/stdout", check=False).stdout


def events(site: SimulatedSite) -> str:
    """The jobs' own words, of all runs."""
    return site.run_on_login(CERTIFICATE_USER, "cat dagster-slurm/runs/*/events", check=False).stdout


def nobody_left(site: SimulatedSite, seconds: float = 60) -> None:
    """Wait until no process of the user is left on the login nodes."""
    wait_until(lambda: not site.processes_on_login(), "no process on the login nodes", seconds)


def logins(site: SimulatedSite, said: str = "Accepted publickey") -> dict[str, int]:
    """How often each login node's sshd has said so of the user since the site is up."""
    words = f"{said} for {CERTIFICATE_USER.name} "
    logs = {node: site.layout.log / f"sshd-{node}.out" for node in ("login01", "login02")}
    return {node: log.read_text(errors="replace").count(words) for node, log in logs.items()}


def one_job_did_it(site: SimulatedSite, outcome: Outcome) -> None:
    """The run succeeded, at the first attempt, with one job."""
    assert outcome.error == ""
    assert outcome.retries == []
    (metadata,) = outcome.materializations[None]
    assert jobs_of(site, metadata["run_directory"]) == [str(metadata["job_id"])]
    assert len(runs_there(site)) == 1


def attempts_of(metadata: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table of attempts."""
    return [dict(record.data) for record in metadata["attempts"].records]


def pause(seconds: float) -> None:
    """Let a fault last; nothing in it can be waited for."""
    threading.Event().wait(seconds)
