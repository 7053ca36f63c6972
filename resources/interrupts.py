"""Cleaning up to the end, however often Dagster interrupts."""

import threading
from collections.abc import Callable
from typing import TypeVar

import dagster as dg

T = TypeVar("T")


def run_interruptibly(work: Callable[[threading.Event], T]) -> T:
    """Run `work(stop)` in a thread of its own and return its result.

    Dagster raises DagsterExecutionInterruptedError in the main thread, sometimes a second time while an `except` block
    is at work, and a clean-up there is lost. Here the main thread only waits: an interrupt sets `stop`, `work` cleans
    up and returns, and only then the interrupt goes on its way.

    Args:
        work: looks at `stop` often, and when it is set ends what it started, then returns or raises.

    Raises:
        DagsterExecutionInterruptedError, KeyboardInterrupt: the interrupt, after the clean-up.
        BaseException: whatever `work` raised, when nothing interrupted it.
    """
    stop, finished = threading.Event(), threading.Event()
    results: list[T] = []
    errors: list[BaseException] = []

    def target() -> None:
        try:
            results.append(work(stop))
        except BaseException as error:  # noqa: BLE001 - handed over to the main thread below
            errors.append(error)
        finally:
            finished.set()

    threading.Thread(target=target, name="workload", daemon=True).start()
    interrupt: BaseException | None = None
    while not finished.is_set():
        try:
            if interrupt is not None:
                stop.set()
            finished.wait(0.5)
        except (dg.DagsterExecutionInterruptedError, KeyboardInterrupt) as error:
            interrupt = interrupt or error
    if interrupt is not None:
        raise interrupt
    if errors:
        raise errors[0]
    return results[0]
