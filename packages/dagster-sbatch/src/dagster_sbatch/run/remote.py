"""A workload on the supercomputer as one job, as its Dagster step sees it: submit or adopt, follow, judge, repeat."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from dagster_sbatch.environments.deployed import Environment
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.run.adoption import Choice, is_left_out
from dagster_sbatch.run.array_results import table
from dagster_sbatch.run.attempt_record import (
    ATTEMPTS,
    AttemptRecord,
    load_attempts,
    load_request,
    rows_of,
    store_attempts,
    store_change,
    store_request,
)
from dagster_sbatch.run.attempts import Attempts, Submission
from dagster_sbatch.run.directory import CONTEXT, RunPaths, files_of
from dagster_sbatch.run.messages import explain_failure
from dagster_sbatch.run.past_use import proposal_metadata, uses_of
from dagster_sbatch.run.pipes import Session, open_session
from dagster_sbatch.run.remote_step import RemoteStep, exit_code
from dagster_sbatch.run.results import complete, declared_checks, partitions_of
from dagster_sbatch.run.run_environment import RunEnvironment
from dagster_sbatch.slurm import SlurmRequest, accounting, job_usage
from dagster_sbatch.slurm.gateway import (
    MESSAGES,
    Gateway,
    JobEnd,
    JobState,
    RefusedError,
    StoppedError,
    Submitted,
)
from dagster_sbatch.slurm.next_request import Next, next_request
from dagster_sbatch.slurm.outcome import CAUSES, Outcome, explain_stderr, find_fault, judge
from dagster_sbatch.slurm.retries import Fault
from dagster_sbatch.slurm.waiting import advise

RETRY_SECONDS = 10.0
"""Before the same request is submitted again."""


class RemoteRun(RemoteStep):
    """One call of `compute.run` on the supercomputer, as one job; after some failures, as one job after another."""

    _run = ""
    _number = 0
    _state: list[str] | None = None
    _idle_reported = False
    _failed: tuple[AttemptRecord, ...] = ()

    def _execute(
        self, gateway: Gateway, attempts: Attempts, environment: RunEnvironment
    ) -> dg.PipesClientCompletedInvocation:
        paths = self._choose(gateway, attempts, environment)
        while not (completed := self._follow(gateway, attempts.submission, paths)):
            paths = self._begin(attempts.family, self._number + 1, self._find_next_environment(gateway, environment))
        return completed

    def _before_cancelling(self) -> None:
        """Nothing is complete before the job is over."""

    def _choose(self, gateway: Gateway, attempts: Attempts, environment: RunEnvironment) -> RunPaths | None:
        """Choose the attempt; return where a new one is to be submitted, None if an earlier one is adopted."""
        choice, found = self._claim_runs(attempts), None
        if not choice.adopt:
            self._guard.check_cost(self._plan.allocation)
            found = self._find_environment(gateway, environment, self._claim.environment)
            while not choice.adopt and attempts.cancel_outdated(self._claim):
                choice = self._claim_runs(attempts)
        gateway.committed = True
        job = self._claim.job if choice.adopt else None
        return self._begin(attempts.family, choice.attempt, None if choice.adopt else found, job)

    def _claim_runs(self, attempts: Attempts) -> Choice:
        """Claim the runs of the call, and continue with what an earlier execution of this step has left to do."""
        self._claim, choice = attempts.choose()
        record = self._claim.record or {}
        changed = bool(record) and record["request"] != attempts.submission.request
        if choice.adopt or (is_left_out(self._claim) and not changed):
            self._failed = load_attempts(record)
            self._set_request(load_request(record, self._planned.request))
        self._changed = changed and choice.adopt
        return choice

    def _begin(self, family: str, number: int, found: Environment | None, job: str | None = None) -> RunPaths | None:
        """Begin to submit an attempt, or to follow one; return where it is submitted, None without an environment."""
        self._number, self._state, self._idle_reported = number, None, False
        self._run = f"{self._claim.runs}/{family}-{number}"
        self._runs[self._run] = job
        return self._paths(self._claim, self._run, found) if found else None

    def _find_next_environment(self, gateway: Gateway, environment: RunEnvironment) -> Environment:
        """Return the environment of the next attempt.

        Raises:
            Failure: there is none, or the project has not enough left.
        """
        try:
            return self._find_environment(gateway, environment)
        except ConfigurationError as error:
            raise self._end_attempts(gateway, str(error), final=True) from None
        except RefusedError as error:
            raise self._end_attempts(gateway, self._explain(gateway, str(error)), final=False) from None

    def _end_attempts(self, gateway: Gateway, reason: str, *, final: bool) -> dg.Failure:
        """Return the step's failure: the next attempt cannot be submitted. A re-execution begins with the first one."""
        gateway.reject(self._run)
        attempts: dict[str, Any] = {ATTEMPTS: table(rows_of(self._failed))}
        return self._failure(self._failed[-1].explain_last(reason), final=final, **attempts)

    def _set_request(self, request: SlurmRequest) -> None:
        """Let the plan have the request of the attempt that is submitted or followed now."""
        self._plan = replace(self._plan, allocation=replace(self._planned, request=request))

    def _follow(
        self, gateway: Gateway, submission: Submission, paths: RunPaths | None
    ) -> dg.PipesClientCompletedInvocation | None:
        """Submit the job, if it has paths, and follow it to its end; return None if another attempt has to follow."""
        run, request = self._run, self._plan.allocation.request
        with open_session(self._context, self._plan.extras, f"{run}/{CONTEXT}", f"{run}/{MESSAGES}") as session:
            document, checks = session.context, declared_checks(self._context)
            change = store_change(request, self._planned.request)
            record = {**submission.record, **change, **store_attempts(self._failed)}
            files = files_of(self._plan, paths, self._info, document, checks, record) if paths else None
            try:
                end = gateway.run(
                    run, files, session.sinks, self._report_submitted, self._report_state, self._context.run_id
                )
            except RefusedError as error:
                if not self._failed or self._job:
                    raise
                raise self._end_attempts(gateway, self._explain(gateway, str(error)), final=False) from None
            outcome = judge(end, request)
            failed = find_fault(outcome, end, session.stderr.tail, request)
            following = self._find_next(failed, end)
            if following.request:
                session.messages.close()
            else:
                session.messages.finish(self._context)
        self._report_project(self._job, end.account)
        if failed and following.request:
            self._retry(gateway, failed, following, end)
            return None
        try:
            self._check(session, end, outcome, failed, following.text)
        except dg.Failure:
            gateway.reject(run)
            raise
        costs = self._costs(end, "succeeded")
        uses = [*uses_of(costs, partitions_of(self._context)[:1], self._plan.allocation.request.partition)]
        proposal = proposal_metadata(self._context, replace(self._plan, allocation=self._planned), uses)
        return complete(self._context, session.pipes, self._about(end), {**costs, **proposal})

    def _find_next(self, failed: Outcome | None, end: JobEnd) -> Next:
        """Return what follows this attempt; nothing if it succeeded, or failed for a reason that is not repeated."""
        request, fault = self._plan.allocation.request, failed.fault if failed else None
        found = next_request(fault, request, self._planned, end.node, len(self._failed))
        if found.request and self._changed:
            found = Next(self._planned.request, "the request of the asset, which has changed")
        return self._guard.within_limit(found, self._planned)

    def _retry(self, gateway: Gateway, failed: Outcome, following: Next, end: JobEnd) -> None:
        """Register a failed attempt, and wait before the same request is submitted again."""
        assert following.request
        most = self._planned.request.retries.max_retries + 1
        number = len(self._failed) + 2
        self._log.warning(
            f"Slurm job {self._job}: {failed.cause}. Attempt {number} of at most {most} follows, with {following.text}."
        )
        self._failed += (self._attempt(failed.cause, end),)
        del self._runs[self._run]  # its job is over
        same, self._changed = following.request == self._plan.allocation.request, False
        self._set_request(following.request)
        if same and gateway.stop.wait(RETRY_SECONDS):
            raise StoppedError

    def _check(
        self, session: Session, end: JobEnd, outcome: Outcome | None, failed: Outcome | None, limit: str
    ) -> None:
        """Raise if the job or its workload failed.

        Args:
            session: of the workload.
            end: of the job.
            outcome: what Slurm and the job's own record say; None if its exit code and its Pipes session decide.
            failed: the same, or what stderr says.
            limit: of the retries, if it was reached.
        """
        cause = outcome.text if outcome else explain_failure(session.messages, exit_code(end), self._plan.workload.name)
        if cause:
            own = self._about(end) | self._costs(end, failed.cause if failed else cause.partition("\n")[0])
            if end.state not in CAUSES:
                cause = explain_stderr(cause, session.stderr.tail, self._plan.allocation.request)
            if limit:
                cause += f". No other attempt follows: {limit}"
            final = bool(limit) and failed is not None and failed.fault in (Fault.MEMORY, Fault.TIME)
            raise self._failure(cause, stderr=session.stderr.tail, final=final, **own)
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
            text = job_usage.describe_idle(state.idle, self._plan.allocation.request)
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

    def _costs(self, end: JobEnd, how: str) -> dict[str, Any]:
        """Return metadata of the whole job, and a table of the attempts if there were several; `how` it ended."""
        request = self._plan.allocation.request
        costs: dict[str, Any] = {**accounting.count(end, request)}
        if plot := job_usage.plot(end.usage, request):
            costs["usage"] = plot
        if self._failed:
            costs[ATTEMPTS] = table(rows_of((*self._failed, self._attempt(how, end))))
        return costs

    def _attempt(self, how: str, end: JobEnd) -> AttemptRecord:
        request = self._plan.allocation.request
        return AttemptRecord(self._job or "", how, store_request(request), accounting.count(end, request))
