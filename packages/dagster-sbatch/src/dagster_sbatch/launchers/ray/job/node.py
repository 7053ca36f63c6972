"""One node of a job's Ray cluster: starts Ray, watches over it, and leaves nothing of it behind.

srun runs it on every node, in the run directory; task 0 is the head. It ends when its standard input does (the batch
script is done, or gone), when Slurm terminates it, or when Ray does, which is a failure: why is written to
$RAY_JOB_STATE/failed, by whoever is the first.
"""

import ctypes
import fcntl
import importlib.metadata
import os
import platform
import re
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from folder import keep_logs, make_folder
from job_cluster import POLL_SECONDS, Head, NodeError, fail, read_settings, state, tail
from ports import check_ports, claim_ports, is_ours

AGENT_PORTS = ("runtime-env-agent", "dashboard-agent-listen", "dashboard-agent-grpc", "metrics-export")
"""Of Ray's agents. For those that choose them the raylet waits, and it dies where that takes more than 15 s."""
RAY_FOLDER = "ray"
"""Below the private folder: Ray opens its own to everybody."""
OLDEST_RAY = (2, 52)
"""The first with token authentication."""
SIOCGIFADDR = 0x8915
PR_SET_CHILD_SUBREAPER = 36
OBJECT_STORE_SHARE, SHARED_MEMORY_SHARE = 0.3, 0.9
"""Ray's own share of the memory for its object store, here of the job's; and how full it may make /dev/shm."""


def own_address(interface: str | None) -> str:
    """The IPv4 address of an interface; without one, what this host's name resolves to.

    Raises:
        NodeError: there is none that other nodes can reach.
    """
    if interface:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", interface.encode()))
            except OSError as error:
                names = ", ".join(name for _, name in socket.if_nameindex())
                raise NodeError(f"network_interface={interface!r}: {error.strerror}; there are {names}") from None
        return socket.inet_ntoa(found[20:24])
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        raise NodeError(f"the host name {name} has no address ({error}): set network_interface") from None
    if address.startswith("127."):
        raise NodeError(f"the host name {name} resolves to {address}, of use to nobody else: set network_interface")
    return address


def check_gpus(wanted: int) -> None:
    """Compare the GPUs that Slurm gave, and those that the driver sees, with those that were asked for.

    Raises:
        NodeError: there are fewer.
    """
    if not wanted:
        return
    given = [number for number in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if number]
    if len(given) < wanted:
        raise NodeError(f"{len(given)} of {wanted} GPUs: Slurm gave CUDA_VISIBLE_DEVICES={','.join(given)!r}")
    if shutil.which("nvidia-smi"):
        done = subprocess.run(
            ["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        seen = count_gpus(done.stdout)
        if done.returncode or seen < wanted:
            said = "; ".join(tail(done.stdout).splitlines())
            raise NodeError(f"{seen} of {wanted} GPUs are there; nvidia-smi says: {said}")


def count_gpus(listing: str) -> int:
    """Return how many devices `nvidia-smi -L` lists that a program can use: the MIG slices of a GPU, or the GPU.

    Args:
        listing: a line `GPU 0: ...` per GPU, each followed by its slices as indented lines `  MIG 1g.12gb ...`.
    """
    gpus = re.split(r"^GPU \d+:", listing, flags=re.M)[1:]
    return sum(len(re.findall(r"^\s+MIG ", gpu, re.M)) or 1 for gpu in gpus)


def memory_arguments(object_store: int | None, environ: Mapping[str, str]) -> list[str]:
    """Ray's memory from the job's: by itself it would take the whole node for its own.

    Args:
        object_store: bytes that the launcher was given for the object store, if any.
        environ: Slurm's variables.
    """
    per_node = int(environ.get("SLURM_MEM_PER_NODE", 0))
    total = (per_node or int(environ.get("SLURM_MEM_PER_CPU", 0)) * int(environ.get("SLURM_CPUS_ON_NODE", 1))) << 20
    if not total:  # all that the node has
        return [f"--object-store-memory={object_store}"] if object_store else []
    shared = shutil.disk_usage("/dev/shm").free  # noqa: S108 - Ray's place, not a temporary file
    store = object_store or int(min(total * OBJECT_STORE_SHARE, shared * SHARED_MEMORY_SHARE))
    return [f"--object-store-memory={store}", f"--memory={max(total - store, 0)}"]


def versions() -> dict[str, str]:
    """What has to be the same on all nodes."""
    try:
        ray = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        raise NodeError(f"there is no Ray in the environment of {sys.executable}") from None
    if tuple(int(part) for part in re.findall(r"\d+", ray)[:2]) < OLDEST_RAY:
        oldest = ".".join(map(str, OLDEST_RAY))
        raise NodeError(
            f"Ray {ray} ({sys.executable}) is too old. It has no authentication: every user of the network could run "
            f"programs in your name. Install Ray {oldest} or later"
        )
    return {"Ray": ray, "Python": platform.python_version()}


def explain(code: int, output: str) -> str:
    """Why `ray start` ended: in a line, which of its processes have died, or its last words; then its last lines."""
    lines = [line for line in output.splitlines() if "[state-dump]" not in line]
    dead = [line for line in lines if "[exit code=" in line] or [line for line in lines if line.strip()][-1:]
    words = ", ".join(line.rpartition(" -- ")[2].strip() for line in dead)
    return f"`ray start` ended with exit code {code}: {words}\n" + tail("\n".join(lines))


def descendants(pid: int) -> Iterator[int]:
    """All processes below one, its orphans included if it is a subreaper (prctl(2)); deepest last."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    waiting = list(children.get(pid, []))
    while waiting:
        found = waiting.pop()
        yield found
        waiting += children.get(found, [])


def kill_descendants() -> None:
    """End everything that was started here, whatever became of it, and nothing else."""
    while found := list(descendants(os.getpid())):
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(POLL_SECONDS / 5)


class Node:
    """Ray on this node."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._host = socket.gethostname()
        self._head = os.environ["SLURM_PROCID"] == "0"
        self._folder: Path | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
        self._claims: list[socket.socket] = []

    def run(self) -> None:
        """Start Ray and stay until it is to end.

        Raises:
            NodeError: it ended by itself, or did not start.
        """
        mine = versions()
        self._folder = make_folder(
            Path(self._settings["temp_dir"] or os.environ["JOB_TMPDIR"]), os.environ["SLURM_JOB_ID"]
        )
        check_gpus(self._settings["gpus"])
        address = own_address(self._settings["network_interface"])
        ports, self._claims = claim_ports(len(AGENT_PORTS) + 2 * self._head)
        arguments = self._arguments(self._folder, address, ports)
        output = state() / f"ray-start-{self._host}.out"
        with output.open("w") as file:
            ray = subprocess.Popen(
                [sys.executable, "-u", str(Path(__file__).with_name("start.py")), *arguments],
                env={**os.environ, "TMPDIR": str(self._folder)},  # what is killed cannot tidy up
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._selector.register(_wait_in_background(ray), selectors.EVENT_READ, ray)
        if self._head:
            gcs, dashboard = ports[-2:]
            self._announce(Head(self._host, address, gcs, dashboard, sys.executable, mine))
        else:
            self._compare_versions(mine)
        for key, _ in self._selector.select():
            if key.data is ray:
                raise NodeError(explain(ray.wait(), output.read_text(errors="replace")))

    def _arguments(self, folder: Path, address: str, ports: list[int]) -> list[str]:
        """Of `ray start`. A port of 0 is one that the raylet chooses when it binds it: nobody can come between."""
        settings = self._settings
        further = settings["ray_start_args"]
        check_ports(further)
        arguments = [
            "--block",
            "--log-color=false",
            "--disable-usage-stats",
            f"--temp-dir={folder / RAY_FOLDER}",
            f"--node-ip-address={address}",
            f"--num-cpus={settings['cpus']}",
            f"--num-gpus={settings['gpus']}",
            "--node-manager-port=0",
            "--object-manager-port=0",
        ]
        arguments += [f"--{part}-port={port}" for part, port in zip(AGENT_PORTS, ports, strict=False)]
        arguments += memory_arguments(settings["object_store_memory"], os.environ)
        if self._head:
            gcs, dashboard = ports[-2:]
            arguments += ["--head", f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        return [*arguments, *(each for each in further if self._head or not each.startswith("--include-dashboard"))]

    def _announce(self, head: Head) -> None:
        """Publish the head's address as soon as Ray listens there.

        Earlier, another user could take the port, and would be sent the token of the cluster.
        """
        while not is_ours(head.port):
            if self._selector.select(POLL_SECONDS):
                return
        head.publish()

    def _compare_versions(self, mine: Mapping[str, str]) -> None:
        """Wait for the head's address; end with an error if this node has another Ray or Python than the head."""
        while not (head := Head.read()):
            if self._selector.select(POLL_SECONDS):
                return
        for name, version in mine.items():
            if version != head.versions[name]:
                raise NodeError(
                    f"{name} {version} ({sys.executable}), but {head.versions[name]} on the head, {head.hostname}"
                )

    def clean_up(self) -> None:
        """End what runs, keep its logs and remove the rest."""
        kill_descendants()
        if not self._folder:
            return
        try:
            logs = self._folder / RAY_FOLDER / "session_latest" / "logs"
            if self._settings["collect_logs"] and logs.exists():
                keep_logs(logs.resolve(), Path("ray", f"logs-{self._host}.tar.gz"))
        finally:
            shutil.rmtree(self._folder)


def _wait_in_background(process: subprocess.Popen[bytes]) -> int:
    """Return a file descriptor that becomes readable when a process has ended.

    os.pidfd_open would do the same, but kernels before 5.3 do not have it, and neither have some builds of Python.
    """
    reader, writer = os.pipe()

    def wait() -> None:
        process.wait()
        os.close(writer)

    threading.Thread(target=wait, daemon=True).start()
    return reader


def main() -> None:
    """Run the node; exit code 1 is a failure."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, end)
    node = Node(read_settings())
    try:
        node.run()
    except NodeError as error:
        fail(f"Ray on {socket.gethostname()}: {error}")
        raise SystemExit(1) from None
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        node.clean_up()


if __name__ == "__main__":
    main()
