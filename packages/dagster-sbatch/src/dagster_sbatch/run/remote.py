"""A workload on the supercomputer as one job, as its Dagster step sees it: submit or adopt, follow, judge."""

from datetime import UTC, datetime
from typing import Any

import dagster as dg

from dagster_sbatch.run.attempts import Attempts, Submission
from dagster_sbatch.run.directory import CONTEXT, RunPaths, files_of
from dagster_sbatch.run.messages import explain_failure
from dagster_sbatch.run.past_use import proposal_metadata, uses_of
from dagster_sbatch.run.pipes import Session, open_session
from dagster_sbatch.run.remote_step import MOST_RETRIES, RemoteStep, exit_code
from dagster_sbatch.run.results import complete, declared_checks, partitions_of
from dagster_sbatch.run.run_environment import RunEnvironment
from dagster_sbatch.slurm import accounting, usage
from dagster_sbatch.slurm.gateway import MESSAGES, Gateway, JobEnd, JobState, Submitted
from dagster_sbatch.slurm.outcome import CAUSES, explain_memory, judge
from dagster_sbatch.slurm.waiting import advise

RETRY_SECONDS = 10


class RemoteRun(RemoteStep):
    """One call of `compute.run` on the supercomputer, as one job."""

    _run = ""
    _state: list[str] | None = None
    _idle_reported = False

    def _execute(
        self, gateway: Gateway, attempts: Attempts, environment: RunEnvironment
    ) -> dg.PipesClientCompletedInvocation:
        paths = self._choose(gateway, attempts, environment)
        return self._follow(gateway, attempts.submission, paths)

    def _before_cancelling(self) -> None:
        """Nothing is complete before the job is over."""

    def _choose(self, gateway: Gateway, attempts: Attempts, environment: RunEnvironment) -> RunPaths | None:
        """Choose the attempt; return where a new one is to be submitted, None if an earlier one is adopted."""
        claim, choice = attempts.choose()
        if not choice.adopt:
            self._check_cost()
        found = None if choice.adopt else self._find_environment(gateway, environment)
        while not choice.adopt and attempts.cancel_outdated(claim):
            claim, choice = attempts.choose()
        self._run = f"{claim.runs}/{attempts.family}-{choice.attempt}"
        self._runs[self._run] = claim.job if choice.adopt else None
        gateway.committed = True
        if found is None or choice.adopt:
            return None
        return self._paths(claim, self._run, found)

    def _follow(
        self, gateway: Gateway, submission: Submission, paths: RunPaths | None
    ) -> dg.PipesClientCompletedInvocation:
        """Submit the job, if it has paths, and follow it to its end."""
        run = self._run
        with open_session(self._context, self._plan.extras, f"{run}/{CONTEXT}", f"{run}/{MESSAGES}") as session:
            document, checks = session.context_document.text, declared_checks(self._context)
            files = files_of(self._plan, paths, self._info, document, checks, submission.record) if paths else None
            sinks = {MESSAGES: session.messages.feed, "stdout": session.stdout.feed, "stderr": session.stderr.feed}
            end = gateway.run(run, files, sinks, self._report_submitted, self._report_state, self._context.run_id)
            session.messages.finish(self._context)
        self._report_project(self._job, end.account)
        try:
            self._check(session, end)
        except (dg.Failure, dg.RetryRequested):
            gateway.reject(run)
            raise
        costs = self._costs(end)
        uses = [*uses_of(costs, partitions_of(self._context)[:1], self._plan.allocation.request.partition)]
        proposal = proposal_metadata(self._step, self._plan, uses)
        return complete(self._context, session.pipes, self._about(end), {**costs, **proposal})

    def _check(self, session: Session, end: JobEnd) -> None:
        """Raise if the job or its workload failed."""
        request, workload = self._plan.allocation.request, self._plan.workload
        outcome = judge(end, request)
        cause = outcome.cause if outcome else explain_failure(session.messages, exit_code(end), workload.name)
        if cause:
            if end.state not in CAUSES:
                cause = explain_memory(cause, session.stderr.tail, request)
            error = self._failure(cause, stderr=session.stderr.tail, **(self._about(end) | self._costs(end)))
            if outcome and outcome.again and self._context.retry_number < MOST_RETRIES:
                self._log.warning(f"{cause}; another attempt follows")
                raise dg.RetryRequested(MOST_RETRIES, RETRY_SECONDS) from error
            raise error
        if not end.state:
            self._log.warning("Slurm does not know the job any more. The job's own record of its end is used.")
        if end.short:
            lost = ", ".join(f"{name} from byte {size} on" for name, size in end.short.items())
            self._log.warning(f"Not all output of the job arrived: {lost}. It is in {self._run}.")

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
            words.append(f"expected to start at {datetime.fromtimestamp(state.start, UTC):%Y-%m-%d %H:%M:%S} UTC")
        if state.idle is not None and not self._idle_reported:
            self._idle_reported = True
            text = usage.describe_idle(state.idle, self._plan.allocation.request)
            self._log.warning(f"Slurm job {self._job}: {text}")
        if words != self._state:
            self._state = words
            self._log.info(f"job {self._job or '(just submitted)'}: {', '.join(words)}")
            advice = advise(state.reason, self._job or "JOB") if state.state == "PENDING" else None
            if advice:
                self._log.warning(f"Slurm job {self._job} may never start ({state.reason}): {advice}")

    @property
    def _job(self) -> str | None:
        return self._runs[self._run]

    def _about(self, end: JobEnd) -> dict[str, Any]:
        """Return metadata for everything that the job reports."""
        own = {"job_id": int(self._job or 0), "run_directory": self._run, "attach": self._attach(self._job or "")}
        return {**own, **self._plan.launcher.hints(self._job or ""), **self._where(end.account)}

    def _costs(self, end: JobEnd) -> dict[str, float | str]:
        """Return metadata of the whole job."""
        request = self._plan.allocation.request
        plot = usage.plot(end.usage, request)
        return {**accounting.count(end, request), **({"usage": plot} if plot else {})}
