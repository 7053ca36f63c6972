"""An instance with the run launcher that forks, and what its runs report."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest

from dagster_sbatch.run_launcher.fork_client import RunProcess
from dagster_sbatch.run_launcher.fork_server import LOG
from local import forked_jobs
from support.dagster_dev import gone, wait_for

STATUS = dg.DagsterRunStatus
JOBS = Path(forked_jobs.__file__)


class Runs:
    """An instance with the launcher, and what its runs report."""

    def __init__(self, instance: dg.DagsterInstance, folder: Path) -> None:
        self.instance, self.folder, self.reports = instance, folder, folder / "reports"
        self.base = folder / "launcher"

    def new(self, name: str, python: str = sys.executable) -> str:
        """The id of a run that is about to be launched."""
        job = dg.reconstructable(getattr(forked_jobs, name)).get_python_origin()
        origin = job._replace(repository_origin=job.repository_origin._replace(executable_path=python))
        run = self.instance.create_run_for_job(getattr(forked_jobs, name), job_code_origin=origin)
        return run.run_id

    def launch(self, name: str, python: str = sys.executable) -> str:
        run_id = self.new(name, python)
        self.instance.launch_run(run_id, workspace=None)  # type: ignore[arg-type]
        return run_id

    def status(self, run_id: str) -> dg.DagsterRunStatus:
        run = self.instance.get_run_by_id(run_id)
        assert run
        return run.status

    def wait(self, run_id: str, status: dg.DagsterRunStatus = STATUS.SUCCESS) -> None:
        wait_for(lambda: self.status(run_id) == status, 60, f"run {run_id} is {status}; {self.log}")

    def process(self, run_id: str) -> RunProcess:
        run = self.instance.get_run_by_id(run_id)
        assert run
        process = RunProcess.of(run)
        assert process
        return process

    def seen(self, run_id: str) -> dict[str, Any]:
        """What a run has reported."""
        path = self.reports / f"{self.process(run_id).pid}.json"
        wait_for(path.exists, 60, f"run {run_id} reports; {self.log}")
        seen: dict[str, Any] = json.loads(path.read_text())
        return seen

    def health(self, run_id: str) -> str:
        run = self.instance.get_run_by_id(run_id)
        assert run
        return str(self.instance.run_launcher.check_run_worker_health(run).status.value)

    @property
    def log(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return (self.base / LOG).read_text()
        return ""

    def servers(self) -> list[psutil.Process]:
        """Living fork servers of this folder."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(self.base) in process.cmdline() and not gone(process.pid) and not self._is_run(process.pid):
                    found.append(process)
        return found

    def _is_run(self, pid: int) -> bool:
        return f"has process {pid}\n" in self.log


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    (tmp_path / "reports").mkdir()
    monkeypatch.setenv("REPORTS", str(tmp_path / "reports"))
    monkeypatch.setenv("A_SECRET", "of-nobody's-business")
    monkeypatch.syspath_prepend(str(JOBS.parents[1]))
    monkeypatch.setenv("PYTHONPATH", str(JOBS.parents[1]))
    config = {"module": "dagster_sbatch", "class": "ForkingRunLauncher", "config": {"base_dir": f"{tmp_path}/launcher"}}
    with dg.instance_for_test(overrides={"run_launcher": config}, temp_dir=str(tmp_path)) as instance:
        made = Runs(instance, tmp_path)
        yield made
        (tmp_path / "reports" / "go").touch()
        for server in made.servers():
            server.terminate()
        psutil.wait_procs(made.servers(), timeout=30)
