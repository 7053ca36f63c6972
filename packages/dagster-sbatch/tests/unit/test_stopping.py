"""Why a step is interrupted, and how calls in other threads than the main one learn of it."""

import threading
from collections.abc import Callable

import dagster as dg
import pytest

from dagster_sbatch.run import interrupts
from dagster_sbatch.run.interrupts import read_interruption, stopped_with_run


def in_a_step(look: Callable[[dg.OpExecutionContext], object]) -> object:
    """Call a function inside an op of a run that was started from Python, and return its result."""
    seen = []

    @dg.op
    def step(context: dg.OpExecutionContext) -> None:
        seen.append(look(context))

    @dg.job
    def only() -> None:
        step()

    with dg.DagsterInstance.ephemeral() as instance:
        only.execute_in_process(instance=instance, raise_on_error=False)
    return seen[0]


def cancel(context: dg.OpExecutionContext) -> None:
    context.instance.report_run_canceling(context.run)


def fail(context: dg.OpExecutionContext) -> None:
    context.instance.report_run_failed(context.run)


def delete(context: dg.OpExecutionContext) -> None:
    context.instance.delete_run(context.run_id)


@pytest.mark.parametrize(
    ("happens", "interruption"),
    [(lambda _: None, "command"), (cancel, "terminated"), (delete, "terminated"), (fail, "stopped")],
)
def test_why_a_step_is_interrupted(happens: Callable[[dg.OpExecutionContext], None], interruption: str) -> None:
    def look(context: dg.OpExecutionContext) -> str:
        happens(context)
        return read_interruption(context)

    assert in_a_step(look) == interruption


@pytest.mark.parametrize("happens", [cancel, delete, fail])
def test_a_run_that_is_terminated_stops_every_call(
    happens: Callable[[dg.OpExecutionContext], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No signal reaches a call in a thread of its own."""
    monkeypatch.setattr(interrupts, "LIFE_SECONDS", 0.01)

    def look(context: dg.OpExecutionContext) -> bool:
        stop = threading.Event()
        with stopped_with_run(context, stop):
            assert not stop.wait(0.2)
            happens(context)
            return stop.wait(20)

    assert in_a_step(look) is True
