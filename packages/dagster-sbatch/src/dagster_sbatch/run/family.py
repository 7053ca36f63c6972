"""Claiming a step's runs on the supercomputer, adopting the job of an earlier attempt, cancelling what is outdated."""

import os
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import dagster as dg

from dagster_sbatch.run.adoption import (
    MOST_NAMES,
    NO_RECORD,
    Choice,
    choose,
    describe_adoption,
    name_differences,
    name_request_changes,
    outdated_runs,
)
from dagster_sbatch.run.array import Task
from dagster_sbatch.run.attempts import store_request
from dagster_sbatch.run.calls import Call, StepName
from dagster_sbatch.run.history import is_stored, runs_since, shared_runs, stored_before
from dagster_sbatch.run.reports import StepLog
from dagster_sbatch.slurm import SlurmRequest
from dagster_sbatch.slurm.gateway import (
    Attempt,
    Claim,
    Gateway,
    JobEnd,
    OtherRun,
    Questions,
    RefusedError,
    StoppedError,
)
from dagster_sbatch.slurm.units import list_names

HOLDER_SECONDS = 5.0  # pause before asking again whether another run still executes this step
SIBLING_SECONDS = 2.0
"""For other threads of the step to make their calls, before jobs with other inputs count as outdated."""


class Family:
    """The family of jobs of one call of `compute.run`: its attempts, also those of earlier runs of the same step."""

    def __init__(
        self,
        context: dg.OpExecutionContext,
        gateway: Gateway,
        runs: str,
        call: Call,
        inputs: Mapping[str, str],
        request: SlurmRequest,
        *,
        questions: Questions,
    ) -> None:
        self._context, self._gateway, self._questions = context, gateway, questions
        self._inputs, self._retries = inputs, request.retries
        self._log = StepLog(context)
        self._folder = runs
        self._token = uuid.uuid4().hex
        self._shared = shared_runs(context.instance, context.run)  # now, before this call waits for another run
        self.call, self.request = call, store_request(request)
        # What is stored with a job: a later attempt compares its own inputs with it
        self.record = {"call": call.number, "inputs": inputs, "request": self.request}

    def choose(self, tasks: Mapping[int, Task] | None = None) -> tuple[Claim, Choice]:
        """Claim the call's runs, once no other run executes them; choose between earlier attempts and a new one.

        `tasks`: of an array, those that are not done, by index; None: the call is one job, and that is its only task.
        """
        claim = self._claim(self.call.family, self._questions)
        ids = {0: ""} if tasks is None else {index: task.id for index, task in tasks.items()}
        choice = choose(claim.attempts, ids, self._find_stored(tasks or {}), self._retries)
        followed = [attempt for attempt in claim.attempts if attempt.run in choice.follow]
        if followed and tasks is None:
            self._log.info(describe_adoption(followed[0]))
            if changes := name_request_changes(self.request, followed[0].record):
                self._log.info(f"The job keeps its Slurm request, which differs: {changes}")
        elif followed:
            jobs, number = ", ".join(str(attempt.job) for attempt in followed), sum(map(len, choice.follow.values()))
            self._log.info(
                f"Slurm job {jobs} of an earlier run of this step has {number} of the tasks: attaching to "
                f"{number - choice.ended}, and using the results of {choice.ended} that have ended."
            )
        for attempt in claim.attempts:
            if attempt.run in choice.outdated:
                self._cancel_tasks(attempt, choice.outdated[attempt.run], followed=attempt.run in choice.follow)
        return claim, choice

    def _find_stored(self, tasks: Mapping[int, Task]) -> Callable[[Attempt, int], bool]:
        """Return a function that tells whether Dagster has stored the result of a task in an attempt."""
        context, instance, step = self._context, self._context.instance, StepName.of(self._context)

        @cache  # the followers are mostly those of all attempts
        def find(followers: tuple[str, ...]) -> tuple[bool, set[str]]:
            # Dagster may have stored the result of a job in these runs, or that of another job since
            runs = runs_since(instance, context.run.root_run_id or context.run_id, followers) - self._shared
            partitions = stored_before(instance, runs, step) if tasks else set[str]()
            return is_stored(instance, runs, step), partitions

        def is_task_stored(attempt: Attempt, index: int) -> bool:
            whole, partitions = find(tuple(attempt.followers))
            own = tasks[index].partitions if tasks else ()
            return whole or (bool(own) and partitions.issuperset(own))

        return is_task_stored

    def _cancel_tasks(self, array: Attempt, outdated: Sequence[int], *, followed: bool) -> None:
        """Cancel tasks of an array job that this step does not need; the whole job if it follows none of the others."""
        tasks = (array.record or {}).get("tasks")
        shown = list_names([tasks[index]["name"] for index in outdated], MOST_NAMES) if tasks else NO_RECORD
        job = f"Slurm job {array.job}" if array.job else f"The Slurm job of {array.run}"
        self._log.warning(
            f"{job} of an earlier run of this step has tasks that this run does not need, or needs with other values "
            f"or newer data ({shown}). They are cancelled."
        )
        try:
            if followed:
                self._gateway.cancel_tasks(array.run, outdated)
            else:
                self._gateway.cancel(array.run)
        except RefusedError as error:
            self._log.warning(f"The tasks of {job} could not be cancelled. {error}")

    def cancel_outdated(self, claim: Claim) -> bool:
        """Cancel the jobs that earlier executions of this step submitted with other inputs.

        Returns whether there were any; then the call's own runs have to be claimed again.
        """
        if not claim.others:
            return False
        step, waited = self.call.step, False
        while not waited or not step.are_prepared:
            if self._gateway.stop.wait(SIBLING_SECONDS):
                raise StoppedError
            waited = True
        outdated = outdated_runs(claim.others, step.begun)
        families = [family for family in {run.family: None for run in outdated} if step.claim_once(family)]
        for family in families:
            self._claim(family, Questions())  # while another run follows its jobs, this one waits
        if families:
            self._cancel([run for run in outdated if run.family in families])
        return bool(families)

    def _cancel(self, runs: Sequence[OtherRun]) -> None:
        """Cancel jobs at the same time: a family has several array jobs."""
        jobs = {run.run: f"Slurm job {run.job}" if run.job else f"The Slurm job of {run.run}" for run in runs}
        for run in runs:
            differences = name_differences(self._inputs, run.record)
            self._log.warning(
                f"{jobs[run.run]} was submitted by an earlier run of this step with other inputs ({differences}). "
                "It is cancelled, and a new job is submitted."
            )

        def report(run: str, outcome: JobEnd | RefusedError | None) -> None:
            if isinstance(outcome, RefusedError):
                self._log.warning(f"{jobs[run]} could not be cancelled. {outcome}")

        self._gateway.cancel_all(list(jobs), report)

    def _claim(self, family: str, questions: Questions) -> Claim:
        who = f"run {self._context.run_id}, process {os.getpid()} on {socket.gethostname()}"
        reported = None
        while True:
            claim = self._gateway.claim(self._folder, family, self._token, who, questions)
            if claim.held_by is None:
                return claim
            if reported != claim.held_by:
                reported = claim.held_by
                self._log.warning(
                    f"Another run ({reported}) is already executing this step. Waiting until it finishes."
                )
            if self._gateway.stop.wait(HOLDER_SECONDS):
                raise StoppedError
