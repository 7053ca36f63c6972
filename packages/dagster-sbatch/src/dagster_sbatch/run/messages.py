"""The Pipes messages of a workload, as they come out of its file, and whether the workload succeeded."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import dagster as dg
from dagster_pipes import PipesMessage

from dagster_sbatch.launchers.command.job.pipes_command import ONCE, subject_of
from dagster_sbatch.launchers.command.job.run_program import EXIT_CODE_DECIDES
from dagster_sbatch.run.failures import is_success, name_exception, name_exit, shorten, shorten_exception
from dagster_sbatch.run.results import PARTITION, attach, hand_over, make_message, merge, read_partitions

JOB_STARTED = "job_started"
"""Method of the line that the job script writes into the messages file whenever Slurm starts the job."""
LEVELS = frozenset("DEBUG INFO WARN WARNING ERROR FATAL CRITICAL".split())  # those of Dagster, for a line of the log


class Messages:
    """Reads the bytes of a workload's messages file, in pieces of any size; results wait until the end.

    Dagster's own reader does not report whether all sessions were closed and with which exception, and it counts the
    results of a job that Slurm requeued twice. Here only the results since the last start of the job count. `error`
    keeps the first message that cannot be read or that Dagster refuses; the step follows the job to its end in spite of
    it.
    """

    def __init__(
        self, path: str, deliver: Callable[[PipesMessage], None], on_lost: Callable[[Exception], None]
    ) -> None:
        """`deliver`: gets each message that says `opened`, and each line of the log, at once; `on_lost`: its errors."""
        self.path, self.deliver, self.on_lost = path, deliver, on_lost
        self._rest = b""
        self._begin()

    def _begin(self) -> None:
        """Forget everything: the job begins, for the first time or once more."""
        self.exit_code_decides = False  # not the Pipes sessions; the launcher says so
        self.opened = False  # whether a process has opened a session
        self.open = 0  # sessions; a process that the workload starts may open one of its own
        self.exception: Mapping[str, Any] | None = None  # that ended an outermost session
        self.inner_exception: Mapping[str, Any] | None = None  # inside another session, which may have handled it
        self.error: Exception | None = None  # what was wrong with the messages
        self.closed: PipesMessage | None = None  # the last message that closed a session
        self.results: list[PipesMessage] = []  # reports, and the workload's own custom messages
        self.partitions: list[Any] = []  # the values of the PARTITION messages

    def feed(self, data: bytes) -> None:
        """Read the next bytes; log messages are delivered at once. An incomplete last line waits for its rest."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in filter(None, lines):
            with self.error_kept():
                try:
                    self.receive(_parse(line))
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    text = line[:200].decode(errors="replace")
                    raise ValueError(f"not a Dagster Pipes message in {self.path}: {text!r}") from error

    def read_last_line(self) -> None:
        """Read what is left as a line: no more bytes come, and a program may end its last one without a newline."""
        self.feed(b"\n")

    @contextmanager
    def error_kept(self) -> Iterator[None]:
        """Keep the first error that a message causes, here or in Dagster; the step reports it."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            self.error = self.error or error

    def receive(self, message: PipesMessage) -> None:
        """Deliver a message at once, or keep it."""
        method, params = message["method"], message["params"] or {}
        payload = params.get("payload") if method == "report_custom_message" else None
        if method == JOB_STARTED:
            self._begin()
        elif self.error:
            return
        elif method == EXIT_CODE_DECIDES:
            self.exit_code_decides = True
        elif method == "closed":
            self._close(params.get("exception"))
        elif isinstance(payload, dict) and payload.keys() == {PARTITION}:
            self.partitions.append(payload[PARTITION])
        elif method.startswith("report_"):
            self.results.append(message)
        else:
            if method == "opened":
                self.opened = True
                self.open += 1
            elif method == "log" and str(params.get("level")).upper() not in LEVELS:  # of Python's `logging`, say
                message = {**message, "params": {**params, "level": "INFO"}}
            try:
                self.deliver(message)
            except Exception as error:  # noqa: BLE001 - a line of the log that Dagster cannot store decides nothing
                self.on_lost(error)

    def _close(self, exception: Mapping[str, Any] | None) -> None:
        self.open -= 1
        shortened = shorten_exception(exception) if exception else None
        if shortened and self.open > 0:
            self.inner_exception = shortened
        elif shortened:
            self.exception = self.exception or shortened
        self.closed = make_message("closed", {"exception": shortened} if shortened else {})

    def read_results(self) -> Sequence[PipesMessage]:
        """Return the reports.

        Raises ValueError: two are about the same. Of a check, the first may have failed and the last have passed.
        """
        subjects = Counter(subject_of(each) for each in self.results if each["method"] in ONCE)
        for subject, number in subjects.items():
            if number > 1:
                raise ValueError(f"{subject} has been reported {number} times. Report all of it in one call.")
        return self.results

    def finish(self, context: dg.OpExecutionContext) -> None:
        """Hand the results to Dagster, after the last byte, and the last message that closed a session."""
        self.read_last_line()
        with self.error_kept():
            for message in self.read_results():
                hand_over(context, message, self.deliver)
            if self.partitions:
                reports = read_partitions(context, self.partitions)
                attach(context, reports, merge(reports, {}))
        if self.closed:  # after all others: Dagster warns of what follows
            with self.error_kept():
                self.deliver(self.closed)


def _parse(line: bytes) -> Any:
    """Return a message, with U+FFFD for each half of a surrogate pair. ValueError, TypeError, KeyError: it is none.

    Programs write one for a byte that is not UTF-8. Dagster stores it, and its web server could not send it.
    """
    text = json.dumps(json.loads(line), ensure_ascii=False)
    message: Any = json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    message["params"] = message.get("params") or {}
    if not isinstance(message["method"], str) or not isinstance(message["params"], dict):
        raise TypeError
    return message


def explain_failure(messages: Messages, exit_code: int, workload: str) -> str | None:
    """Return why the workload failed, for its author; None if it succeeded.

    It succeeded if its exit code is 0, every Pipes session was closed, and no exception but `sys.exit(0)` ended one: a
    workload that raises after it has reported a materialization, or that never ran, has failed. If the launcher says
    that the exit code decides, the sessions do not count.

    `messages`: of the workload, after the last byte. `exit_code`: of the workload's process; negative is the signal
    that ended it, as in `subprocess`.
    """
    exception = messages.exception or (messages.inner_exception if messages.open > 0 else None)
    if exception is not None and not is_success(exception) and not messages.exit_code_decides:
        return f"{workload} raised {name_exception(exception, with_stack=exit_code == 0)}"
    if exit_code:
        return f"{workload} {name_exit(exit_code)}"
    if messages.error:
        return f"what {workload} reported cannot be used: {shorten(str(messages.error))}"
    return None if messages.exit_code_decides else _explain_session(messages, workload)


def _explain_session(messages: Messages, workload: str) -> str | None:
    """Return what is wrong with the Pipes sessions of a workload that ended with 0 and without an exception."""
    if not messages.opened:
        return f"{workload} ended without opening a Dagster Pipes session: wrap its work in `with open_dagster_pipes()`"
    if messages.open > 0:
        return (
            f"{workload} ended without closing its Dagster Pipes session: something ended it too early, or its work "
            "is not inside `with open_dagster_pipes()`"
        )
    return None
