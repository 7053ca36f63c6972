"""What `ray start` needs to know of this node, checked: address, GPUs, memory, versions."""

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
from collections.abc import Mapping

from job_cluster import NodeError, tail

OLDEST_RAY = (2, 52)
"""The first with token authentication."""
SIOCGIFADDR = 0x8915
OBJECT_STORE_SHARE, SHARED_MEMORY_SHARE = 0.3, 0.9
"""The object store's share of the job's memory (Ray's default, of the node's), and of what is free in /dev/shm."""


def own_address(interface: str | None) -> str:
    """Return the IPv4 address of an interface; without one, what this host's name resolves to.

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
    """Compare the GPUs that Slurm allocated, and those that the driver sees, with the request.

    Raises:
        NodeError: there are fewer.
    """
    if not wanted:
        return
    given = [number for number in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if number]
    if len(given) < wanted:
        raise NodeError(f"{len(given)} of {wanted} GPUs: Slurm gave CUDA_VISIBLE_DEVICES={','.join(given)!r}")
    if shutil.which("nvidia-smi"):
        try:
            done = subprocess.run(
                ["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
            )
        except OSError as error:
            raise NodeError(f"nvidia-smi, which counts the GPUs, cannot be run: {error.strerror}") from None
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
    """Return Ray's share of memory from the job's: Ray's default is that of the whole node.

    Args:
        object_store: bytes, if the launcher has them as a field.
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
    """Return the versions that must be equal on all nodes.

    Raises:
        NodeError: there is no Ray, or it is too old.
    """
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
