"""MUSICA in a box: a simulated, certificate-only Slurm site of real parts, for tests and for trying things out.

Example:
    site = SimulatedSite.up("musica")
    job = site.submit("hostname", "--partition=zen4_0768", "--qos=dev_zen4_0768")
    site.wait_for_job(job)
    with site.faults.controller_down():
        ...
    SimulatedSite.down("musica")
"""

from .authentik import AuthentikControl, AuthentikServer, Disturbance, ServedRequest
from .errors import NotInstalledError, RequirementsError, SiteError
from .faults import Fault, Faults
from .layout import CERTIFICATE_USER, CPU_PARTITION, GPU_PARTITION, LOGIN_NAME, PLAIN_KEY_USER, TCSH_USER, USERS, User
from .site import VANILLA, LoginProcess, SimulatedSite
from .waiting import wait_until

__all__ = [
    "CERTIFICATE_USER",
    "CPU_PARTITION",
    "GPU_PARTITION",
    "LOGIN_NAME",
    "PLAIN_KEY_USER",
    "TCSH_USER",
    "USERS",
    "VANILLA",
    "AuthentikControl",
    "AuthentikServer",
    "Disturbance",
    "Fault",
    "Faults",
    "LoginProcess",
    "NotInstalledError",
    "RequirementsError",
    "ServedRequest",
    "SimulatedSite",
    "SiteError",
    "User",
    "wait_until",
]
