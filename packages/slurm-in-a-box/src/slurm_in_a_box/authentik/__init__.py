"""A stand-in for authentik: its token API and OIDC provider, as recorded from a real authentik 2025.12.

`AuthentikServer` runs it in a thread, on loopback and without any privilege;
`python -m slurm_in_a_box.authentik` runs it as a program of its own. `AuthentikControl` moves its clock, sets its
lifetimes, disturbs it and reads what it served.

The claims of its JWTs are those of 2026.5. Elsewhere 2026.5 differs from the recording in what no client may rely on:
an expired token stays until the background worker comes (here its first use deletes it); `view_key` of another user's
token is a 403 (here a 404); the order of `scope` in an answer is any.
"""

from .control import AuthentikControl, ServedRequest
from .disturbances import Disturbance
from .server import AuthentikServer

__all__ = ["AuthentikControl", "AuthentikServer", "Disturbance", "ServedRequest"]
