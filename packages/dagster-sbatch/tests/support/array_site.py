"""An array job whose tasks a test plays, and commands in place of Slurm's."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from dagster_sbatch.slurm.gateway import Gateway, JobToFollow, StoppedError, follow_jobs
from resources import PROJECT
from slurm_in_a_box import wait_until
from support.agent_fixtures import put
from support.array_run import Recorder, files_of

SITE = PROJECT.load_site("musica")
NO_ACCOUNTING = "echo 'Slurm accounting storage is disabled' >&2; exit 1"
KEY = "KEY-1"


def record(index: str, state: str, end: str = "120", key: str = KEY) -> str:
    """A line of `scontrol -o show job`."""
    job = f"JobId=17 ArrayJobId=17 ArrayTaskId={index} ArrayTaskThrottle=2 JobName={key} Account=p1 JobState={state}"
    return f"{job} ExitCode=0:0 SubmitTime=100 StartTime=110 EndTime={end}"


def lines(*texts: str) -> str:
    return "cat <<'E'\n" + "\n".join(texts) + "\nE"


class Site:
    """Slurm's commands in one folder, and an array job whose tasks a test plays."""

    def __init__(self, slurm: Path, folder: Path, tasks: int) -> None:
        self.slurm, self.run, self.asked = slurm, folder / "runs" / KEY, folder / "asked"
        self.array = JobToFollow(str(self.run), files_of(SITE, KEY, "true", tasks), range(tasks))
        put(slurm, "sbatch", "echo 17")
        put(slurm, "sacct", NO_ACCOUNTING)
        self.say(record(f"0-{tasks - 1}", "PENDING", "Unknown"))

    def say(self, *records: str, before: str = "true") -> None:
        """Have scontrol show these when it is asked; `before`: a command that runs each time before that."""
        put(self.slurm, "scontrol", f"echo >>'{self.asked}'; {before}; {lines(*records)}")

    def wait_until_asked(self) -> None:
        before = self.asked.stat().st_size if self.asked.exists() else 0
        wait_until(lambda: self.asked.exists() and self.asked.stat().st_size > before, "Slurm is asked", 60)

    def write(self, index: int, name: str, text: str) -> None:
        """Append to a file of a task, which has started once its folder has all its files."""
        task = self.run / "tasks" / str(index)
        if not (self.run / "tasks" / f"{index}.started").exists():
            for each in ("messages.jsonl", "events", "cause"):
                (task / each).touch()
            for each in ("stdout", "stderr", "started"):
                (self.run / "tasks" / f"{index}.{each}").touch()
        path = task / name if name in ("events", "messages.jsonl") else self.run / "tasks" / f"{index}.{name}"
        with path.open("a") as file:
            file.write(text)

    def start(self, index: int, at: float = 1.0) -> None:
        self.write(index, "events", json.dumps({"started": "n1", "time": at, "temporary": "/tmp"}) + "\n")

    def end(self, index: int, code: int | None = 0, at: float | None = None) -> None:
        stdout = self.run / "tasks" / f"{index}.stdout"
        sizes = {"messages.jsonl": 0, "stdout": stdout.stat().st_size, "stderr": 0}
        self.write(index, "events", json.dumps({"code": code, "time": at or time.time(), "sizes": sizes}) + "\n")


Follow = Callable[[Site, Gateway], Recorder]


@pytest.fixture
def follow() -> Iterator[Follow]:
    """`follow(site, gateway)` follows the array job in a thread of its own; it returns when the job is submitted."""
    threads: list[tuple[threading.Thread, Gateway]] = []

    def work(gateway: Gateway, seen: Recorder) -> None:
        with suppress(StoppedError):
            follow_jobs(gateway, seen, "run-1")

    def start(site: Site, gateway: Gateway) -> Recorder:
        seen = Recorder(site.array)
        threads.append((threading.Thread(target=work, args=(gateway, seen)), gateway))
        threads[-1][0].start()
        wait_until((site.run / "job").is_symlink, "it is submitted", 60)
        return seen

    yield start
    for thread, gateway in threads:
        gateway.stop.set()
        thread.join(30)


def wait_for_ends(seen: Recorder, count: int) -> None:
    wait_until(lambda: len(seen.ends) == count, f"{count} ends", 60)
