"""Slurm on the simulated machines: munge, database, accounting, controller, compute nodes."""

import functools
import os
import shutil
import stat
from pathlib import Path

from . import images, roots
from . import slurm_configuration as configuration
from .daemons import Daemon
from .layout import COMPUTE_NODES, CONTROLLER, DATABASE, MACHINES, Layout
from .machines import MEMORY_CGROUPS, PROGRAMS, Machine
from .waiting import wait_until

_NULL_DEVICE = os.makedev(1, 3)
_IN_SERVICE = ("idle", "mix", "alloc", "comp")
"""States of a node that is up, as sinfo(1) prints them."""


class Cluster:
    """The Slurm of a site.

    Attributes:
        controller: slurmctld.
        accounting: slurmdbd.
        node_daemons: slurmd of each compute node, by hostname.
    """

    # Newer Slurm has each node decode a launch credential, which one munged for all would refuse as replayed.

    def __init__(self, layout: Layout, machines: dict[str, Machine]) -> None:
        self._layout = layout
        self._machines = machines
        control, database = machines[CONTROLLER.hostname], machines[DATABASE.hostname]
        as_munge = "setpriv --reuid=munge --regid=munge --clear-groups"
        munged = f"munged --foreground --num-threads=2 --key-file={layout.etc}/munge/munge.key"
        files = "--pid-file=/run/munge/munged.pid --seed-file=/run/munge/munged.seed"
        log = f"--log-file={layout.log}/munge"
        self._authentication = [
            Daemon(
                machines[name],
                f"munged-{name}",
                f"{as_munge} {munged} {files} {log}/{name}.log".split(),
                functools.partial(self._succeeds, name, "munge", "--no-input"),
            )
            for name in (machine.hostname for machine in MACHINES if not machine.of_host)
        ]
        self._database = Daemon(
            database, "mariadbd", ["mariadbd", f"--defaults-file={layout.etc}/database.cnf"], self._database_answers
        )
        self.accounting = Daemon(database, "slurmdbd", ["slurmdbd", "-D"], self._accounting_answers)
        self.controller = Daemon(control, "slurmctld", ["slurmctld", "-D"], self._controller_answers)
        self.node_daemons = {
            name: Daemon(
                machines[name],
                f"slurmd-{name}",
                ["slurmd", "-D", "-N", name],
                functools.partial(self.takes_jobs, name),
            )
            for name in (node.hostname for node in COMPUTE_NODES)
        }

    def daemons(self) -> list[Daemon]:
        """Return every daemon, in the order in which they start."""
        return [*self._authentication, self._database, self.accounting, self.controller, *self.node_daemons.values()]

    def configure(self) -> None:
        """Write the configuration files and make what the daemons need to start the first time."""
        layout = self._layout
        folder = layout.machine_etc / "slurm"
        folder.mkdir(exist_ok=True)
        (folder / "slurm.conf").write_text(configuration.slurm_conf(layout, MEMORY_CGROUPS), encoding="utf-8")
        (folder / "gres.conf").write_text(configuration.gres_conf(layout), encoding="utf-8")
        shutil.copy(PROGRAMS / "job_submit.lua", folder)
        if MEMORY_CGROUPS:
            (folder / "cgroup.conf").write_text(configuration.cgroup_conf(), encoding="utf-8")
        self._write(folder / "slurmdbd.conf", configuration.slurmdbd_conf(layout), "slurm")
        (layout.etc / "database.cnf").write_text(configuration.database_conf(layout), encoding="utf-8")
        (layout.run / "slurmd").mkdir()
        for path, owner in (
            (layout.log / "munge", "munge"),
            (layout.etc / "munge", "munge"),
            (layout.run / "slurmctld", "slurm"),
        ):
            path.mkdir()
            self._give(path, owner, 0o700)
        for name in ("slurmctld", "slurmdbd"):
            self._write(layout.log / f"{name}.log", "", "slurm")
            self._write(layout.run / f"{name}.pid", "", "slurm")
        key = layout.etc / "munge/munge.key"
        key.write_bytes(os.urandom(128))
        self._give(key, "munge", 0o400)
        self._make_gpus()
        self._write_programs()
        images.make(layout)

    def start(self) -> None:
        """Start every daemon that does not run, fill the accounting the first time, and wait until they serve."""
        first_time = self._start_accounting([daemon for daemon in self._authentication if daemon.launch()])
        self.controller.start()
        launched = [daemon for daemon in self.node_daemons.values() if daemon.launch()]
        if first_time:
            self._account(configuration.gpu_accounting_commands())
        for daemon in launched:
            daemon.wait_ready()

    def _start_accounting(self, authentication: list[Daemon]) -> bool:
        """Start the database and slurmdbd, once authentication serves, and return whether it was for the first time.

        slurmctld will not start before slurmdbd knows the cluster.
        """
        data = self._layout.run / "database"
        database = self._machines[DATABASE.hostname]
        first_time = not data.exists()
        if first_time:
            options = ["--no-defaults", "--user=mysql", f"--datadir={data}", "--skip-test-db"]
            temporary = data.with_name("database-tmp")  # two sites' would meet in /tmp, under the same names
            temporary.mkdir()
            temporary.chmod(0o1777)
            install = ["env", f"TMPDIR={temporary}", "mariadb-install-db", *options]
            database.run([*install, "--auth-root-authentication-method=socket"], timeout=120)
        self._database.start()
        if first_time:
            account = "create user 'slurm'@'localhost' identified via unix_socket"
            rights = "grant all on slurm_acct_db.* to 'slurm'@'localhost'"
            database.run(["mariadb", "--execute", f"create database slurm_acct_db; {account}; {rights}"])
        for daemon in authentication:
            daemon.wait_ready()
        self.accounting.start()
        if first_time:
            self._account(configuration.accounting_commands())
        return first_time

    def _account(self, commands: list[list[str]]) -> None:
        for arguments in commands:
            self._machines[DATABASE.hostname].run(["sacctmgr", "--immediate", "--quiet", *arguments])

    def query(self, *command: str) -> str:
        """Run a Slurm command as root on the controller's machine, and return its stdout.

        Raises:
            SiteError: it failed.
        """
        return self._machines[CONTROLLER.hostname].run(command).stdout

    def node_state(self, hostname: str) -> str:
        """State of a node as sinfo(1) prints it, for example `idle` or `down*`."""
        return self.query("sinfo", "--noheader", "--Node", "--nodes", hostname, "--format", "%t").splitlines()[0]

    def takes_jobs(self, hostname: str) -> bool:
        """Whether a node is up and in service, idle or busy."""
        return self.node_state(hostname) in _IN_SERVICE

    def out_of_service(self) -> list[str]:
        """Return the compute nodes that take no jobs."""
        rows = self.query("sinfo", "--noheader", "--Node", "--format", "%N %t").splitlines()
        states = dict(row.split() for row in rows)
        return [node.hostname for node in COMPUTE_NODES if states.get(node.hostname) not in _IN_SERVICE]

    def cancel_all(self) -> None:
        """Cancel every job and wait until none is left, running, pending or completing."""
        owners = set(self.query("squeue", "--noheader", "--format=%u").split())
        for owner in owners:
            self.query("scancel", f"--user={owner}")
        if owners:
            wait_until(lambda: not self.query("squeue", "--noheader"), "an empty queue", 90.0)

    def _database_answers(self) -> bool:
        return self._succeeds(DATABASE.hostname, "mariadb-admin", "ping")

    def _accounting_answers(self) -> bool:
        return self._succeeds(DATABASE.hostname, "sacctmgr", "--noheader", "show", "cluster")

    def _controller_answers(self) -> bool:
        return self._succeeds(CONTROLLER.hostname, "sinfo", "--noheader")

    def _succeeds(self, hostname: str, *command: str) -> bool:
        """Whether a command succeeds within 5 s: Slurm's own wait for long on a server that is not there."""
        return self._machines[hostname].run(["timeout", "5", *command], check=False).returncode == 0

    def _make_gpus(self) -> None:
        folder = self._layout.run / "gpus"
        folder.mkdir()
        for i in range(4):
            os.mknod(folder / f"nvidia{i}", 0o666 | stat.S_IFCHR, _NULL_DEVICE)

    def _write_programs(self) -> None:
        """Write what machines mount; keep a copy of the real sbatch, over which they mount the site's own."""
        for folder in ("bin", "libexec"):
            (self._layout.state / folder).mkdir()
        shutil.copy2(roots.root(self._layout.slurm) / "usr/bin/sbatch", self._layout.state / "libexec/sbatch")
        self._install("sbatch")
        self._install("nvidia-smi")
        shutil.copy(PROGRAMS / "nvidia-smi.csv", self._layout.state / "bin")

    def _install(self, name: str) -> None:
        """Write a program that machines mount."""
        program = self._layout.state / "bin" / name
        program.write_text((PROGRAMS / name).read_text(encoding="utf-8").replace("@STATE@", str(self._layout.state)))
        program.chmod(0o755)

    def _write(self, file: Path, text: str, owner: str) -> None:
        file.write_text(text, encoding="utf-8")
        self._give(file, owner, 0o600)

    def _give(self, path: Path, owner: str, mode: int) -> None:
        """Give a file to an account of the machines, which the host may not have, or with another number."""
        accounts = (self._layout.machine_etc / "passwd").read_text(encoding="utf-8").splitlines()
        uid, gid = next(line.split(":")[2:4] for line in accounts if line.startswith(f"{owner}:"))
        os.chown(path, int(uid), int(gid))
        path.chmod(mode)
