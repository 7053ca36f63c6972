"""One node of a job's Ray cluster: start Ray, watch its processes, and leave nothing of it behind.

srun runs this program on every node, in the run directory; task 0 is the head. It ends when its standard input ends
(the batch script is done, or was killed), when Slurm terminates it, or when a process of Ray ends. The last is a
failure: the first node that sees one writes the reason to $RAY_JOB_STATE/failed.

The program is two processes. The child starts Ray and watches it; all its descendants are Ray's. The parent waits for
the child. Its other children are what the pre-start commands have left in the background, because the shell that ran
these has become the parent. If one of the two is killed, the other cleans up.
"""

import ctypes
import importlib.util
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from checks import check_gpus, check_ports, is_ours, memory_arguments, own_address, versions
from folder import keep_logs, make_folder
from job_cluster import (
    HEAD_FILE,
    POLL_SECONDS,
    PR_SET_PDEATHSIG,
    NodeError,
    fail,
    joined_file,
    publish,
    read_published,
    read_settings,
    state,
    tail,
)
from ports import claim_ports
from processes import children, describe_death, end_descendants, kill_descendants, process_name, reap

AGENT_PORTS = ("runtime-env-agent", "dashboard-agent-listen", "dashboard-agent-grpc", "metrics-export")
"""Options for the ports of Ray's agents. The raylet does not wait for an agent whose port it knows."""
RAY_FOLDER = "ray"  # below the private folder: Ray opens its own to everybody
PR_SET_CHILD_SUBREAPER = 36
WATCH_SECONDS = 0.5
LEAVE_SECONDS = 3.0
"""Time for a raylet to leave its cluster. If it is killed, the head counts its node as alive for some seconds more."""
LONGEST_POLL = 1.0
"""Seconds between two reads of the head's file. The pause grows with the time waited: every node reads it."""
WRONG_ARGUMENTS = 2  # exit code of `ray start`


def describe_failed_start(code: int, output: str) -> str:
    """Return in a line how `ray start` ended and its last line, then its last lines."""
    lines = [line for line in output.splitlines() if line.strip()]
    return f"`ray start` ended with exit code {code}: {''.join(lines[-1:])}\n" + tail("\n".join(lines))


class Node:
    """Ray on this node."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._name = os.environ["SLURMD_NODENAME"]
        self._is_head = os.environ["SLURM_PROCID"] == "0"
        self._folder: Path | None = None
        self._claims: dict[int, socket.socket] = {}

    def make_folder(self) -> None:
        """Make the private folder of this node.

        Raises NodeError: it cannot be made.
        """
        base = Path(self._settings["temp_dir"] or os.environ["JOB_TMPDIR"])
        self._folder = make_folder(base, os.environ["SLURM_JOB_ID"], self._name)

    def run(self) -> NoReturn:
        """Start Ray and watch it until the batch script ends.

        Raises NodeError: Ray cannot run here, did not start, or a process of it has ended.
        Raises SystemExit: the batch script has ended.
        """
        assert self._folder
        mine = versions()
        check_gpus(self._settings["gpus"])
        address = own_address(self._settings["network_interface"])
        arguments, gcs, dashboard = self._arguments(self._folder, address)
        process = self._import_ray(self._folder)
        if not self._is_head:
            head = self._await_head(mine)
            arguments.append(f"--address={head['ray_address']}")
        self._start(process, arguments)
        if self._is_head:
            self._publish_head(address, gcs, dashboard, mine)
        publish(joined_file(self._name), {"address": address})
        self._watch()

    def _arguments(self, folder: Path, address: str) -> tuple[list[str], int, int]:
        """Return the arguments of `ray start`, and the ports of the head's GCS and dashboard.

        A port of 0 is one that the process chooses when it binds it: nobody can come between. Without these
        arguments, the workers of all clusters on a node look for free ports from 10002 on, and two may take the same.
        """
        settings = self._settings
        further = settings["ray_start_args"]
        check_ports(further)
        self._claims = claim_ports(len(AGENT_PORTS) + 3)
        gcs, dashboard, client, *agents = self._claims
        arguments = [
            "--log-color=false",
            "--disable-usage-stats",
            f"--temp-dir={folder / RAY_FOLDER}",
            f"--node-ip-address={address}",
            f"--num-cpus={settings['cpus']}",
            f"--num-gpus={settings['gpus']}",
            "--node-manager-port=0",
            "--object-manager-port=0",
            "--min-worker-port=0",
            "--max-worker-port=0",
            *(f"--{part}-port={port}" for part, port in zip(AGENT_PORTS, agents, strict=True)),
            *memory_arguments(settings["object_store_memory"], os.environ),
        ]
        if self._is_head:
            arguments += ["--head", f"--port={gcs}", f"--dashboard-host={address}", f"--dashboard-port={dashboard}"]
            if importlib.util.find_spec("grpc"):  # then Ray starts its client server, whose default port is fixed
                arguments.append(f"--ray-client-server-port={client}")
        arguments += [each for each in further if self._is_head or not each.startswith("--include-dashboard")]
        return arguments, gcs, dashboard

    def _import_ray(self, folder: Path) -> subprocess.Popen[str]:
        """Begin start.py, which imports Ray and waits for the arguments of `ray start`."""
        with (state() / f"ray-start-{self._name}.out").open("w") as output:
            return subprocess.Popen(
                [sys.executable, "-u", str(Path(__file__).with_name("start.py"))],
                env={**os.environ, "TMPDIR": str(folder)},  # a process that is killed does not remove its files
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def _await_head(self, mine: Mapping[str, str]) -> dict[str, Any]:
        """Return what the head has published; refuse a node that has another Ray or Python than the head."""
        waited = 0.0
        while not (head := read_published(HEAD_FILE)):
            pause = min(max(POLL_SECONDS, waited / 50), LONGEST_POLL)
            _pause(pause)
            waited += pause
        for name, version in mine.items():
            if version != head["versions"][name]:
                raise NodeError(
                    f"{name} {version} ({sys.executable}), but {head['versions'][name]} on the head, {head['node']}"
                )
        return head

    def _start(self, process: subprocess.Popen[str], arguments: list[str]) -> None:
        """Run `ray start`, and a second time if it fails.

        Ray gives an agent 15 s and a raylet 30 s to start. If the node is busy, or the environment's files are not in
        its memory yet, that can be too short; the second start then finds them there.
        """
        assert self._folder
        for again in (True, False):
            assert process.stdin
            with suppress(BrokenPipeError), process.stdin:
                json.dump(arguments, process.stdin)
            while (code := process.poll()) is None:
                _pause(POLL_SECONDS)
            if code == 0:
                return
            output = (state() / f"ray-start-{self._name}.out").read_text(errors="replace")
            failure = describe_failed_start(code, output)
            if code == WRONG_ARGUMENTS or not again:
                raise NodeError(failure)
            print(f"Ray on {self._name}: {failure}\nStarting it a second time.", file=sys.stderr)
            end_descendants(LEAVE_SECONDS)
            process = self._import_ray(self._folder)

    def _publish_head(self, address: str, gcs: int, dashboard: int, mine: Mapping[str, str]) -> None:
        """Publish where the head and its dashboard listen. Clients send the token of the cluster there.

        Raises NodeError: another user's process has taken the head's port.
        """
        if not is_ours(gcs):
            raise NodeError(f"a process of another user listens on port {gcs}, which was reserved for Ray's head")
        facts = {
            "node": self._name,
            "ray_address": f"{address}:{gcs}",
            "dashboard_address": [address, dashboard] if is_ours(dashboard) else None,
            "versions": mine,
        }
        publish(HEAD_FILE, facts)

    def _watch(self) -> NoReturn:
        """Watch the processes that `ray start` has left to this one, until one ends.

        Exit code 0 and SIGTERM are failures, too. `ray start --block` expects them, because `ray stop` ends processes
        that way; in a job that can only be the `ray stop` of somebody else, and the workload would wait for ever.
        """
        assert self._folder
        names = {pid: process_name(pid) for pid in children().get(os.getpid(), [])}
        _, _, _, agent, *_ = self._claims  # the port of the runtime environment agent, in the order of `_arguments`
        while True:
            if agent and (ours := is_ours(agent)) is not None:
                if not ours:  # the raylet sends the token of the cluster there, and does not ask whose process it is
                    raise NodeError(f"a process of another user listens on port {agent}, which was reserved for Ray")
                agent = 0
            dead = {names[pid]: code for pid, code in reap() if pid in names}
            if dead:
                raise NodeError(describe_death(dead, self._folder / RAY_FOLDER / "session_latest" / "logs"))
            _pause(WATCH_SECONDS)

    def clean_up(self) -> None:
        """End what runs, keep its logs and remove the rest, unless the other process has done that."""
        kill_descendants()
        if not self._folder or not self._folder.exists():
            return
        try:
            logs = self._folder / RAY_FOLDER / "session_latest" / "logs"
            if self._settings["collect_logs"] and logs.exists():
                keep_logs(logs.resolve(), Path("ray", f"logs-{self._name}.tar.gz"))
        finally:
            shutil.rmtree(self._folder)


def _pause(seconds: float) -> None:
    """Wait; end this program if its standard input has ended: the batch script is done, or was killed."""
    if select.select([sys.stdin.fileno()], [], [], seconds)[0]:
        raise SystemExit


def _terminate(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(143)


def main() -> None:
    """Run the node in a child; exit code 1 is a failure. Both processes clean up, the child first."""
    signal.signal(signal.SIGTERM, _terminate)
    system = ctypes.CDLL(None)
    system.prctl(PR_SET_CHILD_SUBREAPER, 1)
    node, parent = Node(read_settings()), os.getpid()
    try:
        node.make_folder()
        child = os.fork()
        if child:
            _await(child)
        system.prctl(PR_SET_CHILD_SUBREAPER, 1)
        system.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has ended already
            raise SystemExit(143)
        node.run()
    except (NodeError, OSError) as error:  # the disk is full, say
        fail(f"Ray on {os.environ['SLURMD_NODENAME']}: {error}")
        raise SystemExit(1) from None
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        node.clean_up()


def _await(child: int) -> NoReturn:
    """Wait for the child, and end with its exit code; it is a NodeError if it was killed."""

    def pass_on(*_: object) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)

    signal.signal(signal.SIGTERM, pass_on)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        raise NodeError(f"the process that watches Ray was killed by signal {-code}")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
