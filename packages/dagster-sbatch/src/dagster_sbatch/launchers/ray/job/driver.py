"""Waits until the Ray cluster of the job is complete, then becomes the workload, in the same process.

usage: driver.py PROGRAM [ARGUMENT...], or driver.py -m PACKAGE [ARGUMENT...]; in the run directory

Importing Ray takes seconds: it is done while the nodes start, once for this and for the workload. A cluster that is
not complete in time is told, with the log of what is missing, and the workload does not run.
"""

import os
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from job_cluster import CALL_SECONDS, POLL_SECONDS, await_head, end_with_parent, fail, read_settings, state, tail


def await_cluster(settings: Mapping[str, Any]) -> str:
    """The address of the cluster, once all of its nodes have joined with all that was asked for.

    Raises:
        SystemExit: that took too long; it is told what is missing.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import gcs_pb2
    from ray.exceptions import RpcError

    until = time.monotonic() + settings["startup_time_limit"]
    joined: list[Any] = []
    head = await_head(lambda: time.monotonic() < until)
    if head:
        client = GcsClient(address=head.ray_address)
        while time.monotonic() < until:
            with suppress(RpcError):
                nodes = client.get_all_node_info(timeout=CALL_SECONDS).values()
                joined = [node for node in nodes if node.state == gcs_pb2.GcsNodeInfo.ALIVE]  # type: ignore[attr-defined]
            if is_complete(joined, settings):
                return head.ray_address
            time.sleep(POLL_SECONDS)
    fail(describe_missing(joined, settings))
    raise SystemExit(1)


def is_complete(joined: list[Any], settings: Mapping[str, Any]) -> bool:
    """Whether the nodes have what was asked for; `joined`: of Ray's GcsNodeInfo."""
    return len(joined) >= settings["nodes"] and all(
        count(joined, name) >= settings["nodes"] * settings[setting]
        for name, setting in (("CPU", "cpus"), ("GPU", "gpus"))
    )


def count(joined: list[Any], resource: str) -> int:
    """How much of a resource all nodes have."""
    return int(sum(node.resources_total.get(resource, 0) for node in joined))


def describe_missing(joined: list[Any], settings: Mapping[str, Any]) -> str:
    """What there is of what was asked for, and the last lines of each node that is not there."""
    nodes = settings["nodes"]
    text = (
        f"Ray: after {settings['startup_time_limit']} s there are {len(joined)} of {nodes} nodes, "
        f"{count(joined, 'CPU')} of {nodes * settings['cpus']} CPUs, "
        f"{count(joined, 'GPU')} of {nodes * settings['gpus']} GPUs"
    )
    there = {node.node_manager_hostname for node in joined}
    command = ["scontrol", "show", "hostnames"]
    hosts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    missing = [name for name in hosts if name not in there]
    if missing:
        text += f"; not joined: {', '.join(missing)}"
    return "\n".join([text, *(f"The end of what `ray start` says on {name}:\n{log_tail(name)}" for name in missing)])


def log_tail(host: str) -> str:
    """The last lines of `ray start` on a node."""
    path = state() / f"ray-start-{host}.out"
    return tail(path.read_text(errors="replace")) if path.exists() else "(nothing)"


def main() -> None:
    """Wait, then run the workload."""
    end_with_parent()
    os.environ["RAY_ADDRESS"] = await_cluster(read_settings())
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
