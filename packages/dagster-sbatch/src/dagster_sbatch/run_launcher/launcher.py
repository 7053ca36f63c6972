"""The run launcher that Dagster loads: it asks a fork server for each run's process."""

import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import psutil

# Dagster documents no public names for run launchers. These are what its own Docker and Kubernetes launchers import.
from dagster._config.config_schema import UserConfigSchema
from dagster._core.launcher import CheckRunHealthResult, LaunchRunContext, WorkerStatus
from dagster._core.remote_origin import GrpcServerCodeLocationOrigin
from dagster._grpc.types import ExecuteRunArgs
from dagster._serdes import serialize_value
from dagster._serdes.config_class import ConfigurableClassData

from dagster_sbatch.run_launcher.fork_client import ForkServers, ForkServerUnavailableError, RunProcess
from dagster_sbatch.settings import is_loopback

CAN_FORK = sys.platform == "linux"
"""Elsewhere runs are started as Dagster does by default: macOS's libraries do not survive a fork, Windows has none."""


class ForkingRunLauncher(dg.DefaultRunLauncher):
    """Starts each run as a fork of a fork server, a process that has imported Dagster and this package already.

    A run has the working directory, the variables and the process group of the Dagster process that starts it, usually
    the daemon's. It imports the project's code itself, so it has the code as it is on disk when it starts. What cannot
    be forked is started as by Dagster's DefaultRunLauncher: runs on macOS, runs of a code location in a container or on
    another host, and runs for which no fork server can be started (the run's log says so).

    A run's process is found again by a tag of the run. `run_monitoring` must be enabled in dagster.yaml: it fails the
    runs on this machine whose process is gone, whatever has started them.

    Args:
        base_dir: folder for the log of the fork servers. A relative one counts from Dagster's working directory, as in
            Dagster's other settings.
        fork: false: every run is started as by Dagster's DefaultRunLauncher.

    Example:
        run_launcher:
          module: dagster_sbatch
          class: ForkingRunLauncher
          config: {base_dir: .dagster/run_launcher}
    """

    def __init__(self, base_dir: str, fork: bool = True, inst_data: ConfigurableClassData | None = None) -> None:
        """See the class."""
        super().__init__(inst_data)
        self._fork = fork
        self._servers = ForkServers(Path(base_dir).absolute())

    @classmethod
    def config_type(cls) -> UserConfigSchema:
        """Return the fields of `config` in dagster.yaml; see the class."""
        return {"base_dir": dg.StringSource, "fork": dg.Field(dg.BoolSource, default_value=True)}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData, config_value: Mapping[str, Any]
    ) -> "ForkingRunLauncher":
        """Return a launcher with the configuration of dagster.yaml."""
        return cls(inst_data=inst_data, **config_value)

    def launch_run(self, context: LaunchRunContext) -> None:
        """Start a run's process, once: it begins to work when the run's tag names it.

        Raises:
            DagsterLaunchFailedError: neither a fork server nor Dagster's default launcher can start it.
        """
        run, origin = context.dagster_run, context.job_code_origin
        if not (CAN_FORK and self._fork) or origin is None or _is_elsewhere(run):
            super().launch_run(context)
            return
        arguments = ExecuteRunArgs(origin, run.run_id, self._instance.get_ref(), set_exit_code_on_failure=True)
        try:
            forked = self._servers.fork(origin.executable_path, run.run_id, serialize_value(arguments))
        except ForkServerUnavailableError as error:
            text = f"{error}\nThis run is started by Dagster's default launcher. It takes more memory."
            self._instance.report_engine_event(text, run, cls=type(self))
            super().launch_run(context)
            return
        with forked.connection:
            self._instance.add_run_tags(run.run_id, forked.process.tags(run.run_id))
            now = self._instance.get_run_by_id(run.run_id)
            if now and now.status == dg.DagsterRunStatus.STARTING:
                forked.begin()
            elif now and not now.is_finished:  # a person has terminated it since
                self._instance.report_run_canceled(now)

    def terminate(self, run_id: str) -> bool:
        """End a run's process; return whether there was something to end.

        The process of a run that has begun is interrupted, as by Dagster's default launcher. That of a run that is
        starting is killed: it has no job yet, and Dagster would report an interrupt then as a failure.
        """
        run = self._instance.get_run_by_id(run_id)
        process = RunProcess.of(run) if run else None
        if run is None or process is None:
            return bool(super().terminate(run_id))  # type: ignore[no-untyped-call]
        if run.is_finished:
            return False
        self._instance.report_run_canceling(run)
        if run.status == dg.DagsterRunStatus.STARTING:
            now = self._instance.get_run_by_id(run_id)
            if now and now.status == dg.DagsterRunStatus.CANCELING:
                process.kill()
                return self._report_canceled(run_id, f"Process {process.pid} of this run ended before its first step.")
            if now:  # it has begun just now, which has replaced that status
                self._instance.report_run_canceling(now)
        if process.interrupt():
            return True
        return self._report_canceled(run_id, f"Process {process.pid} of this run was gone already.")

    def _report_canceled(self, run_id: str, text: str) -> bool:
        """Report a run whose process has ended as canceled, unless it has reported its end itself."""
        now = self._instance.get_run_by_id(run_id)
        if now is None or now.is_finished:
            return False
        self._instance.report_run_canceled(now, text)
        return True

    @property
    def supports_check_run_worker_health(self) -> bool:
        """Whether Dagster's run monitoring may ask for a run's process: always."""
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Return whether a run's process is alive. A process that is not on this machine counts as alive."""
        process = RunProcess.of(run) or self._find_process(run)
        if process is None or process.alive:
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        text = f"Process {process.pid} of this run is gone, and has not reported how the run ended."
        return CheckRunHealthResult(WorkerStatus.NOT_FOUND, text)

    def _find_process(self, run: dg.DagsterRun) -> RunProcess | None:
        """Return the process of a run that this launcher has not forked, and tag the run with it.

        It is the one that has reported the run's start. If that number is no Python's now, it is gone.
        """
        event = dg.DagsterEventType.RUN_START
        started = self._instance.get_records_for_run(run.run_id, of_type=event, limit=1, ascending=False).records
        pid = started[0].event_log_entry.get_dagster_event().pid if started else None
        if pid is None or _is_elsewhere(run):
            return None
        process = RunProcess.find(pid)
        if process is None or not _is_python(pid):
            return RunProcess(pid, begin="")
        self._instance.add_run_tags(run.run_id, process.tags(run.run_id))
        return process


def _is_python(pid: int) -> bool:
    try:
        return "python" in Path(psutil.Process(pid).exe()).name.lower()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _is_elsewhere(run: dg.DagsterRun) -> bool:
    """Return whether a run's Python and code are in a container or on another host, with its location's code server."""
    if run.job_code_origin and run.job_code_origin.repository_origin.container_image:
        return True
    origin = run.remote_job_origin.repository_origin.code_location_origin if run.remote_job_origin else None
    if not isinstance(origin, GrpcServerCodeLocationOrigin) or origin.socket:
        return False
    return not is_loopback(origin.host) and origin.host not in {socket.gethostname(), socket.getfqdn()}
