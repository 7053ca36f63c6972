"""The Dagster Pipes session around a workload: context out, messages and output in."""

import codecs
import io
import json
import logging
import os
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import pairwise
from typing import Any, TextIO

import dagster as dg
from dagster_pipes import DAGSTER_PIPES_CONTEXT_ENV_VAR, DAGSTER_PIPES_MESSAGES_ENV_VAR, encode_param

from dagster_sbatch.run.array import PARTITION_KEYS, Task
from dagster_sbatch.run.messages import Messages
from dagster_sbatch.run.reports import StepLog
from dagster_sbatch.run.results import UNREAD
from dagster_sbatch.slurm.gateway import MESSAGES

CONTEXT = "context.json"  # name of the file with the Pipes context in a run directory, beside MESSAGES
TAIL_LINES = 30  # lines of stderr that a failure shows
TAIL_CHARACTERS = 2000  # of each of them: a progress bar may well write megabytes without a newline


class Lines(ABC):
    """Decodes one stream of a workload as UTF-8, shows it, and remembers its last lines."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._tail: deque[str] = deque([""], maxlen=TAIL_LINES + 1)

    def feed(self, data: bytes) -> None:
        """Show the next bytes; a character may be cut anywhere."""
        text = self._decoder.decode(data)
        self.show(text)
        first, *rest = text.split("\n")
        self._tail[-1] = (self._tail[-1] + first)[:TAIL_CHARACTERS]
        self._tail.extend(line[:TAIL_CHARACTERS] for line in rest)

    @abstractmethod
    def show(self, text: str) -> None:
        """Show some text."""

    @property
    def tail(self) -> str:
        """The last lines, without blank ones at the end."""
        return "\n".join(self._tail).rstrip()


class Output(Lines):
    """Writes one stream of the workload to the step's own; None where that is closed, as Python has it."""

    def __init__(self, target: TextIO | None, on_error: Callable[[Exception], None]) -> None:
        """`on_error` is called each time that the target cannot be written to; the workload continues."""
        super().__init__()
        self._target, self._on_error = target, on_error

    def show(self, text: str) -> None:
        """Write UTF-8 in any locale, past the buffer: it would keep what a full disk refuses."""
        if self._target is None:
            return
        try:
            number, data = _file_of(self._target), text.encode(errors="replace")  # half of a surrogate pair
            if number is None:
                print(text, end="", file=self._target, flush=True)
                return
            self._target.flush()
            while data:
                data = data[os.write(number, data) :]
        except (OSError, ValueError) as error:  # ValueError: it was closed meanwhile
            self._on_error(error)


def _file_of(stream: TextIO) -> int | None:
    """Return the descriptor of the file that a stream writes to; None if it is not a file, as in a notebook or a test.

    The stream of a notebook has one all the same: that of the terminal in which the notebook's server runs.
    """
    if isinstance(stream, io.TextIOWrapper):
        with suppress(OSError):
            return stream.fileno()
    return None


@dataclass
class Streams:
    """What reads the three files that a workload writes: its messages, stdout and stderr."""

    messages: Messages
    stdout: Lines
    stderr: Lines

    @property
    def sinks(self) -> dict[str, Callable[[bytes], None]]:
        """Functions that get the next bytes of the files, by name."""
        return {MESSAGES: self.messages.feed, "stdout": self.stdout.feed, "stderr": self.stderr.feed}


@dataclass
class Session(Streams):
    """A Pipes session with its streams.

    `context` is the document that the workload reads. It is a file because an environment variable has 128 KiB at most.
    """

    pipes: dg.PipesSession
    context: str


@contextmanager
def open_session(context: dg.OpExecutionContext, extras: Mapping[str, Any], folder: str = ".") -> Iterator[Session]:
    """Open a Pipes session; `folder`: the run directory of the workload."""
    log, warned = StepLog(context), dict[str, bool]()  # warnings, and whether Dagster has stored them

    def warn(name: str, error: Exception) -> None:
        reason = str(error).partition("\n")[0]  # of a database: the line itself follows
        text = f"The step's {name} cannot be written ({reason}). Lines of the workload are missing there."
        if text not in warned:
            warned[text] = log.warning(text)

    opened = dg.open_pipes_session(context, dg.PipesEnvContextInjector(), UNREAD, extras=dict(extras))
    with _without_advice(context.log), opened as pipes:
        messages = Messages(f"{folder}/{MESSAGES}", pipes.message_handler.handle_message, partial(warn, "log"))
        output = Output(sys.stdout, partial(warn, "stdout")), Output(sys.stderr, partial(warn, "stderr"))
        try:
            yield Session(messages, *output, pipes, json.dumps(pipes.context_data))
        finally:
            for text in (each for each in warned if not warned[each]):  # Dagster's database was on the full disk, too
                log.warning(text)


@contextmanager
def _without_advice(log: logging.Logger) -> Iterator[None]:
    """Leave out Dagster's warning of a session that no process has opened, or closed: the step's failure says why."""

    def is_other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("[pipes] did not receive")

    log.addFilter(is_other)
    try:
        yield
    finally:
        log.removeFilter(is_other)


def pipes_variables(folder: str) -> dict[str, str]:
    """Return the variables by which a workload finds its context and its messages."""
    messages = {"path": f"{folder}/{MESSAGES}", "include_stdio_in_messages": False}
    return {
        DAGSTER_PIPES_CONTEXT_ENV_VAR: encode_param({"path": f"{folder}/{CONTEXT}"}),
        DAGSTER_PIPES_MESSAGES_ENV_VAR: encode_param(messages),
    }


class TaskContexts:
    """Makes the Pipes contexts of the tasks of an array: `head` is of all, and a JSON document with a task's `tail`."""

    def __init__(self, document: str, partitions_def: dg.PartitionsDefinition | None, tasks: Iterable[Task]) -> None:
        """Read what all tasks have in common.

        `document`: the context of the whole step, as JSON.
        """
        common = json.loads(document)
        self._partitions_def = partitions_def
        self._partition = {name: common.pop(name) for name in list(common) if name.startswith("partition_")}
        extras = common.pop("extras")
        self._keys = extras.pop(PARTITION_KEYS, None)
        replaced = {name for task in tasks for name in task.values} & extras.keys()
        self._replaced = {name: extras.pop(name) for name in replaced}
        self.head = f'{json.dumps(common)[:-1]}, "extras": {json.dumps(extras)[:-1]}'
        self._comma = ", " if extras else ""

    def tail(self, task: Task) -> str:
        """Return the rest of a task's context."""
        extras = {**self._replaced, **task.values}
        if keys := list(task.partitions) or self._keys:
            extras[PARTITION_KEYS] = keys
        own = json.dumps(extras)[1:]
        fields = self._fields(task) if task.partitions else self._partition
        return f"{self._comma if extras else ''}{own}, {json.dumps(fields)[1:]}"

    def files(self, run: str, tasks: Sequence[Task]) -> dict[str, str]:
        """Return the files with the contexts of an array job; `run`: its run directory, `tasks`: those in it."""
        pipes = [" ".join(pipes_variables(f"{run}/tasks/{index}").values()) for index in range(len(tasks))]
        return {
            "context.head": self.head,
            "tasks.jsonl": "".join(f"{self.tail(task)}\n" for task in tasks),
            "tasks.pipes": "".join(f"{each}\n" for each in pipes),
        }

    def _fields(self, task: Task) -> dict[str, Any]:
        first, last = task.partitions[0], task.partitions[-1]
        window = time_window(self._partitions_def, task.partitions)
        return {
            "partition_key": first if len(task.partitions) == 1 else None,
            "partition_key_range": {"start": first, "end": last},
            "partition_time_window": window and {"start": window[0].isoformat(), "end": window[1].isoformat()},
        }


def time_window(
    definition: dg.PartitionsDefinition | None, partitions: Sequence[str]
) -> tuple[datetime, datetime] | None:
    """Return the time from the first of some partitions to the last; there is at least one.

    None if the partitions have no time, or if they have a second dimension and are not one range of time for one value
    of it.
    """
    if isinstance(definition, dg.TimeWindowPartitionsDefinition):
        first, last = (definition.time_window_for_partition_key(partitions[at]) for at in (0, -1))
        return first.start, last.end
    if not isinstance(definition, dg.MultiPartitionsDefinition) or not definition.has_time_window_dimension:
        return None
    time = definition.time_window_dimension.name
    keys = [definition.get_partition_key_from_str(partition).keys_by_dimension for partition in partitions]
    others = {value for key in keys for name, value in key.items() if name != time}
    windows = [definition.time_window_for_partition_key(partition) for partition in partitions]
    if len(others) > 1 or any(before.end != after.start for before, after in pairwise(windows)):
        return None
    return windows[0].start, windows[-1].end
