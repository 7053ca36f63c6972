"""The Dagster Pipes session around a workload: context out, messages and output in, and what counts as success."""

import codecs
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TextIO

import dagster as dg
from dagster_pipes import PIPES_PROTOCOL_VERSION, PipesContextData, PipesMessage

from dagster_sbatch.run.failures import is_success, name_exception, name_exit, shorten, shorten_exception
from dagster_sbatch.run.reports import StepLog
from dagster_sbatch.run.results import PARTITION, StepContext, attach_partitions

TAIL_LINES = 30
"""Lines of stderr that a failure shows."""
TAIL_CHARACTERS = 2000
"""Of each of them: a progress bar may well write megabytes without a newline."""
JOB_STARTED = "job_started"
"""Method of the line that the job script writes into the messages file whenever Slurm starts the job."""


class ContextDocument(dg.PipesContextInjector):
    """Keeps the Pipes context as text, to be written into the run directory, where the workload reads it.

    It is a file because an environment variable has 128 KiB at most.
    """

    def __init__(self, path: str) -> None:
        """`path`: where the workload will find the document."""
        self.path = path
        self.text = ""

    @contextmanager
    def inject_context(self, context: PipesContextData) -> Iterator[dict[str, Any]]:  # noqa: D102 - Dagster's
        self.text = json.dumps(context)
        yield {"path": self.path}

    def no_messages_debug_text(self) -> str:  # noqa: D102 - Dagster's
        return f"The workload was to read its context from {self.path}."


class Messages(dg.PipesMessageReader):
    """Reads the bytes of the workload's messages file, in pieces of any size.

    Dagster's own reader does not report whether all sessions were closed and with which exception, and it counts the
    results of a job that Slurm requeued twice. Here results wait until `finish`, and only those since the last start of
    the job count. `error` keeps the first message that cannot be read or that Dagster refuses; the step follows the job
    to its end in spite of it.

    Attributes:
        opened: whether a process has opened a Pipes session.
        open: how many sessions are open now. A process that the workload starts may open one of its own.
        exception: that ended an outermost session.
        inner_exception: that ended a session inside another one, which may have handled it.
        error: what was wrong with the messages; None if nothing was.
    """

    def __init__(self, path: str) -> None:
        """`path`: where the workload will write its messages."""
        self.path = path
        self._rest = b""
        self._handler: dg.PipesMessageHandler | None = None
        self._begin()

    def _begin(self) -> None:
        """Forget everything: the job begins, for the first time or once more."""
        self.opened = False
        self.open = 0
        self.exception: Mapping[str, Any] | None = None
        self.inner_exception: Mapping[str, Any] | None = None
        self.error: Exception | None = None
        self._closed: PipesMessage | None = None
        self._results: list[PipesMessage] = []
        self._partitions: list[Any] = []

    @contextmanager
    def read_messages(self, handler: dg.PipesMessageHandler) -> Iterator[dict[str, Any]]:  # noqa: D102 - Dagster's
        self._handler = handler
        yield {"path": self.path, "include_stdio_in_messages": False}

    def feed(self, data: bytes) -> None:
        """Read the next bytes; log messages go to Dagster at once. An incomplete last line waits for its rest."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in filter(None, lines):
            with self._error_kept():
                self._read(line)

    def finish(self, context: StepContext) -> None:
        """Hand the results to Dagster, after the last byte."""
        with self._error_kept():
            for message in self._results:
                self._deliver(message)
            attach_partitions(context, self, self._partitions)
            if self._closed:  # the last one alone: Dagster warns of what follows the first
                self._deliver(self._closed)

    @contextmanager
    def _error_kept(self) -> Iterator[None]:
        """Keep the first error that a message causes, here or in Dagster; the step reports it."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            self.error = self.error or error

    def _read(self, line: bytes) -> None:
        try:
            message: PipesMessage = json.loads(line)
            message = {**message, "method": message["method"], "params": message.get("params") or {}}
        except (ValueError, TypeError, KeyError) as error:
            text = line[:200].decode(errors="replace")
            raise ValueError(f"not a Dagster Pipes message in {self.path}: {text!r}") from error
        self.receive(message)

    def receive(self, message: PipesMessage) -> None:
        """Deliver a message to Dagster at once, or keep it until `finish`."""
        method, params = message["method"], message["params"] or {}
        payload = params.get("payload") if method == "report_custom_message" else None
        if method == JOB_STARTED:
            self._begin()
        elif self.error:
            return
        elif method == "closed":
            self._close(params.get("exception"))
        elif isinstance(payload, dict) and payload.keys() == {PARTITION}:
            self._partitions.append(payload[PARTITION])
        elif method.startswith("report_"):
            self._results.append(message)
        else:
            if method == "opened":
                self.opened = True
                self.open += 1
            with suppress(Exception):  # a line of the log that Dagster cannot store decides nothing
                self._deliver(message)

    def _close(self, exception: Mapping[str, Any] | None) -> None:
        self.open -= 1
        shortened = shorten_exception(exception) if exception else None
        if shortened and self.open > 0:
            self.inner_exception = shortened
        elif shortened:
            self.exception = self.exception or shortened
        params = {"exception": shortened} if shortened else {}
        self._closed = {"__dagster_pipes_version": PIPES_PROTOCOL_VERSION, "method": "closed", "params": params}

    def _deliver(self, message: PipesMessage) -> None:
        assert self._handler is not None, "the Pipes session is not open"
        self._handler.handle_message(message)

    def no_messages_debug_text(self) -> str:  # noqa: D102 - Dagster's
        return f"The workload was to write its messages to {self.path}."


class Output:
    """Writes one stream of the workload to the step's own, as UTF-8, and remembers its last lines."""

    def __init__(self, target: TextIO | None, on_error: Callable[[Exception], None]) -> None:
        """Nothing is written yet.

        Args:
            target: the step's stdout or stderr; None where that is closed, as Python has it.
            on_error: called once, if the target cannot be written to; the workload continues.
        """
        self._target = target
        self._on_error: Callable[[Exception], None] | None = on_error
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._tail: deque[str] = deque([""], maxlen=TAIL_LINES + 1)

    def feed(self, data: bytes) -> None:
        """Write the next bytes; a character may be cut anywhere."""
        text = self._decoder.decode(data)
        try:
            if self._target:
                self._write(self._target, text)
        except (OSError, ValueError) as error:  # ValueError: it was closed meanwhile
            if self._on_error:
                self._on_error(error)
                self._on_error = None
        first, *rest = text.split("\n")
        self._tail[-1] = (self._tail[-1] + first)[:TAIL_CHARACTERS]
        self._tail.extend(line[:TAIL_CHARACTERS] for line in rest)

    @staticmethod
    def _write(target: TextIO, text: str) -> None:
        """Write UTF-8 in any locale, past the buffer: it would keep what a full disk refuses."""
        try:
            number = target.fileno()
        except (AttributeError, OSError):  # a test's, a notebook's
            target.write(text)
            target.flush()
            return
        target.flush()
        data = text.encode(errors="replace")  # half of a surrogate pair
        while data:
            data = data[os.write(number, data) :]

    @property
    def tail(self) -> str:
        """The last lines, without blank ones at the end."""
        return "\n".join(self._tail).rstrip()


@dataclass
class Session:
    """A Pipes session with its three streams."""

    pipes: dg.PipesSession
    context_document: ContextDocument
    messages: Messages
    stdout: Output
    stderr: Output


@contextmanager
def open_session(
    context: StepContext, extras: Mapping[str, Any], context_path: str, messages_path: str
) -> Iterator[Session]:
    """Open a Pipes session; the paths of its files are the workload's."""
    log = StepLog(context)

    def write_to(target: TextIO | None, name: str) -> Output:
        def warn(error: Exception) -> None:
            log.warning(f"The step's {name} cannot be written ({error}). Lines of the workload are missing there.")

        return Output(target, warn)

    document, messages = ContextDocument(context_path), Messages(messages_path)
    with dg.open_pipes_session(context, document, messages, extras=dict(extras)) as pipes:
        yield Session(pipes, document, messages, write_to(sys.stdout, "stdout"), write_to(sys.stderr, "stderr"))


def explain_failure(session: Session, exit_code: int, workload: str) -> str | None:
    """Return why the workload failed, for its author; None if it succeeded.

    It succeeded if its exit code is 0, every Pipes session was closed, and no exception but `sys.exit(0)` ended one: a
    workload that raises after it has reported a materialization, or that never ran, has failed.

    Args:
        session: after `messages.finish`.
        exit_code: of the workload's process; negative is the signal that ended it, as in `subprocess`.
        workload: its name, for the text.
    """
    messages = session.messages
    exception = messages.exception or (messages.inner_exception if messages.open > 0 else None)
    if exception is not None and not is_success(exception):
        return f"{workload} raised {name_exception(exception, with_stack=exit_code == 0)}"
    if exit_code:
        return f"{workload} {name_exit(exit_code)}"
    if messages.error:
        return f"what {workload} reported cannot be used: {shorten(str(messages.error))}"
    if not messages.opened:
        return f"{workload} ended without opening a Dagster Pipes session: wrap its work in `with open_dagster_pipes()`"
    if messages.open > 0:
        return f"{workload} ended without closing its Dagster Pipes session: something ended it in mid-work"
    return None
