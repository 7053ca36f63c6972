"""A workload on the supercomputer, as its Dagster step sees it: claim, submit or adopt, follow to the end, judge."""

import signal
import threading
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from dagster_sbatch.auth import AccessError
from dagster_sbatch.environments.deployed import Environments
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.run.adoption import inputs_of, request_of
from dagster_sbatch.run.attempts import Attempts, Submission
from dagster_sbatch.run.calls import calls_of, former_family_of, step_key, step_prefix
from dagster_sbatch.run.digests import digest_of
from dagster_sbatch.run.directory import CONTEXT, RunInfo, RunPaths, files_of
from dagster_sbatch.run.failures import failure
from dagster_sbatch.run.history import left_job, tag_job
from dagster_sbatch.run.interrupts import read_interruption, run_interruptibly, stopped_with_run
from dagster_sbatch.run.messages import explain_failure
from dagster_sbatch.run.pipes import Session, open_session
from dagster_sbatch.run.plan import Plan
from dagster_sbatch.run.reports import StepLog, report_reachable, show_on_terminal
from dagster_sbatch.run.results import StepContext, complete, op_context, partitions_of
from dagster_sbatch.run.run_environment import RunEnvironment
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import accounting
from dagster_sbatch.slurm.gateway import (
    MESSAGES,
    Gateway,
    JobEnd,
    JobState,
    LostClaimError,
    RefusedError,
    StoppedError,
    Submitted,
    make_gateway,
)
from dagster_sbatch.slurm.outcome import explain_refusal, judge
from dagster_sbatch.slurm.waiting import advise
from dagster_sbatch.ssh import SshError

CANCEL_SECONDS = {"terminated": 170.0, "command": 30.0}
"""For cancelling a job. `cancel_timeout_seconds` of dagster.yaml is a little longer; a person waits at a terminal."""
MOST_RETRIES = 3
"""After a fault of the machine: a node that failed, a job that was preempted."""
RETRY_SECONDS = 10


class RemoteRun:
    """One call of `compute.run` on the supercomputer."""

    def __init__(self, context: StepContext, asset: str, settings: Settings, plan: Plan) -> None:
        self._context, self._asset, self._settings, self._plan = context, asset, settings, plan
        self._step, self._log = op_context(context), StepLog(context)
        root, partitions = context.run.root_run_id or context.run_id, partitions_of(context)
        ends = " to ".join(sorted({*partitions[:1], *partitions[-1:]}))
        self._info = RunInfo(context.run_id, root, asset, ends, step=step_key(self._step))
        self._call = 0
        self._run: str | None = None
        self._job: str | None = None
        self._left = left_job(context)
        self._trouble: str | None = None
        self._project: str | None = None
        self._state: list[str] = []

    def run(self) -> dg.PipesClientCompletedInvocation:
        """Run it to its end; see `ComputeResource.run`."""
        return run_interruptibly(self._work)

    def _work(self, stop: threading.Event) -> dg.PipesClientCompletedInvocation:
        site, base = self._plan.site, str(self._settings.deployment_base_path)
        gateway = make_gateway(
            self._settings, site, stop, lambda text: self._report_trouble(gateway, text), self._report_recovered
        )
        gateway.committed = self._left is not None
        environments, lock = Environments(gateway, base, site), self._plan.project.lock
        environment = RunEnvironment(environments, self._settings, self._plan.workload, lock)
        try:
            attempts = Attempts(self._step, gateway, base, self._register(environment))
            with stopped_with_run(self._step, stop):
                paths = self._choose(gateway, attempts, environment)
                return self._follow(gateway, attempts.submission, paths)
        except StoppedError:
            raise self._end(gateway) from None
        except LostClaimError as error:
            text = f"While the connection of this step was lost, another run ({error}) attached to its job."
            raise self._failure(text, final=True) from None
        except RefusedError as error:
            text = f"refused on the supercomputer: {self._explain(gateway, error)}{self._still_running}"
            raise self._failure(text) from None
        except (AccessError, SshError, ConfigurationError) as error:
            final = isinstance(error, ConfigurationError)
            raise self._failure(f"{error}{self._still_running}", final=final) from None
        finally:
            gateway.close()

    def _register(self, environment: RunEnvironment) -> Submission:
        """Register this call, and compute digests of everything that decides its result."""
        assets = tuple(sorted(key.to_user_string() for key in self._step.selected_asset_keys))
        data_root = self._settings.data_root or f"{self._settings.deployment_base_path}/data"
        inputs = inputs_of(self._plan, environment.inputs, assets, data_root)
        root, step = self._info.root, self._info.step
        call = calls_of(self._step).begin(root, step, digest_of(inputs))
        self._call = call.number
        former = former_family_of(root, assets, partitions_of(self._context), call.number)
        related = (f"{step_prefix(root, step)}-", f"{former}-")
        return Submission(call, step, related, inputs, request_of(self._plan), data_root)

    # Submit and follow

    def _choose(self, gateway: Gateway, attempts: Attempts, environment: RunEnvironment) -> RunPaths | None:
        """Choose the attempt; return where a new one is to be submitted, None if an earlier one is adopted."""
        claim, choice = attempts.choose()
        found = None if choice.adopt else environment.find(self._log.info)
        while not choice.adopt and attempts.cancel_outdated(claim):
            claim, choice = attempts.choose()
        self._run = f"{claim.runs}/{attempts.family}-{choice.attempt}"
        self._job = claim.job if choice.adopt else None
        gateway.committed = True
        if found is None or choice.adopt:
            return None
        self._info = replace(self._info, environment=found.name)
        return RunPaths(self._run, found.python, found.workloads, claim.data_root)

    def _follow(
        self, gateway: Gateway, submission: Submission, paths: RunPaths | None
    ) -> dg.PipesClientCompletedInvocation:
        """Submit the job, if it has paths, and follow it to its end."""
        run = str(self._run)
        with open_session(self._context, self._plan.extras, f"{run}/{CONTEXT}", f"{run}/{MESSAGES}") as session:
            document = session.context_document.text
            files = files_of(self._plan, paths, self._info, document, submission.record) if paths else None
            sinks = {MESSAGES: session.messages.feed, "stdout": session.stdout.feed, "stderr": session.stderr.feed}
            end = gateway.run(run, files, sinks, self._report_submitted, self._report_state, self._context.run_id)
            session.messages.finish(self._context)
        self._report_project(end.account)
        try:
            self._check(session, end)
        except (dg.Failure, dg.RetryRequested):
            gateway.reject(run)
            raise
        return complete(self._context, session.pipes, self._where(end), self._costs(end))

    def _check(self, session: Session, end: JobEnd) -> None:
        """Raise if the job or its workload failed."""
        request, workload = self._plan.allocation.request, self._plan.workload
        outcome = judge(end, request)
        cause = outcome.cause if outcome else explain_failure(session.messages, _exit_code(end), workload.name)
        if cause:
            error = self._failure(cause, stderr=session.stderr.tail, **(self._where(end) | self._costs(end)))
            if outcome and outcome.again and self._context.retry_number < MOST_RETRIES:
                self._log.warning(f"{cause}; another attempt follows")
                raise dg.RetryRequested(MOST_RETRIES, RETRY_SECONDS) from error
            raise error
        if not end.state:
            self._log.warning("Slurm does not know the job any more. The job's own record of its end is used.")
        if end.short:
            lost = ", ".join(f"{name} from byte {size} on" for name, size in end.short.items())
            self._log.warning(f"Not all output of the job arrived: {lost}. It is in {self._run}.")

    # Terminate

    def _end(self, gateway: Gateway) -> dg.Failure:
        """Cancel the job of an interrupted step, or leave it to the next attempt; return the step's failure."""
        if self._run is None:
            return self._failure("The step was interrupted before it had a job.", final=True)
        interruption = read_interruption(self._step)
        if interruption == "stopped":
            show_on_terminal(f"{self._asset}: stopped.{self._still_running}")
            self._log.info(f"Stopped.{self._still_running}")
            return self._failure(f"Dagster has stopped this step.{self._still_running}", final=True)
        show_on_terminal(f"{self._asset}: cancelling Slurm job {self._job or '(just submitted)'} ...")
        gateway.stop = threading.Event()
        limit = threading.Timer(CANCEL_SECONDS[interruption], gateway.stop.set)
        limit.start()
        try:
            end = gateway.cancel(self._run)
        except (RefusedError, StoppedError, LostClaimError, AccessError, SshError, ConfigurationError) as error:
            text = (
                f"Slurm job {self._job} could not be cancelled, and may still be running. "
                f"{error or self._trouble or 'The login node cannot be reached.'}\n"
                f"Cancel it later:\n  scripts/job {self._job or self._run.rpartition('/')[2]} cancel"
            )
            show_on_terminal(text)
            self._log.error(text)
            return self._failure(text, final=True)
        finally:
            limit.cancel()
        text = f"Slurm job {self._job} is over: {end.state}" if end else "No job was submitted."
        show_on_terminal(f"{self._asset}: {text}")
        self._log.info(f"Terminated. {text}")
        return self._failure(f"Terminated. {text}", final=True)

    # Messages

    def _report_submitted(self, submitted: Submitted) -> None:
        self._job = submitted.job
        tag_job(self._context, submitted.job, self._call)
        self._log.info(f"job {submitted.job} ({submitted.how}) in {self._run}. A shell inside it: {self._attach}")
        for shown, command in self._plan.launcher.hints(submitted.job).items():
            self._log.info(f"{shown}, while it runs: {command}")

    def _explain(self, gateway: Gateway, error: RefusedError) -> str:
        try:
            return explain_refusal(str(error), self._plan.allocation.request, gateway.projects)
        except (RefusedError, StoppedError, AccessError, SshError):  # the refusal itself is what counts
            return str(error)

    def _report_project(self, account: str) -> None:
        if account and account != self._project:
            self._project = account
            self._log.info(f"job {self._job} is charged to project {account}")

    def _report_state(self, state: JobState) -> None:
        self._report_project(state.account)
        words = [f"{state.state} on {state.node}, temporary files in {state.temporary}" if state.node else state.state]
        if state.reason != "None":
            words.append(state.reason)
        if state.start and state.state == "PENDING":
            words.append(f"expected to start at {datetime.fromtimestamp(state.start, UTC):%Y-%m-%d %H:%M:%S} UTC")
        if words != self._state:
            self._state = words
            self._log.info(f"job {self._job or '(just submitted)'}: {', '.join(words)}")
            advice = advise(state.reason, self._job or "JOB") if state.state == "PENDING" else None
            if advice:
                self._log.warning(f"Slurm job {self._job} may never start ({state.reason}): {advice}")

    def _report_trouble(self, gateway: Gateway, text: str) -> None:
        """Log a lost connection or a temporary error, once; report an error that a person may have to fix."""
        if text == self._trouble:
            return
        self._trouble, where = text, self._settings.edge_node_host
        if not gateway.blocked:
            self._log.warning(f"{where}: {text}; trying again")
            return
        job = self._job or self._left or "(just submitted)"
        report = (
            f"The step cannot reach its Slurm job {job} on {where}, which is not affected. {text}\n"
            "Fix that while the run waits: it tries again by itself. Every link of the chain is tested by\n"
            "  scripts/doctor"
        )
        self._log.error(report)
        report_reachable(self._step, passed=False, description=report)

    def _report_recovered(self) -> None:
        report = f"The step reaches its Slurm job {self._job or self._left or '(just submitted)'} again."
        self._log.info(report)
        report_reachable(self._step, passed=True, description=report)

    @property
    def _still_running(self) -> str:
        """What to do about a job that this step does not follow any more; empty without one."""
        if not self._job:
            return ""
        return f"\nSlurm job {self._job} is still running. Re-execute this run to attach to it again."

    @property
    def _attach(self) -> str:
        command = f"srun --jobid={self._job} --overlap --pty bash"
        if self._settings.on_login_node:
            return command
        return f"ssh -t {self._settings.edge_node_user}@{self._settings.edge_node_host} {command}"

    def _where(self, end: JobEnd) -> dict[str, Any]:
        """Return metadata for everything that the job reports."""
        request = self._plan.allocation.request
        where = {
            "job_id": int(self._job or 0),
            "run_directory": self._run,
            "attach": self._attach,
            **self._plan.launcher.hints(self._job or ""),
            "partition": request.partition,
            "qos": request.qos,
            "account": end.account or None,
            "workload": str(self._plan.workload.path),
        }
        return {name: value for name, value in where.items() if value is not None}

    def _costs(self, end: JobEnd) -> dict[str, float]:
        """Return metadata of the whole job."""
        return accounting.count(end, self._plan.allocation.request)

    def _failure(self, cause: str, stderr: str = "", *, final: bool = False, **details: Any) -> dg.Failure:
        if self._job:
            cause += f"\n\nRun directory on {self._settings.edge_node_host}: {self._run}"
        return failure(self._asset, cause, stderr, final=final, **details)


def _exit_code(end: JobEnd) -> int:
    """As in `subprocess`: the shell's 128 + N, where a signal N has ended the workload, becomes -N."""
    code = end.code or 0
    return 128 - code if code - 128 in set(signal.Signals) else code
