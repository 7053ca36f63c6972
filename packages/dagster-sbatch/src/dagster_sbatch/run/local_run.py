"""A workload, or the tasks of an array, as processes of this machine, as their Dagster step sees them."""

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import dagster as dg

from dagster_sbatch import launchers
from dagster_sbatch.children import child_environment
from dagster_sbatch.run.array_step import ArrayStep
from dagster_sbatch.run.directory import CHECKS
from dagster_sbatch.run.failures import failure
from dagster_sbatch.run.interrupts import run_interruptibly
from dagster_sbatch.run.local import GRACE_SECONDS, POLL_SECONDS, Ended, LocalProcess, workload_environment
from dagster_sbatch.run.messages import explain_failure
from dagster_sbatch.run.pipes import CONTEXT, open_session, pipes_variables
from dagster_sbatch.run.plan import Plan
from dagster_sbatch.run.reports import StepLog
from dagster_sbatch.run.results import complete, declared_checks
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm.modules import shorten_error
from dagster_sbatch.text_file import write_text


def run_here(
    context: dg.OpExecutionContext, name: str, settings: Settings, plan: Plan
) -> dg.PipesClientCompletedInvocation:
    """Run the workload as a subprocess of this step; see `ComputeResource.run`."""
    machine = _Machine(context, name, settings, plan)
    with _starting(name):
        directory = temporary_run_directory()
    with directory as path, open_session(context, plan.extras, path) as session:

        def run(stop: threading.Event) -> Ended:
            with _starting(name):
                process = machine.start(Path(path), session.context, session.sinks)
            return process.run(stop)

        ended = run_interruptibly(context, run)
        session.messages.finish(context)
    cause = ended.cause or explain_failure(session.messages, ended.exit_code, plan.workload.name)
    if cause:
        raise failure(name, cause, session.stderr.tail, exit_code=ended.exit_code, workload=str(plan.workload.path))
    return complete(context, session.pipes, machine.where, {"workload_seconds": round(ended.seconds, 3)})


def temporary_run_directory() -> "tempfile.TemporaryDirectory[str]":
    """Make a private folder (mode 0700) that is removed at the end: Dagster has all results by then."""
    return tempfile.TemporaryDirectory(prefix="workload-", ignore_cleanup_errors=True)


class _Machine:
    """This machine, as the workload of a call finds it."""

    def __init__(self, context: dg.OpExecutionContext, name: str, settings: Settings, plan: Plan) -> None:
        """Prepare what all processes of the call have in common.

        Raises Failure: the image is not one, or a folder's name cannot be passed to the container's command.
        """
        self._plan, self._log = plan, StepLog(context)
        self._data_root = plan.project.local_data_root(settings)
        self._folders = self._data_root, plan.workload.root, Path(launchers.__file__).parent
        self._image = self._find_image(name)
        self._checks = json.dumps(declared_checks(context))
        # Metadata for all results
        self.where = {"host": socket.gethostname(), "workload": str(plan.workload.path)}
        self._environment = {
            **workload_environment(),
            **load_modules(plan.allocation.request.modules or (), self._log),
            **plan.launcher.local_environment(),
            "DATA_ROOT": str(self._data_root),
            "PYTHONPATH": str(plan.workload.root),
            **plan.env,
        }

    def _find_image(self, name: str) -> Path | None:
        """Return the image of the workload; None: it runs without a container, and the log says so if it should not."""
        container, command = self._plan.launcher.container, self._plan.site.container_runtime.command
        if container is None:
            return None
        image = container.local_image(self._data_root) if shutil.which(command) else None
        if image is None:
            lacking = f"no container image {container.image}" if shutil.which(command) else f"no {command}"
            self._log.warning(f"This machine has {lacking}. The workload runs without its container here.")
            return None
        problem = container.local_problem(image, self._folders)
        if problem:
            raise failure(name, problem, final=True)
        return image

    def start(self, folder: Path, context: str, sinks: Mapping[str, Callable[[bytes], None]]) -> LocalProcess:
        """Start a process of the workload, in an image if it has one.

        `folder`: its run directory, which is empty. `context`: of Dagster Pipes, as JSON.
        """
        (folder / CONTEXT).write_text(context)
        (folder / CHECKS).write_text(self._checks)
        environment = {**self._environment, **pipes_variables(str(folder))}
        return LocalProcess(self._command(folder), environment, folder, sinks)

    def _command(self, folder: Path) -> list[str]:
        plan, request, container = self._plan, self._plan.allocation.request, self._plan.launcher.container
        command = plan.launcher.local_command(request, plan.workload.command(plan.workload.root))
        if container is None or self._image is None:
            return command
        for file, text in container.files(plan.env).items():
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
        self._data_root.mkdir(parents=True, exist_ok=True)
        return container.local_command(
            request, plan.site.container_runtime, self._image, folder, command, self._folders
        )


def run_array_here(
    context: dg.OpExecutionContext, name: str, settings: Settings, plan: Plan
) -> dg.PipesClientCompletedInvocation:
    """Run the tasks of an array as subprocesses of this step, some at once; see `ComputeResource.run`."""
    assert plan.array is not None
    step, machine = ArrayStep(context, name, plan), _Machine(context, name, settings, plan)
    step.where = machine.where
    with step.open():
        most = plan.array.max_running_tasks or os.cpu_count() or 1
        run_interruptibly(context, _LocalTasks(step, machine, most).run)
    return step.complete()


class _LocalTasks:
    """The processes of the tasks that run now; `most`: how many at once."""

    def __init__(self, step: ArrayStep, machine: _Machine, most: int) -> None:
        self._step, self._machine, self._most = step, machine, most
        self._processes: dict[int, LocalProcess] = {}
        self._folders: dict[int, ExitStack] = {}

    def run(self, stop: threading.Event) -> None:
        """Run all tasks that are left; when `stop` is set, end those that run, and start no more."""
        try:
            self._run_left(stop)
        except BaseException:
            self._step.store_completed()
            raise
        finally:
            for process in self._processes.values():
                process.release()
            for index in list(self._processes):
                self._end(index)
            self._step.wait_until_stored()

    def _run_left(self, stop: threading.Event) -> None:
        left = iter(self._step.left)
        while not stop.is_set():
            while len(self._processes) < self._most and (index := next(left, None)) is not None:
                try:
                    self._start(index)
                except OSError as error:
                    self._folders.pop(index).close()
                    self._step.failed(index, _not_started(error), "none: it has not run")
            if not self._processes:
                return
            ended = [index for index, process in self._processes.items() if not process.follow()]
            for index in ended:
                self._judge(index, self._end(index))
            if not ended:
                stop.wait(POLL_SECONDS)
        until = time.monotonic() + GRACE_SECONDS
        for process in self._processes.values():
            process.send(signal.SIGTERM)
        for process in self._processes.values():
            process.wait(max(0.0, until - time.monotonic()))
        self._step.store_completed()

    def _start(self, index: int) -> None:
        folder, contexts = ExitStack(), self._step.contexts
        self._folders[index] = folder
        path = Path(folder.enter_context(temporary_run_directory()))
        context = contexts.head + contexts.tail(self._step.tasks[index])
        self._processes[index] = self._machine.start(path, context, self._step.reader(index).sinks)
        self._step.progress.started.add(index)

    def _end(self, index: int) -> Ended:
        with self._folders.pop(index):
            return self._processes.pop(index).end()

    def _judge(self, index: int, ended: Ended) -> None:
        label = self._step.tasks[index].label
        logs = f"the lines of this step's stdout and stderr that begin with [{label}]"
        if ended.cause:
            self._step.failed(index, ended.cause, logs)
        else:
            self._step.ended(index, ended.exit_code, {}, {"workload_seconds": round(ended.seconds, 3)}, logs)


@contextmanager
def _starting(name: str) -> Iterator[None]:
    """Raise the failure of the step `name` if its process cannot be started."""
    try:
        yield
    except OSError as error:
        raise failure(name, _not_started(error)) from None


def _not_started(error: OSError) -> str:
    """Return why there is no process; `error`: of the system: no memory, no space, too many processes."""
    return f"its process could not be started: {error}"


_LMOD = "LMOD_CMD"  # Lmod sets it in every shell in which `module` works
_STATE = ("LMOD_", "__LMOD_", "MODULE", "_ModuleTable", "LOADEDMODULES", "_LMFILES_")
"""Beginnings of the names of Lmod's own variables."""
_LOAD = 'set -e; eval "$("$LMOD_CMD" bash load "$@")" >&2; env -0'  # a module may print
_SHELLS = ("PWD", "OLDPWD", "SHLVL", "_")


def load_modules(modules: Sequence[str], log: StepLog) -> dict[str, str]:
    """Return the variables that modules set or change on this machine.

    The log says if they cannot be loaded: laptops have no Lmod, and other machines have other modules.
    """
    if not modules:
        return {}
    names = ", ".join(modules)
    if _LMOD not in os.environ:
        log.info(
            f"These modules are not loaded: {names}. This machine has no Lmod. "
            "The workload uses the programs that it finds on the PATH."
        )
        return {}
    before = child_environment(*(name for name in os.environ if name.startswith(_STATE)))
    done = subprocess.run(
        ["bash", "-c", _LOAD, "bash", *modules], env=before, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    if done.returncode:
        log.warning(
            f"Lmod on this machine could not load the modules {names}. "
            f"{shorten_error(done.stderr.decode(errors='replace'))}\nThe workload runs without them."
        )
        return {}
    after = dict(line.partition("=")[::2] for line in os.fsdecode(done.stdout).split("\0") if line)
    # As in a job, Python does not get the variables of a module's Python.
    return {
        name: value
        for name, value in after.items()
        if before.get(name) != value and name not in _SHELLS and not name.startswith("PYTHON")
    }
