"""A stand-in for authentik: its token API and OIDC provider, as recorded from a real authentik 2025.12.

`AuthentikServer` runs it within a program, on loopback and without any privilege;
`python -m tests.simulated_site.authentik` runs it as a program of its own. `AuthentikControl` moves its clock, sets its
lifetimes, disturbs it and looks at what it served.
"""

from .control import AuthentikControl, ServedRequest
from .disturbances import Disturbance
from .server import AuthentikServer

__all__ = ["AuthentikControl", "AuthentikServer", "Disturbance", "ServedRequest"]
