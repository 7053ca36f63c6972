"""Interrupts: raised in the main thread at any moment and more than once; why they came, and calls in other threads."""

import logging
import math
import os
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import Mock, patch

import dagster as dg
import pytest
from dagster._daemon.monitoring import run_monitoring

from dagster_sbatch.run import interrupts
from dagster_sbatch.run.interrupts import read_interruption, run_interruptibly
from slurm_in_a_box import wait_until

ROUNDS = 200 if os.environ.get("STRESS") == "1" else 10


@pytest.fixture(autouse=True)
def dagster_signal() -> Iterator[None]:
    """SIGTERM raises, as it does in a step."""

    def interrupt(*_: object) -> None:
        raise dg.DagsterExecutionInterruptedError

    before = signal.signal(signal.SIGTERM, interrupt)
    yield
    signal.signal(signal.SIGTERM, before)


def interruptibly(work: Callable[[threading.Event], Any]) -> Any:
    """Run the work for a step whose database does not answer."""
    context: Any = Mock(**{"instance.get_run_by_id.side_effect": OSError})
    return run_interruptibly(context, work)


def test_the_result_and_the_error_of_the_work_come_back() -> None:
    assert interruptibly(lambda stop: 42) == 42

    def fail(stop: threading.Event) -> None:
        raise ValueError("why")

    with pytest.raises(ValueError, match="why"):
        interruptibly(fail)


def test_a_second_interrupt_does_not_break_off_the_clean_up() -> None:
    """The second one comes at a random moment of the clean-up (STRESS=1: 200 rounds)."""
    draw = random.Random(13)
    for number in range(ROUNDS):
        cleaned = threading.Event()
        pause = draw.uniform(0.001, 0.05)

        def work(stop: threading.Event, cleaned: threading.Event = cleaned, pause: float = pause) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.wait(60), "the first interrupt was lost"
            time.sleep(pause)  # the random moment: what is tested, not a wait for something
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(pause)
            cleaned.set()

        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(dg.DagsterExecutionInterruptedError):
            interruptibly(work)
        assert signal.getsignal(signal.SIGTERM) is handler
        assert cleaned.is_set(), f"round {number}: the clean-up was broken off"


def hang_up(stop: threading.Event) -> bool:
    os.kill(os.getpid(), signal.SIGHUP)
    return stop.wait(1)


@pytest.fixture
def hangup() -> Iterator[Callable[[signal.Handlers], object]]:
    """Sets what SIGHUP does, until the end of the test."""
    before = signal.getsignal(signal.SIGHUP)
    yield lambda handler: signal.signal(signal.SIGHUP, handler)
    signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_interrupts_as_ctrl_c_does(hangup: Callable[[signal.Handlers], object]) -> None:
    """The signal would end the process, and with it nobody would cancel the job."""
    hangup(signal.SIG_DFL)
    stopped = []
    with pytest.raises(KeyboardInterrupt):
        interruptibly(lambda stop: stopped.append(hang_up(stop)))
    assert stopped == [True]
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_a_closed_terminal_interrupts_nothing_that_nohup_has_started(
    hangup: Callable[[signal.Handlers], object],
) -> None:
    hangup(signal.SIG_IGN)
    assert interruptibly(hang_up) is False


def in_a_step(look: Callable[[dg.OpExecutionContext], object]) -> object:
    """Call a function inside an op of a run that was started from Python, and return its result."""
    seen = []

    @dg.op
    def step(context: dg.OpExecutionContext) -> None:
        seen.append(look(context))

    @dg.job
    def only() -> None:
        step()

    # Threads that read and write at the same time need a database in a file: one in memory would be locked.
    with TemporaryDirectory() as folder, dg.DagsterInstance.local_temp(folder) as instance:
        only.execute_in_process(instance=instance, raise_on_error=False)
    return seen[0]


def cancel(context: dg.OpExecutionContext) -> None:
    context.instance.report_run_canceling(context.run)


def fail(context: dg.OpExecutionContext) -> None:
    context.instance.report_run_failed(context.run)


def exceed_max_runtime(context: dg.OpExecutionContext) -> None:
    """Have run monitoring end the run, up to its signal; it reports the failure of the run only then."""
    context.instance.add_run_tags(context.run_id, {"dagster/max_runtime": "1e-9"})
    record = context.instance.get_run_record_by_id(context.run_id)
    assert record
    launcher = Mock(**{"terminate.return_value": False})
    with (
        patch.object(dg.DagsterInstance, "run_launcher", launcher),
        patch.object(run_monitoring, "_force_mark_as_failed"),
    ):
        run_monitoring.check_run_timeout(context.instance, record, logging.getLogger(), 0)


def cancel_slowly(context: dg.OpExecutionContext) -> None:
    cancel(context)
    exceed_max_runtime(context)


def mark_as_canceled(context: dg.OpExecutionContext) -> None:
    """As a forced termination does if the run launcher fails: no request of a termination comes before it."""
    context.instance.report_run_canceled(context.run)


def delete(context: dg.OpExecutionContext) -> None:
    context.instance.delete_run(context.run_id)


@pytest.mark.parametrize(
    ("happens", "interruption"),
    [
        (lambda _: None, "command"),
        (cancel, "terminated"),
        (delete, "terminated"),
        (fail, "stopped"),
        (exceed_max_runtime, "stopped"),
        (cancel_slowly, "terminated"),
        (mark_as_canceled, "terminated"),
    ],
)
def test_why_a_step_is_interrupted(happens: Callable[[dg.OpExecutionContext], None], interruption: str) -> None:
    def look(context: dg.OpExecutionContext) -> str:
        happens(context)
        return read_interruption(context)

    assert in_a_step(look) == interruption


class Away:
    """Dagster's database, which does not answer the next questions about a run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times, ask = 0.0, dg.DagsterInstance.get_run_by_id

        def get_run_by_id(*arguments: Any) -> dg.DagsterRun | None:
            if self.times > 0:
                self.times -= 1
                raise sqlite3.OperationalError("database is locked")
            return ask(*arguments)

        monkeypatch.setattr(dg.DagsterInstance, "get_run_by_id", get_run_by_id)


@pytest.mark.parametrize(("times", "interruption"), [(3, "terminated"), (math.inf, "stopped")])
def test_a_step_is_interrupted_while_the_database_is_away(
    times: float, interruption: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an answer the job is left to a later attempt."""
    monkeypatch.setattr(interrupts, "SIGNAL_SECONDS", 0.01)
    monkeypatch.setattr(interrupts, "DATABASE_SECONDS", 60 if times == 3 else 0.1)
    away = Away(monkeypatch)

    def look(context: dg.OpExecutionContext) -> str:
        cancel(context)
        away.times = times
        found = read_interruption(context)
        away.times = 0
        return found

    assert in_a_step(look) == interruption


def is_stopped(context: dg.OpExecutionContext, happens: Callable[[dg.OpExecutionContext], object]) -> bool:
    """Return whether what happens to the run stops a call, which then has no result: it may have done a part."""
    stopped = []

    def work(stop: threading.Event) -> None:
        happens(context)
        stopped.append(stop.wait(60))

    with pytest.raises(dg.DagsterExecutionInterruptedError):
        run_interruptibly(context, work)
    return stopped == [True]


def test_a_run_is_terminated_after_the_database_was_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "LIFE_SECONDS", 0.01)
    away = Away(monkeypatch)

    def happens(context: dg.OpExecutionContext) -> None:
        away.times = 3
        wait_until(lambda: away.times == 0, "it was asked", 60)
        cancel(context)

    assert in_a_step(lambda context: is_stopped(context, happens)) is True


@pytest.mark.parametrize("happens", [cancel, delete, fail])
def test_a_run_that_is_terminated_stops_every_call(
    happens: Callable[[dg.OpExecutionContext], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No signal reaches a call in a thread of its own."""
    monkeypatch.setattr(interrupts, "LIFE_SECONDS", 0.01)
    assert in_a_step(lambda context: is_stopped(context, happens)) is True


def test_a_call_that_begins_after_the_termination_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool of threads begins the next call when it has ended one: that must not submit a job."""
    monkeypatch.setattr(interrupts, "LIFE_SECONDS", 600)

    def look(context: dg.OpExecutionContext) -> bool:
        cancel(context)
        return is_stopped(context, lambda _: None)

    assert in_a_step(look) is True
