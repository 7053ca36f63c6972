"""What the programs of a Ray job share: the launcher's settings, and the files through which they inform each other."""

import ctypes
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.05
TAIL_LINES = 20
PR_SET_PDEATHSIG = 1
HEAD_FILE = "head.json"


class NodeError(Exception):
    """Ray cannot run on this node; the text says why."""


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however the parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def read_settings() -> dict[str, Any]:
    """Return the launcher's fields, with the nodes, CPUs and GPUs of the request."""
    settings: dict[str, Any] = json.loads((state().parent / "settings.json").read_text())
    return settings


def state() -> Path:
    """Return the state folder of the job; a job that Slurm has requeued has a new one."""
    return Path(os.environ["RAY_JOB_STATE"])


def joined_file(node: str) -> str:
    """Return the name of the file that a node publishes when it has joined the cluster."""
    return f"joined-{node}.json"


def publish(name: str, facts: Mapping[str, Any]) -> None:
    """Write a file of the state folder for the programs on other nodes.

    The file already exists, empty: if a reader asked for it before, an NFS client could repeat "no such file" for a
    minute (nfs(5), lookupcache).
    """
    (state() / name).write_text(json.dumps(facts) + "\n")


def read_published(name: str) -> dict[str, Any] | None:
    """Return what another program has published; None if it has not, or is still writing."""
    text = (state() / name).read_text()
    return json.loads(text) if text.endswith("\n") else None


def fail(text: str) -> None:
    """Record why the cluster failed. The first failure counts; later ones go to stderr, and the first on a full disk.

    The file appears with its text: as soon as another node fails, too, Slurm may kill this program.

    `text`: its first line becomes the cause of the run's failure.
    """
    part = state() / f"failed-{socket.gethostname()}-{os.getpid()}"
    try:
        part.write_text(f"{text}\n")
        os.link(part, state() / "failed")  # cluster.sh shows it
    except OSError:
        print(text, file=sys.stderr)
    part.unlink(missing_ok=True)


def tail(text: str) -> str:
    """Return the last lines."""
    return "\n".join(text.rstrip().splitlines()[-TAIL_LINES:])
