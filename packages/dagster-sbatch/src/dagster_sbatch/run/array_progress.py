"""Lines of the step's log that show how far an array is."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dagster_sbatch.slurm.units import count_of

FIRST_PAUSE, LONGEST_PAUSE = 10.0, 300.0
"""Seconds between two lines: short at first, longer while the array runs. Nothing is logged while nothing changes."""


class ArrayProgress:
    """Counts tasks, and logs the counts from a thread of its own."""

    def __init__(self, total: int, done: int, log: Callable[[str], None]) -> None:
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
