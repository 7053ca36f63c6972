"""What `ray start` needs to know of this node, checked: address, ports, GPUs, memory, versions."""

import fcntl
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from job_cluster import NodeError, tail

OLDEST_RAY = (2, 52)  # the first with token authentication
SIOCGIFADDR = 0x8915
OBJECT_STORE_SHARE, SHARED_MEMORY_SHARE = 0.3, 0.9
"""The object store's share of the job's memory (Ray's default, of the node's), and of what is free in /dev/shm."""
EXCLUDE_NODE = "Exclude this node (SlurmRequest(exclude=...)), and tell the centre its name"
NAME_INTERFACE = "Set network_interface of the launcher to the interface that other nodes reach"
_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_LISTENING = "0A"


def own_address(interface: str | None) -> str:
    """Return the IPv4 address of an interface; without one, what this host's name resolves to.

    Raises NodeError: there is none that other nodes can reach.
    """
    if interface:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", interface.encode()))
            except OSError as error:
                names = ", ".join(name for _, name in socket.if_nameindex())
                raise NodeError(
                    f"network_interface={interface!r} has no address that Ray could use: {error.strerror}. This node "
                    f"has {names}. {NAME_INTERFACE}"
                ) from None
        return socket.inet_ntoa(found[20:24])
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        raise NodeError(f"the host name {name} has no address ({error}). {NAME_INTERFACE}") from None
    if address.startswith("127."):
        raise NodeError(
            f"the host name {name} has the address {address}, which no other node reaches. {NAME_INTERFACE}"
        )
    return address


def check_gpus(wanted: int) -> None:
    """Compare the GPUs that Slurm allocated, and those that the driver sees, with the request.

    Raises NodeError: there are fewer, or the driver does not answer; the text says which, and what to do.
    """
    if not wanted:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    given = len([number for number in (visible or "").split(",") if number])
    if given < wanted:
        now = "is not set" if visible is None else f"is {visible!r}"
        raise NodeError(
            f"programs may use {given} of the {wanted} GPUs that the job requested here: CUDA_VISIBLE_DEVICES {now}. "
            "Slurm sets it, so Slurm allocated fewer GPUs, or it was changed in the job. Check env of the asset, "
            f"pre_start_commands of the launcher and setup_commands of the site. If they are correct: {EXCLUDE_NODE}"
        )
    if shutil.which("nvidia-smi"):
        _ask_driver(wanted)


def _ask_driver(wanted: int) -> None:
    command = ["nvidia-smi", "-L"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    seen = count_gpus(done.stdout)
    if done.returncode:
        problem = f"the GPUs cannot be listed: nvidia-smi ended with exit code {done.returncode}"
    elif seen < wanted:
        problem = f"nvidia-smi lists {seen} of the {wanted} GPUs that the job requested here"
    else:
        return
    said = "; ".join(tail(done.stdout).splitlines()) or "nothing"
    raise NodeError(f"{problem}. It says: {said}. {EXCLUDE_NODE}")


def count_gpus(listing: str) -> int:
    """Return how many devices `nvidia-smi -L` lists that a program can use: the MIG slices of a GPU, or the GPU.

    `listing`: a line `GPU 0: ...` per GPU, each followed by its slices as indented lines `  MIG 1g.12gb ...`.
    """
    gpus = re.split(r"^GPU \d+:", listing, flags=re.M)[1:]
    return sum(len(re.findall(r"^\s+MIG ", gpu, re.M)) or 1 for gpu in gpus)


def memory_arguments(object_store: int | None, environ: Mapping[str, str]) -> list[str]:
    """Return Ray's share of memory from the job's: Ray's default is that of the whole node.

    `object_store`: bytes, if the launcher has them as a field.
    """
    per_node = int(environ.get("SLURM_MEM_PER_NODE", 0))
    total = (per_node or int(environ.get("SLURM_MEM_PER_CPU", 0)) * int(environ.get("SLURM_CPUS_ON_NODE", 1))) << 20
    if not total:  # all that the node has
        return [f"--object-store-memory={object_store}"] if object_store else []
    shared = shutil.disk_usage("/dev/shm").free  # noqa: S108 - Ray's place, not a temporary file
    store = object_store or int(min(total * OBJECT_STORE_SHARE, shared * SHARED_MEMORY_SHARE))
    return [f"--object-store-memory={store}", f"--memory={max(total - store, 0)}"]


def versions() -> dict[str, str]:
    """Return the versions that must be equal on all nodes.

    Raises NodeError: there is no Ray, or it is too old.
    """
    try:
        ray = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        image = os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER")
        if image:
            advice = "Install it in the image, or name the Python that has it with Container(python=...)"
            raise NodeError(f"{sys.executable} in the image {image} has no Ray. {advice}") from None
        raise NodeError(
            f"there is no Ray in the environment of {sys.executable}. Add `ray` to its packages, or check which "
            "interpreter pre_start_commands choose"
        ) from None
    if tuple(int(part) for part in re.findall(r"\d+", ray)[:2]) < OLDEST_RAY:
        oldest = ".".join(map(str, OLDEST_RAY))
        raise NodeError(
            f"Ray {ray} ({sys.executable}) is too old. It has no authentication: every user of the network could run "
            f"programs in your name. Install Ray {oldest} or later"
        )
    return {"Ray": ray, "Python": platform.python_version()}


def is_ours(port: int) -> bool | None:
    """Return whether a process of this user listens on a port of this node, and nobody else; None: no process does."""
    owners = set()
    for table in _TABLES:
        with suppress(FileNotFoundError):  # no IPv6 here
            for line in table.read_text().splitlines()[1:]:
                _, local, _, connection, *_, owner = line.split()[:8]
                if connection == _LISTENING and int(local.rpartition(":")[2], 16) == port:
                    owners.add(int(owner))
    return owners == {os.getuid()} if owners else None


def check_ports(arguments: Iterable[str]) -> None:
    """Check that the ports which the user has chosen are free: Ray reports a taken port only deep in its logs.

    Raises NodeError: one is taken.
    """
    for argument in arguments:
        chosen = re.fullmatch(r"--(?!m(?:in|ax)-worker-)[a-z-]+-port=([1-9][0-9]*)", argument)
        if chosen:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Ray does: a port in TIME_WAIT is free
                try:
                    probe.bind(("", int(chosen[1])))
                except OSError as error:
                    raise NodeError(f"cannot use the port of {argument}: {error.strerror}") from None
