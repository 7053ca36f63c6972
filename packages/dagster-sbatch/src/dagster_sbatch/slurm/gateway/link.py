"""A connection with an agent at its other end, opened anew as often as it takes.

A lost connection says nothing about a job: every request is repeated until it is answered. The agent's errors are of
three kinds: `refused` is permanent; `temporary` is repeated over the same connection, with growing pauses; `broken`, an
error of the agent itself, is repeated a few times only.
"""

import math
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any, TypeVar

from dagster_sbatch.auth import AccessError
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.slurm.gateway.answers import LostClaimError, RefusedError, RemovedError, StoppedError
from dagster_sbatch.slurm.gateway.channel import Channel, Frame, NoPythonError, OpenChannel
from dagster_sbatch.ssh import AuthenticationError, SshError, UnreachableError

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 60.0
"""Seconds between two tries of a request: each pause is twice as long as the one before."""
MOST_LOGINS, LOGINS_SECONDS = 15, 600.0
"""A link that has opened this many connections within this many seconds waits LONGEST_PAUSE before each further one."""
BROKEN_TRIES = 4  # after this many broken answers in a row, a request fails
DENIED_PAUSE, DENIED_PATIENCE = 60.0, 86400.0
"""Seconds between tries, and since the last login, while the login node refuses this client: a person may fix that."""
PYTHON_ADVICE = (
    "The agent needs Python 3.6 or newer. Name one in python_candidates of SUPERCOMPUTER_SITE_OVERRIDES, "
    "or load one in its setup_commands."
)
T = TypeVar("T")


class AgainError(Exception):
    """The request got no final answer; repeat it over a new connection."""


class _BlockedError(AgainError):
    """Something on the way to the login node is wrong that a person may have to fix."""


class _DeniedError(_BlockedError):
    """The login node refuses this client; a person may change that."""


class _TemporaryError(AgainError):
    """The agent could not do what was asked, for now; repeat the request over the same connection."""


class _BrokenError(_TemporaryError):
    """The agent failed by an error of its own."""


_ERRORS = {"refused": RefusedError, "broken": _BrokenError}  # by the kind that the agent names; any other is temporary


class Link:
    """Requests and their answers, over whatever connection there is at the moment; for one thread at a time."""

    def __init__(
        self,
        open_channel: OpenChannel,
        stop: threading.Event | None = None,
        on_trouble: Callable[[str], None] = lambda _: None,
        on_recovered: Callable[[], None] = lambda: None,
    ) -> None:
        """Nothing is opened yet.

        `open_channel`: makes a connection with an agent at its other end. `stop`: ends waits with StoppedError, when it
        is set. `on_trouble`: gets the text of each error after which the request is repeated. `on_recovered`: is called
        when the login node answers again after the link was `blocked`: a person may have had to fix the latest error.
        """
        self._open_channel = open_channel
        self.stop = stop or threading.Event()
        self.on_trouble, self._on_recovered = on_trouble, on_recovered
        # Set it when a job may exist: from then on no error on the way to the login node is final.
        self.committed = False
        self.blocked = False  # whether a person may have to fix the latest error
        self.claimed: Mapping[str, Any] | None = None
        self._let_in: float | None = None
        self._had_agent = False
        self._opened: deque[float] = deque(maxlen=MOST_LOGINS)
        self._advanced = False
        self._channel: Channel | None = None

    def close(self) -> None:
        """End the connection."""
        if self._channel:
            self._channel.close()
            self._channel = None

    def ask(self, on_progress: Callable[[str], None] = lambda _: None, /, **request: Any) -> Mapping[str, Any]:
        """Return the answer to a request.

        `on_progress`: gets what the agent reports before it answers. `request`: `do` names the verb, a function of
        the agent's; the others are the verb's own.
        """

        def step() -> Mapping[str, Any]:
            answers = (head for _, head, _ in self.exchange([request]))
            while "progress" in (head := next(answers)):
                on_progress(head["progress"])
            return head

        return self.patiently(step)

    def exchange(
        self, requests: Sequence[Mapping[str, Any]], data: bytes = b"", until: float = math.inf
    ) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any], bytes]]:
        """Generate the answers to some requests, as they come, each after its request.

        Requests that the caller adds meanwhile are sent, too. `data` is sent behind the first request. `until`: when to
        wait no longer, by `monotonic`.
        """
        try:
            channel, sent = self._connect(), dict[int, Mapping[str, Any]]()
            while monotonic() <= until:
                if self.stop.is_set():
                    raise StoppedError
                for request in requests[len(sent) :]:
                    sent[channel.send(b"" if sent else data, **request)] = request
                frame = channel.receive()
                self._note(frame)
                if frame is None or frame[0]["id"] not in sent:
                    continue
                if "error" in frame[0]:
                    raise _ERRORS.get(frame[0]["error"], _TemporaryError)(frame[0]["text"])
                self._advanced |= bool(frame[1] or data)
                yield sent[frame[0]["id"]], *frame
        except (OSError, EOFError, UnreachableError) as error:
            raise AgainError(str(error)) from error
        except NoPythonError as error:
            kind = _BlockedError if self.committed else AgainError if self._had_agent else RefusedError
            raise kind(f"{error}\n{PYTHON_ADVICE}") from error
        except (AccessError, SshError, ConfigurationError) as error:
            again = self._classify(error)
            if again is None:
                raise
            raise again from error

    def _classify(self, error: AccessError | SshError | ConfigurationError) -> AgainError | None:
        """Return what an error on the way to the login node means for a request; None: it is final."""
        text = f"no certificate to log in with: {error}" if isinstance(error, AccessError) else str(error)
        if isinstance(error, AccessError) and error.temporary:
            return AgainError(text)
        if isinstance(error, AccessError | AuthenticationError):
            lately = self._let_in is not None and monotonic() - self._let_in <= DENIED_PATIENCE
            return _DeniedError(text) if self.committed or lately else None
        return _BlockedError(text) if self.committed else None

    def notify(self, **request: Any) -> None:
        """Send a request whose answer nobody waits for; without a connection, nothing is sent."""
        if self._channel:
            with suppress(OSError, EOFError):  # a request that is waited for shows the loss
                self._channel.send(**request)

    def ask_once(self, seconds: float, /, **request: Any) -> Mapping[str, Any] | None:
        """Return the answer to a request; None if there is none within some seconds, or an error.

        It is sent over the connection that there is, and never repeated.
        """
        try:
            if self._channel:
                return next((head for _, head, _ in self.exchange([request], until=monotonic() + seconds)), None)
        except (AgainError, RefusedError) as error:
            if not isinstance(error, _TemporaryError | RefusedError):
                self.close()
        return None

    # Repeat

    def patiently(self, step: Callable[[], T], lasting: Callable[[], bool] = lambda: False) -> T:
        """Repeat a request until it works, is refused, is broken again and again, or is stopped.

        Pauses grow for as long as the request does not advance, whether connections are lost or the agent answers. A
        connection that lasted is a good one, so the pause after its loss is short. A request that the agent answers
        with an error after a long time (an environment that it cannot build) has not advanced.

        `lasting`: whether there is a job to follow: then neither broken nor refused answers end the request, unless the
        run directory was removed.
        Raises RefusedError: also for BROKEN_TRIES broken answers in a row.
        Raises StoppedError: `stop` was set.
        """
        pause, broken = FIRST_PAUSE, 0
        while True:
            begun, self._advanced = monotonic(), False
            try:
                return step()
            except (AgainError, RefusedError) as error:
                if isinstance(error, RemovedError) or (isinstance(error, RefusedError) and not lasting()):
                    raise
                lost = not isinstance(error, _TemporaryError | RefusedError)
                if self._advanced or (lost and monotonic() - begun > LONGEST_PAUSE):
                    pause = FIRST_PAUSE
                if self._advanced:
                    broken = 0
                broken += isinstance(error, _BrokenError)
                if broken >= BROKEN_TRIES and not lasting():
                    raise RefusedError(str(error)) from error
                if not isinstance(error, _TemporaryError):
                    self.close()
                self.blocked = isinstance(error, _BlockedError)
                self.on_trouble(str(error))
                wait = DENIED_PAUSE if isinstance(error, _DeniedError) else pause
            self._wait(wait * random.uniform(0.5, 1.0))  # noqa: S311 (jitter)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _wait(self, seconds: float) -> None:
        """Wait before the next try; an open connection is kept alive, and what comes over it is dropped."""
        until = monotonic() + seconds
        if self._channel:
            try:
                for _ in self.exchange([], until=until):
                    pass
            except AgainError:
                self.close()
        many = len(self._opened) == MOST_LOGINS and monotonic() - self._opened[0] < LOGINS_SECONDS
        if many and not self._channel:
            until = max(until, self._opened[-1] + LONGEST_PAUSE)
        if self.stop.wait(max(until - monotonic(), 0)):
            raise StoppedError

    # The connection

    def _connect(self) -> Channel:
        """Return the connection; over a new one, the claim is renewed first, by the request `_hold`."""
        if self._channel is None:
            self._opened.append(monotonic())
            self._channel = self._open_channel()
            self._channel.on_trouble = self.on_trouble
            self._hold = self._channel.send(do="claims.hold", **self.claimed) if self.claimed else -1
        return self._channel

    def _note(self, frame: Frame | None) -> None:
        """Note what a frame, or that none came, says of the connection and the claim."""
        self._let_in = monotonic()
        self._had_agent |= frame is not None
        if frame and self.blocked:
            self.blocked = False
            self._on_recovered()
        if frame and frame[0]["id"] == self._hold and "held" in frame[0]:
            raise LostClaimError(frame[0]["held"])
        if frame and frame[0]["id"] == self._hold and "error" in frame[0]:
            raise OSError(frame[0]["text"])  # without the claim, this connection is of no use
