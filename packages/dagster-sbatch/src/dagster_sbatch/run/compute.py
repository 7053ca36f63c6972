"""The one thing an asset calls: run this workload, wherever the deployment says."""

import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Never

import dagster as dg
from pydantic import Field

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.launchers import Launcher
from dagster_sbatch.project import Project
from dagster_sbatch.run.failures import failure
from dagster_sbatch.run.history import tag_deployment
from dagster_sbatch.run.interrupts import run_interruptibly
from dagster_sbatch.run.local import RunDirectory, run_workload, temporary_run_directory, workload_environment
from dagster_sbatch.run.pipes import explain_failure, open_session
from dagster_sbatch.run.plan import Plan, complete_extras, make_plan
from dagster_sbatch.run.remote import RemoteRun
from dagster_sbatch.run.reports import StepLog
from dagster_sbatch.run.results import StepContext, complete, partitions_of
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import SlurmRequest


class ComputeResource(dg.ConfigurableResource[Any]):
    """Runs workloads: on this machine in `development`, through Slurm on the `*_supercomputer` deployments."""

    # Dagster copies a resource for each step, so it holds no state; all that a run needs is built in `run`.
    root: str = Field(default=".", description="Folder of the code location, with `.env` and `envs/`.")
    workloads: str = Field(default="workloads", description="Folder of the workloads, below the root.")
    site_overrides: dict[str, Any] = Field({}, description="The sites: SUPERCOMPUTER_SITE_OVERRIDES.")

    @classmethod
    def of(cls, project: Project) -> "ComputeResource":
        """Make the resource of a code location."""
        return cls(
            root=str(project.root), workloads=str(project.workloads), site_overrides=dict(project.site_overrides)
        )

    @property
    def project(self) -> Project:
        """The code location."""
        return Project(Path(self.root).resolve(), self.site_overrides, self.workloads)

    def run(
        self,
        context: StepContext | dg.AssetCheckExecutionContext,
        *,
        workload: Path | str,
        launcher: Launcher,
        args: Sequence[str] = (),
        request: SlurmRequest | None = None,
        extras: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> dg.PipesClientCompletedInvocation:
        """Run a workload to its end and return what it reported through Dagster Pipes.

        Args:
            context: of the asset, the op, or the function of an asset check.
            workload: a Python program that calls `open_dagster_pipes()`, or a package: its folder with a `__main__.py`.
            launcher: ScriptLauncher or RayLauncher.
            args: the workload's `sys.argv[1:]`.
            request: of Slurm; the default is one CPU for an hour. It is checked in `development`, too.
            extras: values for the workload's `pipes.extras`; JSON. `partition_keys` is added for partitioned assets.
            env: further environment variables for the workload. Not for secrets.

        Returns:
            The results; an asset returns `.get_materialize_result()` of it, a check `.get_asset_check_result()`.

        Raises:
            Failure: the workload, the request or another argument is wrong; the text says what to change.
            RetryRequested: a node failed, or the job was preempted.
            DagsterExecutionInterruptedError: the run was terminated, and its processes and its job have ended; or
                Dagster is stopping, and the Slurm job keeps running.
        """
        step = context.op_execution_context if isinstance(context, dg.AssetCheckExecutionContext) else context
        name = ", ".join(sorted(key.to_user_string() for key in step.selected_asset_keys)) or step.op_def.name
        try:
            settings = self._settings()
            plan = make_plan(
                settings,
                self.project,
                workload,
                launcher,
                SlurmRequest() if request is None else request,
                args=args,
                extras=complete_extras(extras, partitions_of(step)),
                env=env,
            )
        except ConfigurationError as error:
            raise failure(name, str(error), final=True) from None
        return self._execute(step, name, settings, plan)

    def _settings(self) -> Settings:
        return self.project.load_settings()

    def _execute(
        self, context: StepContext, name: str, settings: Settings, plan: Plan
    ) -> dg.PipesClientCompletedInvocation:
        if _intercept:
            _intercept(name, settings, plan)
        tag_deployment(context, settings.deployment, settings.supercomputer_site if settings.on_supercomputer else None)
        for note in plan.notes:
            StepLog(context).warning(note)
        if settings.on_supercomputer:
            return RemoteRun(context, name, settings, plan).run()
        return _run_here(context, name, settings, plan)


_Intercept = Callable[[str, Settings, Plan], Never]
_intercept: _Intercept | None = None


@contextmanager
def intercept_runs(intercept: _Intercept) -> Iterator[None]:
    """Call `intercept` in place of every run in this process, nested resources and other threads included.

    Args:
        intercept: gets the step's name, the settings and the plan, and raises.
    """
    global _intercept  # noqa: PLW0603 - for all threads; a context variable does not reach those that an asset starts
    _intercept = intercept
    try:
        yield
    finally:
        _intercept = None


def _run_here(context: StepContext, name: str, settings: Settings, plan: Plan) -> dg.PipesClientCompletedInvocation:
    """Run the workload as a subprocess of this step."""
    with temporary_run_directory() as folder:
        directory = RunDirectory(Path(folder))
        with open_session(context, plan.extras, str(directory.context), str(directory.messages)) as session:
            directory.context.write_text(session.context_document.text)
            environment = {
                **workload_environment(),
                **plan.launcher.local_environment(),
                "DATA_ROOT": str(plan.project.local_data_root(settings)),
                "PYTHONPATH": str(plan.workload.root),
                **plan.env,
                **session.pipes.get_bootstrap_env_vars(),
            }
            command = [sys.executable, *plan.workload.command(plan.workload.root)]
            sinks = {
                directory.stdout: session.stdout.feed,
                directory.stderr: session.stderr.feed,
                directory.messages: session.messages.feed,
            }

            ended = run_interruptibly(lambda stop: run_workload(command, environment, directory, sinks, stop))
            session.messages.finish(context)
        cause = explain_failure(session, ended.exit_code, plan.workload.name)
        if cause:
            raise failure(name, cause, session.stderr.tail, exit_code=ended.exit_code, workload=plan.workload.path)
        where = {"host": socket.gethostname(), "workload": str(plan.workload.path)}
        return complete(context, session.pipes, where, {"workload_seconds": round(ended.seconds, 3)})
