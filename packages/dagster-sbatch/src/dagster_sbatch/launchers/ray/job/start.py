"""`ray start`, begun as early as can be: Ray is imported while the head still starts. Run by node.py.

usage: start.py ARGUMENTS...   of `ray start`; without --head, the address of the head is added when it answers
"""

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from job_cluster import CALL_SECONDS, POLL_SECONDS, await_head, end_with_parent, read_settings

OTHER_COMMANDS = ("ray.dashboard.modules.job.cli", "ray.serve.scripts", "ray.util.state.state_cli")
"""Parts of Ray's command line that it can do without, and whose import takes longer than that of all the rest."""

LOW_PRIORITY = ("nice", "-n", "19")
"""What is begun with this gives way to everything else, Ray's workers included: those have niceness 15."""


def import_command_line() -> Any:
    """The module of `ray start`."""
    for name in OTHER_COMMANDS:
        sys.modules[name] = None  # type: ignore[assignment]  # then importing it is an ImportError
    from ray.scripts import scripts

    return scripts


def await_registration(address: str) -> None:
    """Wait until the head is a node of its own cluster: only then do others know where to join, and Ray soon gives up.

    Args:
        address: of a head that answers.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import RpcError

    client = GcsClient(address=address)
    while True:
        with suppress(RpcError):
            if client.get_all_node_info(timeout=CALL_SECONDS):
                return
        time.sleep(POLL_SECONDS)


def raylet_lives() -> bool:
    """Whether the raylet that this process has started still runs."""
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with suppress(OSError):
            name, _, rest = Path(f"/proc/{child}/stat").read_text().partition("(")[2].rpartition(")")
            if name == "raylet" and rest.split()[0] != "Z":
                return True
    return False


def be_patient(seconds: float) -> None:
    """Give this node's raylet so long to register: Ray itself gives up after 30 s, too few where much else runs."""
    from ray._private import services

    ask = services.get_node
    until = time.monotonic() + seconds

    def get_node(*arguments: Any) -> Any:
        while True:
            try:
                return ask(*arguments)  # type: ignore[no-untyped-call]
            except RuntimeError:
                if time.monotonic() > until or not raylet_lives():
                    raise
                time.sleep(POLL_SECONDS)

    services.get_node = get_node


def know_agent_port() -> None:
    """Have the raylet know the port of its dashboard agent at once: it waits for that even where it was given.

    A Ray that does not tell ports by files has nothing to wait for.
    """
    from ray import _raylet
    from ray._private.node import Node

    persist: Any = getattr(_raylet, "persist_port", None)
    start_raylet = Node.start_raylet

    def know_and_start(self: Any, *arguments: Any) -> None:
        port = self._ray_params.dashboard_agent_listen_port
        if port:
            name = _raylet.DASHBOARD_AGENT_LISTEN_PORT_NAME  # type: ignore[attr-defined]
            persist(self.get_session_dir_path(), self.node_id, name, port)
        start_raylet(self, *arguments)

    if persist:
        Node.start_raylet = know_and_start  # type: ignore[assignment,method-assign]


def let_workload_go_first() -> None:
    """Put what only accompanies the workload behind it: Ray's log monitor, autoscaler monitor and dashboard agent.

    They take a third of the CPU time of a start, and nothing waits for them. Ray has its workers wait for them instead.
    """
    from ray._private import ray_constants, services

    start = services.start_ray_process
    agent = "--dashboard_agent_command="

    def start_in_order(command: list[str], process_type: str, *arguments: Any, **options: Any) -> Any:
        if process_type in (ray_constants.PROCESS_TYPE_LOG_MONITOR, ray_constants.PROCESS_TYPE_MONITOR):
            command = [*LOW_PRIORITY, *command]
        low = f"{agent}{' '.join(LOW_PRIORITY)} "
        command = [low + word[len(agent) :] if word.startswith(agent) else word for word in command]  # the raylet's
        return start(command, process_type, *arguments, **options)

    services.start_ray_process = start_in_order


def main() -> None:
    """Become `ray start`."""
    end_with_parent()
    scripts = import_command_line()
    # No Ray Client server: nobody needs it here, and its port could not be left out.
    scripts.get_ray_client_dependency_error = lambda: ImportError("not wanted")
    know_agent_port()
    let_workload_go_first()
    be_patient(read_settings()["startup_time_limit"])
    arguments = sys.argv[1:]
    if "--head" not in arguments:
        head = await_head()
        assert head
        await_registration(head.ray_address)
        arguments.append(f"--address={head.ray_address}")
    sys.argv = ["ray", "start", *arguments]
    scripts.main()


if __name__ == "__main__":
    main()
