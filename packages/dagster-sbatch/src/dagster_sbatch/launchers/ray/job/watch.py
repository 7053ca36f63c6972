"""Ask the job's Ray cluster from time to time how busy it is, and end when a node is lost.

cluster.sh runs this program beside the workload, in the run directory. It reports to the Dagster run's events, as lines
of the workload's Pipes messages. A process of Ray that ends is seen by its own node at once; this program is for a node
that falls silent (power, network).
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from job_cluster import HEAD_FILE, end_with_parent, fail, read_published, state

ASK_SECONDS = 2
START_SECONDS = 10
FIRST_PAUSE, LONGEST_PAUSE = 10, 300
"""Seconds between the first two reports; the pause doubles with each report, up to the longest."""


def report(text: str) -> None:
    """Write a log line into the events of the Dagster run; do without it if the disk is full."""
    params = {"message": text, "level": "INFO"}
    line = json.dumps({"__dagster_pipes_version": "0.1", "method": "log", "params": params}) + "\n"
    with suppress(OSError), Path("messages.jsonl").open("ab", buffering=0) as messages:
        messages.write(line.encode())  # in one call: the workload writes there too


def describe(status: Any) -> str:
    """Return in a line how busy a cluster is."""
    parts = [f"{len(status.active_nodes) + len(status.idle_nodes)} node(s)"]
    parts += [
        f"{used.used:g} of {used.total:g} {used.resource_name}s in use"
        for used in status.cluster_resource_usage
        if used.resource_name in ("CPU", "GPU")
    ]
    waiting = sum(
        bundle.count for demand in status.resource_demands.ray_task_actor_demand for bundle in demand.bundles_by_count
    )
    return f"Ray: {', '.join(parts)}, {waiting} task(s) waiting"


def joined_nodes() -> dict[str, str]:
    """Return the nodes that have joined, by address."""
    published = {path.stem.removeprefix("joined-"): read_published(path.name) for path in state().glob("joined-*.json")}
    return {facts["address"]: name for name, facts in published.items() if facts}


def find_lost(status: Any, nodes: Mapping[str, str]) -> list[str]:
    """Return the names of the nodes that are not alive.

    Ray's own list of failed nodes also has those whose first start failed and whose second did not.
    """
    alive = {node.ip_address for node in (*status.active_nodes, *status.idle_nodes)}
    return [name for address, name in nodes.items() if address not in alive]


def main() -> None:
    """Watch until a node is lost; cluster.sh ends this program before."""
    end_with_parent()
    os.nice(19)
    while not (state() / "complete").exists():
        time.sleep(0.5)
    head = read_published(HEAD_FILE)
    assert head
    time.sleep(START_SECONDS)  # the workload starts now, and should have the CPUs for itself
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.exceptions import RpcError

    nodes = joined_nodes()
    pause, next_report, reported = FIRST_PAUSE, time.monotonic(), ""
    while True:
        try:
            status = get_cluster_status(head["ray_address"])
        except RpcError as error:
            print(f"Ray: the head does not answer: {error}", file=sys.stderr)
        else:
            if lost := find_lost(status, nodes):
                fail(f"Ray: lost the node {', '.join(lost)}: it no longer answers the head")
                raise SystemExit(os.EX_TEMPFAIL)  # another attempt may succeed
            if time.monotonic() >= next_report:
                text = describe(status)
                if text != reported:
                    report(text)
                reported, pause = text, min(2 * pause, LONGEST_PAUSE)
                next_report = time.monotonic() + pause
        time.sleep(ASK_SECONDS)


if __name__ == "__main__":
    main()
