"""What the programs of a Ray job tell each other, through files in the run directory."""

import ctypes
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.05
TAIL_LINES = 20
PR_SET_PDEATHSIG = 1
HEAD_FILE = "head.json"
CALL_SECONDS = 10
"""For one question to the head."""


class NodeError(Exception):
    """Ray cannot run on this node; the text says why."""


def end_with_parent() -> None:
    """Be killed as soon as the process that started this one ends, however it does."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def read_settings() -> dict[str, Any]:
    """The launcher's fields, with the nodes, CPUs and GPUs of the request."""
    settings: dict[str, Any] = json.loads(Path("ray/settings.json").read_text())
    return settings


def state() -> Path:
    """The folder of this life of the job: one that is requeued has another."""
    return Path(os.environ["RAY_JOB_STATE"])


@dataclass(frozen=True)
class Head:
    """Where the head of the cluster is.

    Attributes:
        hostname: of its node.
        address: IPv4, for the other nodes.
        port: of its GCS.
        dashboard_port: on its loopback interface.
        python: its interpreter.
        versions: of Ray and Python.
    """

    hostname: str
    address: str
    port: int
    dashboard_port: int
    python: str
    versions: dict[str, str]

    @property
    def ray_address(self) -> str:
        """As Ray takes it."""
        return f"{self.address}:{self.port}"

    def publish(self) -> None:
        """Write it for the other nodes, into the empty file that cluster.sh has made.

        They ask for the file from their first moment. If it did not exist then, an NFS client could go on saying so
        for a minute (nfs(5), lookupcache).
        """
        (state() / HEAD_FILE).write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls) -> "Head | None":
        """Return what the head has published; None if it has not, or is at it."""
        text = (state() / HEAD_FILE).read_text()
        return cls(**json.loads(text)) if text.endswith("\n") else None

    def answers(self) -> bool:
        """Whether it takes connections: a client of Ray that comes too early waits for long, or gives up."""
        try:
            socket.create_connection((self.address, self.port), timeout=5).close()
        except OSError:
            return False
        return True


def await_head(go_on: Callable[[], bool] = lambda: True) -> Head | None:
    """The head, as soon as it can be talked to; None if `go_on` says no before."""
    while go_on():
        head = Head.read()
        if head and head.answers():
            return head
        time.sleep(POLL_SECONDS)
    return None


def fail(text: str) -> None:
    """Leave word of why the cluster failed; that of the first failure counts.

    Args:
        text: its first line becomes the cause of the run's failure.
    """
    try:
        with (state() / "failed").open("x") as file:  # cluster.sh shows it
            file.write(f"{text}\n")
    except FileExistsError:
        print(text, file=sys.stderr)


def tail(text: str) -> str:
    """The last lines."""
    return "\n".join(text.rstrip().splitlines()[-TAIL_LINES:])
