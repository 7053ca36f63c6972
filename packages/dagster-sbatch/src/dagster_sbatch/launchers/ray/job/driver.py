"""Wait until all nodes have joined the job's Ray cluster, then become the workload, in the same process.

usage: driver.py PROGRAM [ARGUMENT...], or driver.py -m PACKAGE [ARGUMENT...]; in any folder

Ray is imported while the nodes start, once for this program and the workload. If a node is missing at the end of
startup_time_limit, the workload does not run, and the cause names the node with the end of its log.
"""

import gc
import importlib
import os
import runpy
import sys
import time
from pathlib import Path

from job_cluster import (
    HEAD_FILE,
    POLL_SECONDS,
    end_with_parent,
    fail,
    joined_file,
    read_published,
    read_settings,
    state,
    tail,
)

LONGEST_POLL = 2.0  # seconds between two reads of the nodes' files, however many nodes are missing


def await_cluster(seconds: int) -> str:
    """Return the address of the cluster when all of its nodes have joined.

    Raises SystemExit: a node has not joined in this time.
    """
    until = time.monotonic() + seconds
    nodes = (state() / "nodes").read_text().split()
    for node in nodes:
        (state() / joined_file(node)).touch()
    gc.disable()  # collecting garbage takes a fifth of the import, and finds nothing
    importlib.import_module("ray")
    gc.enable()
    missing = nodes
    while missing := [node for node in missing if not read_published(joined_file(node))]:
        if time.monotonic() > until:
            fail(describe_missing(seconds, nodes, missing))
            raise SystemExit(1)
        time.sleep(min(POLL_SECONDS * len(missing), LONGEST_POLL))  # reads a file per missing node each time
    head = read_published(HEAD_FILE)
    assert head
    return str(head["ray_address"])


def describe_missing(seconds: int, nodes: list[str], missing: list[str]) -> str:
    """Return how many nodes have joined, which have not, and the last lines of `ray start` on these."""
    joined = len(nodes) - len(missing)
    text = f"Ray: after {seconds} s, {joined} of {len(nodes)} nodes have joined; missing: {', '.join(missing)}"
    return "\n".join([text, *(f"The last lines of `ray start` on {node}:\n{log_tail(node)}" for node in missing)])


def log_tail(node: str) -> str:
    """Return the last lines of `ray start` on a node."""
    path = state() / f"ray-start-{node}.out"
    return (tail(path.read_text(errors="replace")) if path.exists() else "") or "(nothing)"


def main() -> None:
    """Wait, then run the workload."""
    end_with_parent()
    os.environ["RAY_ADDRESS"] = await_cluster(read_settings()["startup_time_limit"])
    (state() / "complete").touch()
    if sys.argv[1] == "-m":
        module = sys.argv[2]
        sys.argv = sys.argv[2:]  # runpy puts the path of the file in the place of the name
        sys.path[0] = str(Path.cwd())
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        program = sys.argv[1]
        sys.argv = sys.argv[1:]
        sys.path[0] = str(Path(program).parent.resolve())
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
