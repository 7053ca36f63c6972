"""The runs on the supercomputer, as sensors, the doctor and `scripts/job` see them."""

import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.project import Project
from dagster_sbatch.run.directory import RunInfo
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm.gateway import Gateway, JobEnd, JobState, RefusedError, StoppedError, make_gateway
from dagster_sbatch.ssh import UnreachableError

SHORTEST_ID = 6  # characters of a Dagster run's id that identify it; the UI shows eight
ACTIVE_WITHOUT_END = timedelta(days=1)
"""A run without a recorded end counts as active for this long: the cached squeue output may be older than its job."""


@dataclass(frozen=True)
class RunRecord:
    """A run directory, and the job in it."""

    path: str  # of the run directory
    job: str | None  # its Slurm id; None if sbatch has not answered, or refused
    about: RunInfo  # the Dagster run that it belongs to
    end: JobEnd | None  # how the job ended; None if it has not, or if nobody has asked Slurm since
    heard: datetime  # when the run directory last changed: created, job started, job ended
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
        about, heard = RunInfo.parse(row["about"]), datetime.fromtimestamp(row["at"], UTC)
        return cls(row["run"], row["job"], about, end, heard, tuple(row["followers"] or [about.run]), row["array"])


class Runs:
    """All runs below SLURM_DEPLOYMENT_BASE_PATH, over one connection; `open_runs` opens it."""

    def __init__(self, gateway: Gateway, settings: Settings) -> None:
        self.gateway = gateway
        self.folder = settings.runs_folder

    def all(self) -> list[RunRecord]:
        """Return every run, by the time of its last change."""
        return sorted(map(RunRecord.parse, self.gateway.runs(self.folder)), key=lambda run: run.heard)

    def find(self, name: str) -> list[RunRecord]:
        """Return the runs of that name: a Slurm job id, the beginning of a Dagster run id, or a submission key.

        Raises ConfigurationError: there is none.
        """
        runs = self.all()
        found = [run for run in runs if name in (run.job, run.key)]
        if not found and len(name) >= SHORTEST_ID:
            found = [run for run in runs if run.about.run.startswith(name)]
        if not found:
            raise ConfigurationError(
                f"No run in {self.folder} is called {name!r}. Name a Slurm job id, {SHORTEST_ID} or more characters of "
                "a Dagster run's id, or the name of a run directory. To list all runs:\n  scripts/job"
            )
        return found

    def task_counts(self, found: Iterable[RunRecord]) -> dict[str, Mapping[str, int]]:
        """Return the numbers of tasks (`done`, `running`, `waiting`, `failed`) of array jobs, by run directory."""
        paths = [run.path for run in found]
        counts: dict[str, Mapping[str, int]] = self.gateway.ask(do="run_directories.task_counts", paths=paths)["counts"]
        return counts

    def remove(self, found: Iterable[RunRecord]) -> list[str]:
        """Remove run directories without a job that may run, and unfinished ones; return the names of those removed."""
        return self.gateway.clean(self.folder, [run.key for run in found])

    def state(self, run: RunRecord) -> tuple[JobState | None, JobEnd | None]:
        """Return what Slurm says of a run's job now: its state, or how it ended; neither if it has no job."""
        return self.gateway.state(run.path)

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

    def claim(self, run: RunRecord, who: str) -> str | None:
        """Claim a run and its other attempts until the connection ends; return who else holds the claim, if so."""
        return self.gateway.claim(self.folder, run.family, uuid.uuid4().hex, who).held_by

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
            if run.job in queue["jobs"] or (run.end is None and run.heard > lately)
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
    limit = threading.Timer(seconds, stop.set) if seconds else None
    if limit:
        limit.start()
    try:
        yield Runs(gateway, settings)
    except StoppedError:
        raise UnreachableError(
            f"{settings.edge_node_host} has not answered everything within {seconds:.0f} s. Last error: {troubles[-1]}"
        ) from None
    finally:
        if limit:
            limit.cancel()
        gateway.close()
