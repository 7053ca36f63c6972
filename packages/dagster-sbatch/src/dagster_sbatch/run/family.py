"""Claiming a step's runs on the supercomputer, adopting the job of an earlier attempt, cancelling what is outdated."""

import os
import socket
import uuid
from collections.abc import Collection, Mapping, Sequence

import dagster as dg

from dagster_sbatch.run.adoption import (
    MOST_NAMES,
    Choice,
    TaskChoice,
    choose,
    choose_tasks,
    name_differences,
    name_request_changes,
    outdated_runs,
)
from dagster_sbatch.run.array import Task
from dagster_sbatch.run.attempts import store_request
from dagster_sbatch.run.calls import Call, StepName
from dagster_sbatch.run.history import is_stored, requested_at, runs_since, stored_before
from dagster_sbatch.run.reports import StepLog
from dagster_sbatch.slurm import SlurmRequest
from dagster_sbatch.slurm.gateway import (
    ArrayJob,
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
        self.call, self.request = call, store_request(request)
        # What is stored with a job: a later attempt compares its own inputs with it
        self.record = {"call": call.number, "inputs": inputs, "request": self.request}

    def choose(self) -> tuple[Claim, Choice]:
        """Claim the call's runs, once no other run executes them; choose between an earlier attempt and a new one."""
        claim = self._claim(self.call.family, self._questions)
        instance, asked = self._context.instance, requested_at(self._context.instance, self._context.run_id)
        runs = self._runs_since(claim.followers) if claim.over else ()
        stored = is_stored(instance, runs, StepName.of(self._context), before=asked)
        choice = choose(claim, stored=stored, retries=self._retries)
        if choice.reason:
            self._log.info(choice.reason)
        if choice.adopt and (changes := name_request_changes(self.request, claim.record)):
            self._log.info(f"The job keeps its Slurm request, which differs: {changes}")
        return claim, choice

    def _runs_since(self, followers: Collection[str]) -> set[str]:
        """Return the runs in which Dagster may have stored the result of a job, or that of another job since."""
        return runs_since(self._context.instance, self._context.run.root_run_id or self._context.run_id, followers)

    def choose_tasks(self, tasks: Mapping[int, Task]) -> tuple[Claim, TaskChoice]:
        """Claim the call's runs, and choose for each task between an earlier array job and a new one."""
        instance, step = self._context.instance, StepName.of(self._context)
        claim = self._claim(self.call.family, self._questions)
        asked = requested_at(instance, self._context.run_id)
        stored: dict[tuple[str, ...], tuple[bool, set[str]]] = {}

        def task_is_stored(array: ArrayJob, index: int) -> bool:
            followers = tuple(array.followers)  # mostly those of all array jobs: Dagster is asked once
            if followers not in stored:
                runs = self._runs_since(followers)
                whole = is_stored(instance, runs, step, before=asked)
                stored[followers] = whole, stored_before(instance, runs, step, asked)
            whole, partitions = stored[followers]
            own = tasks[index].partitions
            return whole or (bool(own) and partitions.issuperset(own))

        ids = {index: task.id for index, task in tasks.items()}
        choice = choose_tasks(claim.arrays, ids, task_is_stored, self._retries)
        followed = sum(map(len, choice.follow.values()))
        if followed:
            jobs = ", ".join(str(array.job) for array in claim.arrays if array.run in choice.follow)
            self._log.info(
                f"Slurm job {jobs} of an earlier run of this step has {followed} of the tasks: attaching to "
                f"{followed - choice.ended}, and using the results of {choice.ended} that have ended."
            )
        for array in claim.arrays:
            if array.run in choice.outdated:
                self._cancel_tasks(array, choice.outdated[array.run], followed=array.run in choice.follow)
        return claim, choice

    def _cancel_tasks(self, array: ArrayJob, outdated: Sequence[int], *, followed: bool) -> None:
        """Cancel tasks of an array job that this step does not need; the whole job if it follows none of the others."""
        names = [task["name"] for task in (array.record or {})["tasks"]]
        shown = list_names([names[index] for index in outdated], MOST_NAMES)
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
