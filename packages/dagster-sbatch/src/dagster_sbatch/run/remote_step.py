"""What every call of `compute.run` does on the supercomputer: claim, report trouble, cancel or leave its jobs."""

import json
import threading
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import dagster as dg

from dagster_sbatch.auth import AccessError
from dagster_sbatch.costs.budget import check_budget
from dagster_sbatch.costs.cost import explain_excess
from dagster_sbatch.environments.deployed import Environment
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.run.adoption import Choice, inputs_of, is_left_out
from dagster_sbatch.run.array import Task
from dagster_sbatch.run.attempts import AttemptSeries, store_change
from dagster_sbatch.run.calls import StepName, calls_of, step_prefix
from dagster_sbatch.run.digests import digest_of
from dagster_sbatch.run.directory import CHECKS, RunInfo, RunPaths, files_of_commands, render_job
from dagster_sbatch.run.failures import failure
from dagster_sbatch.run.family import Family
from dagster_sbatch.run.history import earlier_job, key_in
from dagster_sbatch.run.interrupts import cancel_jobs, describe_uncancelled, read_interruption, run_interruptibly
from dagster_sbatch.run.plan import Plan
from dagster_sbatch.run.reports import StepLog, report_reachable, show_on_terminal
from dagster_sbatch.run.results import declared_checks, partitions_of
from dagster_sbatch.run.run_environment import RunEnvironment
from dagster_sbatch.run.step_inputs import inputs_of_step
from dagster_sbatch.run.tags import tag_job
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import Allocation, ArrayShape, SlurmRequest
from dagster_sbatch.slurm.gateway import (
    Claim,
    Gateway,
    LostClaimError,
    Questions,
    RefusedError,
    RemovedError,
    StoppedError,
    make_gateway,
)
from dagster_sbatch.slurm.gateway.agent.images import RECORD
from dagster_sbatch.slurm.outcome import explain_refusal
from dagster_sbatch.ssh import SshError

CANCEL_SECONDS = {"terminated": 170.0, "command": 30.0}
"""For cancelling jobs. `cancel_timeout_seconds` of dagster.yaml is a little longer; a person waits at a terminal."""
MOST_JOBS = 3  # jobs that a message or a tag of the run names; the latest ones


class RemoteStep(ABC):
    """One call of `compute.run` on the supercomputer, as one job or as array jobs.

    `runs` has the run directories that may have a job which is not over, each with that job's id once it is known.
    `planned` has the request of a first attempt, `series` the attempts at each task, `number` that of the latest one.
    """

    _gateway: Gateway
    _environment: RunEnvironment
    _family: Family
    _claim: Claim
    _number: int

    def __init__(self, context: dg.OpExecutionContext, asset: str, settings: Settings, plan: Plan) -> None:
        self._context, self._asset, self._settings, self._plan = context, asset, settings, plan
        self._log = StepLog(context)
        root, partitions = context.run.root_run_id or context.run_id, partitions_of(context)
        ends = " to ".join(sorted({*partitions[:1], *partitions[-1:]}))
        name = StepName.of(context)
        step = name.key if root == context.run_id else key_in(context.instance, root, name)
        self._info = RunInfo(context.run_id, root, asset, ends, step=step)
        self._planned = plan.allocation
        self._runs: dict[str, str | None] = {}
        self._series = defaultdict[int, AttemptSeries](lambda: AttemptSeries(self._planned, self._settings))
        self._earlier, interrupted = earlier_job(context)
        self._left = self._earlier if interrupted else None
        self._trouble: str | None = None
        self._project: str | None = None

    def run(self) -> dg.PipesClientCompletedInvocation:
        """Run it to its end; see `ComputeResource.run`."""
        return run_interruptibly(self._context, self._work)

    @abstractmethod
    def _execute(self) -> dg.PipesClientCompletedInvocation:
        """Submit or adopt, follow to the end, and return the results."""

    def _keep_completed(self) -> None:  # noqa: B027 - of a single job, nothing is complete before it is over
        """Store what is complete, quickly: the jobs are cancelled next, or their run directory was removed."""

    def _work(self, stop: threading.Event) -> dg.PipesClientCompletedInvocation:
        settings = self._settings
        gateway = make_gateway(settings, self._plan.site, stop, self._report_trouble, self._report_recovered)
        gateway.committed = self._left is not None
        self._gateway = gateway
        self._environment = RunEnvironment(gateway, settings, self._plan)
        try:
            self._family = self._register()
            return self._execute()
        except StoppedError:
            raise self._end() from None
        except LostClaimError as error:
            text = f"While the connection of this step was lost, another run ({error}) attached to its job."
            raise self._failure(text, final=True) from None
        except RemovedError as error:
            del self._runs[error.run]
            self._keep_completed()
            text = f"{error}\nRe-execute this run. Do not remove the folder of a run that is not over."
            raise self._failure(f"{text}{self._still_running}") from None
        except RefusedError as error:
            raise self._failure(f"{self._explain(error)}{self._still_running}") from None
        except (AccessError, SshError, ConfigurationError) as error:
            final = isinstance(error, ConfigurationError)
            raise self._failure(f"{error}{self._still_running}", final=final) from None
        finally:
            gateway.close()

    def _register(self) -> Family:
        """Register this call, and compute digests of everything that decides its result."""
        root, step, calls = self._info.root, self._info.step, calls_of(self._context)
        data_root, runs, environment = self._settings.data_folder, self._settings.runs_folder, self._environment
        with calls.preparing():
            known = inputs_of_step(self._context, by_partition=any(task.partitions for task in self._plan.tasks))
            inputs = inputs_of(self._plan, environment.inputs, known, data_root, self._find_image())
            call = calls.begin(root, step, digest_of(inputs))
        related = f"{step_prefix(root, step)}-"
        earlier = self._earlier.split(", ") if self._earlier else ()
        questions = Questions(related, data_root, environment.request, earlier)
        return Family(self._context, self._gateway, runs, call, inputs, self._planned.request, questions=questions)

    def _find_image(self) -> str | None:
        """Return the identity of the image of the job's container; None without a container."""
        container, data_root = self._plan.launcher.container, self._settings.data_folder
        if container is None:
            return None
        image = container.remote_image(data_root)
        problem, identity = self._gateway.image(image, data_root, self._settings.runs_folder)
        if problem:
            raise ConfigurationError(problem)
        return identity

    def _choose(self, tasks: Mapping[int, Task] | None = None) -> tuple[Choice, Environment | None]:
        """Choose which tasks are adopted and which are submitted; `tasks`: see `Family.choose`.

        Also returns the environment of new jobs; None if nothing is submitted.
        """
        choice, found = self._adopt(tasks), None
        if choice.new:
            if excess := explain_excess(self._allocation, len(choice.new), self._settings):
                raise ConfigurationError(excess)
            found = self._find_environment(self._claim.environment, len(choice.new))
            while choice.new and self._family.cancel_outdated(self._claim):
                choice = self._adopt(tasks)
        self._gateway.committed = True
        return choice, found if choice.new else None

    def _adopt(self, tasks: Mapping[int, Task] | None) -> Choice:
        """Register the jobs that this step follows, and cancels if a person terminates the run from now on."""
        self._claim, choice = self._family.choose(tasks)
        self._number = self._claim.number
        self._runs = {each.run: each.job for each in self._claim.attempts if each.run in choice.follow}
        self._gateway.committed |= bool(self._runs)
        self._series.clear()
        for attempt in self._claim.attempts:
            left_out = {0: 0} if is_left_out(attempt, self._family.request) else {}
            for place, index in choice.follow.get(attempt.run, left_out).items():
                self._series[index].read(attempt.record, self._family.request, place)
        return choice

    def _begin_attempt(self) -> str:
        """Return the run directory of a new attempt; from now on it may have a job."""
        self._number += 1
        run = f"{self._claim.runs}/{self._family.call.family}-{self._number}"
        self._runs[run] = None
        return run

    def _find_environment(self, answer: Mapping[str, Any] | None = None, tasks: int = 1) -> Environment:
        """Return the environment of new jobs; see `RunEnvironment.find`.

        `tasks`: how many of an array would be submitted; 0: only tasks whose cost was compared before.
        Raises ConfigurationError: there is none, or the project has not enough left.
        """
        found = self._environment.find(self._log.info, answer)
        check_budget(self._gateway, self._allocation, self._settings, self._log.warning, tasks)
        return found

    @property
    def _request(self) -> SlurmRequest:
        """The request of the jobs that messages are about."""
        return self._planned.request

    @property
    def _allocation(self) -> Allocation:
        return replace(self._planned, request=self._request)

    def _files(
        self,
        run: str,
        found: Environment,
        request: SlurmRequest,
        contexts: Mapping[str, str],
        record: Mapping[str, Any],
        array: ArrayShape | None = None,
    ) -> dict[str, str]:
        """Return all files of a new run directory by name.

        `contexts`: the file with the Pipes context, or those of the tasks of an array; see `TaskContexts`.
        `record`: what a later attempt reads of this one, beside what decides the result.
        """
        self._info = replace(self._info, environment=found.name)
        paths = RunPaths(run, found.python, found.workloads, self._claim.data_root)
        plan = replace(self._plan, allocation=replace(self._planned, request=request))
        record = {**self._family.record, **store_change(request, self._planned.request), **record}
        return {
            **files_of_commands(plan),
            "job.sh": render_job(plan, paths, self._info, array),
            **contexts,
            CHECKS: json.dumps(declared_checks(self._context)),
            "about.json": self._info.text,
            RECORD: json.dumps(record),
        }

    # Terminate

    def _end(self) -> dg.Failure:
        """Cancel the jobs of an interrupted step, or leave them to the next attempt; return the step's failure."""
        if not self._runs:
            return self._failure("The step was interrupted while it had no Slurm job.", final=True)
        interruption = read_interruption(self._context)
        if interruption == "stopped":
            show_on_terminal(f"{self._asset}: stopped.{self._still_running}")
            self._log.info(f"Stopped.{self._still_running}")
            return self._failure(f"Dagster has stopped this step.{self._still_running}", final=True)
        self._keep_completed()
        jobs = ", ".join(job or "(just submitted)" for job in self._runs.values())
        show_on_terminal(f"{self._asset}: cancelling Slurm job {jobs} ...")
        texts, left, error = cancel_jobs(self._gateway, self._runs, CANCEL_SECONDS[interruption])
        text = "\n".join([*texts, *([describe_uncancelled(left, error or self._trouble)] if left else [])])
        show_on_terminal(f"{self._asset}: {text}")
        ended = text if left else f"Terminated. {text}"
        (self._log.error if left else self._log.info)(ended)
        return self._failure(ended, final=True)

    # Messages

    def _register_job(self, run: str, job: str) -> None:
        """Register the job of a run directory, here and in the tags of the Dagster run."""
        self._runs.pop(run, None)
        self._runs[run] = job
        tag_job(self._context, self._jobs, self._family.call.number)

    def _explain(self, error: RefusedError | ConfigurationError) -> str:
        """Return why no job is submitted, or why another request was refused."""
        text = str(error)
        if isinstance(error, ConfigurationError):
            return text
        with suppress(RefusedError, StoppedError, AccessError, SshError):  # the refusal itself is what counts
            text = explain_refusal(text, self._request, self._gateway.projects)
        return f"refused on the supercomputer: {text}"

    def _report_project(self, job: str | None, account: str) -> None:
        if account and account != self._project:
            self._project = account
            self._log.info(f"job {job} is charged to project {account}")

    def _report_trouble(self, text: str) -> None:
        """Log a lost connection or a temporary error, once; report an error that a person may have to fix."""
        if text == self._trouble:
            return
        self._trouble, where = text, self._settings.edge_node_host
        if not self._gateway.blocked:
            self._log.warning(f"{where}: {text}; trying again")
            return
        job = self._jobs or self._left or "(just submitted)"
        report = (
            f"The step cannot reach its Slurm job {job} on {where}. The job is not affected. {text}\n"
            "Fix the cause while the run waits: it retries by itself. To check all that it needs:\n"
            "  scripts/doctor"
        )
        self._log.error(report)
        report_reachable(self._context, passed=False, description=report)

    def _report_recovered(self) -> None:
        report = f"The step reaches its Slurm job {self._jobs or self._left or '(just submitted)'} again."
        self._log.info(report)
        report_reachable(self._context, passed=True, description=report)

    @property
    def _jobs(self) -> str:
        """The ids of the jobs that may not be over; empty if none is known."""
        return ", ".join([job for job in self._runs.values() if job][-MOST_JOBS:])

    @property
    def _still_running(self) -> str:
        """What to do about jobs that this step does not follow any more; empty without one."""
        if not self._jobs:
            return ""
        jobs, are, them = ("jobs", "are", "them") if "," in self._jobs else ("job", "is", "it")
        return f"\nSlurm {jobs} {self._jobs} {are} still running. Re-execute this run to attach to {them} again."

    def _where(self, account: str | None) -> dict[str, Any]:
        """Return metadata for everything that the jobs report."""
        place = {"partition": self._request.partition, "qos": self._request.qos, "account": account or None}
        known = {name: value for name, value in place.items() if value is not None}
        return {**known, "workload": str(self._plan.workload.path)}

    def _failure(self, cause: str, stderr: str = "", *, final: bool = False, **details: Any) -> dg.Failure:
        for run, job in [(run, job) for run, job in self._runs.items() if job][-MOST_JOBS:]:
            cause += f"\n\nSlurm job {job}, run directory on {self._settings.edge_node_host}: {run}"
        return failure(self._asset, cause, stderr, final=final, **details)
