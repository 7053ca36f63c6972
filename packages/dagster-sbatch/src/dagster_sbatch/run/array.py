"""Job arrays: what an asset writes, its tasks, and their division into array jobs. Pure."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from dagster_sbatch.errors import CheckedModel, ConfigurationError
from dagster_sbatch.run.digests import check_json, digest_of
from dagster_sbatch.slurm.gateway import Limits
from dagster_sbatch.slurm.units import count_of

PARTITION_KEYS = "partition_keys"  # the one of the extras that holds the partitions of the run, or of a task
MOST_TASKS = 10_000  # of one run
LONGEST_NAME = 200  # characters of the name of a parameter set
USUAL_LIMIT = 1000  # tasks of an array job where Slurm does not tell its limit (MaxArraySize is 1001 by default)
PARTS = 4  # array jobs that fill the submit limit together: when one of them is over, there is room for the next one


def _parameter_sets(value: Any) -> Any:
    """Read a dictionary, or pairs as `dict()` takes them: a dictionary cannot show that a name came twice."""
    if value is None or isinstance(value, Mapping):
        return value
    pairs = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not all(isinstance(each, Sequence) and not isinstance(each, str) and len(each) == 2 for each in pairs):
        raise ValueError("give a dictionary of parameter sets by name, or a list of pairs (name, parameter set)")
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two parameter sets have the name {twice!r}. Give each set a name of its own")
    return dict(pairs)


class JobArray(CheckedModel):
    """Runs a workload in many tasks of a Slurm job array; in `development`, in many processes at once.

    Without `tasks`, each partition of the run has its own task, or each `partitions_per_task` of them. The request, the
    launcher and the workload are those of each task. A run has at most 10,000 tasks.

    Example:
        JobArray(partitions_per_task=24, max_running_tasks=50)
        JobArray(tasks={"lr=0.1": {"lr": 0.1}, "lr=0.01": {"lr": 0.01}})

    Raises:
        ConfigurationError: a field is unknown or has a wrong value; the text lists all problems.
    """

    partitions_per_task: PositiveInt = Field(1, description="How many partitions a task computes, one after another.")
    max_running_tasks: PositiveInt | None = Field(
        None,
        description="How many tasks run at once at most. Default: as Slurm decides; in `development`, one per CPU.",
    )
    tasks: Annotated[dict[str, dict[str, Any]] | None, BeforeValidator(_parameter_sets)] = Field(
        None,
        description="Parameter sets by name, one task each; JSON. A task finds the values of its set in "
        "`pipes.extras`. A list of pairs (name, set) is accepted, too; no name may occur twice.",
    )

    def __init__(self, **fields: Any) -> None:  # type checkers accept what the validators do
        super().__init__(**fields)

    @model_validator(mode="after")
    def _check(self) -> "JobArray":
        if self.tasks is None:
            return self
        if self.partitions_per_task != 1:
            raise ValueError("give tasks or partitions_per_task, not both")
        if not self.tasks:
            raise ValueError("tasks: there is no parameter set. Give at least one")
        for name, values in self.tasks.items():
            if not name.isprintable() or not name.strip() or len(name) > LONGEST_NAME:
                raise ValueError(
                    f"tasks: the name {name[:LONGEST_NAME]!r} is empty, longer than {LONGEST_NAME} characters, or has "
                    "characters that cannot be printed. Use another name"
                )
            if PARTITION_KEYS in values:
                reason = f"{PARTITION_KEYS!r} holds the partitions of the run. Use another name"
                raise ValueError(f"tasks[{name!r}]: {reason}")
            for key, value in values.items():
                check_json(f"tasks[{name!r}][{key!r}]", value)
        return self


@dataclass(frozen=True, slots=True)
class Task:
    """One task of an array."""

    # Its partition, `first..last` of several partitions, or the name of its parameter set. No other task of the array
    # has it
    name: str
    partitions: Sequence[str] = ()  # that it computes; empty for a parameter set
    values: Mapping[str, Any] = field(default_factory=dict)  # its parameter set; empty for partitions
    # Versions of the data that only this task reads, by partition
    reads: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name in lines of the log."""
        return self.name if self.name.isprintable() else repr(self.name)

    @property
    def id(self) -> str:
        """A digest of its name and its own inputs, without those that all tasks have in common."""
        return digest_of([self.name, list(self.partitions), dict(self.values), dict(self.reads)])

    @property
    def record(self) -> dict[str, Any]:
        """What the record of an array job has of it: nothing that may be private."""
        return {"name": self.name, "id": self.id, "partitions": list(self.partitions)}


def make_tasks(array: JobArray, partitions: Sequence[str]) -> tuple[Task, ...]:
    """Return the tasks that an array asks for, in order.

    Raises ConfigurationError: there are none, or too many.
    """
    if array.tasks is not None:
        _check_number(
            len(array.tasks), "Divide the parameter sets among several runs, or put several into one parameter set."
        )
        return tuple(Task(name, values=values) for name, values in array.tasks.items())
    if not partitions:
        raise ConfigurationError(
            "array=JobArray(): this asset has no partitions, so there is nothing to divide into tasks. Give it "
            "partitions_def=..., or name parameter sets: JobArray(tasks={'small': {'n': 1}, 'large': {'n': 9}})."
        )
    size = array.partitions_per_task
    _check_number(
        -(-len(partitions) // size), f"Write JobArray(partitions_per_task={-(-len(partitions) // MOST_TASKS)})."
    )
    chunks = [tuple(partitions[at : at + size]) for at in range(0, len(partitions), size)]
    return tuple(Task(name, chunk) for name, chunk in zip(_name_chunks(chunks), chunks, strict=True))


def _name_chunks(chunks: Sequence[Sequence[str]]) -> Iterator[str]:
    """Return a name for each chunk; a name that is taken gets a number: `a..b` may be a partition, too."""
    names: set[str] = set()
    for chunk in chunks:
        name = chunk[0] if len(chunk) == 1 else f"{chunk[0]}..{chunk[-1]}"
        numbered = (f"{name} ({number})" for number in count(2))
        while name in names:
            name = next(numbered)
        names.add(name)
        yield name


def _check_number(number: int, advice: str) -> None:
    if number > MOST_TASKS:
        raise ConfigurationError(f"{number} tasks are more than the {MOST_TASKS} that a run may have. {advice}")


class Batches:
    """The tasks that have to be submitted, as array jobs: as many as the site accepts, and as run at once."""

    def __init__(self, tasks: Sequence[int], limits: Limits, max_running: int | None) -> None:
        """Choose the size of the array jobs.

        `tasks`: indices, in the order in which they are submitted. `max_running`: how many tasks may run at once, of
        all array jobs together.
        Raises ConfigurationError: Slurm does not let so many tasks run at once.
        """
        submit = limits.submit
        if max_running and submit and max_running > submit:
            raise ConfigurationError(
                f"max_running_tasks={max_running} is more than you may have submitted at once: "
                f"{count_of(submit, 'job')}. A task counts as a job. Write JobArray(max_running_tasks={submit})."
            )
        self.left = list(tasks)  # not submitted yet; one that has to be submitted once more is appended
        self._limits, self._max_running = limits, max_running

    def take(
        self, shares: Sequence[int], queued: int, kind: Callable[[int], Hashable] = lambda _: None, running: int = 0
    ) -> tuple[list[int], int | None]:
        """Return the tasks of the next array job, none if there is none now, and how many of them may run at once.

        `shares`: how many tasks of each array job that is not over may run at once; not read without `max_running`.
        `queued`: number of tasks of these array jobs. `kind`: returns the request of a task: the tasks of an array job
        have the same one. `running`: how many tasks of the array jobs can run at once from now on: fewer than their
        shares, if these have fewer tasks left; not read without `max_running`.
        """
        submit = self._limits.submit
        alike = [task for task in self.left if kind(task) == kind(self.left[0])]
        size = min(len(alike), self._limits.array or USUAL_LIMIT)
        if submit and len(self.left) + queued > submit // 2:  # other jobs of the user need room, too
            size = min(size, max(1, submit // PARTS))
        most = share = self._max_running
        if most is not None and size:
            number, share = -(-len(alike) // size), most - sum(shares)
            if share < 1:  # Slurm would never let more of them run than have room now
                number, share = 1, min(size, most - running)
                if share < len(alike):
                    return [], None
            if submit:
                number = min(number, max(1, PARTS - len(shares)))
            share = min(size, -(-share // number))
        taken = alike[:size]
        gone = set(taken)
        self.left = [task for task in self.left if task not in gone]
        return taken, share
