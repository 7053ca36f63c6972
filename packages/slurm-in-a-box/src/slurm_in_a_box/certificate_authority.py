"""The site's step-ca: the real program, with authentik's stand-in as its OIDC provisioner."""

import json
import ssl
import subprocess
import urllib.request
from pathlib import Path

from .daemons import Daemon
from .keys import Authorities
from .layout import CERTIFICATE_USER, OIDC_CLIENT_ID, STEP_CA_PORT, Layout
from .machines import Machine
from .smallstep import Programs

DEFAULT_VALIDITY = "16h"
_SHORTEST, _LONGEST = "5s", "24h"


class CertificateAuthority:
    """step-ca as user CA.

    Attributes:
        url: the value of ASC_STEP_CA_URL.
        daemon: its process.
        step: path of the real `step` client.
    """

    def __init__(self, layout: Layout, machine: Machine, programs: Programs, issuer: str) -> None:
        self._folder = layout.etc / "step-ca"
        self._database = layout.run / "step-ca"
        self._issuer = issuer
        self._address = machine.address
        self.authorities = Authorities(layout.etc / "keys")
        self.url = f"https://{machine.address}:{STEP_CA_PORT}"
        self.step = programs.step
        command = [str(programs.step_ca), str(self._configuration)]
        self.daemon = Daemon(machine, "step-ca", ["env", f"STEPPATH={self._folder}", *command], self._healthy)

    @property
    def fingerprint(self) -> str:
        """The value of ASC_STEP_FINGERPRINT."""
        return self.authorities.fingerprint

    def configure(self, validity: str = DEFAULT_VALIDITY) -> None:
        """Write its configuration.

        Args:
            validity: validity of a certificate for which the client requests none, `5s` to `24h`.
        """
        self.authorities.create()
        self._folder.mkdir(exist_ok=True)
        provisioner = {
            "type": "OIDC",
            "name": "authentik",
            "clientID": OIDC_CLIENT_ID,
            "clientSecret": "",
            "configurationEndpoint": f"{self._issuer}.well-known/openid-configuration",
            "claims": {
                "enableSSHCA": True,
                "minUserSSHCertDuration": _SHORTEST,
                "maxUserSSHCertDuration": _LONGEST,
                "defaultUserSSHCertDuration": validity,
            },
        }
        keys = self.authorities
        configuration = {
            "root": str(keys.root_certificate),
            "crt": str(keys.intermediate_certificate),
            "key": str(keys.folder / "intermediate_ca_key"),
            "address": f"{self._address}:{STEP_CA_PORT}",
            "dnsNames": [self._address],
            "ssh": {"hostKey": str(keys.host_key), "userKey": str(keys.user_key)},
            "logger": {"format": "text"},
            "db": {"type": "badgerv2", "dataSource": str(self._database), "badgerFileLoadingMode": ""},
            "authority": {"provisioners": [provisioner]},
            "tls": {"minVersion": 1.2, "maxVersion": 1.3, "renegotiation": False},
        }
        self._configuration.write_text(json.dumps(configuration, indent=2), encoding="utf-8")

    def set_validity(self, validity: str) -> None:
        """Issue certificates with this validity from now on, `5s` to `24h`.

        A change restarts step-ca; like any step-ca, it then refuses tokens that were issued before.
        """
        before = self._configuration.read_text(encoding="utf-8")
        self.configure(validity)
        if self._configuration.read_text(encoding="utf-8") != before:
            self.daemon.stop()
        self.daemon.start()

    def sign_with_step(
        self, key: Path, token: str, email: str = CERTIFICATE_USER.email
    ) -> subprocess.CompletedProcess[str]:
        """Make a new key and certificate with the real `step` client, as a user without a browser would.

        The token is passed in the environment: in an argument, every user of the machine could read it.
        """
        options = ["--ca-url", self.url, "--root", str(self.authorities.root_certificate)]
        return subprocess.run(
            [self.step, "ssh", "certificate", email, key, "--no-password", "--insecure", "--force", *options],
            env={"PATH": "/usr/bin:/bin", "HOME": str(key.parent), "STEP_TOKEN": token},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    @property
    def _configuration(self) -> Path:
        return self._folder / "ca.json"

    def _healthy(self) -> bool:
        context = ssl.create_default_context(cafile=str(self.authorities.root_certificate))
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5, context=context) as answer:
                return bool(json.load(answer) == {"status": "ok"})
        except (OSError, ValueError):
            return False
