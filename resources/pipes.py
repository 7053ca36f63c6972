"""The Dagster Pipes session around a workload: context out, messages and output in, and what counts as success."""

import codecs
import json
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import dagster as dg
from dagster_pipes import PipesContextData, PipesMessage

TAIL_LINES = 30
"""Lines of stderr that a failure shows."""
TAIL_CHARACTERS = 2000
"""Of each of them: a progress bar may well write megabytes without a newline."""


class ContextDocument(dg.PipesContextInjector):
    """Keeps the Pipes context as text, for whoever lays out the run directory; the workload reads it from a file.

    A file since an environment variable holds no more than 128 KiB.
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


class MessageLines(dg.PipesMessageReader):
    """Takes the workload's messages line by line from whoever follows its messages file.

    Dagster's own reader tells nobody whether the session was closed, and with which exception; and it takes the results
    of a job that was put back in the queue twice. Here they are held back until the end, and count if they are of the
    workload's last life.
    """

    def __init__(self, path: str) -> None:
        """`path`: where the workload will write its messages."""
        self.path = path
        self.opened = False
        self.closed = False
        self.exception: Mapping[str, Any] | None = None
        self._handler: dg.PipesMessageHandler | None = None
        self._held: list[PipesMessage] = []

    @contextmanager
    def read_messages(self, handler: dg.PipesMessageHandler) -> Iterator[dict[str, Any]]:  # noqa: D102 - Dagster's
        self._handler = handler
        yield {"path": self.path, "include_stdio_in_messages": False}

    def feed(self, line: str) -> None:
        """Take one line of the messages file; what is logged goes to Dagster at once.

        Raises:
            ValueError: the line is not a Pipes message.
        """
        assert self._handler is not None, "the Pipes session is not open"
        try:
            message = json.loads(line)
            method, params = message["method"], message.get("params") or {}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"not a Dagster Pipes message in {self.path}: {line[:200]!r}") from error
        if method == "opened":  # Ray's watch writes here too
            self.opened, self.closed, self.exception = True, False, None
            self._held.clear()
        elif method == "closed":
            self.closed, self.exception = True, params.get("exception")
        if method == "closed" or method.startswith("report_"):
            self._held.append(message)
        else:
            self._handler.handle_message(message)

    def hand_over(self) -> None:
        """Hand the results to Dagster, after the last line; raises what it has against one."""
        assert self._handler is not None, "the Pipes session is not open"
        for message in self._held:
            self._handler.handle_message(message)

    def no_messages_debug_text(self) -> str:  # noqa: D102 - Dagster's
        return f"The workload was to write its messages to {self.path}."


class Output:
    """Passes one stream of the workload on to the step's own, as it comes, and remembers its last lines."""

    def __init__(self, target: TextIO) -> None:
        """`target`: the step's stdout or stderr."""
        self._target = target
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._tail: deque[str] = deque([""], maxlen=TAIL_LINES + 1)

    def feed(self, data: bytes) -> None:
        """Pass on the next bytes; a character may be cut anywhere."""
        text = self._decoder.decode(data)
        self._target.write(text)
        self._target.flush()
        first, *rest = text.split("\n")
        self._tail[-1] = (self._tail[-1] + first)[:TAIL_CHARACTERS]
        self._tail.extend(line[:TAIL_CHARACTERS] for line in rest)

    @property
    def tail(self) -> str:
        """The last lines, without blank ones at the end."""
        return "\n".join(self._tail).rstrip()


class Messages:
    """Cuts the bytes of the messages file into whole lines for a MessageLines."""

    def __init__(self, reader: MessageLines) -> None:
        self._reader = reader
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Pass on the next bytes; what follows the last newline waits."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._reader.feed(line.decode())


class MessageGuard:
    """Takes messages until one of them cannot be taken: the job is followed to its end all the same."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def take(self, step: Callable[[], None]) -> None:
        """Do it, unless an earlier one has failed; `error` tells."""
        if self.error is None:
            try:
                step()
            except Exception as error:  # noqa: BLE001 - whatever Dagster says to it; told at the end
                self.error = error


@dataclass
class Session:
    """A Pipes session with its three streams, however the workload's bytes arrive."""

    pipes: dg.PipesSession
    context_document: ContextDocument
    reader: MessageLines
    messages: Messages
    stdout: Output
    stderr: Output

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which `open_dagster_pipes()` finds context and messages."""
        return dict(self.pipes.get_bootstrap_env_vars())


@contextmanager
def open_session(
    context: dg.AssetExecutionContext, extras: Mapping[str, Any], context_path: str, messages_path: str
) -> Iterator[Session]:
    """Open a Pipes session whose files lie at the paths given (as the workload sees them)."""
    document, reader = ContextDocument(context_path), MessageLines(messages_path)
    with dg.open_pipes_session(context, document, reader, extras=dict(extras)) as pipes:
        yield Session(pipes, document, reader, Messages(reader), Output(sys.stdout), Output(sys.stderr))


def explain_failure(session: Session, exit_code: int, workload: str) -> str | None:
    """Why the workload failed, in words for its author; None if it succeeded.

    Success is an exit code of 0 and a Pipes session that was opened and closed without an exception: a workload that
    raises after it has reported a materialization, or never ran, must not pass for a success.

    Args:
        session: after the last message has been fed.
        exit_code: of the workload's process; negative is the signal that ended it, as in `subprocess`.
        workload: its file name, for the text.
    """
    exception = session.reader.exception
    if exception is not None:
        return f"{workload} raised {_name_exception(exception, with_stack=exit_code == 0)}"
    if exit_code < 0:
        cause = signal.Signals(-exit_code).name if -exit_code in set(signal.Signals) else f"signal {-exit_code}"
        hint = " (the system does that when memory runs out)" if cause == "SIGKILL" else ""
        return f"{workload} was killed by {cause}{hint}"
    if exit_code:
        return f"{workload} ended with exit code {exit_code}"
    if not session.reader.opened:
        return f"{workload} ended without opening a Dagster Pipes session: wrap its work in `with open_dagster_pipes()`"
    if not session.reader.closed:
        return f"{workload} ended without closing its Dagster Pipes session: it left in the middle of its work"
    return None


def _name_exception(exception: Mapping[str, Any], *, with_stack: bool) -> str:
    """Name and message of a Pipes exception; with the stack where stderr does not show it anyway."""
    name, message = exception.get("name") or "an exception", str(exception.get("message") or "").strip()
    head = message if message.startswith(f"{name}:") else f"{name}: {message}"
    stack = "".join(exception.get("stack") or [])
    return f"{head}\n\n{stack}".rstrip() if stack and with_stack else head


def failure(asset: str, cause: str, stderr: str = "", **details: Any) -> dg.Failure:
    """A failure that a retry would not mend.

    Args:
        asset: whose.
        cause: in words.
        stderr: its last lines.
        details: metadata.
    """
    description = f"{asset}: {cause}" + (f"\n\nLast lines of stderr:\n{stderr}" if stderr else "")
    metadata = {name: str(value) if isinstance(value, Path) else value for name, value in details.items()}
    return dg.Failure(description=description, metadata=metadata, allow_retries=False)
