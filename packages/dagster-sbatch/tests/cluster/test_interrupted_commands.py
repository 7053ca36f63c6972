"""Ctrl-C at a terminal in which a command runs an asset, and the terminal's end.

No daemon would retry that run, so its job is cancelled.
"""

import itertools
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from slurm_in_a_box import SimulatedSite, wait_until
from support import ROOT
from support.background import SLEEPS, rows_of

pytestmark = pytest.mark.cluster

LOCATION = """\
from pathlib import Path
import dagster as dg
from resources import build_resources
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.launchers import ScriptLauncher
from dagster_sbatch.slurm import SlurmRequest

@dg.asset
def probe(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    workload = Path(__file__).parent / "workloads" / "sleeps.py"
    request = SlurmRequest(time_limit="00:30:00")
    return compute.run(context, workload=workload, launcher=ScriptLauncher(), request=request).get_materialize_result()

defs = dg.Definitions(
    assets=[probe],
    jobs=[dg.define_asset_job("all")],
    resources=build_resources(),
    executor=dg.EXECUTOR,
)
"""
COMMANDS = {
    "asset materialize": ("asset", "materialize", "--select", "probe"),
    "job execute": ("job", "execute", "--job", "all"),
}


class Terminal:
    """A `dagster` command in a terminal of its own, without DAGSTER_HOME."""

    def __init__(self, folder: Path, variables: dict[str, str], command: str, executor: str) -> None:
        (folder / "workloads").mkdir(parents=True)
        (folder / "workloads" / "sleeps.py").write_text(SLEEPS)
        location = folder / "location.py"
        location.write_text(LOCATION.replace("EXECUTOR", executor))
        dagster = str(Path(sys.executable).with_name("dagster"))
        self._master, slave = os.openpty()
        self._process = subprocess.Popen(
            ["setsid", "--ctty", dagster, *COMMANDS[command], "--python-file", str(location)],
            env={**variables, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
            cwd=folder,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # noqa: PLW1509 - not as under `nohup`
        )
        os.close(slave)
        self.shown = ""
        self._closed = False
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while not self._closed:
            try:
                if select.select([self._master], [], [], 0.2)[0]:
                    self.shown += os.read(self._master, 65536).decode(errors="replace")
            except OSError:  # nobody has the terminal any more
                return

    def press_ctrl_c(self) -> None:
        os.write(self._master, b"\x03")

    def close(self) -> None:
        """Close the window, as a lost SSH connection does."""
        self._closed = True
        self._reader.join(60)
        os.close(self._master)
        self._process.wait(120)

    def has_ended(self) -> bool:
        """Whether all its processes have: a step may outlive its command, and would use the next test's access."""
        return not any(self._lives(each) for each in psutil.process_iter())

    def _lives(self, process: psutil.Process) -> bool:
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            return os.getsid(process.pid) == self._process.pid and process.status() != psutil.STATUS_ZOMBIE
        return False

    def wait(self) -> int:
        code = self._process.wait(120)
        self._reader.join(60)
        os.close(self._master)
        return code

    def kill(self) -> None:
        """End all its processes, whatever the test has come to."""
        self._closed = True
        for process in filter(self._lives, psutil.process_iter()):
            process.kill()
        self._process.wait()


@pytest.fixture
def open_terminal(tmp_path: Path, on_supercomputer: dict[str, str]) -> Iterator[Callable[[str, str], Terminal]]:
    """Makes terminals for a command and an executor; nothing of them is left after the test."""
    variables = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **on_supercomputer}
    opened: list[Terminal] = []

    def open_one(command: str, executor: str) -> Terminal:
        opened.append(Terminal(tmp_path / str(len(opened)), variables, command, executor))
        return opened[-1]

    yield open_one
    for each in opened:
        each.kill()


def test_ctrl_c_cancels_the_job_or_says_how_to(
    site: SimulatedSite, open_terminal: Callable[[str, str], Terminal]
) -> None:
    kinds = itertools.product(COMMANDS, ("in_process_executor", "multiprocess_executor"))
    terminals = [open_terminal(*kind) for kind in kinds]

    def running() -> list[str]:
        return [job for job, state in rows_of(site, "%i %T") if state == "RUNNING"]

    wait_until(lambda: all("RUNNING" in terminal.shown for terminal in terminals), "all jobs run", 240)
    jobs = {re.findall(r"job (\d+): RUNNING", terminal.shown)[0]: terminal for terminal in terminals}
    assert sorted(jobs) == sorted(running())
    last = jobs.popitem()
    for job, terminal in jobs.items():
        terminal.press_ctrl_c()
        assert terminal.wait() != 0
        assert f"probe: cancelling Slurm job {job}" in terminal.shown
        assert f"probe: Slurm job {job} is over: CANCELLED" in terminal.shown
        assert site.job_state(int(job)) == "CANCELLED"
    job, terminal = last
    with site.faults.ssh_refused():
        site.faults.drop_connections()
        terminal.press_ctrl_c()
        assert terminal.wait() != 0
    assert f"Slurm job {job} could not be cancelled, and may still be running." in terminal.shown
    assert f"scripts/job {job} cancel" in terminal.shown
    assert running() == [job]


@pytest.mark.parametrize("executor", ["in_process_executor", "multiprocess_executor"])
def test_closing_the_terminal_cancels_the_job(
    executor: str, site: SimulatedSite, open_terminal: Callable[[str, str], Terminal]
) -> None:
    terminal = open_terminal("asset materialize", executor)
    wait_until(lambda: "RUNNING" in terminal.shown, "the job runs", 240)
    job = re.findall(r"job (\d+): RUNNING", terminal.shown)[0]  # a second line follows if Slurm tells the node later
    terminal.close()
    wait_until(lambda: site.job_state(int(job)) == "CANCELLED", "the job is cancelled", 60)
    wait_until(terminal.has_ended, "the step has ended", 60)
