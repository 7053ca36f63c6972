"""A Slurm cluster on one machine, for tests: real programs in namespaces, modelled on MUSICA, with faults on request.

Example:
    with SimulatedSite.temporary() as site:
        job = site.submit("hostname", "--partition=zen4_0768", "--qos=zen4_0768")
        site.wait_for_job(job)
        print(site.output(job))
        with site.faults.controller_down():
            ...
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
