"""A workload, or the tasks of an array, as processes of this machine, as their Dagster step sees them."""

import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg

from dagster_sbatch import launchers
from dagster_sbatch.children import child_environment
from dagster_sbatch.run.array_step import ArrayStep
from dagster_sbatch.run.directory import CHECKS
from dagster_sbatch.run.failures import failure
from dagster_sbatch.run.interrupts import run_interruptibly
from dagster_sbatch.run.local import Ended, LocalProcess, workload_environment
from dagster_sbatch.run.messages import explain_failure
from dagster_sbatch.run.pipes import CONTEXT, Streams, open_session, pipes_variables
from dagster_sbatch.run.plan import Plan
from dagster_sbatch.run.reports import StepLog
from dagster_sbatch.run.results import complete, declared_checks
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm.modules import shorten_error
from dagster_sbatch.text_file import write_text

NOT_STARTED = 126  # in place of the exit code of a process that could not be started, as in a shell
Runner = Callable[[str, Streams, threading.Event, AbstractContextManager[Any]], Ended]
"""Runs a process of a workload to its end; see `Machine.run`."""


def run_here(
    context: dg.OpExecutionContext, name: str, plan: Plan, run: Runner, where: Mapping[str, Any]
) -> dg.PipesClientCompletedInvocation:
    """Run the workload, or the tasks of its array, some at once, in processes of this step; see `ComputeResource.run`.

    `where`: metadata for all results.
    """
    if plan.array:
        step = ArrayStep(context, name, plan)
        step.where = where
        with step.open():
            run_interruptibly(context, partial(_run_tasks, step, run, plan.array.max_running_tasks))
        return step.complete()
    with open_session(context, plan.extras) as session:
        ended = run_interruptibly(context, lambda stop: run(session.context, session, stop, nullcontext()))
        session.messages.finish(context)
    cause = ended.cause or explain_failure(session.messages, ended.exit_code, plan.workload.name)
    if cause:
        raise failure(name, cause, session.stderr.tail, exit_code=ended.exit_code, workload=str(plan.workload.path))
    return complete(context, session.pipes, where, ended.costs)


def _run_tasks(step: ArrayStep, run: Runner, most: int | None, stop: threading.Event) -> None:
    """Run all tasks that are left, `most` at once; when `stop` is set, end those that run, and start no more."""
    turn = threading.Lock()  # the step reads what tasks write one after another

    def run_task(index: int) -> Ended | None:
        if stop.is_set():
            return None
        with turn:
            step.progress.started.add(index)
            reader = step.reader(index)
        return run(step.contexts.head + step.contexts.tail(step.tasks[index]), reader, stop, turn)

    try:
        with ThreadPoolExecutor(most or os.cpu_count() or 1) as pool:
            try:
                tasks = {pool.submit(run_task, index): index for index in step.left}
                for task in as_completed(tasks):
                    ended = task.result()
                    with turn:
                        if ended and not stop.is_set():
                            _judge(step, tasks[task], ended)
            except BaseException:
                stop.set()
                raise
    finally:
        if stop.is_set():
            step.store_completed()
        step.wait_until_stored()


def _judge(step: ArrayStep, index: int, ended: Ended) -> None:
    logs = f"the lines of this step's stdout and stderr that begin with [{step.tasks[index].label}]"
    if ended.cause:
        step.failed(index, ended.cause, logs if ended.seconds else "none: it has not run")
    else:
        step.ended(index, ended.exit_code, {}, ended.costs, logs)


def temporary_run_directory() -> "tempfile.TemporaryDirectory[str]":
    """Make a private folder (mode 0700) that is removed at the end: Dagster has all results by then."""
    return tempfile.TemporaryDirectory(prefix="workload-", ignore_cleanup_errors=True)


class Machine:
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

    def run(self, context: str, streams: Streams, stop: threading.Event, turn: AbstractContextManager[Any]) -> Ended:
        """Run a process of the workload to its end, in an image if it has one.

        `context`: of Dagster Pipes, as JSON. `streams`: read what the process writes, each time within `turn`. `stop`:
        see `LocalProcess.run`.
        """
        with ExitStack() as removed:
            try:
                folder = Path(removed.enter_context(temporary_run_directory()))
                (folder / CONTEXT).write_text(context)
                (folder / CHECKS).write_text(self._checks)
                environment = {**self._environment, **pipes_variables(str(folder))}
                process = LocalProcess(self._command(folder), environment, folder, streams.sinks, turn)
            except OSError as error:  # no memory, no space, too many processes
                return Ended(NOT_STARTED, 0.0, f"its process could not be started: {error}")
            return process.run(stop)

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
