"""An array on the supercomputer, as its Dagster step sees it: adopt tasks, submit the others, follow and judge each."""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from dagster_sbatch.environments.deployed import Environment
from dagster_sbatch.run.adoption import TaskChoice
from dagster_sbatch.run.array_batches import Batches
from dagster_sbatch.run.array_step import ArrayStep
from dagster_sbatch.run.attempts import Attempts
from dagster_sbatch.run.directory import CONTEXT, array_files_of
from dagster_sbatch.run.plan import Plan
from dagster_sbatch.run.remote_step import MOST_RETRIES, RemoteStep, exit_code
from dagster_sbatch.run.results import StepContext, declared_checks
from dagster_sbatch.run.run_environment import RunEnvironment
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import accounting
from dagster_sbatch.slurm.gateway import (
    MESSAGES,
    ArrayRun,
    Arrays,
    ArrayState,
    Claim,
    Gateway,
    JobEnd,
    Limits,
    Submitted,
)
from dagster_sbatch.slurm.outcome import judge
from dagster_sbatch.slurm.waiting import advise


@dataclass
class _ArrayJob:
    """An array job that is not over.

    Attributes:
        tasks: indices of its tasks that this step follows, by their index in the array job.
        share: how many of its tasks may run at once.
        job: its id, once it is known.
        reasons: for which its tasks have waited so far.
        ends: of its tasks.
        running: how many of its tasks run.
        requeued: how many of its tasks have started, and wait to start again.
    """

    tasks: dict[int, int]
    share: int
    job: str | None = None
    reasons: set[str] = field(default_factory=set)
    ends: dict[int, JobEnd] = field(default_factory=dict)
    running: int = 0
    requeued: int = 0


class RemoteArray(RemoteStep, Arrays):
    """One call of `compute.run` with an array on the supercomputer."""

    def __init__(self, context: StepContext, asset: str, settings: Settings, plan: Plan) -> None:
        super().__init__(context, asset, settings, plan)
        self._array = ArrayStep(context, asset, plan)
        self._jobs_by_run: dict[str, _ArrayJob] = {}
        self._adopted: list[str] = []
        self._batches = Batches([], Limits(None, None), None)
        self._submitting: str | None = None
        self._found: Environment | None = None
        self._refusal: str | None = None
        self._refused: list[int] = []
        self._attempts: Counter[int] = Counter()
        self._warned: set[str] = set()

    def _work(self, stop: threading.Event) -> dg.PipesClientCompletedInvocation:
        try:
            return super()._work(stop)
        finally:
            self._array.wait_until_stored()

    def _execute(
        self, gateway: Gateway, attempts: Attempts, environment: RunEnvironment
    ) -> dg.PipesClientCompletedInvocation:
        with self._array.open(CONTEXT, MESSAGES):
            if self._array.left:
                self._gateway = gateway
                self._choose(attempts, environment)
                gateway.committed = True
                gateway.run_arrays(self, self._context.run_id)
                if self._found is None and self._batches.left:  # adopted tasks that have to run again
                    self._found = self._find_environment(self._gateway, environment, tasks=0)  # they cost nothing new
                    self._batches = self._divide(self._batches.left)
                    gateway.run_arrays(self, self._context.run_id)
                self._fail_refused()
        return self._array.complete(self._where(self._project))

    def _before_cancelling(self) -> None:
        self._array.store_completed()

    def _choose(self, attempts: Attempts, environment: RunEnvironment) -> None:
        """Choose which tasks are adopted and which are submitted."""
        left = {index: self._array.tasks[index] for index in self._array.left}
        claim, choice = attempts.choose_tasks(left)
        self._adopt(claim, choice)
        found: Environment | None = None
        if choice.new:
            self._check_cost(len(choice.new))
            found = self._find_environment(self._gateway, environment, len(choice.new))
            while attempts.cancel_outdated(claim):
                claim, choice = attempts.choose_tasks(left)
                self._adopt(claim, choice)
            self._batches = self._divide(choice.new)
        self._claim, self._found = claim, found
        self._submission, self._family, self._number = attempts.submission, attempts.family, claim.attempt

    def _adopt(self, claim: Claim, choice: TaskChoice) -> None:
        """Register the array jobs that this step follows, and cancels if a person terminates the run from now on."""
        self._jobs_by_run, self._runs = {}, {}
        for array in claim.arrays:
            if array.run in choice.follow:
                places = choice.follow[array.run]
                number = sum(place not in array.ends for place in places)
                most = (array.record or {}).get("max_running_tasks") or number
                self._jobs_by_run[array.run] = _ArrayJob(dict(places), min(most, number))
                self._runs[array.run] = array.job
        self._adopted = list(self._runs)
        if self._runs:
            self._gateway.committed = True

    def _divide(self, tasks: Sequence[int]) -> Batches:
        """Divide tasks into array jobs, within the limits of the site as they are now."""
        assert self._plan.array
        request = self._plan.allocation.request
        limits = self._gateway.limits(request.partition or "", request.qos or "", request.account or "")
        return Batches(tasks, limits, self._plan.array.max_running_tasks)

    def _fail_refused(self) -> None:
        """Register the tasks of array jobs that Slurm refused, and those that were not submitted after that."""
        if self._refusal is None:
            return
        cause = f"refused on the supercomputer: {self._explain(self._gateway, self._refusal)}"
        for index in [*self._refused, *self._batches.left]:
            self._array.failed(index, cause, "none: it was not submitted")

    # What the gateway asks and reports

    def take(self) -> ArrayRun | None:  # noqa: D102 - see Arrays
        if self._adopted:
            run = self._adopted.pop()
            return ArrayRun(run, None, sorted(self._jobs_by_run[run].tasks))
        if self._submitting or self._refusal is not None or self._found is None:
            return None
        active = self._jobs_by_run.values()
        queued = sum(len(each.tasks) - len(each.ends) for each in active)
        indices, max_running = self._batches.take([each.share for each in active], queued)
        if not indices:
            return None
        self._number += 1
        run = self._submitting = f"{self._claim.runs}/{self._family}-{self._number}"
        self._jobs_by_run[run] = _ArrayJob(dict(enumerate(indices)), max_running or len(indices))
        self._runs[run] = None
        return ArrayRun(run, self._files(run, indices, max_running), range(len(indices)))

    def _files(self, run: str, indices: Sequence[int], max_running: int | None) -> dict[str, str]:
        assert self._found
        tasks, contexts = [self._array.tasks[index] for index in indices], self._array.contexts
        record = {**self._submission.record, "max_running_tasks": max_running, "tasks": [task.record for task in tasks]}
        paths = self._paths(self._claim, run, self._found)
        texts = [contexts.head, *(contexts.tail(task) for task in tasks)]
        checks = declared_checks(self._context)
        return array_files_of(self._plan, paths, self._info, texts, checks, record, max_running=max_running)

    def submitted(self, run: str, submitted: Submitted) -> None:  # noqa: D102 - see Arrays
        array_job = self._jobs_by_run[run]
        array_job.job = submitted.job
        if self._submitting == run:
            self._submitting = None
        self._register_job(run, submitted.job)
        self._log.info(f"job {submitted.job} ({submitted.how}) with {len(array_job.tasks)} tasks in {run}")

    def refused(self, run: str, text: str) -> None:  # noqa: D102 - see Arrays
        tasks = self._jobs_by_run.pop(run).tasks.values()
        del self._runs[run]
        if run != self._submitting:  # an earlier run made it, which Slurm has never accepted
            for index in tasks:
                self._batches.add(index)
            return
        self._submitting, self._refusal = None, text
        self._refused += tasks
        self._array.store_completed()

    def waiting(self, run: str, text: str) -> None:  # noqa: D102 - see Arrays
        number = len(self._jobs_by_run[run].tasks) + len(self._batches.left)
        self._log.info(f"Slurm has no room for {number} more tasks yet ({text}). They are submitted when it has.")

    def state(self, run: str, state: ArrayState) -> None:  # noqa: D102 - see Arrays
        array_job = self._jobs_by_run[run]
        self._count_running(array_job, state.running, state.requeued)
        self._report_project(array_job.job, state.account)
        if not (state.waiting or state.requeued) or state.reason in array_job.reasons | {"None"}:
            return
        array_job.reasons.add(state.reason)
        start = f"{datetime.fromtimestamp(state.start, UTC):%Y-%m-%d %H:%M:%S} UTC" if state.start else ""
        expected = f"; the next one is expected to start at {start}" if start else ""
        self._log.info(f"job {array_job.job}: tasks wait ({state.reason}){expected}")
        if advice := advise(state.reason, array_job.job or "JOB"):
            self._log.warning(f"Tasks of Slurm job {array_job.job} may never start ({state.reason}): {advice}")

    def started(self, run: str, task: int, node: str) -> None:  # noqa: ARG002, D102 - see Arrays
        array_job = self._jobs_by_run[run]
        self._array.started(array_job.tasks[task])
        self._count_running(array_job, array_job.running + 1, array_job.requeued)  # until the next state

    def _count_running(self, array_job: _ArrayJob, running: int, requeued: int) -> None:
        array_job.running, array_job.requeued = running, requeued
        active = self._jobs_by_run.values()
        self._array.running(sum(each.running for each in active), sum(each.requeued for each in active))

    def feed(self, run: str, task: int, name: str, data: bytes) -> None:  # noqa: D102 - see Arrays
        self._array.feed(self._jobs_by_run[run].tasks[task], name, data)

    def ended(self, run: str, task: int, end: JobEnd) -> None:  # noqa: D102 - see Arrays
        array_job = self._jobs_by_run[run]
        index, request = array_job.tasks[task], self._plan.allocation.request
        array_job.ends[task] = end
        self._report_project(array_job.job, end.account)
        label, logs = self._array.tasks[index].label, f"scripts/job {array_job.job}_{task} logs"
        outcome = judge(end, request)
        if outcome and outcome.again and self._attempts[index] < MOST_RETRIES:
            self._attempts[index] += 1
            self._array.waits(index)
            self._batches.add(index)
            self._warn_once(outcome.cause, f"Task {label}: {outcome.cause}; it is submitted again.")
        elif outcome:
            self._array.failed(index, outcome.cause, logs)
        else:
            where = {"job_id": f"{array_job.job}_{task}", "run_directory": f"{run}/tasks/{task}"}
            if self._array.ended(index, exit_code(end), where, accounting.count(end, request), logs):
                return
        self._gateway.reject(run, task)

    def over(self, run: str, rows: Any) -> None:  # noqa: D102 - see Arrays
        array_job = self._jobs_by_run.pop(run)
        del self._runs[run]
        if short := sum(bool(end.short) for end in array_job.ends.values()):
            self._log.warning(f"Not all output of {short} tasks of job {array_job.job} arrived. It is in {run}/tasks.")
        for task, found in rows.items():
            if task in array_job.ends:
                end = replace(array_job.ends[task], rows=found)
                costs = accounting.count(end, self._plan.allocation.request)
                self._array.add_costs(array_job.tasks[task], costs)

    def _warn_once(self, kind: str, text: str) -> None:
        """Log a warning, unless there was one of this kind."""
        if kind not in self._warned:
            self._warned.add(kind)
            self._log.warning(text)
