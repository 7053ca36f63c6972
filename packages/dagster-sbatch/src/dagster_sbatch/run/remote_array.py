"""An array on the supercomputer, as its Dagster step sees it: adopt tasks, submit the others, follow and judge each."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import dagster as dg

from dagster_sbatch.clock import written
from dagster_sbatch.environments.deployed import Environment
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.run.adoption import Choice
from dagster_sbatch.run.array import Batches, Task
from dagster_sbatch.run.array_step import ArrayStep
from dagster_sbatch.run.attempts import rows_of, store_attempts
from dagster_sbatch.run.plan import Plan
from dagster_sbatch.run.remote_step import RemoteStep
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import ArrayShape, SlurmRequest, accounting
from dagster_sbatch.slurm.gateway import JobEnd, Limits, RefusedError, Sinks, Submitted, TaskStates
from dagster_sbatch.slurm.gateway.following import JobHandler, JobToFollow, follow_jobs
from dagster_sbatch.slurm.outcome import advise
from dagster_sbatch.slurm.request import Fault
from dagster_sbatch.slurm.units import count_of

MOST_REPEATED = 8
"""Array jobs at once whose tasks are repeated with a changed request: tasks that fail meanwhile share the next one."""
_SLURM_REPEATS = (Fault.NODE, Fault.AGAIN)
"""After these faults, Slurm may start the same task again: then a task that is marked as rejected ends at once."""


@dataclass
class _ArrayJob:
    """An array job that is not over."""

    tasks: dict[int, int]  # indices of its tasks that this step follows, by their index in the array job
    request: SlurmRequest  # of Slurm
    share: int  # how many of its tasks may run at once
    reasons: set[str] = field(default_factory=set)  # for which its tasks have waited so far
    ends: dict[int, JobEnd] = field(default_factory=dict)  # of its tasks
    repeated: set[int] = field(default_factory=set)  # those that have failed and are submitted again
    running: int = 0  # how many of its tasks run
    requeued: int = 0  # how many of its tasks have started, and wait to start again


class RemoteArray(RemoteStep, JobHandler):
    """One call of `compute.run` with an array on the supercomputer."""

    def __init__(self, context: dg.OpExecutionContext, asset: str, settings: Settings, plan: Plan) -> None:
        super().__init__(context, asset, settings, plan)
        self._array = ArrayStep(context, asset, plan)
        self._jobs_by_run: dict[str, _ArrayJob] = {}
        self._adopted: list[str] = []
        self._batches = Batches([], Limits(None, None), None)
        self._submitting: str | None = None
        self._found: Environment | None = None
        self._refusal: RefusedError | ConfigurationError | None = None
        self._refused: dict[int, RefusedError | ConfigurationError] = {}
        self._failed_in: dict[int, tuple[str, int]] = {}
        self._warned: set[str] = set()

    def _work(self, stop: threading.Event) -> dg.PipesClientCompletedInvocation:
        try:
            return super()._work(stop)
        finally:
            self._array.wait_until_stored()

    def _execute(self) -> dg.PipesClientCompletedInvocation:
        with self._array.open():
            if self._array.left:
                choice, self._found = self._choose({index: self._array.tasks[index] for index in self._array.left})
                self._adopted = list(self._runs)
                if choice.new:
                    self._batches = self._divide(choice.new)
                follow_jobs(self._gateway, self, self._context.run_id)
                self._fail_refused()
        self._array.attempts = self._rows()
        self._array.where = self._where(self._project)
        return self._array.complete()

    def _keep_completed(self) -> None:
        self._array.store_completed()

    def _rows(self) -> list[dict[str, Any]]:
        """Return the rows of a table: the attempts at the tasks that were repeated."""
        tasks = [(self._array.tasks[index].name, series) for index, series in sorted(self._series.items())]
        return [{"task": name, **row} for name, series in tasks for row in rows_of(series.ended)]

    def _adopt(self, tasks: Mapping[int, Task] | None) -> Choice:
        choice, self._jobs_by_run = super()._adopt(tasks), {}
        for attempt in self._claim.attempts:
            if places := choice.follow.get(attempt.run):
                number = sum(place not in attempt.ends for place in places)
                most = (attempt.record or {}).get("max_running_tasks") or number
                request = self._series[next(iter(places.values()))].request
                self._jobs_by_run[attempt.run] = _ArrayJob(dict(places), request, min(most, number))
        return choice

    def _divide(self, tasks: Sequence[int]) -> Batches:
        """Divide tasks into array jobs, within the limits of the site as they are now."""
        assert self._plan.array
        request = self._plan.allocation.request
        limits = self._gateway.limits(request.partition or "", request.qos or "", request.account or "")
        return Batches(tasks, limits, self._plan.array.max_running_tasks)

    def _fail_refused(self) -> None:
        """Register the tasks of array jobs that Slurm refused, and those that were not submitted after that."""
        if self._refusal is not None:
            self._refused |= dict.fromkeys(self._batches.left, self._refusal)
        explained = {error: self._explain(error) for error in {*self._refused.values()}}
        for index, error in self._refused.items():
            last, cause = next(reversed(self._series[index].ended), None), explained[error]
            if last and index in self._failed_in:  # a re-execution begins with the request of the asset
                self._gateway.reject(*self._failed_in[index])
            logs = f"scripts/job {last.job} logs" if last else "none: it was not submitted"
            self._array.failed(index, last.explain_last(cause) if last else cause, logs)

    # What the gateway asks and reports

    def take(self) -> JobToFollow | None:  # noqa: D102 - see JobHandler
        if self._adopted:
            run = self._adopted.pop()
            return JobToFollow(run, None, sorted(self._jobs_by_run[run].tasks))
        if self._submitting or self._refusal is not None or self._found is None:
            return None
        active, planned = self._jobs_by_run.values(), self._planned.request
        repeated = sum(each.request != planned for each in active)
        left = self._batches.left
        if left and self._series[left[0]].request != planned and repeated >= MOST_REPEATED:
            return None
        queued = sum(len(each.tasks) - len(each.ends) for each in active)
        shares = [each.share for each in active]
        running = sum(min(each.share, len(each.tasks) - len(each.ends)) for each in active)
        indices, max_running = self._batches.take(shares, queued, lambda index: self._series[index].request, running)
        if not indices:
            return None
        run = self._submitting = self._begin_attempt()
        request = self._series[indices[0]].request
        self._jobs_by_run[run] = _ArrayJob(dict(enumerate(indices)), request, max_running or len(indices))
        return JobToFollow(run, self._files_of_array(run, indices, max_running), range(len(indices)))

    def request_before(self) -> Callable[[], None] | None:  # noqa: D102 - see JobHandler
        ready = self._found is not None or self._refusal is not None or not self._batches.left
        return None if ready else self._prepare

    def _prepare(self) -> None:
        """Find the environment in which adopted tasks run again. Without one, they fail, and the others continue."""
        try:
            self._batches = self._divide(self._batches.left)
            self._found = self._find_environment(tasks=0)  # they cost nothing new
        except (ConfigurationError, RefusedError) as error:
            self._refusal = error

    def _files_of_array(self, run: str, indices: Sequence[int], max_running: int | None) -> dict[str, str]:
        assert self._found
        tasks = [self._array.tasks[index] for index in indices]
        attempts = [store_attempts(self._series[index].ended) for index in indices]
        record = {
            "max_running_tasks": max_running,
            "tasks": [{**task.record, **each} for task, each in zip(tasks, attempts, strict=True)],
        }
        request, shape = self._series[indices[0]].request, ArrayShape(len(tasks), max_running)
        return self._files(run, self._found, request, self._array.contexts.files(run, tasks), record, shape)

    def submitted(self, run: str, submitted: Submitted) -> None:  # noqa: D102 - see JobHandler
        if self._submitting == run:
            self._submitting = None
        self._register_job(run, submitted.job)
        tasks = count_of(len(self._jobs_by_run[run].tasks), "task")
        self._log.info(f"job {submitted.job} ({submitted.how}) with {tasks} in {run}")

    def refused(self, run: str, text: str) -> None:  # noqa: D102 - see JobHandler
        array_job = self._jobs_by_run.pop(run)
        del self._runs[run]
        if run != self._submitting:  # adopted from an earlier run: Slurm had never accepted it
            for index in array_job.tasks.values():
                self._series[index].request = self._planned.request
                self._batches.left.append(index)
            return
        self._submitting = None
        error = RefusedError(text)
        self._refused |= dict.fromkeys(array_job.tasks.values(), error)
        if array_job.request == self._planned.request:  # a changed request may be the reason
            self._refusal = error
        self._array.store_completed()

    def waiting(self, run: str, text: str) -> None:  # noqa: D102 - see JobHandler
        number = len(self._jobs_by_run[run].tasks) + len(self._batches.left)
        what, they = count_of(number, "more task"), "It is" if number == 1 else "They are"
        self._log.info(f"Slurm has no room for {what} yet ({text}). {they} submitted when it has.")

    def state(self, run: str, state: TaskStates) -> None:  # noqa: D102 - see JobHandler
        array_job, job = self._jobs_by_run[run], self._runs[run]
        self._count_running(array_job, state.running, state.requeued)
        self._report_project(job, state.account)
        if not (state.waiting or state.requeued) or state.reason in array_job.reasons | {"None"}:
            return
        array_job.reasons.add(state.reason)
        expected = f"; the next one is expected to start at {written(state.start)}" if state.start else ""
        self._log.info(f"job {job}: tasks wait ({state.reason}){expected}")
        if advice := advise(state.reason, job or "JOB"):
            self._log.warning(f"Tasks of Slurm job {job} may never start ({state.reason}): {advice}")

    def started(self, run: str, task: int, node: str, temporary: str) -> None:  # noqa: ARG002, D102 - see JobHandler
        array_job = self._jobs_by_run[run]
        self._array.progress.started.add(array_job.tasks[task])
        self._count_running(array_job, array_job.running + 1, array_job.requeued)  # until the next state

    def _count_running(self, array_job: _ArrayJob, running: int, requeued: int) -> None:
        array_job.running, array_job.requeued = running, requeued
        active, progress = self._jobs_by_run.values(), self._array.progress
        progress.running = sum(each.running for each in active)
        progress.requeued = sum(each.requeued for each in active)

    def sinks(self, run: str, task: int) -> Sinks:  # noqa: D102 - see JobHandler
        return self._array.reader(self._jobs_by_run[run].tasks[task]).sinks

    def ended(self, run: str, task: int, end: JobEnd) -> None:  # noqa: D102 - see JobHandler
        array_job = self._jobs_by_run[run]
        index, request = array_job.tasks[task], array_job.request
        array_job.ends[task] = end
        self._report_project(self._runs[run], end.account)
        self._array.where = self._where(self._project)
        job, series = f"{self._runs[run]}_{task}", self._series[index]
        outcome, failed, following = series.judge(end, self._array.reader(index).stderr.tail)
        logs = f"scripts/job {job} logs"
        if failed and following.request:
            array_job.repeated.add(task)
            self._failed_in[index] = run, task
            series.repeat(job, end, failed.cause, following.request)
            self._submit_again(index, f"{failed.cause}; it is submitted again, with {following.text}.")
            if failed.fault in _SLURM_REPEATS:
                self._gateway.reject(run, task)
            return
        if outcome:
            succeeded = False
            self._array.failed(index, outcome.text + following.refusal, logs)
        else:
            where, costs = {"job_id": job, "run_directory": f"{run}/tasks/{task}"}, accounting.count(end, request)
            succeeded = self._array.ended(
                index, end.exit_code, where, costs, logs, request=request, limit=following.refusal
            )
        series.finish(job, end, "succeeded" if succeeded else failed.cause if failed else "failed")
        if not succeeded:
            self._gateway.reject(run, task)

    def _submit_again(self, index: int, text: str) -> None:
        """Have a task submitted once more; the log has the text."""
        self._array.stop_reading(index)
        self._batches.left.append(index)
        if text not in self._warned:  # once for all tasks
            self._warned.add(text)
            self._log.warning(f"Task {self._array.tasks[index].label}: {text}")

    def over(self, run: str, rows: Any) -> None:  # noqa: D102 - see JobHandler
        array_job, job = self._jobs_by_run.pop(run), self._runs.pop(run)
        if short := sum(bool(end.short) for end in array_job.ends.values()):
            tasks = f"{count_of(short, 'task')} of job {job}"
            self._log.warning(f"Not all output of {tasks} arrived. It is in {run}/tasks, unless removed.")
        for task, found in rows.items():
            if task in array_job.ends and task not in array_job.repeated:
                end = replace(array_job.ends[task], rows=found)
                self._array.add_costs(array_job.tasks[task], accounting.count(end, array_job.request))
