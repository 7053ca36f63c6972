"""Jobs as a client follows them: several at once, over one channel, each task from the byte where it broke."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dagster_sbatch.slurm.gateway.agent.job_record import last_of
from dagster_sbatch.slurm.gateway.answers import (
    ACCOUNTED,
    JobEnd,
    JobState,
    RefusedError,
    RemovedError,
    Submitted,
    TaskStates,
    read_start,
)
from dagster_sbatch.slurm.gateway.link import AgainError, Link

Files = Mapping[str, str]  # content of a run directory by name; one is `job.sh`
Sinks = Mapping[str, Callable[[bytes], None]]
"""Functions that get the new bytes of files, by name: each byte once and in order."""
Rows = Mapping[int, Sequence[Sequence[str]]]
"""Rows of sacct by the index of a task, with ACCOUNTED: the task, then its steps."""


@dataclass(frozen=True)
class JobToFollow:
    """A job to follow, and to submit before if it does not exist."""

    run: str  # the run directory
    files: Files | None  # its content by name; None: it exists already
    tasks: Sequence[int]  # indices of the tasks to follow


class JobHandler:
    """Chooses the jobs of a step, and gets all that they report. One thread calls all methods.

    A subclass has `take` and the other methods that it needs: by default, `refused` raises, and the others do nothing.
    `run` is a run directory, `task` the index of a task in its job.
    """

    def take(self) -> JobToFollow | None:
        """Return the next job to follow now; None: none now, or no more.

        It is called at the start, and after each call of `submitted`, `refused`, `ended` and `over`.
        """
        raise NotImplementedError

    def request_before(self) -> Callable[[], None] | None:
        """Return a function that asks the agent for what the next `take` needs; None if that needs nothing.

        The other methods must not ask the agent: the link is busy with the answers about the jobs.
        """
        return None

    def submitted(self, run: str, submitted: Submitted) -> None:
        """Slurm has accepted the job, or it was found."""

    def refused(self, run: str, text: str) -> None:  # noqa: ARG002
        """Slurm or the agent has refused the job for good; nothing else comes of it."""
        raise RefusedError(text)

    def waiting(self, run: str, text: str) -> None:
        """Slurm has no room for the job (a limit of submitted jobs). The agent tries again by itself."""

    def state(self, run: str, state: TaskStates) -> None:
        """The number of waiting or running tasks has changed, or why they wait; at most once per second."""

    def started(self, run: str, task: int, node: str, temporary: str) -> None:
        """A task has started, or has started again; `temporary`: its folder for temporary files on the node."""

    def idle(self, run: str, task: int, seconds: float) -> None:
        """The GPUs of a task have been idle for this long. It is said once."""

    def sinks(self, run: str, task: int) -> Sinks:  # noqa: ARG002
        """Return what gets the output of a task that has written: `messages.jsonl`, `stdout`, `stderr`."""
        return {}

    def ended(self, run: str, task: int, end: JobEnd) -> None:
        """A task is over. All that it wrote has come, except for what `end.short` names."""

    def over(self, run: str, rows: Rows) -> None:
        """All followed tasks of the job are over; `rows` has those that the accounting knew in time."""


@dataclass
class _Followed:
    """A job that is followed: the tasks whose end has not come, and the bytes that came of them."""

    job: JobToFollow
    left: set[int]
    known: Mapping[str, Any] | None = None
    # By task and name of a file, the number of bytes that came and the last of them, a character for each byte
    offsets: dict[int, dict[str, tuple[int, str]]] = field(default_factory=dict)
    starts: dict[int, float] = field(default_factory=dict)

    def request(self, follower: str) -> dict[str, Any]:
        run = {"run": self.job.run, "files": self.job.files, "follower": follower, "known": self.known}
        tasks = {"tasks": list(self.left), "followed": list(self.job.tasks), "offsets": self.offsets}
        return {"do": "jobs.run", "fields": ",".join(ACCOUNTED), **run, **tasks}

    def count(self, head: Mapping[str, Any], data: bytes) -> None:
        """Count bytes of a file that have come. AgainError: they do not follow those that came before."""
        name, at, offsets = head["file"], head["at"], self.offsets.setdefault(head["task"], {})
        come, last = offsets.get(name, (0, ""))
        if at not in (0, come):  # 0: a program has emptied the file
            raise AgainError(f"{name} came from byte {at}, not {come}")
        end = at + len(data)
        offsets[name] = end, last_of(last.encode("latin-1"), data, end).decode("latin-1")


def follow_jobs(link: Link, handler: JobHandler, follower: str) -> None:
    """Submit jobs and follow their tasks, until `take` returns no further job and all are over.

    `follower`: id of the Dagster run; the agent records it in the run directories. Empty: nothing is submitted.
    Raises RefusedError: the agent cannot act at all. A job that Slurm refuses goes to `handler.refused`.
    Raises StoppedError: `stop` was set; the jobs still run.
    """
    active: dict[str, _Followed] = {}

    def step() -> None:
        _follow(link, handler, active, follower)
        while request := handler.request_before():
            request()
            _follow(link, handler, active, follower)

    link.patiently(step, lasting=lambda: any(each.known for each in active.values()))


def _follow(link: Link, handler: JobHandler, active: dict[str, _Followed], follower: str) -> None:
    """Follow jobs until all are over, or the handler has another request; the next call continues from there."""
    requests = [each.request(follower) for each in active.values()]

    def take() -> None:
        while job := handler.take():
            active[job.run] = _Followed(job, set(job.tasks))
            requests.append(active[job.run].request(follower))

    take()
    if not active:
        return
    for request, head, data in link.exchange(requests):
        run = request["run"]
        if "file" in head:
            active[run].count(head, data)
            if sink := handler.sinks(run, head["task"]).get(head["file"]):
                sink(data)
        elif "trouble" in head:
            link.on_trouble(head["trouble"])
        elif _report(handler, active, run, head):
            take()
        if not active or handler.request_before():
            return


def _report(handler: JobHandler, active: dict[str, _Followed], run: str, head: Mapping[str, Any]) -> bool:
    """Report an answer of the agent; return whether there may be another job to take."""
    followed, task = active[run], head.get("task", 0)
    if "began" in head and followed.starts.get(task) != head["began"]:
        followed.starts[task] = head["began"]
        handler.started(run, task, head["node"], head["temporary"])
    elif "idle" in head:
        handler.idle(run, task, head["idle"])
    elif "end" in head:
        followed.left.discard(task)
        followed.offsets.pop(task, None)
        followed.starts.pop(task, None)
        handler.ended(run, task, JobEnd.parse(head["end"], head["short"]))
    elif "job" in head:
        followed.known = head
        followed.job = replace(followed.job, files=None)  # they are there, and not needed again
        handler.submitted(run, Submitted(head["job"], head["how"]))
    elif "removed" in head:
        raise RemovedError(head["removed"], run)
    elif "refused" in head:
        handler.refused(run, head["refused"])
        del active[run]
    elif "over" in head:
        handler.over(run, {int(index): rows for index, rows in head["rows"].items()})
        del active[run]
    elif "waiting" in head:
        handler.waiting(run, head["waiting"])
    elif "state" in head:
        handler.state(run, TaskStates(**{**head["state"], "start": read_start(head["state"]["start"])}))
    return not {"end", "job", "refused", "over"}.isdisjoint(head)


class SingleTask(JobHandler):
    """A single job, or one task of an array job, and how it has ended; `sinks` get its output."""

    def __init__(
        self,
        run: JobToFollow,
        sinks: Sinks,
        on_submitted: Callable[[Submitted], None],
        on_state: Callable[[JobState], None],
        on_trouble: Callable[[str], None],
    ) -> None:
        self.end: JobEnd | None = None
        self._left, self._sinks = [run], sinks
        self._state = self._reported = JobState("", "None", None)
        self._on_submitted, self._on_state, self._on_trouble = on_submitted, on_state, on_trouble

    def take(self) -> JobToFollow | None:  # noqa: D102 - see JobHandler
        return self._left.pop() if self._left else None

    def submitted(self, run: str, submitted: Submitted) -> None:  # noqa: ARG002, D102 - see JobHandler
        self._on_submitted(submitted)

    def waiting(self, run: str, text: str) -> None:  # noqa: ARG002, D102 - see JobHandler
        self._on_trouble(f"you have as many jobs as Slurm allows you; this step waits until others have ended. {text}")

    def state(self, run: str, state: TaskStates) -> None:  # noqa: ARG002, D102 - see JobHandler
        on_node = state.running or state.shown == "COMPLETING"  # its script is over, and Slurm or its node still busy
        if state.running and state.shown in ("", "PENDING"):  # squeue has not been asked since it has started
            self._report(state="RUNNING", reason="None", start=None, account=state.account)
        elif state.shown and (on_node or state.waiting or state.requeued):
            nowhere = {} if on_node else {"node": "", "temporary": "", "idle": None}
            self._report(state=state.shown, reason=state.reason, start=state.start, account=state.account, **nowhere)

    def started(self, run: str, task: int, node: str, temporary: str) -> None:  # noqa: ARG002, D102 - see JobHandler
        self._state = replace(self._state, node=node, temporary=temporary, idle=None)  # the job's state follows

    def idle(self, run: str, task: int, seconds: float) -> None:  # noqa: ARG002, D102 - see JobHandler
        self._report(idle=seconds)

    def _report(self, **changes: Any) -> None:
        """Report a state, unless only the expected start has changed."""
        self._state = replace(self._state, **changes)
        if self._reported != (known := replace(self._state, start=None)):
            self._reported = known
            self._on_state(self._state)

    def sinks(self, run: str, task: int) -> Sinks:  # noqa: ARG002, D102 - see JobHandler
        return self._sinks

    def ended(self, run: str, task: int, end: JobEnd) -> None:  # noqa: ARG002, D102 - see JobHandler
        self.end = end

    def over(self, run: str, rows: Rows) -> None:  # noqa: ARG002, D102 - see JobHandler
        assert self.end
        self.end = replace(self.end, rows=next(iter(rows.values()), ()))
