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
import tarfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from job_cluster import POLL_SECONDS, Head, NodeError, fail, read_settings, state, tail
from ports import check_ports, claim_ports

AGENT_PORTS = ("runtime-env-agent", "dashboard-agent-listen", "dashboard-agent-grpc", "metrics-export")
"""Of Ray's agents. For those that choose them the raylet waits, and it dies where that takes more than 15 s."""
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


def make_private_folder(path: Path) -> None:
    """Make a folder in a place where others may write, for this user alone; what an earlier life left goes.

    Raises:
        NodeError: the name is taken by somebody else, or nothing can be written there.
    """
    with suppress(FileNotFoundError):
        there = path.lstat()
        if there.st_uid != os.getuid():
            raise NodeError(f"{path} belongs to user {there.st_uid}")
        shutil.rmtree(path)
    try:
        path.mkdir(mode=0o700)
    except OSError as error:
        raise NodeError(f"cannot make {path} ({error.strerror}): RayLauncher's temp_dir says where") from None


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
        seen = len(re.findall(r"^GPU \d+:", done.stdout, re.M))
        if done.returncode or seen < wanted:
            said = "; ".join(tail(done.stdout).splitlines())
            raise NodeError(f"{seen} of {wanted} GPUs are there; nvidia-smi says: {said}")


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
        self._folder = Path(settings["temp_dir"], f"r-{os.environ['SLURM_JOB_ID']}")
        self._ray_folder = self._folder / "ray"  # in a private one: Ray opens its own to everybody
        self._selector = selectors.DefaultSelector()
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
        self._claims: list[socket.socket] = []

    def run(self) -> None:
        """Start Ray and stay until it is to end.

        Raises:
            NodeError: it ended by itself, or did not start.
        """
        make_private_folder(self._folder)
        check_gpus(self._settings["gpus"])
        command = [sys.executable, "-u", str(Path(__file__).with_name("start.py")), *self._arguments()]
        output = state() / f"ray-start-{self._host}.out"
        with output.open("w") as file:
            ray = subprocess.Popen(
                command,
                env={**os.environ, "TMPDIR": str(self._folder)},  # what is killed cannot tidy up
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._selector.register(os.pidfd_open(ray.pid), selectors.EVENT_READ, ray)
        if not self._head:
            self._compare_versions()
        for key, _ in self._selector.select():
            if key.data is ray:
                raise NodeError(explain(ray.wait(), output.read_text(errors="replace")))

    def _arguments(self) -> list[str]:
        """Of `ray start`. A port of 0 is one that the raylet chooses when it binds it: nobody can come between."""
        settings = self._settings
        further = settings["ray_start_args"]
        check_ports(further)
        address = own_address(settings["network_interface"])
        arguments = [
            "--block",
            "--log-color=false",
            "--disable-usage-stats",
            f"--temp-dir={self._ray_folder}",
            f"--node-ip-address={address}",
        ]
        arguments += [f"--num-cpus={settings['cpus']}", f"--num-gpus={settings['gpus']}"]
        ports, self._claims = claim_ports(len(AGENT_PORTS) + 2 * self._head, int(os.environ["SLURM_JOB_ID"]) * 7)
        arguments += ["--node-manager-port=0", "--object-manager-port=0"]
        arguments += [f"--{part}-port={port}" for part, port in zip(AGENT_PORTS, ports, strict=False)]
        arguments += memory_arguments(settings["object_store_memory"], os.environ)
        if self._head:
            gcs, dashboard = ports[-2:]
            arguments += ["--head", f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
            Head(self._host, address, gcs, dashboard, sys.executable, versions()).tell()
        return [*arguments, *(each for each in further if self._head or not each.startswith("--include-dashboard"))]

    def _compare_versions(self) -> None:
        """Wait for the head's word, and end with it if this node has another Ray or Python."""
        mine = versions()
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
        try:
            if self._settings["collect_logs"]:
                self._keep_logs()
        finally:
            if self._folder.exists() and self._folder.stat().st_uid == os.getuid():
                shutil.rmtree(self._folder)

    def _keep_logs(self) -> None:
        logs = self._ray_folder / "session_latest" / "logs"
        if logs.exists():
            part = Path("ray", f"logs-{self._host}.tar.gz.part")
            with tarfile.open(part, "w:gz", compresslevel=1) as archive:
                archive.add(logs.resolve(), f"logs-{self._host}")
            part.rename(part.with_suffix(""))


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
