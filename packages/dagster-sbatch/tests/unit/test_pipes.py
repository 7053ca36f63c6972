"""The messages and the output of a workload, byte by byte, without one."""

import io
import json
import warnings
from pathlib import Path
from typing import Any, cast

import dagster as dg
import pytest

from dagster_sbatch.run.array import Task
from dagster_sbatch.run.messages import JOB_STARTED, Messages
from dagster_sbatch.run.pipes import Output, open_session
from dagster_sbatch.run.task_output import TaskLines, TaskReader, Warnings

CONTEXT = cast(dg.OpExecutionContext, None)
"""Not needed without reports on partitions."""
STARTED = b'\n{"method": "' + JOB_STARTED.encode() + b'"}\n'


class Handler:
    """Keeps what Dagster would be given."""

    def __init__(self) -> None:
        self.taken: list[str] = []

    def handle_message(self, message: dict[str, Any]) -> None:
        self.taken.append(f"{message['method']} {message['params'].get('text', '')}".strip())


@pytest.fixture
def handler() -> Handler:
    return Handler()


def refuse_loss(error: Exception) -> None:
    pytest.fail(f"a line of the log was lost: {error}")


@pytest.fixture
def messages(handler: Handler) -> Messages:
    return Messages("/run/messages.jsonl", cast(dg.PipesMessageHandler, handler).handle_message, refuse_loss)


def line(method: str, text: str = "") -> bytes:
    return json.dumps({"method": method, "params": {"text": text}}).encode() + b"\n"


def test_only_the_last_life_of_a_requeued_job_counts(messages: Messages, handler: Handler) -> None:
    first = STARTED + line("opened") + line("report_custom_message", "old") + line("closed")
    messages.feed(first + STARTED + line("opened") + line("report_custom_message", "new") + line("closed"))
    messages.finish(CONTEXT)
    assert handler.taken == ["opened", "opened", "report_custom_message new", "closed"]
    assert (messages.error, messages.open) == (None, 0)


def test_a_line_that_the_end_of_an_earlier_life_has_cut_off_does_no_harm(messages: Messages, handler: Handler) -> None:
    messages.feed(STARTED + line("opened") + line("report_custom_message", "old") + b'{"method": "clo\0\0')
    assert messages.open == 1
    messages.feed(STARTED + line("opened") + line("report_custom_message", "new") + line("closed"))
    messages.finish(CONTEXT)
    assert handler.taken == ["opened", "opened", "report_custom_message new", "closed"]
    assert messages.error is None


def test_a_session_opened_by_a_child_discards_nothing(messages: Messages, handler: Handler) -> None:
    messages.feed(STARTED + line("opened") + line("report_custom_message", "first") + line("opened") + line("closed"))
    assert messages.open == 1
    messages.feed(line("report_custom_message", "second") + line("closed"))
    messages.finish(CONTEXT)
    assert handler.taken[2:] == ["report_custom_message first", "report_custom_message second", "closed"]
    assert messages.open == 0


@pytest.mark.parametrize("said", [[], ["opened"], ["opened", "log"]])
def test_a_session_that_is_never_opened_or_closed_gets_no_advice_from_dagster(said: list[str]) -> None:
    """Dagster would warn beside the step's own failure: Slurm has refused the job, or something has killed it."""

    @dg.op
    def step(context: dg.OpExecutionContext) -> None:
        with open_session(context, {}) as session:
            for method in said:
                session.messages.feed(line(method, "busy"))
            raise ValueError("the cause")

    with dg.DagsterInstance.ephemeral() as instance:
        job = dg.GraphDefinition(name="job", node_defs=[step]).to_job()
        result = job.execute_in_process(instance=instance, raise_on_error=False)
        texts = [entry.user_message for entry in instance.all_logs(result.run_id)]
    assert not result.success
    assert [text for text in texts if "did not receive" in text] == []


def test_messages_may_be_cut_anywhere(messages: Messages, handler: Handler) -> None:
    for byte in STARTED + line("opened") + line("report_custom_message", "\u00e9") + line("closed"):
        messages.feed(bytes([byte]))
    messages.finish(CONTEXT)
    assert handler.taken == ["opened", "report_custom_message \u00e9", "closed"]


@pytest.mark.parametrize("text", ["caf\udce9", "\ud83d"])
def test_what_is_not_unicode_is_replaced(text: str, messages: Messages, handler: Handler) -> None:
    """Dagster would store half of a surrogate pair, and its web server could not show the run any more."""
    messages.feed(STARTED + line("opened") + line("log", text) + line("report_custom_message", text) + line("closed"))
    messages.feed(b'{"method": "report_custom_message", "params": {"text": "\xed\xb3\xa9"}}\n')
    messages.finish(CONTEXT)
    shown = text[:-1] + "\ufffd"
    assert handler.taken[1:4] == [
        f"log {shown}",
        f"report_custom_message {shown}",
        "report_custom_message \ufffd",
    ]


def test_a_last_line_without_a_newline_counts(messages: Messages, handler: Handler) -> None:
    """Programs in other languages write messages, too; the exit code of theirs may decide."""
    messages.feed(STARTED + line("opened") + line("closed") + line("report_custom_message", "last")[:-1])
    messages.finish(CONTEXT)
    assert (handler.taken[1:], messages.error) == (["report_custom_message last", "closed"], None)


def test_a_session_warns_of_nothing_that_is_a_preview() -> None:
    @dg.op
    def opens(context: dg.OpExecutionContext) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", dg.PreviewWarning)
            with open_session(context, {}):
                pass

    assert dg.GraphDefinition(name="opens", node_defs=[opens]).to_job().execute_in_process().success


def test_a_line_of_the_log_with_a_level_of_its_own_is_not_lost() -> None:
    """Dagster has five levels, and refuses others. Python's `logging` has any."""
    levels = ["NOTICE", "Level 25", 25, "warn", None]

    @dg.op
    def log(context: dg.OpExecutionContext) -> None:
        with open_session(context, {}) as session:
            for level in levels:
                params = {"message": f"with {level}", "level": level}
                session.messages.feed(json.dumps({"method": "log", "params": params}).encode() + b"\n")

    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.GraphDefinition(name="logs", node_defs=[log]).to_job().execute_in_process(instance=instance)
        found = [(entry.user_message, entry.level) for entry in instance.all_logs(result.run_id)]
    said = [each for each in found if each[0].startswith("with ")]
    assert said == [(f"with {level}", 30 if level == "warn" else 20) for level in levels]


def test_half_a_last_line_is_kept_as_the_error(messages: Messages, handler: Handler) -> None:
    """The disk was full, and the program did not notice: its exit code is 0."""
    messages.feed(STARTED + line("opened") + line("closed") + line("report_custom_message", "last")[:-9])
    messages.finish(CONTEXT)
    assert "not a Dagster Pipes message" in str(messages.error)


RUBBISH = [b"rubbish\n", b"[1]\n", b'{"params": {}}\n', b"\xff\xfe\n", b'{"method": 5}\n']
RUBBISH += [b'{"method": "log", "params": [1]}\n', b'{"method": "closed", "params": {"exception": "boom"}}\n']


@pytest.mark.parametrize("rubbish", RUBBISH)
def test_rubbish_is_kept_as_the_error_and_nothing_is_handed_over_after_it(rubbish: bytes, messages: Messages) -> None:
    messages.feed(STARTED + line("opened") + rubbish + line("closed"))
    messages.finish(CONTEXT)
    assert "not a Dagster Pipes message" in str(messages.error)


def test_output_is_utf_8_whatever_the_locale_is(tmp_path: Path) -> None:
    path = tmp_path / "stdout"
    with path.open("w", encoding="ascii") as target:
        target.write("before ")
        output = Output(target, lambda error: pytest.fail(str(error)))
        for byte in "\u2713 caf\u00e9\n".encode() + b"\xff\n":
            output.feed(bytes([byte]))
    assert path.read_text(encoding="utf-8") == "before \u2713 caf\u00e9\n\ufffd\n"


@pytest.mark.parametrize("database", ["on the full disk, too", "elsewhere"])
def test_a_full_disk_is_reported_once_and_the_last_lines_are_known_all_the_same(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, full = dg.DagsterInstance.handle_new_event, open("/dev/full", "w")  # noqa: PTH123, SIM115
    text = "The step's stdout cannot be written ([Errno 28] No space left on device). Lines of the workload are missing"

    def refuse(*arguments: Any, **names: Any) -> Any:
        if database != "elsewhere" and not full.closed:
            raise OSError(28, "No space left on device")
        return store(*arguments, **names)

    @dg.op
    def write(context: dg.OpExecutionContext) -> None:
        with monkeypatch.context() as patched, open_session(context, {}) as session:
            patched.setattr(dg.DagsterInstance, "handle_new_event", refuse)
            cast(Output, session.stdout)._target = full
            session.stdout.feed(b"first\n")
            session.stdout.feed(b"second\n")
            full.close()
            assert session.stdout.tail == "first\nsecond"

    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.GraphDefinition(name="writes", node_defs=[write]).to_job().execute_in_process(instance=instance)
        assert [each.user_message.startswith(text) for each in instance.all_logs(result.run_id)].count(True) == 1


def test_lines_of_the_log_that_dagster_does_not_store_are_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    store, locked = dg.DagsterInstance.handle_new_event, [True]
    text = "The step's log cannot be written (database is locked). Lines of the workload are missing there."

    def refuse(*arguments: Any, **names: Any) -> Any:
        if locked:
            raise OSError(f"database is locked\n[parameters: {arguments}]")
        return store(*arguments, **names)

    @dg.op
    def log(context: dg.OpExecutionContext) -> None:
        with monkeypatch.context() as patched, open_session(context, {}) as session:
            patched.setattr(dg.DagsterInstance, "handle_new_event", refuse)
            task = TaskReader(Task("n"), session, Warnings())
            for each, number in ((session, 1), (session, 2), (task, 3)):
                message = {"method": "log", "params": {"message": f"line {number}", "level": "INFO"}}
                each.messages.feed(json.dumps(message).encode() + b"\n")
            locked.clear()

    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.GraphDefinition(name="logs", node_defs=[log]).to_job().execute_in_process(instance=instance)
        assert [each.user_message for each in instance.all_logs(result.run_id)].count(text) == 1


def test_output_to_what_is_no_file() -> None:
    target = io.StringIO()
    Output(target, lambda error: pytest.fail(str(error))).feed("\u2713".encode())
    assert target.getvalue() == "\u2713"


def test_output_in_a_notebook_is_not_written_to_the_terminal_of_its_server(tmp_path: Path) -> None:
    class Cell(io.StringIO):
        """As ipykernel's stream: `fileno` is what the stdout of its process was before."""

        def fileno(self) -> int:
            return terminal.fileno()

    with (tmp_path / "terminal").open("w") as terminal:
        target = Cell()
        Output(target, lambda error: pytest.fail(str(error))).feed("\u2713".encode())
    assert target.getvalue() == "\u2713"
    assert (tmp_path / "terminal").read_text() == ""


def test_output_to_what_is_closed(tmp_path: Path) -> None:
    errors: list[Exception] = []
    with (tmp_path / "stdout").open("w") as target:
        output = Output(target, errors.append)
    for each in (output, Output(None, errors.append)):  # Python's sys.stdout, if the file descriptor is closed
        each.feed(b"a line\n")
        assert each.tail == "a line"
    assert [str(error) for error in errors] == ["I/O operation on closed file"]


def test_of_a_progress_bar_of_a_task_the_last_state_is_shown() -> None:
    shown: list[str] = []
    lines = TaskLines("2013-01", shown.append, Warnings())
    for percent in range(101):
        lines.feed(b"\r%3d %% [########]" % percent)
    lines.feed(b"\r")
    lines.feed(b"\ndone\r\n")
    assert "".join(shown) == "[2013-01] 100 % [########]\r\n[2013-01] done\r\n"
