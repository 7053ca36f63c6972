"""The site's identity provider: authentik's stand-in as a daemon on one of its machines."""

import json
import sys
import urllib.parse
import urllib.request
from pathlib import Path

from .authentik import AuthentikControl
from .daemons import Daemon
from .layout import AUTHENTIK_PORT, CERTIFICATE_USER, OIDC_APPLICATION, OIDC_CLIENT_ID, TCSH_USER, Layout, User
from .machines import Machine

_IMPORT_ROOT = Path(__file__).parents[1]
_USERS = (CERTIFICATE_USER, TCSH_USER)


class IdentityProvider:
    """The stand-in as the site runs it.

    Attributes:
        url: the value of ASC_AUTHENTIK_API_BASE.
        token_url: the value of ASC_OIDC_TOKEN_URL.
        issuer: the issuer in its tokens.
        control: moves its clock, sets its lifetimes, disturbs it, returns what it served.
        daemon: its process.
    """

    def __init__(self, layout: Layout, machine: Machine) -> None:
        self.url = f"http://{machine.address}:{AUTHENTIK_PORT}"
        self.token_url = f"{self.url}/application/o/token/"
        self.issuer = f"{self.url}/application/o/{OIDC_APPLICATION}/"
        self.control = AuthentikControl(self.url)
        self._folder = layout.run / "authentik"
        environment = ["env", f"PYTHONPATH={_IMPORT_ROOT}", "PYTHONDONTWRITEBYTECODE=1"]
        program = [sys.executable, "-m", f"{__package__}.authentik", "--folder", str(self._folder)]
        address = ["--host", machine.address, "--port", str(AUTHENTIK_PORT)]
        self.daemon = Daemon(machine, "authentik", [*environment, *program, *address], self._answers)

    def start(self) -> None:
        """Start it, and give it its users the first time."""
        first_time = not self._folder.exists()
        self.daemon.start()
        if first_time:
            for user in _USERS:
                self.control.create_user(user.name, user.email)
            self.control.create_user("akadmin", "admin@sim.test", superuser=True)

    def id_token(self, app_password: str, user: User) -> str:
        """Exchange an app password for an id token, as a client without a browser does.

        Raises:
            urllib.error.HTTPError: authentik refused, or fails.
        """
        form = {
            "grant_type": "client_credentials",
            "client_id": OIDC_CLIENT_ID,
            "username": user.name,
            "password": app_password,
            "scope": "openid email profile",
        }
        body = urllib.parse.urlencode(form).encode()
        with urllib.request.urlopen(self.token_url, body, timeout=30) as answer:
            token: str = json.load(answer)["id_token"]
        return token

    def _answers(self) -> bool:
        """Whether it serves. The control is never disturbed, and its requests are not in the record."""
        try:
            self.control.tokens()
        except OSError:
            return False
        return True
