"""The client's half of the gateway: one connection with an agent on it, opened anew as often as it takes.

A lost connection says nothing about a job: every request is repeated until it is answered, and a run is followed on
from the byte where it stopped.
"""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from resources.auth import AccessError
from resources.slurm.gateway.channel import Channel, OpenChannel
from resources.ssh import SshError, UnreachableError

HELLO = "gateway-agent 1"
BEAT_SECONDS = 15.0
"""A ping so often, both ways on the clock: the agent leaves a client that is silent for 60 s."""
DEAD_SECONDS = 45.0
"""A connection on which nothing comes for so long is given up."""
LOOK_SECONDS = 0.5
"""How often a wait looks whether it is to stop."""
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 15.0

T = TypeVar("T")


class RefusedError(Exception):
    """Slurm or the agent said no, for good; the text is theirs."""


class StoppedError(Exception):
    """The wait was ended from here; nothing is known of what was asked."""


class _BrokenError(Exception):
    """The connection is lost, or an answer decided nothing: ask again."""


@dataclass(frozen=True)
class Submitted:
    """A run's job.

    Attributes:
        job: its id.
        how: `submitted` now, `recorded` before, or `found` in Slurm after an answer that was lost.
    """

    job: str
    how: str


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job that is not over.

    Attributes:
        state: `PENDING`, `RUNNING`, ...
        reason: why it waits; `None` (the word) if it does not.
        start: expected start in seconds since 1970, if Slurm knows.
    """

    state: str
    reason: str
    start: float | None


@dataclass(frozen=True)
class JobEnd:
    """How a job ended.

    Attributes:
        code: exit code of the workload; None if it was cut short.
        state: Slurm's last state, where it was asked; empty if the job itself told its end.
        short: streams of which less came than the job had written, and how much that was.
    """

    code: int | None
    state: str
    short: Mapping[str, int] = field(default_factory=dict)


class Gateway:
    """Requests to the agent on a login node; for one thread at a time."""

    def __init__(
        self,
        open_channel: OpenChannel,
        stop: threading.Event | None = None,
        on_trouble: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Nothing is opened yet.

        Args:
            open_channel: makes a connection with an agent on it.
            stop: ends waits with StoppedError, when it is set.
            on_trouble: is told of each lost connection, in words.
        """
        self._open_channel = open_channel
        self.stop = stop or threading.Event()
        self._on_trouble = on_trouble
        self._wire: _Wire | None = None

    def close(self) -> None:
        """End the connection."""
        if self._wire:
            self._wire.close()
            self._wire = None

    def submit(self, run: str, files: Mapping[str, str], options: Sequence[str]) -> Submitted:
        """Submit a run, once, however often it is asked for.

        Args:
            run: the run directory; its last part is the submission key, which the job has as its name.
            files: content by name; one is `job.sh`.
            options: for sbatch, before the script's own.

        Raises:
            RefusedError: sbatch said no, or another run is there under that key.
            StoppedError: `stop` was set.
        """
        answer = self._ask(do="submit", run=run, files=dict(files), options=list(options))
        return Submitted(answer["job"], answer["how"])

    def cancel(self, run: str) -> str | None:
        """Cancel a run's job; the state with which it is over, None if it never had a job."""
        answer = self._ask(do="cancel", run=run)
        if answer["job"] is None:
            return None
        if answer["over"] is None:
            raise RefusedError(f"job {answer['job']} is not over a minute after it was cancelled")
        return str(answer["over"]["state"])

    def states(self) -> Mapping[str, Any]:
        """The view of all of the user's jobs: `jobs` by id (state, reason, start, name), `at`, `calls`, `error`."""
        return self._ask(do="states")

    def accounting(self, run: str, fields: Sequence[str]) -> list[list[str]]:
        """What sacct has of the run's job and its steps: a row each, with these fields."""
        rows: list[list[str]] = self._ask(do="accounting", run=run, fields=",".join(fields))["rows"]
        return rows

    def follow(
        self, run: str, sinks: Mapping[str, Callable[[bytes], None]], on_state: Callable[[JobState], None]
    ) -> JobEnd:
        """Pass on what a run writes, each byte once and in order, until its job is over.

        Args:
            run: the run directory.
            sinks: who takes the new bytes of `stdout`, `stderr` and `messages.jsonl`.
            on_state: is told of each change.

        Raises:
            RefusedError: there is no such run.
            StoppedError: `stop` was set; the job goes on.
        """
        offsets = dict.fromkeys(sinks, 0)

        def go_on() -> JobEnd:
            for head, data in self._exchange(do="follow", run=run, offsets=offsets):
                if "file" in head:
                    name = head["file"]
                    if head["at"] != offsets[name]:
                        raise _BrokenError(f"{name} came from byte {head['at']} on, not {offsets[name]}")
                    offsets[name] += len(data)
                    sinks[name](data)
                elif "state" in head:
                    start = float(head["start"]) if head["start"].isdecimal() else None
                    on_state(JobState(head["state"], head["reason"], start))
                else:
                    end = head["end"]
                    return JobEnd(end.get("code"), end.get("state", ""), head["short"])
            raise _BrokenError("the agent ended its answer")

        return self._patiently(go_on)

    def _ask(self, **request: Any) -> Mapping[str, Any]:
        """The one answer to a request."""
        return self._patiently(lambda: next(self._exchange(**request))[0])

    def _exchange(self, **request: Any) -> Iterator[tuple[Mapping[str, Any], bytes]]:
        """The answers to a request, as they come."""
        try:
            if self._wire is None:
                self._wire = _Wire(self._open_channel())
            ident = self._wire.send(**request)
            while True:
                if self.stop.is_set() and request["do"] != "cancel":
                    raise StoppedError
                frame = self._wire.receive()
                if frame is None or frame[0]["id"] != ident:
                    continue
                error = frame[0].get("error")
                if error == "refused":
                    raise RefusedError(frame[0]["text"])
                if error:
                    raise _BrokenError(frame[0]["text"])
                yield frame
        except (OSError, EOFError, UnreachableError) as error:
            raise _BrokenError(str(error) or type(error).__name__) from error
        except AccessError as error:
            if not error.temporary:
                raise
            raise _BrokenError(str(error)) from error

    def _patiently(self, step: Callable[[], T]) -> T:
        """Until it works, is refused, or is stopped; pauses grow while nothing works at all."""
        pause = FIRST_PAUSE
        while True:
            try:
                return step()
            except _BrokenError as error:
                if self._wire and self._wire.worked:
                    pause = FIRST_PAUSE
                self.close()
                self._on_trouble(str(error))
            except (RefusedError, StoppedError, SshError, AccessError):
                raise
            if self.stop.wait(pause * random.uniform(0.5, 1.0)):  # noqa: S311 (jitter)
                raise StoppedError
            pause = min(2 * pause, LONGEST_PAUSE)


class _Wire:
    """Frames over a channel: a line of JSON, and raw bytes behind it where it says so."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._buffer = bytearray()
        self._ident = 0
        self._greeted = False
        self._heard = self._beaten = time.monotonic()
        self.worked = False

    def close(self) -> None:
        self._channel.close()

    def send(self, **request: Any) -> int:
        self._ident += 1
        self._channel.write(json.dumps({**request, "id": self._ident}).encode() + b"\n")
        return self._ident

    def receive(self) -> tuple[Mapping[str, Any], bytes] | None:
        """The next frame; None if it has not come whole within LOOK_SECONDS."""
        now = time.monotonic()
        if now - self._beaten > BEAT_SECONDS:
            self._beaten = now
            self.send(do="ping")
        frame = self._cut()
        if frame is None:
            self._fill(now)
            frame = self._cut()
        return frame

    def _fill(self, now: float) -> None:
        try:
            data = self._channel.read(LOOK_SECONDS)
        except TimeoutError:
            if now - self._heard > DEAD_SECONDS:
                raise OSError(f"nothing has come for {DEAD_SECONDS:.0f} s") from None
            return
        if not data:
            raise EOFError("the connection was closed" if self._greeted else f"no agent: {self._channel.complaint()}")
        self._heard = now
        self._buffer += data

    def _cut(self) -> tuple[Mapping[str, Any], bytes] | None:
        """Take a whole frame off the buffer; what comes before the agent's greeting is a banner's or a profile's."""
        while True:
            end = self._buffer.find(b"\n")
            if end < 0:
                return None
            line = bytes(self._buffer[:end])
            if self._greeted:
                break
            del self._buffer[: end + 1]
            self._greeted = HELLO.encode() in line
        head = json.loads(line)
        size = head.get("size", 0)
        if len(self._buffer) < end + 1 + size:
            return None
        data = bytes(self._buffer[end + 1 : end + 1 + size])
        del self._buffer[: end + 1 + size]
        self.worked = True
        return head, data
