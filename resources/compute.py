"""The one thing an asset calls: run this workload, wherever the deployment says."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Never

import dagster as dg
from pydantic import Field

from resources.errors import ConfigurationError
from resources.interrupts import run_interruptibly
from resources.launchers import Launcher
from resources.local import RunDirectory, run_workload, temporary_run_directory, workload_environment
from resources.pipes import explain_failure, failure, open_session
from resources.plan import Plan, make_plan
from resources.remote import RemoteRun
from resources.settings import Settings, load_settings
from resources.slurm import SlurmRequest


class ComputeResource(dg.ConfigurableResource[Any]):
    """Runs workloads: on this machine in `development`, through Slurm on the `*_supercomputer` deployments.

    Dagster makes a new copy of a resource for each step, so it holds no state; all that a run needs is built in `run`.
    """

    site_overrides: dict[str, Any] = Field({}, description="SUPERCOMPUTER_SITE_OVERRIDES.")

    def run(
        self,
        context: dg.AssetExecutionContext,
        *,
        workload: Path | str,
        launcher: Launcher,
        request: SlurmRequest | None = None,
        extras: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> dg.PipesClientCompletedInvocation:
        """Run a workload to its end and hand over what it reported through Dagster Pipes.

        Args:
            context: of the asset.
            workload: a Python program that calls `open_dagster_pipes()`.
            launcher: ScriptLauncher or RayLauncher.
            request: what to ask Slurm for; the default is one CPU for an hour. Checked everywhere, used by Slurm.
            extras: values for the workload's `pipes.extras`; JSON. `partition_keys` is added for partitioned assets.
            env: further environment variables for the workload. Not for secrets.

        Returns:
            The results; an asset returns `.get_materialize_result()` of it.

        Raises:
            Failure: the workload or what was asked for it is at fault; the text says what to change.
            RetryRequested: the supercomputer is: a node failed, the job was preempted.
            DagsterExecutionInterruptedError: the run was terminated, and what it had started has ended; or Dagster is
                stopping, and a Slurm job goes on.
        """
        asset = ", ".join(sorted(key.to_user_string() for key in context.selected_asset_keys))
        try:
            settings = load_settings(self.site_overrides)
            wanted = SlurmRequest() if request is None else request
            plan = make_plan(settings, self.site_overrides, workload, launcher, wanted)
            values = _check_extras(extras, context)
        except ConfigurationError as error:
            raise failure(asset, str(error)) from None
        if _intercept:
            _intercept(asset, settings, plan, env or {})
        for note in _notes(settings, plan):
            context.log.warning(note)
        if not settings.on_supercomputer:
            return _run_here(context, asset, settings, plan, values, env or {})
        done = RemoteRun(context, asset, settings, plan).run(values, env or {})
        _attach_partition_metadata(context, asset, done)
        return done


_Intercept = Callable[[str, Settings, Plan, Mapping[str, str]], Never]
_intercept: _Intercept | None = None


@contextmanager
def intercept_runs(intercept: _Intercept) -> Iterator[None]:
    """Call `intercept` in place of every run in this process, nested resources and other threads included.

    Args:
        intercept: gets the step's name, the settings, the plan and `env`, and raises.
    """
    global _intercept  # noqa: PLW0603 - for all threads; a context variable does not reach those that an asset starts
    _intercept = intercept
    try:
        yield
    finally:
        _intercept = None


def _notes(settings: Settings, plan: Plan) -> tuple[str, ...]:
    """What was changed in the request, and what deserves a warning."""
    notes, qos = plan.allocation.notes, plan.allocation.request.qos or ""
    if settings.deployment == "production_supercomputer" and qos.startswith("dev_"):
        notes += (f"QoS {qos} is for short tries, and this is {settings.deployment}: look at SLURM_QOS",)
    return notes


def _check_extras(extras: Mapping[str, Any] | None, context: dg.AssetExecutionContext) -> dict[str, Any]:
    if not isinstance(extras, Mapping | None):
        raise ConfigurationError(f"extras={extras!r} is no dictionary. Write for instance extras={{'trials': 3}}")
    values = dict(extras or {})
    for key, value in values.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"extras[{key!r}] cannot be sent to the workload as JSON: {error}") from None
    if context.has_partition_key or context.has_partition_key_range:
        if "partition_keys" in values:
            raise ConfigurationError("extras['partition_keys'] is taken: the partitions of the run stand there")
        values["partition_keys"] = list(context.partition_keys)
    return values


def _run_here(
    context: dg.AssetExecutionContext,
    asset: str,
    settings: Settings,
    plan: Plan,
    extras: dict[str, Any],
    env: Mapping[str, str],
) -> dg.PipesClientCompletedInvocation:
    """Run the workload as a subprocess of this step."""
    with temporary_run_directory() as folder:
        directory = RunDirectory(Path(folder))
        with open_session(context, extras, str(directory.context), str(directory.messages)) as session:
            directory.context.write_text(session.context_document.text)
            environment = {
                **workload_environment(os.environ),
                **plan.launcher.local_environment(),
                "DATA_ROOT": str(settings.local_data_root()),
                **env,
                **session.environment,
            }
            command = [sys.executable, str(plan.workload)]
            sinks = {
                directory.stdout: session.stdout.feed,
                directory.stderr: session.stderr.feed,
                directory.messages: session.messages.feed,
            }

            def work(stop: threading.Event) -> int:
                return run_workload(command, environment, directory, sinks, stop)

            begun = time.monotonic()
            exit_code = run_interruptibly(work)
            seconds = time.monotonic() - begun
            session.reader.hand_over()
        cause = explain_failure(session, exit_code, plan.workload.name)
        if cause:
            raise failure(asset, cause, stderr=session.stderr.tail, exit_code=exit_code, workload=plan.workload)
        where: dict[str, str | float] = {
            "host": socket.gethostname(),
            "workload": str(plan.workload),
            "workload_seconds": round(seconds, 3),
        }
        done = dg.PipesClientCompletedInvocation(session.pipes, metadata=where)
        _attach_partition_metadata(context, asset, done)
        return done


def _attach_partition_metadata(
    context: dg.AssetExecutionContext, asset: str, done: dg.PipesClientCompletedInvocation
) -> None:
    """Numbers that the workload reported for one partition of a run over several (custom messages of that form)."""
    partitions = context.partition_keys if context.has_partition_key or context.has_partition_key_range else ()
    for message in done.get_custom_messages():
        if isinstance(message, dict) and message.keys() == {"partition", "metadata"}:
            if message["partition"] not in partitions:
                raise failure(
                    asset, f"the workload reported the partition {message['partition']!r}, which is not of this run"
                )
            context.add_asset_metadata(
                message["metadata"], asset_key=context.asset_key, partition_key=message["partition"]
            )
