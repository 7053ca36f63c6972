"""Names, addresses, folders and users of a simulated site. No side effects."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import SiteError

CLUSTER_NAME = "musica"
CPU_PARTITION = "zen4_0768"
GPU_PARTITION = "zen4_0768_h100x4"
LOGIN_NAME = "musica.sim"
"""The name that every host certificate carries beside the addresses."""

DEPLOYMENT_FOLDER = "dagster-slurm"
"""Folder in a user's home that SLURM_DEPLOYMENT_BASE_PATH names."""

PROJECT_FOLDER = "fs71234"
"""Folder of the users' project below /data and /scratch."""


@dataclass(frozen=True)
class User:
    """An account on the login and compute nodes.

    Attributes:
        certificate: logs in with certificates only; otherwise with the plain key in its `authorized_keys`.
    """

    name: str
    uid: int
    shell: str = "/bin/bash"
    certificate: bool = True

    @property
    def home(self) -> str:
        """Home folder as the machines of the site see it."""
        return f"/home/{self.name}"

    @property
    def data(self) -> str:
        """$DATA as the machines of the site see it."""
        return f"/data/{PROJECT_FOLDER}/{self.name}"

    @property
    def scratch(self) -> str:
        """$SCRATCH as the machines of the site see it."""
        return f"/scratch/{PROJECT_FOLDER}/{self.name}"

    @property
    def email(self) -> str:
        """Address in the identity provider; step-ca derives the login name from what is before the `@`."""
        return f"{self.name}@sim.test"


CERTIFICATE_USER = User("xy12345", 20001)
PLAIN_KEY_USER = User("pk67890", 20002, certificate=False)
TCSH_USER = User("tc24680", 20003, shell="/bin/tcsh")
USERS = (CERTIFICATE_USER, PLAIN_KEY_USER, TCSH_USER)


@dataclass(frozen=True)
class MachineName:
    """A machine of the site: its hostname, and the last number of its address.

    Attributes:
        for_users: it has the users' homes and this project's Python, as a login or compute node has.
        of_host: it has the host's file system, since it runs this project's code. The others have one of Debian with
            Slurm (roots.py), and a /tmp of their own.
    """

    hostname: str
    number: int
    for_users: bool = True
    of_host: bool = False


CONTROLLER = MachineName("musica-ctl", 2, for_users=False)
DATABASE = MachineName("musica-db", 3, for_users=False)
IDENTITY = MachineName("auth", 4, for_users=False, of_host=True)
FRONT = MachineName("musica", 9, for_users=False, of_host=True)
LOGIN_NODES = (MachineName("login01", 11), MachineName("login02", 12))
CPU_NODES = tuple(MachineName(f"n400{i}", 100 + i) for i in (1, 2, 3, 4))
GPU_NODES = tuple(MachineName(f"g400{i}", 200 + i) for i in (1, 2))
COMPUTE_NODES = CPU_NODES + GPU_NODES
MACHINES = (CONTROLLER, DATABASE, IDENTITY, FRONT, *LOGIN_NODES, *COMPUTE_NODES)

AUTHENTIK_PORT = 9300
STEP_CA_PORT = 9000
OIDC_APPLICATION = "musica-step"
OIDC_CLIENT_ID = "musica-step"


def state_base() -> Path:
    """Folder below which every site of this machine keeps its state: $SIMULATED_SITE_STATE, or one in /var/lib.

    Raises:
        SiteError: it lies below a folder that the site's machines have for themselves, and could not see.
    """
    base = Path(os.environ.get("SIMULATED_SITE_STATE", "/var/lib/simulated-site")).resolve()
    for hidden in ("/tmp", "/run", "/home", "/dev/shm", "/data", "/scratch", "/local"):
        if base.is_relative_to(hidden):
            raise SiteError(f"SIMULATED_SITE_STATE must not lie below {hidden}: each simulated machine has its own")
    return base


@dataclass(frozen=True)
class Layout:
    """Where a site of a given name keeps what it makes.

    Attributes:
        name: unique on one machine; lower-case letters, digits and `-`.
        subnet: third number of its addresses, 10.77.<subnet>.0/24.
        slurm: version of Slurm, a key of roots.SUITES.
    """

    name: str
    subnet: int
    slurm: str

    @property
    def state(self) -> Path:
        """Folder of everything that the site writes; root's, readable by all of its users."""
        return state_folder(self.name)

    @property
    def home(self) -> Path:
        """The homes as seen from the host; /home on the site's machines."""
        return self.state / "home"

    @property
    def data(self) -> Path:
        """What is /data on the site's machines, as seen from the host."""
        return self.state / "data"

    @property
    def scratch(self) -> Path:
        """What is /scratch on the site's machines, as seen from the host."""
        return self.state / "scratch"

    @property
    def epilog(self) -> Path:
        """The program that slurmd runs when a job has ended."""
        return self.etc / "epilog"

    @property
    def etc(self) -> Path:
        """Keys, and configuration that is not below `machine_etc`."""
        return self.state / "etc"

    @property
    def machine_etc(self) -> Path:
        """What the machines have as /etc: a copy of their root's, with the site's users and Slurm's files."""
        return self.state / "machine-etc"

    @property
    def run(self) -> Path:
        """Pids, sockets and data of the running daemons."""
        return self.state / "run"

    @property
    def images(self) -> Path:
        """Images of containers; the machines see this folder under the same path."""
        return self.state / "images"

    @property
    def log(self) -> Path:
        """Logs; the only folder that outlives the site, for reading after a failure."""
        return self.state / "log"

    @property
    def bridge(self) -> str:
        """Network interface that joins the machines; its address on the host is number 1."""
        return f"sim{self.subnet}"

    def address(self, number: int) -> str:
        """IPv4 address of the machine with that number."""
        return f"10.77.{self.subnet}.{number}"


def state_folder(name: str) -> Path:
    """Folder of the site of that name; raises SiteError for a name that cannot be one."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,30}", name):
        raise SiteError(f"a site's name consists of lower-case letters, digits and `-`, at most 31: {name!r}")
    return state_base() / name
