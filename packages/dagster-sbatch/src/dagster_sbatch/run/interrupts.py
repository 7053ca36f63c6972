"""Interrupts of a step: cleaning up however often they come, what one means for the Slurm jobs, cancelling these."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from typing import Literal, TypeVar

import dagster as dg

from dagster_sbatch.auth import AccessError
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.slurm.gateway import Gateway, JobEnd, LostClaimError, RefusedError, StoppedError
from dagster_sbatch.ssh import SshError

T = TypeVar("T")

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last one: the terminal of this process was closed
SIGNAL_SECONDS = 0.1  # between two times at which the main thread checks for signals
LIFE_SECONDS = 10.0  # between two questions whether Dagster still counts this run as running
DATABASE_SECONDS = 20.0  # for Dagster's database to say why a step is interrupted: it may be locked, or away
_TERMINATED = (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED)
_TOO_LONG = "Canceling due to exceeding maximum runtime"  # event of Dagster's run monitoring, which then fails the run


def run_interruptibly(context: dg.OpExecutionContext, work: Callable[[threading.Event], T]) -> T:
    """Run `work(stop)` in a thread of its own and return its result.

    Dagster's signal handlers raise in the main thread, at any line and more than once: a clean-up in an `except` block
    there is lost. So while `work` runs, STOPS are only recorded. The first one sets `stop`, `work` cleans up and
    returns, and then the handler from before gets the signal; that of SIGINT gets SIGHUP, which would end the process.
    `stop` is also set when Dagster counts the run as terminated or ended, while the step is alive.

    `work`: checks `stop` often; when it is set, ends what it started, then returns or raises.
    Raises BaseException: what the earlier handler raises for a signal (DagsterExecutionInterruptedError in a step),
    after the clean-up; else what `work` raised; else, if it was stopped, DagsterExecutionInterruptedError.
    """
    stop, done = threading.Event(), Future[T]()

    def target() -> None:
        try:
            _check_run(context, stop)  # a pool of threads begins calls after a termination, too
            done.set_result(work(stop))
        except BaseException as error:  # noqa: BLE001 - raised in the calling thread below
            done.set_exception(error)

    def watch() -> None:
        while not wait([done], LIFE_SECONDS).done:
            _check_run(context, stop)

    received: list[int] = []
    with handled_stops(received.append):
        for each in (target, watch):
            threading.Thread(target=each, name="workload", daemon=True).start()
        while not wait([done], SIGNAL_SECONDS).done:
            if received:  # not in the handler: a second signal during `set` would wait for its lock for ever
                stop.set()
    if received:
        signal.raise_signal(signal.SIGINT if received[0] == signal.SIGHUP else received[0])
    result = done.result()
    if stop.is_set():
        raise dg.DagsterExecutionInterruptedError
    return result


@contextmanager
def handled_stops(handle: Callable[[int], None]) -> Iterator[None]:
    """Call `handle` for each of STOPS that comes in this context. Ignored ones stay ignored, as SIGHUP by `nohup`.

    Python handles signals in the main thread only: in another thread, this does nothing.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, lambda number, _: handle(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_run(context: dg.OpExecutionContext, stop: threading.Event) -> None:
    """Set `stop` if Dagster counts the run as terminated or ended. Other threads than the main one get no signal."""
    with suppress(Exception):  # each database has errors of its own; it is asked again
        run = context.instance.get_run_by_id(context.run_id)
        if run is None or run.is_finished or run.status in _TERMINATED:
            stop.set()


def read_interruption(context: dg.OpExecutionContext) -> Literal["terminated", "command", "stopped"]:
    """Return why a step is interrupted.

    Returns:
        `terminated`: a person has terminated or deleted the run; its job has to be cancelled.
        `command`: the run was started by a command in a terminal, and that was interrupted. No daemon retries such a
        run, so its job has to be cancelled.
        `stopped`: Dagster is stopping, or counts the run as ended, or as too long, or its database does not answer in
        time. A later attempt adopts the job.
    """
    until, canceling = time.monotonic() + DATABASE_SECONDS, dg.DagsterEventType.RUN_CANCELING
    while True:
        try:
            run = context.instance.get_run_by_id(context.run_id)
            events = context.instance.all_logs(context.run_id, of_type=canceling)[:1]  # none in a forced termination
            break
        except Exception:  # noqa: BLE001 - each database has errors of its own
            if time.monotonic() > until:
                return "stopped"
            time.sleep(SIGNAL_SECONDS)
    if run is None or (run.status in _TERMINATED and not any(_TOO_LONG in each.message for each in events)):
        return "terminated"
    return "command" if run.status == dg.DagsterRunStatus.STARTED and run.remote_job_origin is None else "stopped"


def cancel_jobs(
    gateway: Gateway, runs: Mapping[str, str | None], seconds: float
) -> tuple[list[str], Mapping[str, str | None], str]:
    """Cancel the jobs of run directories; return how they ended, those that may not be over, and why.

    `runs`: the run directories, each with the id of its job, if that is known. `seconds`: for all of them together.
    """
    gateway.stop = threading.Event()
    limit = threading.Timer(seconds, gateway.stop.set)
    limit.start()
    texts, errors, left = [], [], dict(runs)

    def report(run: str, outcome: JobEnd | RefusedError | None) -> None:
        if isinstance(outcome, RefusedError):
            errors.append(str(outcome))
            return
        job = left.pop(run)
        texts.append(f"Slurm job {job} is over: {outcome.state}" if outcome else "No job was submitted.")

    try:
        gateway.cancel_all(list(left), report, runs)
    except (RefusedError, StoppedError, LostClaimError, AccessError, SshError, ConfigurationError) as error:
        errors.append(str(error))
    finally:
        limit.cancel()
    return texts, left, "\n".join(filter(None, errors))


def describe_uncancelled(left: Mapping[str, str | None], error: str | None) -> str:
    """Return what to do about jobs that could not be cancelled; `left`: by run directory."""
    names = [job or run.rpartition("/")[2] for run, job in left.items()]
    commands = "\n".join(f"  scripts/job {name} cancel" for name in names)
    return (
        f"Slurm job {', '.join(names)} could not be cancelled, and may still be running. "
        f"{error or 'The login node cannot be reached.'}\nCancel it later:\n{commands}"
    )
