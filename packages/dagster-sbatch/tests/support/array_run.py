"""An array job on the simulated site as a gateway's client has it: its files, and all that comes of its tasks."""

import json
import secrets
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from dagster_sbatch.slurm import ArrayShape, Site, SlurmRequest, allocate, render_job_script
from dagster_sbatch.slurm.gateway import MESSAGES, JobEnd, JobHandler, JobToFollow, Sinks, Submitted, TaskStates
from slurm_in_a_box import CERTIFICATE_USER

RUNS = f"{CERTIFICATE_USER.home}/dagster-slurm/runs"


def new_key() -> str:
    return f"array{secrets.token_hex(4)}-1"


def files_of(
    site: Site,
    key: str,
    body: str,
    tasks: int,
    max_running: int | None = None,
    pipes: Sequence[str] = (),
    **request: Any,
) -> dict[str, str]:
    """Return the files of an array job; each task's variables of Pipes are `context<index>` and `messages<index>`."""
    complete = allocate(SlurmRequest(**{"time_limit": "5", **request}), site, qos="zen4_0768").request
    script = render_job_script(
        complete,
        site,
        job_name=key,
        about={},
        environment={"PYTHON": "/usr/bin/python3"},
        body=body,
        array=ArrayShape(tasks, max_running),
    )
    names = [{"name": f"n{index}", "id": f"i{index}", "partitions": [f"n{index}"]} for index in range(tasks)]
    record = {"call": 0, "inputs": {}, "request": {}, "tasks": names}
    return {
        "job.sh": script,
        "about.json": json.dumps({"run": "r", "asset": "a"}),
        "submitted_with.json": json.dumps(record),
        "context.head": '{"common": 1',
        "tasks.jsonl": "".join(f', "task": {index}}}\n' for index in range(tasks)),
        "tasks.pipes": "".join(f"context{index} messages{index}\n" for index in range(tasks)),
    }


class Recorder(JobHandler):
    """Keeps all that comes of array jobs; `on_event` is called with the name of each.

    The tasks of all are numbered through, in the order of the runs.
    """

    def __init__(self, *runs: JobToFollow, at_once: int = 1, on_event: Callable[[str], None] = lambda _: None) -> None:
        self.waiting_runs, self.at_once, self.on_event = list(runs), at_once, on_event
        counts = [max(run.tasks, default=0) + 1 for run in runs]
        self.first = {run.run: sum(counts[:number]) for number, run in enumerate(runs)}
        self.active: set[str] = set()
        self.jobs: dict[str, Submitted] = {}
        self.refusals: dict[str, str] = {}
        self.waits: list[str] = []
        self.states: list[TaskStates] = []
        self.starts: dict[int, list[str]] = defaultdict(list)
        self.written: dict[tuple[int, str], bytearray] = defaultdict(bytearray)
        self.ends: dict[int, JobEnd] = {}
        self.rows: dict[int, Sequence[Sequence[str]]] = {}

    def take(self) -> JobToFollow | None:
        if not self.waiting_runs or len(self.active) >= self.at_once:
            return None
        run = self.waiting_runs.pop(0)
        self.active.add(run.run)
        return run

    def submitted(self, run: str, submitted: Submitted) -> None:
        assert run not in self.jobs, "it was reported twice"
        self.jobs[run] = submitted
        self.on_event("submitted")

    def refused(self, run: str, text: str) -> None:
        self.refusals[run] = text
        self.active.remove(run)

    def waiting(self, run: str, text: str) -> None:
        assert run in self.active
        self.waits.append(text)
        self.on_event("waiting")

    def state(self, run: str, state: TaskStates) -> None:
        assert run in self.active
        self.states.append(state)
        self.on_event("state")

    def started(self, run: str, task: int, node: str, temporary: str) -> None:
        assert run in self.active
        self.starts[self.first[run] + task].append(node)
        self.on_event("started")

    def sinks(self, run: str, task: int) -> Sinks:
        assert run in self.active
        assert self.first[run] + task not in self.ends, "a byte came after the end"
        return {name: partial(self.feed, self.first[run] + task, name) for name in (MESSAGES, "stdout", "stderr")}

    def feed(self, task: int, name: str, data: bytes) -> None:
        self.written[task, name] += data
        self.on_event("feed")

    def ended(self, run: str, task: int, end: JobEnd) -> None:
        assert run in self.active
        assert self.first[run] + task not in self.ends, "it was reported twice"
        self.ends[self.first[run] + task] = end
        self.on_event("ended")

    def over(self, run: str, rows: Any) -> None:
        self.active.remove(run)
        self.rows.update({self.first[run] + task: found for task, found in rows.items()})

    def text(self, task: int, name: str = "stdout") -> str:
        return self.written[task, name].decode()

    @property
    def outcomes(self) -> dict[int, tuple[str, int | None]]:
        return {task: (end.state, end.code) for task, end in sorted(self.ends.items())}
