"""The processes of Ray on this node: who they are, how they ended, and how to end them all."""

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from job_cluster import tail


def children() -> dict[int, list[int]]:
    """Return the processes of this machine by their parent; the name of a program may have any bytes."""
    found: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parent = int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
                found.setdefault(parent, []).append(int(entry.name))
    return found


def kill_descendants() -> None:
    """End every process below this one, orphans included: this process is a subreaper (prctl(2))."""
    while found := _descendants():
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        list(reap())
        time.sleep(0.01)


def end_descendants(seconds: float) -> None:
    """Ask every process below this one to end (SIGTERM), and kill those that have not ended after some seconds."""
    for pid in _descendants():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + seconds
    while _descendants() and time.monotonic() < until:
        list(reap())
        time.sleep(0.05)
    kill_descendants()


def _descendants() -> list[int]:
    below = children()
    found = below.get(os.getpid(), [])
    for pid in found:  # which grows
        found += below.get(pid, [])
    return found


def reap() -> Iterator[tuple[int, int]]:
    """Yield the id and exit code of each child that has ended; the code is -N for one that signal N has killed."""
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            yield ended[0], os.waitstatus_to_exitcode(ended[1])


def process_name(pid: int) -> str:
    """Return the name of a process of Ray, as in its log files' names: that of its module, script or program."""
    words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    if "-m" in words:
        return words[words.index("-m") + 1]
    return Path(next((word for word in words if word.endswith(".py")), words[0])).stem or "a process of Ray"


def describe_death(dead: Mapping[str, int], logs: Path) -> str:
    """Return in a line which processes of Ray have ended and how, then the last lines of their logs."""
    ends = [f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}" for code in dead.values()]
    text = ", ".join(f"{name} {end}" for name, end in zip(dead, ends, strict=True))
    for path in (logs / f"{name}.{kind}" for name in dead for kind in ("err", "out")):
        lines = path.read_text(errors="replace").splitlines() if path.exists() else ()
        if last := tail("\n".join(line for line in lines if "[state-dump]" not in line)):
            text += f"\nThe last lines of {path.name}:\n{last}"
    return text
