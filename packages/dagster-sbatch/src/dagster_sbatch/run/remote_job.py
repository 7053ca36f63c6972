"""A workload on the supercomputer as one job, as its Dagster step sees it: submit or adopt, follow, judge, repeat."""

import shlex
from pathlib import Path
from typing import Any

import dagster as dg

from dagster_sbatch.clock import written
from dagster_sbatch.environments.deployed import Environment
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.run.array_results import attempts_metadata
from dagster_sbatch.run.attempts import rows_of, store_attempts
from dagster_sbatch.run.messages import explain_failure
from dagster_sbatch.run.past_use import proposal_metadata, uses_of
from dagster_sbatch.run.pipes import CONTEXT, Session, open_session
from dagster_sbatch.run.plan import Plan
from dagster_sbatch.run.remote_step import RemoteStep
from dagster_sbatch.run.results import complete, partitions_of
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import SlurmRequest, accounting
from dagster_sbatch.slurm.gateway import JobEnd, JobState, RefusedError, StoppedError, Submitted
from dagster_sbatch.slurm.outcome import CAUSES, Outcome, advise, explain_stderr
from dagster_sbatch.slurm.request import Fault
from dagster_sbatch.slurm.retries import Next

RETRY_SECONDS = 10.0  # before the same request is submitted again


class RemoteJob(RemoteStep):
    """One call of `compute.run` on the supercomputer, as one job; after some failures, as one job after another."""

    def __init__(self, context: dg.OpExecutionContext, asset: str, settings: Settings, plan: Plan) -> None:
        super().__init__(context, asset, settings, plan)
        self._run = ""
        self._state: list[str] | None = None
        self._idle_reported = False

    @property
    def _request(self) -> SlurmRequest:
        """The request of the attempt that is submitted or followed now."""
        return self._series[0].request

    def _execute(self) -> dg.PipesClientCompletedInvocation:
        choice, found = self._choose()
        self._run = self._begin_attempt() if choice.new else next(iter(self._runs))
        while True:
            self._state, self._idle_reported = None, False
            try:
                if completed := self._follow(found):
                    return completed
                found = self._find_environment()
            except (ConfigurationError, RefusedError) as error:
                if not self._series[0].ended or self._job:
                    raise
                raise self._end_attempts(error) from None
            self._run = self._begin_attempt()

    def _end_attempts(self, error: ConfigurationError | RefusedError) -> dg.Failure:
        """Return the step's failure: the next attempt cannot be submitted. A re-execution begins with the first one."""
        self._gateway.reject(self._run)
        ended, final = self._series[0].ended, isinstance(error, ConfigurationError)
        text = ended[-1].explain_last(self._explain(error))
        return self._failure(text, final=final, **attempts_metadata(rows_of(ended)))

    def _follow(self, found: Environment | None) -> dg.PipesClientCompletedInvocation | None:
        """Follow the job to its end; return None if another attempt has to follow.

        `found`: the environment in which it is submitted; None if it exists.
        """
        run, request = self._run, self._request
        with open_session(self._context, self._plan.extras, run) as session:
            contexts, record = {CONTEXT: session.context}, store_attempts(self._series[0].ended)
            files = self._files(run, found, request, contexts, record) if found else None
            report = self._report_submitted, self._report_state
            end = self._gateway.run(run, files, session.sinks, self._context.run_id, *report)
            outcome, failed, following = self._series[0].judge(end, session.stderr.tail)
            if not following.request:  # else the results are those of a failed attempt
                session.messages.finish(self._context)
        self._report_project(self._job, end.account)
        if failed and following.request:
            self._retry(failed, following, end)
            return None
        try:
            self._check(session, end, outcome, failed, following)
        except dg.Failure:
            self._gateway.reject(run)
            raise
        costs = self._costs(end, "succeeded")
        uses = [*uses_of(costs, partitions_of(self._context)[:1], request.partition)]
        proposal = proposal_metadata(self._context, self._plan, uses)
        return complete(self._context, session.pipes, self._about(end), {**costs, **proposal})

    def _retry(self, failed: Outcome, following: Next, end: JobEnd) -> None:
        """Register a failed attempt, and wait before the same request is submitted again."""
        assert following.request
        most = self._planned.request.retries.max_retries + 1
        number = len(self._series[0].ended) + 2
        self._log.warning(
            f"Slurm job {self._job}: {failed.cause}. Attempt {number} of at most {most} follows, with {following.text}."
        )
        same = following.request == self._request
        self._series[0].repeat(self._job, end, failed.cause, following.request)
        del self._runs[self._run]  # its job is over
        if same and self._gateway.stop.wait(RETRY_SECONDS):
            raise StoppedError

    def _check(
        self, session: Session, end: JobEnd, outcome: Outcome | None, failed: Outcome | None, following: Next
    ) -> None:
        """Raise if the job or its workload failed.

        `outcome`: what Slurm and the job's own record say; None if its exit code and its Pipes session decide.
        `failed`: the same, or what stderr says. `following`: no attempt, and perhaps why.
        """
        cause = outcome.text if outcome else explain_failure(session.messages, end.exit_code, self._plan.workload.name)
        if cause:
            own = self._about(end) | self._costs(end, failed.cause if failed else cause.partition("\n")[0])
            if end.state not in CAUSES:
                cause = explain_stderr(cause, session.stderr.tail, self._request)
            cause += following.refusal
            final = bool(following.text) and failed is not None and failed.fault in (Fault.MEMORY, Fault.TIME)
            raise self._failure(cause, stderr=session.stderr.tail, final=final, **own)
        if not end.state:
            self._log.warning("Slurm does not know the job any more. The job's own record of its end is used.")
        if end.short:
            lost = ", ".join(f"{name} from byte {size} on" for name, size in end.short.items())
            self._log.warning(f"Not all output of the job arrived: {lost}. Unless removed, it is in {self._run}.")

    def _report_submitted(self, submitted: Submitted) -> None:
        self._register_job(self._run, submitted.job)
        self._log.info(
            f"job {submitted.job} ({submitted.how}) in {self._run}. A shell inside it: {self._attach(submitted.job)}"
        )
        for shown, command in self._plan.launcher.hints(submitted.job).items():
            self._log.info(f"{shown}, while it runs: {command}")

    def _report_state(self, state: JobState) -> None:
        self._report_project(self._job, state.account)
        words = [f"{state.state} on {state.node}, temporary files in {state.temporary}" if state.node else state.state]
        if state.reason != "None":
            words.append(state.reason)
        if state.start and state.state == "PENDING":
            words.append(f"expected to start at {written(state.start)}")
        if state.idle is not None and not self._idle_reported:
            self._idle_reported = True
            text = accounting.describe_idle(state.idle, self._request)
            self._log.warning(f"Slurm job {self._job}: {text}")
        if words != self._state:
            self._state = words
            self._log.info(f"job {self._job or '(just submitted)'}: {', '.join(words)}")
            advice = advise(state.reason, self._job or "JOB") if state.state == "PENDING" else None
            if advice:
                self._log.warning(f"Slurm job {self._job} may never start ({state.reason}): {advice}")

    @property
    def _job(self) -> str:
        """The id of the job; empty until it is known."""
        return self._runs.get(self._run) or ""

    def _about(self, end: JobEnd) -> dict[str, Any]:
        """Return metadata for everything that the job reports."""
        own = {"job_id": int(self._job or 0), "run_directory": self._run, "attach": self._attach(self._job)}
        return {**own, **self._plan.launcher.hints(self._job), **self._where(end.account)}

    def _attach(self, job: str) -> str:
        """Return the command that opens a shell inside a job."""
        command = f"srun --jobid={job} --overlap --pty bash"
        if self._settings.on_login_node:
            return command
        settings = self._settings
        key, home = shlex.quote(str(settings.edge_node_key_path)), f"{Path.home()}/"
        key = f"~/{key.removeprefix(home)}" if key.startswith(home) else key
        port = f"-p {settings.edge_node_port} " if settings.edge_node_port != 22 else ""
        login = shlex.quote(f"{settings.edge_node_user}@{settings.edge_node_host}")
        return f"ssh -t {port}-i {key} {login} {command}"

    def _costs(self, end: JobEnd, how: str) -> dict[str, Any]:
        """Return metadata of the whole job, and a table of the attempts if there were several; `how` it ended."""
        costs: dict[str, Any] = {**accounting.count(end, self._request)}
        if plot := accounting.plot(end.usage, self._request):
            costs["usage"] = plot
        self._series[0].finish(self._job, end, how)
        return costs | attempts_metadata(rows_of(self._series[0].ended))
