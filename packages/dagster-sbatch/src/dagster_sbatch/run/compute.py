"""The one thing an asset calls: run this workload, wherever the deployment says."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Never

import dagster as dg
from pydantic import Field

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.launchers import Launcher
from dagster_sbatch.project import Project
from dagster_sbatch.run.array import JobArray
from dagster_sbatch.run.failures import failure
from dagster_sbatch.run.local_run import Machine, run_here
from dagster_sbatch.run.plan import Plan, complete_extras, make_plan
from dagster_sbatch.run.remote_array import RemoteArray
from dagster_sbatch.run.remote_job import RemoteJob
from dagster_sbatch.run.reports import StepLog
from dagster_sbatch.run.results import partitions_of, unpartitioned_assets
from dagster_sbatch.run.step_inputs import assets_read, chained_assets
from dagster_sbatch.run.tags import made_elsewhere, retried_elsewhere, tag_deployment
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import SlurmRequest

ELSEWHERE = """\
this run is Dagster's own retry of one that was interrupted on {before}. \
Dagster now runs on {now} with DATA_ROOT={root}. The data and the Slurm jobs of that run are not there.
To attach to a job that is still running, start Dagster with the former settings and re-execute this run. \
To compute everything with the present settings, re-execute all of it."""
OTHER_DATA = """\
{asset} was last materialized on {place}. This run reads what is here, with DATA_ROOT={root}. \
If files are missing or older here, copy them, or materialize {asset} here first."""


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

    def run(  # noqa: PLR0913 - what an asset passes
        self,
        context: dg.AssetExecutionContext | dg.OpExecutionContext | dg.AssetCheckExecutionContext,
        *,
        workload: Path | str,
        launcher: Launcher,
        args: Sequence[str] = (),
        request: SlurmRequest | None = None,
        extras: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        array: JobArray | None = None,
        environment: str | None = None,
    ) -> dg.PipesClientCompletedInvocation:
        """Run a workload to its end and return what it reported through Dagster Pipes.

        Args:
            context: of the asset, the op, or the function of an asset check.
            workload: a Python program that calls `open_dagster_pipes()`, or a package: its folder with a `__main__.py`;
                with CommandLauncher and BatchScriptLauncher a program of any language.
            launcher: how to start it: ScriptLauncher, SrunLauncher, CommandLauncher, ...
            args: arguments of the workload.
            request: of Slurm; the default is one CPU for an hour. It is checked in `development`, too.
            extras: values for the workload's `pipes.extras`; JSON. `partition_keys` is added for partitioned assets.
            env: further environment variables for the workload. Not for secrets.
            array: divides the partitions of the run, or parameter sets, into the tasks of a job array; `request` and
                `launcher` are those of each task.
            environment: the packages on the supercomputer: `"torch"` for the dependency group `cluster-torch`, or the
                absolute path there of an interpreter or of the folder with its `bin/python`. The default is the group
                `cluster`, or SLURM_PYTHON. Not used in `development`.

        Returns:
            The results; an asset returns `.get_materialize_result()` of it, a check `.get_asset_check_result()`. With
            an array it is a CompletedArray, whose `.tasks` has what each task reported.

        Raises:
            Failure: the workload, the request or another argument is wrong, or there is no run; the text says what to
                change.
            DagsterExecutionInterruptedError: the run was terminated, and its processes and its job have ended; or
                Dagster is stopping, and the Slurm job keeps running.
        """
        step = _step_of(context)
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
                array=array,
                environment=environment,
            )
            _check_partitions(step, plan)
        except ConfigurationError as error:
            raise failure(name, str(error), final=True) from None
        return self._execute(step, name, settings, plan)

    def _settings(self) -> Settings:
        return self.project.load_settings()

    def _execute(
        self, context: dg.OpExecutionContext, name: str, settings: Settings, plan: Plan
    ) -> dg.PipesClientCompletedInvocation:
        if _intercept:
            _intercept(name, settings, plan)
        site = settings.supercomputer_site if settings.on_supercomputer else None
        data_root = settings.data_folder if site else str(plan.project.local_data_root(settings))
        if before := retried_elsewhere(context, site, data_root):
            raise failure(name, ELSEWHERE.format(before=before, now=settings.deployment, root=data_root), final=True)
        tag_deployment(context, settings.deployment, site, data_root)
        others = made_elsewhere(context.instance, set(assets_read(context).values()), site, data_root)
        for note in (*plan.notes, *(OTHER_DATA.format(asset=a, place=p, root=data_root) for a, p in others.items())):
            StepLog(context).warning(note)
        if settings.on_supercomputer:
            return (RemoteArray if plan.array else RemoteJob)(context, name, settings, plan).run()
        machine = Machine(context, name, settings, plan)
        return run_here(context, name, plan, machine.run, machine.where)


def _check_partitions(step: dg.OpExecutionContext, plan: Plan) -> None:
    """Refuse an array that cannot compute the partitions of the run in its tasks."""
    if not any(task.partitions for task in plan.tasks):
        return
    head = f"array={plan.array!r} divides the partitions of the run among its tasks, and"
    if without := ", ".join(key.to_user_string() for key in unpartitioned_assets(step)):
        raise ConfigurationError(f"{head} {without} has none. Compute it in a step of its own.")
    if len(plan.tasks) > 1 and (chained := ", ".join(key.to_user_string() for key in chained_assets(step))):
        raise ConfigurationError(
            f"{head} these of {chained} depend on each other. Tasks run at the same time. Without array=, the workload "
            "can compute its partition_keys one after another; without backfill_policy=, Dagster executes one run per "
            "partition, one after another."
        )


def _step_of(context: object) -> dg.OpExecutionContext:
    """Return the context of the step that runs; refuse that of something else, or of a call outside a run."""
    if isinstance(context, dg.AssetExecutionContext | dg.OpExecutionContext | dg.AssetCheckExecutionContext):
        step = context.op_execution_context
        with suppress(dg.DagsterError):  # Dagster's, of build_asset_context() and build_op_context()
            step.get_step_execution_context()
            return step
        problem = (
            "it was called outside a run, with the context of build_asset_context() or build_op_context(). "
            "Let a run call it, in tests as well: dg.materialize([asset], resources={'compute': ...}), "
            "or execute_in_process() of a job."
        )
    else:
        problem = (
            f"its context is a {type(context).__name__}, and only an asset, an op or the function of an asset check "
            "can run a workload. Pass the `context` of that function."
        )
    raise failure("compute.run", problem, final=True)


_Intercept = Callable[[str, Settings, Plan], Never]
_intercept: _Intercept | None = None


@contextmanager
def intercept_runs(intercept: _Intercept) -> Iterator[None]:
    """Call `intercept` in place of every run in this process, nested resources and other threads included.

    `intercept`: gets the step's name, the settings and the plan, and raises.
    """
    global _intercept  # noqa: PLW0603 - for all threads; a context variable does not reach those that an asset starts
    _intercept = intercept
    try:
        yield
    finally:
        _intercept = None
