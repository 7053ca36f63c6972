"""A workload, or the tasks of an array, as processes of this machine, as their Dagster step sees them."""

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import dagster as dg
from dagster_pipes import DAGSTER_PIPES_CONTEXT_ENV_VAR, DAGSTER_PIPES_MESSAGES_ENV_VAR, encode_param

from dagster_sbatch import launchers
from dagster_sbatch.run.array_step import ArrayStep
from dagster_sbatch.run.directory import CONTEXT
from dagster_sbatch.run.failures import failure
from dagster_sbatch.run.interrupts import run_interruptibly
from dagster_sbatch.run.local import (
    GRACE_SECONDS,
    POLL_SECONDS,
    Ended,
    LocalProcess,
    RunDirectory,
    run_workload,
    temporary_run_directory,
    workload_environment,
)
from dagster_sbatch.run.local_modules import load_modules
from dagster_sbatch.run.messages import explain_failure
from dagster_sbatch.run.pipes import open_session
from dagster_sbatch.run.plan import Plan
from dagster_sbatch.run.reports import StepLog
from dagster_sbatch.run.results import complete, declared_checks
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm.gateway import MESSAGES


def run_here(
    context: dg.OpExecutionContext, name: str, settings: Settings, plan: Plan
) -> dg.PipesClientCompletedInvocation:
    """Run the workload as a subprocess of this step; see `ComputeResource.run`."""
    image = _find_image(context, name, settings, plan)
    with temporary_run_directory() as folder:
        directory = RunDirectory(Path(folder))
        with open_session(context, plan.extras, str(directory.context), str(directory.messages)) as session:
            directory.context.write_text(session.context_document.text)
            directory.checks.write_text(json.dumps(declared_checks(context)))
            environment = {**_environment(context, settings, plan), **session.pipes.get_bootstrap_env_vars()}
            sinks = {
                directory.stdout: session.stdout.feed,
                directory.stderr: session.stderr.feed,
                directory.messages: session.messages.feed,
            }
            command = _command(settings, plan, image, directory)
            ended = run_interruptibly(lambda stop: run_workload(command, environment, directory, sinks, stop))
            session.messages.finish(context)
        cause = ended.cause or explain_failure(session.messages, ended.exit_code, plan.workload.name)
        if cause:
            raise failure(name, cause, session.stderr.tail, exit_code=ended.exit_code, workload=plan.workload.path)
        where = {"host": socket.gethostname(), "workload": str(plan.workload.path)}
        return complete(context, session.pipes, where, {"workload_seconds": round(ended.seconds, 3)})


def _find_image(context: dg.OpExecutionContext, name: str, settings: Settings, plan: Plan) -> Path | None:
    """Return the image of the workload; None: it runs without a container, and the log says so if it should have one.

    Raises:
        Failure: the file is not an image, or a folder's name cannot be passed to the container's command.
    """
    container, command = plan.launcher.container, plan.site.container_runtime.command
    if container is None:
        return None
    image = container.local_image(plan.project.local_data_root(settings)) if shutil.which(command) else None
    if image is None:
        lacking = f"no container image {container.image}" if shutil.which(command) else f"no {command}"
        StepLog(context).warning(f"This machine has {lacking}. The workload runs without its container here.")
        return None
    problem = container.local_problem(image, _folders(settings, plan))
    if problem:
        raise failure(name, problem, final=True)
    return image


def _command(settings: Settings, plan: Plan, image: Path | None, directory: RunDirectory) -> list[str]:
    """Return the command that runs the workload in its run directory, or in an image."""
    request, container = plan.allocation.request, plan.launcher.container
    command = plan.launcher.local_command(request, plan.workload.command(plan.workload.root))
    if container is None or image is None:
        return command
    for file, text in container.files(plan.env).items():
        path = directory.path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    folders = _folders(settings, plan)
    plan.project.local_data_root(settings).mkdir(parents=True, exist_ok=True)
    return container.local_command(request, plan.site.container_runtime, image, directory.path, command, folders)


def _folders(settings: Settings, plan: Plan) -> tuple[Path, ...]:
    """Return the folders that a container needs beside its run directory."""
    return plan.project.local_data_root(settings), plan.workload.root, Path(launchers.__file__).parent


def _environment(context: dg.OpExecutionContext, settings: Settings, plan: Plan) -> dict[str, str]:
    """Return the variables of a workload, without those of Dagster Pipes."""
    return {
        **workload_environment(),
        **load_modules(plan.allocation.request.modules or (), StepLog(context)),
        **plan.launcher.local_environment(),
        "DATA_ROOT": str(plan.project.local_data_root(settings)),
        "PYTHONPATH": str(plan.workload.root),
        **plan.env,
    }


def run_array_here(
    context: dg.OpExecutionContext, name: str, settings: Settings, plan: Plan
) -> dg.PipesClientCompletedInvocation:
    """Run the tasks of an array as subprocesses of this step, some at once; see `ComputeResource.run`."""
    step = ArrayStep(context, name, plan)
    step.where = {"host": socket.gethostname(), "workload": str(plan.workload.path)}
    image, checks = _find_image(context, name, settings, plan), json.dumps(declared_checks(context))
    tasks = _LocalTasks(step, settings, plan, _environment(context, settings, plan), image, checks)
    with step.open(CONTEXT, MESSAGES):
        run_interruptibly(tasks.run)
    return step.complete()


class _LocalTasks:
    """The processes of the tasks that run now."""

    def __init__(
        self,
        step: ArrayStep,
        settings: Settings,
        plan: Plan,
        environment: Mapping[str, str],
        image: Path | None,
        checks: str,
    ) -> None:
        self._step, self._settings, self._plan = step, settings, plan
        self._environment, self._image, self._checks = environment, image, checks
        assert plan.array is not None
        self._most = plan.array.max_running_tasks or os.cpu_count() or 1
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
                except OSError as error:  # of the system: no memory, no space, too many processes
                    self._folders.pop(index).close()
                    self._step.failed(index, f"its process could not be started: {error}", "none: it has not run")
            if not self._processes:
                return
            ended = [index for index, process in self._processes.items() if not process.follow()]
            for index in ended:
                self._judge(index, self._end(index))
            if not ended:
                stop.wait(POLL_SECONDS)
        self._terminate()
        self._step.store_completed()

    def _start(self, index: int) -> None:
        folder = self._folders[index] = ExitStack()
        directory = RunDirectory(Path(folder.enter_context(temporary_run_directory())))
        contexts = self._step.contexts
        directory.context.write_text(contexts.head + contexts.tail(self._step.tasks[index]))
        directory.checks.write_text(self._checks)
        messages = {"path": str(directory.messages), "include_stdio_in_messages": False}
        environment = {
            **self._environment,
            DAGSTER_PIPES_CONTEXT_ENV_VAR: encode_param({"path": str(directory.context)}),
            DAGSTER_PIPES_MESSAGES_ENV_VAR: encode_param(messages),
        }
        names = {directory.stdout: "stdout", directory.stderr: "stderr", directory.messages: MESSAGES}
        sinks = {path: lambda data, name=name: self._step.feed(index, name, data) for path, name in names.items()}
        command = _command(self._settings, self._plan, self._image, directory)
        self._processes[index] = LocalProcess(command, environment, directory, sinks)
        self._step.started(index)

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

    def _terminate(self) -> None:
        """End all processes together."""
        until = time.monotonic() + GRACE_SECONDS
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            process.wait(max(0.0, until - time.monotonic()))
