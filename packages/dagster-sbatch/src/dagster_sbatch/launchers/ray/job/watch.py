"""Looks at a job's Ray cluster from time to time: tells how busy it is, and ends when a node is lost.

cluster.sh runs it beside the workload, in the run directory. What it tells goes to the Dagster run's events, as a line
of the workload's Pipes messages. A process of Ray that dies is seen by its own node at once; this is for a node that
falls silent: power, network.
"""

import json
import os
import sys
import time
from typing import Any

from job_cluster import CALL_SECONDS, await_head, end_with_parent, fail, state

LOOK_SECONDS = 2
START_SECONDS = 10
FIRST_WORD, LAST_PAUSE = 10, 300
"""Seconds until the first word; the pause between two doubles up to the other number."""
POLL_SECONDS = 0.5
NODE_LOST = 75
"""Exit code: another try may help (EX_TEMPFAIL of sysexits.h)."""


def tell(text: str) -> None:
    """Into the events of the Dagster run."""
    params = {"message": text, "level": "INFO"}
    line = json.dumps({"__dagster_pipes_version": "0.1", "method": "log", "params": params}) + "\n"
    messages = os.open("messages.jsonl", os.O_WRONLY | os.O_APPEND)
    os.write(messages, line.encode())  # in one piece: the workload writes there too
    os.close(messages)


def describe(status: Any) -> str:
    """How busy a cluster is.

    Args:
        status: Ray's ClusterStatus.
    """
    words = [f"{len(status.active_nodes) + len(status.idle_nodes)} node(s)"]
    words += [
        f"{used.used:g} of {used.total:g} {used.resource_name}s in use"
        for used in status.cluster_resource_usage
        if used.resource_name in ("CPU", "GPU")
    ]
    waiting = sum(
        bundle.count for demand in status.resource_demands.ray_task_actor_demand for bundle in demand.bundles_by_count
    )
    return f"Ray: {', '.join(words)}, {waiting} task(s) waiting"


def find_lost(client: Any) -> str | None:
    """The first node that is lost, and why, in Ray's words."""
    from ray.core.generated import gcs_pb2

    for node in client.get_all_node_info(timeout=CALL_SECONDS).values():
        if node.state == gcs_pb2.GcsNodeInfo.DEAD:  # type: ignore[attr-defined]
            return f"{node.node_manager_hostname}: {node.death_info.reason_message or 'no reason given'}"
    return None


def main() -> None:
    """Watch until a node is lost; cluster.sh ends it before."""
    end_with_parent()
    os.nice(19)
    while not (state() / "complete").exists():
        time.sleep(POLL_SECONDS)
    head = await_head()
    assert head
    time.sleep(START_SECONDS)  # the workload starts now, and should have the CPUs for itself
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.exceptions import RpcError

    client = GcsClient(address=head.ray_address)
    pause, next_word, told = FIRST_WORD, time.monotonic(), ""
    while True:
        try:
            lost = find_lost(client)
            if lost:
                fail(f"Ray: lost the node {lost}")
                raise SystemExit(NODE_LOST)
            if time.monotonic() >= next_word:
                text = describe(get_cluster_status(head.ray_address))
                if text != told:
                    tell(text)
                told, pause = text, min(2 * pause, LAST_PAUSE)
                next_word = time.monotonic() + pause
        except RpcError as error:
            print(f"Ray: the head does not answer: {error}", file=sys.stderr)
        time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    main()
