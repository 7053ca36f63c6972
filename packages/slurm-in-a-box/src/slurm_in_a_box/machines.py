"""Simulated machines: namespaces with an address, a hostname and mostly a file system of their own, on one bridge.

The first process of a machine (`programs/machine-init`) holds its namespaces. If that process is killed, the kernel
ends every other process in its PID namespace and then removes its mounts, its network and its interface.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from . import interpreter, roots
from .errors import SiteError
from .host import ip, spawn
from .layout import COMPUTE_NODES, Layout, MachineName, User
from .waiting import wait_until

PROGRAMS = Path(__file__).parent / "programs"
_CGROUPS = Path("/sys/fs/cgroup")
_CONTROLLERS = ("memory", "freezer")
MEMORY_CGROUPS = all((_CGROUPS / controller / "cgroup.procs").exists() for controller in _CONTROLLERS)
"""Whether the host has version 1 of these cgroups, with which Slurm enforces a job's memory and finds its processes."""

_EXIT_WAIT = 120.0
_IFF_UP = 1  # of netdevice(7)
_ROOT_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


class Machine:
    """A machine of a site, running or not. Its state is in the site's folder, so any process can make the object."""

    def __init__(self, layout: Layout, name: MachineName) -> None:
        self.layout = layout
        self.name = name
        self.hostname = name.hostname
        self.address = layout.address(name.number)
        self._folder = layout.run / "machines" / name.hostname

    @property
    def running(self) -> bool:
        """Whether its first process lives."""
        return self._init_pid() is not None

    def start(self) -> bool:
        """Switch it on, with the network plugged in, and return whether it was off; do nothing if it is on."""
        if self.running:
            return False
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        log = self.layout.log / f"machine-{self.hostname}.out"
        root = "" if self.name.of_host else str(roots.root(self.layout.slurm))
        mounts = interpreter.mounts(self.layout) if self.name.for_users else []
        self._make_folder("root", 0o755)
        self._make_folder("tmp", 0o1777)
        if self.name in COMPUTE_NODES:
            self._make_folder("local", 0o1777)
        cgroup = self._make_cgroup()
        # The shell leaves its own pid, which is then unshare's; the machine's first process is unshare's only child.
        namespaces = "--mount --uts --ipc --net --pid --fork --kill-child --mount-proc"
        start = f'echo $$ >"$1"; shift; exec unshare {namespaces} "$@"'
        init = [str(PROGRAMS / "machine-init"), str(self.layout.state), self.hostname, root, cgroup, *mounts]
        spawn(["sh", "-c", start, "sh", str(self._folder / "pid"), *init], log)
        wait_until((self._folder / "ready").exists, f"start of the machine {self.hostname}; see {log}")
        self._connect()
        return True

    def stop(self) -> None:
        """Switch it off as a power cut does: kill every process on it. Return when all of them have ended."""
        init = self._init_pid()
        if init is not None:
            descriptor = os.pidfd_open(init)
            try:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                wait_until(lambda: self._init_pid() is None, f"end of the machine {self.hostname}", _EXIT_WAIT)
            finally:
                os.close(descriptor)
        # The interface goes with the network namespace, which the kernel cleans up a moment after the last process.
        wait_until(
            lambda: not Path(f"/sys/class/net/{self._interface}").exists(),
            f"end of {self._interface}",
            _EXIT_WAIT,
        )

    def plug(self) -> None:
        """Plug its network cable in; do nothing if it is."""
        flags = Path(f"/sys/class/net/{self._interface}/flags").read_text(encoding="ascii")
        if not int(flags, 16) & _IFF_UP:
            ip("link", "set", self._interface, "up")

    def unplug(self) -> None:
        """Pull its network cable out; its processes keep running."""
        ip("link", "set", self._interface, "down")

    def command(self, arguments: Sequence[str], user: User | None = None) -> list[str]:
        """Return the command line that runs `arguments` on this machine as root or as `user`, in a clean environment.

        Raises:
            SiteError: the machine is off.
        """
        init = self._init_pid()
        if init is None:
            raise SiteError(f"the machine {self.hostname} is switched off")
        enter = ["nsenter", "--target", str(init), "--mount", "--uts", "--ipc", "--net", "--pid"]
        if user is None:
            return [*enter, "env", "--ignore-environment", "--chdir=/", f"PATH={_ROOT_PATH}", "HOME=/root", *arguments]
        identity = [f"--reuid={user.uid}", f"--regid={user.uid}", "--clear-groups"]
        variables = [f"HOME={user.home}", f"USER={user.name}", f"LOGNAME={user.name}", f"SHELL={user.shell}"]
        login = ["env", "--ignore-environment", f"--chdir={user.home}", *variables, "PATH=/usr/bin:/bin"]
        return [*enter, "setpriv", *identity, *login, *arguments]

    def run(
        self, arguments: Sequence[str], user: User | None = None, timeout: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this machine to its end.

        Raises:
            SiteError: it failed (where `check` is true), with what it printed.
            subprocess.TimeoutExpired: it took longer than `timeout` seconds.
        """
        done = subprocess.run(
            self.command(arguments, user),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            output = (done.stdout + done.stderr).strip()
            raise SiteError(f"on {self.hostname}: {' '.join(arguments)} ended with {done.returncode}: {output}")
        return done

    def is_clean(self, users: Collection[int], folders: Sequence[str]) -> bool:
        """Return whether no process of these users runs on it, and these folders are empty, without a program there."""
        root = Path(f"/proc/{self._init_pid()}/root")
        for process in (root / "proc").iterdir():
            with suppress(FileNotFoundError):  # it has ended
                if process.name.isdigit() and process.stat().st_uid in users:
                    return False
        return not any(any((root / folder.lstrip("/")).iterdir()) for folder in folders)

    def pid_file(self, daemon: str) -> Path:
        """File for the PID of a daemon on this machine; `start` removes it."""
        return self._folder / f"{daemon}.pid"

    def process_alive(self, pid: int) -> bool:
        """Whether a process with this PID (in the machine's namespace) exists, even if it is ending."""
        init = self._init_pid()
        return init is not None and Path(f"/proc/{init}/root/proc/{pid}").exists()

    def cgroups(self) -> list[Path]:
        """Folders of the cgroups that were made for this machine, deepest first."""
        tops = [_CGROUPS / controller / self._cgroup for controller in _CONTROLLERS]
        return [Path(folder) for top in tops for folder, _, _ in os.walk(top, topdown=False)]

    def remove_cgroups(self) -> None:
        """Remove its cgroups, which the kernel allows a moment after their last process has ended."""
        deadline = time.monotonic() + _EXIT_WAIT
        for folder in self.cgroups():
            while True:
                try:
                    folder.rmdir()
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)

    @property
    def _interface(self) -> str:
        return f"{self.layout.bridge}-{self.name.number}"

    @property
    def _cgroup(self) -> str:
        return f"simulated-site-{self._interface}"

    def _make_folder(self, name: str, mode: int) -> None:
        """Make a folder that machine-init mounts, or mounts something on."""
        folder = self._folder / name
        folder.mkdir()
        folder.chmod(mode)

    def _make_cgroup(self) -> str:
        """Make the cgroups of this machine, where the host has version 1 of them; return their name, else ""."""
        if not MEMORY_CGROUPS:
            return ""
        for controller in _CONTROLLERS:
            (_CGROUPS / controller / self._cgroup).mkdir(exist_ok=True)
        return self._cgroup

    def _connect(self) -> None:
        """Give it an interface `eth0` with its address, whose other end is on the site's bridge."""
        init = str(self._init_pid())
        ip("link", "add", self._interface, "type", "veth", "peer", "name", "eth0", "netns", init)
        ip("link", "set", self._interface, "master", self.layout.bridge, "up")
        self.run(["ip", "address", "add", f"{self.address}/24", "dev", "eth0"])
        self.run(["ip", "link", "set", "eth0", "up"])

    def _init_pid(self) -> int | None:
        """PID of its first process on the host, or None. The recorded parent is checked, since PIDs are reused."""
        try:
            parent = int((self._folder / "pid").read_text(encoding="ascii"))
            arguments = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii").split()
        except (OSError, ValueError):
            return None
        ours = str(self.layout.state).encode() in arguments and self.hostname.encode() in arguments
        return int(children[0]) if ours and children else None
