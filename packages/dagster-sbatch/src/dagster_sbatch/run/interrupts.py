"""Cleaning up to the end, however often the step is interrupted."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

LOOK_SECONDS = 0.1
"""How often the main thread looks whether a signal has come."""


def run_interruptibly(work: Callable[[threading.Event], T]) -> T:
    """Run `work(stop)` in a thread of its own and return its result.

    Dagster's signal handlers raise in the main thread, at any line of it and more than once: a clean-up in an `except`
    block there is lost. So while `work` runs, SIGINT and SIGTERM are only noted; the first sets `stop`, `work` cleans
    up and returns, and then the signal is given to the handler that was there before.

    Args:
        work: looks at `stop` often, and when it is set ends what it started, then returns or raises.

    Raises:
        BaseException: what the earlier handler raises for a signal (DagsterExecutionInterruptedError in a step),
            after the clean-up; else whatever `work` raised.
    """
    stop, finished = threading.Event(), threading.Event()
    results: list[T] = []
    errors: list[BaseException] = []

    def target() -> None:
        try:
            results.append(work(stop))
        except BaseException as error:  # noqa: BLE001 - handed over to the calling thread below
            errors.append(error)
        finally:
            finished.set()

    with _noted_signals() as received:
        threading.Thread(target=target, name="workload", daemon=True).start()
        while not finished.wait(LOOK_SECONDS):
            if received:  # not in the handler: a second signal in the middle of `set` would wait for its lock for ever
                stop.set()
    if received:
        signal.raise_signal(received[0])
    if errors:
        raise errors[0]
    return results[0]


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM add to the list and do nothing else; those that are ignored stay so.

    Python handles signals in the main thread: in any other one there is nothing to hold back.
    """
    received: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
