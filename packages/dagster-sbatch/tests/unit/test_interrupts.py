"""Interrupts, as Dagster raises them in the main thread, at any moment and more than once."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator

import dagster as dg
import pytest

from dagster_sbatch.run.interrupts import run_interruptibly

ROUNDS = 200 if os.environ.get("STRESS") == "1" else 10


@pytest.fixture(autouse=True)
def dagster_signal() -> Iterator[None]:
    """SIGTERM raises, as it does in a step."""

    def interrupt(*_: object) -> None:
        raise dg.DagsterExecutionInterruptedError

    before = signal.signal(signal.SIGTERM, interrupt)
    yield
    signal.signal(signal.SIGTERM, before)


def test_the_result_and_the_error_of_the_work_come_back() -> None:
    assert run_interruptibly(lambda stop: 42) == 42

    def fail(stop: threading.Event) -> None:
        raise ValueError("why")

    with pytest.raises(ValueError, match="why"):
        run_interruptibly(fail)


def test_a_second_interrupt_does_not_break_off_the_clean_up() -> None:
    """The second one comes at a random moment of the clean-up (STRESS=1: 200 rounds)."""
    draw = random.Random(13)
    for number in range(ROUNDS):
        cleaned = threading.Event()
        pause = draw.uniform(0.001, 0.05)

        def work(stop: threading.Event, cleaned: threading.Event = cleaned, pause: float = pause) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.wait(20), "the first interrupt was lost"
            time.sleep(pause)  # the random moment: what is tested, not a wait for something
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(pause)
            cleaned.set()

        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(dg.DagsterExecutionInterruptedError):
            run_interruptibly(work)
        assert signal.getsignal(signal.SIGTERM) is handler
        assert cleaned.is_set(), f"round {number}: the clean-up was broken off"
