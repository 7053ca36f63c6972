"""The tasks of an array job, as people see them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.inspect.remote_runs import RunRecord, Runs
from dagster_sbatch.slurm.gateway import Attempt

Kind = Literal["failed", "running", "waiting", "done"]
ORDER: Sequence[Kind] = ("failed", "running", "waiting", "done")
STREAMS = ("stdout", "stderr")  # files of a task that lie beside its folder: Slurm opens them before the task makes it


@dataclass(frozen=True)
class TaskRecord:
    """A task of an array job."""

    index: int  # in its array job
    name: str  # its partition, the first and last of several, or the name of its parameter set
    kind: Kind  # `failed` is also a task whose result its step has rejected
    state: str  # Slurm's
    exit: str = ""  # Slurm's exit code and signal, such as `1:0`; empty if it is not over
    node: str = ""  # that it runs or ran on
    changed: datetime | None = None  # when it ended, or started; None while it waits
    cause: str = ""  # why it failed, as something in it has recorded; empty if nothing has
    stderr: str = ""  # its end


class TaskList:
    """The tasks of an array job."""

    def __init__(self, runs: Runs, run: RunRecord) -> None:
        self._runs, self.run = runs, run
        self.job: Attempt = runs.gateway.attempt(run.path)  # with the ends of its tasks
        record = self.job.record or {}
        self._names: list[str] = [task["name"] for task in record.get("tasks", ())]
        # The partitions of each task; empty for parameter sets
        self.partitions: list[Sequence[str]] = [task["partitions"] for task in record.get("tasks", ())]

    def __len__(self) -> int:
        return len(self._names)

    def records(self, indices: Iterable[int] | None = None, tail: int = 0) -> list[TaskRecord]:
        """Return tasks with what they have recorded; without `indices`, all tasks, but without their records.

        `tail`: how many bytes of the end of their stderr.
        """
        if indices is None:
            return [self._record(index, {}) for index in range(len(self))]
        wanted = list(indices)
        said = self._runs.gateway.ask(do="run_directories.task_records", run=self.run.path, tasks=wanted, tail=tail)
        return [self._record(index, said["records"][str(index)]) for index in wanted]

    def one(self, index: int) -> TaskRecord:
        """Return one task.

        Raises ConfigurationError: there is none with this index.
        """
        if index >= len(self):
            raise ConfigurationError(
                f"Slurm job {self.run.job} has no task {index}. The highest index of its tasks is "
                f"{len(self) - 1}. To list them:\n  scripts/job {self.run.job}"
            )
        return self.records([index])[0]

    def path(self, index: int, name: str) -> str:
        """Return the path of a file of a task: below its folder, or absolute."""
        if name.startswith(("/", "~")):
            return name
        return f"{self.run.path}/tasks/{index}{'.' if name in STREAMS else '/'}{name}"

    def _record(self, index: int, own: Mapping[str, Any]) -> TaskRecord:
        name, end = self._names[index], self.job.ends.get(index)
        recorded = {"node": own.get("node", ""), "stderr": own.get("stderr", "")}
        if end is None:
            if index not in self.job.started:
                return TaskRecord(index, name, "waiting", "PENDING")
            if index in self.job.requeued:
                return TaskRecord(index, name, "waiting", "PENDING", **recorded)
            return TaskRecord(index, name, "running", "RUNNING", changed=_time(own.get("time")), **recorded)
        rejected = end.succeeded and index in self.job.rejected
        kind: Kind = "done" if end.succeeded and not rejected else "failed"
        state = f"{end.state or 'ended'}{', result rejected' if rejected else ''}"
        return TaskRecord(index, name, kind, state, end.exit, changed=_time(end.ended), cause=end.cause, **recorded)


def _time(seconds: float | None) -> datetime | None:
    return datetime.fromtimestamp(seconds, UTC) if seconds else None


def count_tasks(counts: Mapping[str, int]) -> str:
    """Return the numbers of tasks by kind as text, without the kinds that have none."""
    return ", ".join(f"{counts[kind]} {kind}" for kind in ("done", "running", "waiting", "failed") if counts[kind])
