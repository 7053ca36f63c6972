"""The runs on the supercomputer and the tasks of array jobs, as sensors, the doctor and `scripts/job` see them."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.project import Project
from dagster_sbatch.run.directory import RunInfo
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm.gateway import Attempt, Gateway, JobEnd, RefusedError, StoppedError, make_gateway
from dagster_sbatch.ssh import UnreachableError

SHORTEST_ID = 6  # characters of a Dagster run's id that identify it; the UI shows eight
ACTIVE_WITHOUT_END = timedelta(days=1)
"""A run without a recorded end counts as active for this long: the cached squeue output may be older than its job."""
Kind = Literal["failed", "running", "waiting", "done"]
ORDER: Sequence[Kind] = ("failed", "running", "waiting", "done")
STREAMS = ("stdout", "stderr")  # files of a task that lie beside its folder: Slurm opens them before the task makes it


@dataclass(frozen=True)
class RunRecord:
    """A run directory, and the job in it."""

    path: str  # of the run directory
    job: str | None  # its Slurm id; None if sbatch has not answered, or refused
    about: RunInfo  # the Dagster run that it belongs to
    end: JobEnd | None  # how the job ended; None if it has not, or if nobody has asked Slurm since
    changed: datetime  # when the run directory last changed: created, job started, job ended
    followers: tuple[str, ...] = ()  # ids of the Dagster runs that submitted or adopted it, in that order
    array: bool = False  # whether it is an array job

    @property
    def key(self) -> str:
        """The submission key, which is the job's name."""
        return self.path.rpartition("/")[2]

    @property
    def family(self) -> str:
        """The part of the key that all attempts of one step share."""
        return self.key.rpartition("-")[0]

    @classmethod
    def parse(cls, row: Mapping[str, Any]) -> "RunRecord":
        """Return the record for an entry of the agent's list."""
        end = JobEnd.parse(row["end"]) if row["end"] else None
        about, changed = RunInfo.parse(row["about"]), datetime.fromtimestamp(row["at"], UTC)
        return cls(row["run"], row["job"], about, end, changed, tuple(row["followers"] or [about.run]), row["array"])


class Runs:
    """All runs below SLURM_DEPLOYMENT_BASE_PATH, over one connection; `open_runs` opens it."""

    def __init__(self, gateway: Gateway, settings: Settings) -> None:
        self.gateway = gateway
        self.folder = settings.runs_folder

    def all(self) -> list[RunRecord]:
        """Return every run, by the time of its last change."""
        return sorted(map(RunRecord.parse, self.gateway.runs(self.folder)), key=lambda run: run.changed)

    def find(self, name: str) -> list[RunRecord]:
        """Return the runs of that name: a Slurm job id (its latest run), the beginning of a Dagster run id, or a key.

        Raises ConfigurationError: there is none.
        """
        runs = [RunRecord.parse(row) for row in self.gateway.runs(self.folder)]  # by the time of their submission
        found = [run for run in runs if name in (run.job, run.key)][-1:]
        if not found and len(name) >= SHORTEST_ID:
            found = [run for run in runs if any(each.startswith(name) for each in run.followers)]
        if not found:
            raise ConfigurationError(
                f"No run in {self.folder} is called {name!r}. Name a Slurm job id, {SHORTEST_ID} or more characters of "
                "a Dagster run's id, or the name of a run directory. To list all runs:\n  scripts/job"
            )
        return found

    def task_counts(self, found: Iterable[RunRecord]) -> dict[str, Mapping[str, int]]:
        """Return the numbers of tasks (`done`, `running`, `waiting`, `failed`) of array jobs, by run directory."""
        paths = [run.path for run in found]
        return dict(self.gateway.ask(do="run_directories.task_counts", paths=paths)["counts"])

    def cancel_task(self, run: RunRecord, index: int) -> JobEnd:
        """Cancel one task of an array job, and wait until it is over; return how it ended.

        Raises RefusedError: it is not over after a minute.
        """
        end = self.gateway.cancel_tasks(run.path, [index]).get(index)
        if not end:
            raise RefusedError(
                f"Slurm has accepted that task {run.job}_{index} is cancelled, but it is not over after a minute. Its "
                f"epilog or its node may be slow. Ask for its state:\n  scripts/job {run.job}_{index} state"
            )
        return end

    def environments_in_use(self) -> set[str]:
        """Return the names of the environments of all runs whose job is in Slurm's queue, or may still get there.

        Raises RefusedError: Slurm does not answer.
        """
        queue = self.gateway.queue(self.folder)
        if queue["trouble"]:
            raise RefusedError(f"Slurm did not list its jobs: {queue['trouble']}")
        lately = datetime.now(UTC) - ACTIVE_WITHOUT_END
        return {
            run.about.environment
            for run in self.all()
            if run.job in queue["jobs"] or (run.end is None and run.changed > lately)
        }


@contextmanager
def open_runs(
    settings: Settings,
    project: Project,
    seconds: float | None = None,
    on_trouble: Callable[[str], None] = lambda _: None,
) -> Iterator[Runs]:
    """Open a connection to the runs on the supercomputer.

    `seconds`: for all requests together; None: no limit. `on_trouble`: gets the text of each error after which a
    request is repeated.
    Raises UnreachableError: the time was not enough.
    Raises AccessError, SshError: there is no access.
    Raises RefusedError: the agent or Slurm refused a request.
    """
    site = project.load_site(settings.supercomputer_site)
    stop, troubles = threading.Event(), ["none"]

    def note(text: str) -> None:
        troubles.append(text)
        on_trouble(text)

    gateway = make_gateway(settings, site, stop, note)
    limit = threading.Timer(seconds or threading.TIMEOUT_MAX, stop.set)
    limit.daemon = True  # an interrupt may come before the `try`
    limit.start()
    try:
        yield Runs(gateway, settings)
    except StoppedError:
        raise UnreachableError(
            f"{settings.edge_node_host} has not answered everything within {seconds:.0f} s. Last error: {troubles[-1]}"
        ) from None
    finally:
        limit.cancel()
        gateway.close()


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
