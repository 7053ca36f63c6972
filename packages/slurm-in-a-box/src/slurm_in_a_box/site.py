"""Start, use, inspect and end a simulated site."""

import itertools
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import interpreter, keys, network, requirements, roots, smallstep
from .certificate_authority import DEFAULT_VALIDITY, CertificateAuthority
from .cluster import Cluster
from .daemons import Daemon
from .errors import SiteError
from .faults import Faults
from .host import locked, run_on_host
from .identity_provider import IdentityProvider
from .layout import (
    CERTIFICATE_USER,
    COMPUTE_NODES,
    CPU_PARTITION,
    DATABASE,
    DEPLOYMENT_FOLDER,
    IDENTITY,
    LOGIN_NODES,
    MACHINES,
    OIDC_CLIENT_ID,
    USERS,
    Layout,
    User,
    state_folder,
)
from .login import Login
from .machines import Machine
from .storage import Storage
from .waiting import wait_until

VANILLA = "#ASC --vanilla\n"
"""A line before the first command of a script; with it, the submit plugin leaves the job as it is."""


@dataclass(frozen=True)
class LoginProcess:
    """A process of a user on a login node, sshd's own ones for the user included."""

    machine: str
    pid: int
    command: str


class SimulatedSite:
    """A running site, from `SimulatedSite.temporary()`, `SimulatedSite.up()` or `SimulatedSite.running()`.

    Attributes:
        machines: every simulated machine by hostname.
        cluster: Slurm.
        login: the login nodes and the way to them.
        storage: the file systems that they share with the compute nodes.
        certificate_authority: step-ca.
        identity_provider: authentik's stand-in, its addresses and its process.
        authentik: its control: clock, lifetimes, users, tokens, disturbances, record of requests.
        faults: injects faults and repairs them.
    """

    def __init__(self, layout: Layout, programs: smallstep.Programs) -> None:
        self.layout = layout
        self.machines = {name.hostname: Machine(layout, name) for name in MACHINES}
        identity = self.machines[IDENTITY.hostname]
        self.identity_provider = IdentityProvider(layout, identity)
        self.authentik = self.identity_provider.control
        self.certificate_authority = CertificateAuthority(layout, identity, programs, self.identity_provider.issuer)
        self.cluster = Cluster(layout, self.machines)
        self.storage = Storage(layout)
        self.login = Login(layout, self.machines, self.certificate_authority.authorities)
        self.faults = Faults(self)

    @classmethod
    def up(cls, name: str, install: bool = False, slurm: str = "") -> "SimulatedSite":
        """Start the site of that name, or those parts of it that do not run; return it when all parts serve.

        Args:
            install: install missing packages, make the machines' file system and build step where they are missing.
            slurm: version of Slurm, a key of roots.SUITES; by default that of the site, for a new one roots.chosen().

        Raises:
            RequirementsError: this machine lacks something, and `install` is false.
            SiteError: a part did not start, and the message names its log; or the site has another version of Slurm.
        """
        requirements.check_system()
        requirements.ensure_packages(install)
        programs = smallstep.ensure_programs(install)
        left = network.find(name)
        if left is None:
            _remove_files(name)  # somebody may have written there after it went down
        elif not _completed(left).exists():
            cls.down(name)  # an attempt that was cut short: its database may lack anything
        layout = network.claim(name, slurm or roots.chosen())
        if slurm and layout.slurm != slurm:
            raise SiteError(f"the site {name!r} runs with Slurm {layout.slurm}; end it with `down` before")
        roots.ensure(layout.slurm, install)
        site = cls(layout, programs)
        if not _completed(site.layout).exists():
            site._configure()
        site.start()
        _completed(site.layout).touch()
        return site

    @classmethod
    @contextmanager
    def temporary(cls, install: bool = False, slurm: str = "", prefix: str = "test") -> Iterator["SimulatedSite"]:
        """Start a new site that no other process uses, and remove it at the end; for a run of tests.

        Its name is the first of `test-1`, `test-2`, ... that no other process uses. A process that is killed leaves its
        site running; the next process that takes the name replaces the site.

        Args:
            install: see `up`.
            slurm: see `up`.
            prefix: what its name begins with.

        Raises:
            RequirementsError: see `up`.
            SiteError: see `up`.
        """
        requirements.check_system()
        for number in itertools.count(1):
            name = f"{prefix}-{number}"
            with locked(state_folder(name) / "in-use", wait=False) as ours:
                if not ours:
                    continue
                cls.down(name)
                try:
                    yield cls.up(name, install, slurm)
                finally:
                    cls.down(name)
                return

    @classmethod
    def running(cls, name: str) -> "SimulatedSite":
        """Return the site of that name, which must have been started.

        Raises:
            SiteError: there is none.
        """
        layout = network.find(name)
        if layout is None:
            raise SiteError(f"the site {name!r} is not up; start it with `up`")
        return cls(layout, smallstep.ensure_programs(install=False))

    @classmethod
    def down(cls, name: str) -> None:
        """End the site of that name and remove everything but its logs; do nothing if there is no such site."""
        layout = network.find(name)
        if layout is None:
            return
        machines = [Machine(layout, machine) for machine in MACHINES]
        with ThreadPoolExecutor(len(machines)) as pool:
            list(pool.map(Machine.stop, machines))
        for machine in machines:
            machine.remove_cgroups()
        Storage(layout).unmount()
        network.release(layout)
        _remove_files(name)
        (layout.state / "site.json").unlink()

    def start(self) -> None:
        """Start those parts of the site that do not run: machines first, then all daemons in parallel."""
        if self.storage.mount():
            self.login.restore_homes()
            self.storage.restore_project()
        with ThreadPoolExecutor(len(self.machines)) as pool:
            if any(list(pool.map(Machine.start, self.machines.values()))):
                self.machines[LOGIN_NODES[0].hostname].run(["ldconfig"])  # for all of them, since they share /etc
            parts = [pool.submit(part) for part in (self.cluster.start, self.login.start, self._start_identity)]
            for part in parts:
                part.result()

    def status(self) -> dict[str, bool]:
        """Return for each machine and daemon whether it runs."""
        return {
            **{f"machine {machine.hostname}": machine.running for machine in self.machines.values()},
            **{daemon.name: daemon.running for daemon in self.daemons()},
        }

    def daemons(self) -> list[Daemon]:
        """Return every daemon of the site."""
        return [
            *self.cluster.daemons(),
            *self.login.daemons.values(),
            self.identity_provider.daemon,
            self.certificate_authority.daemon,
        ]

    def reset(self) -> None:
        """Clean the site for the next test: no faults, jobs, processes of users, files of users or tokens.

        Users that were added to authentik stay.
        """
        self.faults.repair_all()
        self.cluster.cancel_all()
        self.clean_machines()
        self.login.restore_homes()
        self.storage.restore_project()
        self.login.remove_credentials()
        self.authentik.reset()
        self.certificate_authority.set_validity(DEFAULT_VALIDITY)

    # Users and their credentials

    def mint_certificate(self, key: Path, user: User = CERTIFICATE_USER, validity: str = "-1m:+1h") -> Path:
        """Make a key and, with the site's user CA but without asking step-ca, a certificate for it. Takes milliseconds.

        Args:
            key: file of the private key, made if it is not there; the certificate lies beside it, as `<key>-cert.pub`.
            validity: in the format of ssh-keygen(1) `-V`, for example `-2h:-1h` for an expired one.

        Returns:
            The path of the certificate.
        """
        if not key.exists():
            keys.make_key(key)
        return keys.sign_user_key(self.certificate_authority.authorities, key, user.name, validity)

    def id_token(self, app_password: str, user: User = CERTIFICATE_USER) -> str:
        """Exchange an app password for an id token; raise urllib.error.HTTPError if authentik refuses."""
        return self.identity_provider.id_token(app_password, user)

    def environment(self, user: User = CERTIFICATE_USER) -> dict[str, str]:
        """Return the environment variables of a dagster-sbatch deployment on this site, with a fresh API token."""
        client = self.layout.state / "client"
        token = self.authentik.create_token(user.name, "api", f"bootstrap-{secrets.token_hex(4)}")
        return {
            "SLURM_EDGE_NODE_HOST": self.login.address,
            "SLURM_EDGE_NODE_USER": user.name,
            "SLURM_EDGE_NODE_KEY_PATH": str(client / "id_musica"),
            "SLURM_DEPLOYMENT_BASE_PATH": f"{user.home}/{DEPLOYMENT_FOLDER}",
            "SLURM_PYTHON": str(interpreter.interpreter(self.layout)),
            "SLURM_PARTITION": CPU_PARTITION,
            "SLURM_QOS": f"dev_{CPU_PARTITION}",
            "SLURM_SUPERCOMPUTER_SITE": "musica",
            "DAGSTER_DEPLOYMENT": "staging_supercomputer",
            "ASC_ALLOW_HTTP": "true",
            "ASC_OIDC_CLIENT_ID": OIDC_CLIENT_ID,
            "ASC_OIDC_USERNAME": user.name,
            "ASC_OIDC_TOKEN_URL": self.identity_provider.token_url,
            "ASC_AUTHENTIK_API_BASE": self.identity_provider.url,
            "ASC_AUTHENTIK_CREDENTIALS_FILE": str(client / "musica-auth.env"),
            "ASC_AUTHENTIK_API_TOKEN": token,
            "ASC_AUTHENTIK_TOKEN_IDENTIFIER": "dagster-slurm",
            "ASC_STEP_CA_URL": self.certificate_authority.url,
            "ASC_STEP_FINGERPRINT": self.certificate_authority.fingerprint,
        }

    def login_command(self, *command: str, user: User = CERTIFICATE_USER) -> list[str]:
        """Return the command line that logs in as `user`, or runs `command`, with a new certificate of one hour."""
        if not user.certificate:
            return self.login.ssh_command(user, self.login.plain_key, *command)
        key = self.layout.state / "client" / f"id_{user.name}"
        self.mint_certificate(key, user)
        return self.login.ssh_command(user, key, *command)

    # What runs on the machines

    def run_on_login(
        self, user: User, command: str, timeout: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command as `user` on the first login node, without SSH."""
        machine = self.machines[LOGIN_NODES[0].hostname]
        return machine.run(["/bin/sh", "-c", command], user, timeout, check)

    def run_on_node(
        self, node: str, command: str, timeout: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command as root on any machine of the site."""
        return self.machines[node].run(["/bin/sh", "-c", command], timeout=timeout, check=check)

    def processes_on_login(self, user: User = CERTIFICATE_USER) -> list[LoginProcess]:
        """Return every process of a user on the two login nodes."""
        found = []
        for node in LOGIN_NODES:
            listing = self.machines[node.hostname].run(["ps", "-u", str(user.uid), "-o", "pid=,args="], check=False)
            for line in listing.stdout.splitlines():
                pid, _, command = line.strip().partition(" ")
                found.append(LoginProcess(node.hostname, int(pid), command))
        return found

    def clean_machines(self) -> None:
        """Kill every process of every user on login and compute nodes, and empty their /tmp, /dev/shm and /local."""
        uids = {user.uid for user in USERS}
        kill = f"while pids=$(ps -u {','.join(map(str, uids))} -o pid=); do kill -KILL $pids; done"
        for node in (*LOGIN_NODES, *COMPUTE_NODES):
            folders = ["/tmp", "/dev/shm", *(["/local"] if node in COMPUTE_NODES else [])]
            if not self.machines[node.hostname].is_clean(uids, folders):
                self.run_on_node(node.hostname, f"{kill}; find {' '.join(folders)} -mindepth 1 -delete")

    def squeue(self, *options: str) -> str:
        """Return what root's squeue(1) prints."""
        return self.cluster.query("squeue", *options)

    def sacct(self, *options: str) -> str:
        """Return what root's sacct(1) prints on the accounting's own machine, of all users."""
        return self.machines[DATABASE.hostname].run(["sacct", "--allusers", *options]).stdout

    def submit(self, script: str, *options: str, user: User = CERTIFICATE_USER) -> int:
        """Submit a shell script as a user, on a login node but without SSH and noise; return the job's id.

        The script begins with VANILLA.
        """
        sbatch = [str(self.layout.state / "libexec/sbatch"), "--parsable", *options, "--wrap", VANILLA + script]
        done = self.machines[LOGIN_NODES[0].hostname].run(sbatch, user)
        return int(done.stdout.strip())

    def output(self, job: int, user: User = CERTIFICATE_USER) -> str:
        """Return what a job of a user has printed, on both streams.

        Raises:
            FileNotFoundError: the job has not started, or was submitted with other options for its output.
        """
        return (self.layout.home / user.name / f"slurm-{job}.out").read_text(encoding="utf-8")

    def job_state(self, job: int) -> str:
        """Return the state of a job that slurmctld remembers, as squeue(1) prints it, for example `PENDING`."""
        return self.squeue("--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()

    def wait_for_job(self, job: int, *states: str, timeout: float = 60.0) -> None:
        """Wait until a job is in one of the states, by default COMPLETED.

        Raises:
            SiteError: it is not within `timeout` seconds; the message says in which state it is.
        """
        wanted = states or ("COMPLETED",)
        try:
            wait_until(lambda: self.job_state(job) in wanted, f"job {job} in {' or '.join(wanted)}", timeout)
        except SiteError as error:
            now = self.squeue("--noheader", "--states=all", f"--jobs={job}", "--format=%T %r").strip()
            raise SiteError(f"{error}; it is {now}") from None

    # How it is made

    def _configure(self) -> None:
        """Make the site's files, before any machine starts."""
        if self.layout.log.exists():
            shutil.rmtree(self.layout.log)
        for folder in (self.layout.etc, self.layout.run, self.layout.log):
            folder.mkdir()
        run_on_host("cp", "--archive", str(roots.root(self.layout.slurm) / "etc"), str(self.layout.machine_etc))
        # All nodes share the few CPUs of this machine: a thread that waits for others must not spin on one.
        profile = self.layout.machine_etc / "profile.d" / "threads.sh"
        profile.write_text("export OMP_WAIT_POLICY=PASSIVE\n", encoding="utf-8")
        interpreter.make(self.layout)
        self.certificate_authority.configure()
        self.cluster.configure()
        self.login.configure()
        self.storage.configure()

    def _start_identity(self) -> None:
        """Start authentik's stand-in, then step-ca, which ends where it finds no issuer."""
        self.identity_provider.start()
        self.certificate_authority.daemon.start()


def _remove_files(name: str) -> None:
    """Remove what a site that is down has left, except its logs."""
    folder = state_folder(name)
    for entry in folder.iterdir() if folder.exists() else ():
        if entry.is_dir() and entry.name != "log":
            shutil.rmtree(entry)


def _completed(layout: Layout) -> Path:
    """The file that exists once all parts of a site have been up."""
    return layout.run / "completed"
