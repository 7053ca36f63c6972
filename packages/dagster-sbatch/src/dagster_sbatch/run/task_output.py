"""What a step shows of the tasks of an array: how far they are, what they write, and repeated warnings once."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dagster_pipes import PipesMessage

from dagster_sbatch.run.array import Task
from dagster_sbatch.run.messages import Messages
from dagster_sbatch.run.pipes import Lines, Session, Streams
from dagster_sbatch.slurm.units import count_of

FIRST_PAUSE, LONGEST_PAUSE = 10.0, 300.0
"""Seconds between two lines: short at first, longer while the array runs. Nothing is logged while nothing changes."""
MOST_WARNINGS = 500  # different warnings of one step that are compared; later ones are shown each time
_WARNING = re.compile(r"warning", re.IGNORECASE)


class ArrayProgress:
    """Counts tasks, and logs the counts from a thread of its own."""

    def __init__(self, total: int, done: int, log: Callable[[str], object]) -> None:
        self._total, self._log = total, log
        self.done, self.failed = done, 0
        self.started: set[int] = set()  # tasks that have started, and are not over
        # How many of `started` run; None: all of them. The others have ended, which Slurm has not confirmed yet.
        self.running: int | None = None
        self.requeued = 0  # how many of `started` wait to start again
        self._shown = ""

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Log the counts while this context lasts, and at its end."""
        over = threading.Event()

        def watch() -> None:
            pause = FIRST_PAUSE
            while not over.wait(pause):
                self._show()
                pause = min(1.5 * pause, LONGEST_PAUSE)

        thread = threading.Thread(target=watch, name="array progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._show()

    def _show(self) -> None:
        started = len(self.started)
        started -= min(started, self.requeued)
        running = started if self.running is None else min(started, self.running)
        waiting = self._total - self.done - self.failed - started
        tasks = count_of(self._total, "task")
        text = f"{tasks}: {self.done} done, {running} running, {waiting} waiting, {self.failed} failed"
        if started > running:
            text += f", {started - running} ended (Slurm has not confirmed it yet)"
        if text != self._shown:
            self._shown = text
            self._log(text)


class Warnings:
    """Which warnings the tasks of a step have written, so that each is shown once."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}
        self.repeated: dict[str, int] = {}

    def is_new(self, text: str, task: str) -> bool:
        """Return whether no other task has written this warning; else count it."""
        if text not in self._first and len(self._first) < MOST_WARNINGS:
            self._first[text] = task
        if self._first.get(text, task) == task:
            return True
        self.repeated[text] = self.repeated.get(text, 0) + 1
        return False


class TaskLines(Lines):
    """Writes one stream of a task into that of the whole step, in whole lines that begin with the task's name.

    A line with the word `warning` that another task has written before is left out, with the indented lines after it.
    """

    def __init__(self, label: str, target: Callable[[str], None], warnings: Warnings) -> None:
        """`target`: shows the lines."""
        super().__init__()
        self._label, self._target, self._warnings = label, target, warnings
        self._rest = ""
        self._left_out = False

    def show(self, text: str) -> None:
        """Write some text; what follows its last newline waits. Of a progress bar, only its last state does."""
        *lines, self._rest = (line[line.rfind("\r", 0, -1) + 1 :] for line in (self._rest + text).split("\n"))
        shown = [f"[{self._label}] {line}\n" for line in lines if self._is_shown(line)]
        if shown:
            self._target("".join(shown))

    def finish(self) -> None:
        """Write the last line, if it has no newline."""
        if self._rest:
            self.show("\n")

    def _is_shown(self, line: str) -> bool:
        if self._left_out and line[:1].isspace():
            return False
        self._left_out = bool(_WARNING.search(line)) and not self._warnings.is_new(line, self._label)
        return not self._left_out


class TaskReader(Streams):
    """Reads what one task writes, while it runs; lines of its log are in the step's log at once."""

    def __init__(self, task: Task, session: Session, warnings: Warnings) -> None:
        """`session`: of the whole step."""
        self._label, self._session, self._warnings = task.label, session, warnings
        self.stdout: TaskLines = TaskLines(task.label, session.stdout.show, warnings)
        self.stderr: TaskLines = TaskLines(task.label, session.stderr.show, warnings)
        self.messages = Messages(session.messages.path, self._deliver, session.messages.on_lost)

    def finish(self) -> None:
        """Write what is left of the last lines."""
        self.stdout.finish()
        self.stderr.finish()

    def _deliver(self, message: PipesMessage) -> None:
        params: dict[str, Any] = dict(message["params"] or {})
        if message["method"] == "opened":
            if not self._session.messages.opened:
                self._session.messages.receive(message)
            return
        if message["method"] == "log":
            text = str(params.get("message"))
            if str(params.get("level", "")).upper() == "WARNING" and not self._warnings.is_new(text, self._label):
                return
            params["message"] = f"[{self._label}] {text}"
        self._session.messages.deliver({**message, "params": params})
