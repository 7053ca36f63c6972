"""The login nodes: accounts and homes, sshd that takes certificates, host certificates, and the relay in front."""

import functools
import os
import shutil
import socket
import sys
from pathlib import Path

from . import keys, roots
from .daemons import Daemon
from .keys import Authorities
from .layout import FRONT, LOGIN_NAME, LOGIN_NODES, MACHINES, PLAIN_KEY_USER, USERS, Layout, User
from .machines import Machine
from .relay import RelayControl

SSH_PORT = 22
_BASHRC = """\
# Prints on both streams in every shell, also one that runs a single command: so do some real ones.
echo "* MUSICA (simulated): your project p71234 has 1234.5 node hours left *"
echo "* maintenance in 31 days *" >&2
"""
DEVICE_LOGIN = "https://auth.asc.ac.at/device?code=ABCD-1234"
_PAM = """\
auth required pam_echo.so file=/etc/security/device-login
auth required pam_unix.so
account required pam_permit.so
session required pam_permit.so
"""
"""Shows a link and waits for an answer; since no account has a password, none is right."""
_RELAY_PROGRAM = Path(__file__).parent / "relay.py"


class Login:
    """The login nodes of a site, and the address in front of them.

    Attributes:
        address: reaches either login node at random, port 22.
        known_hosts: file with the one `@cert-authority` line for `address`, the login nodes' own and LOGIN_NAME.
        plain_key: private key of the user who logs in without a certificate.
        relay: disturbs the connections from `address` to the login nodes.
        daemons: sshd of each login node, by hostname, and `relay`.
    """

    def __init__(self, layout: Layout, machines: dict[str, Machine], authorities: Authorities) -> None:
        self._layout = layout
        self._authorities = authorities
        self._client = layout.state / "client"
        self.address = machines[FRONT.hostname].address
        self.known_hosts = self._client / "known_hosts"
        self.plain_key = self._client / "id_plain"
        control = layout.run / "relay.sock"
        self.relay = RelayControl(control)
        backends = [f"{machines[node.hostname].address}:{SSH_PORT}" for node in LOGIN_NODES]
        relay = [
            sys.executable,
            str(_RELAY_PROGRAM),
            "--listen",
            f"{self.address}:{SSH_PORT}",
            "--control",
            str(control),
        ]
        self.daemons = {"relay": Daemon(machines[FRONT.hostname], "relay", [*relay, *backends], self._relay_answers)}
        for node in LOGIN_NODES:
            machine = machines[node.hostname]
            command = ["/usr/sbin/sshd", "-D", "-e", "-f", str(self._sshd_folder(machine) / "sshd_config")]
            ready = functools.partial(_greets, machine.address)
            self.daemons[node.hostname] = Daemon(machine, f"sshd-{node.hostname}", command, ready)
        self._machines = machines

    def configure(self) -> None:
        """Write accounts, keys and sshd's configuration."""
        self._write_accounts()
        self._client.mkdir()
        keys.make_key(self.plain_key)
        for path in (self._client, self.plain_key):
            os.chown(path, int(os.environ.get("SUDO_UID", "0")), -1)  # who starts the site with sudo is its client
        for node in LOGIN_NODES:
            self._configure_sshd(self._machines[node.hostname])
        etc = self._layout.machine_etc
        (etc / "pam.d" / "sshd").write_text(_PAM, encoding="ascii")
        (etc / "security" / "device-login").write_text(f"Open this link to log in:\n{DEVICE_LOGIN}\n", encoding="ascii")
        names = ",".join([self.address, LOGIN_NAME, *(self._machines[node.hostname].address for node in LOGIN_NODES)])
        authority = Path(f"{self._authorities.host_key}.pub").read_text(encoding="utf-8")
        self.known_hosts.write_text(f"@cert-authority {names} {authority}", encoding="utf-8")

    def start(self) -> None:
        """Start sshd on both login nodes, and the relay."""
        for daemon in self.daemons.values():
            daemon.launch()
        for daemon in self.daemons.values():
            daemon.wait_ready()

    def restore_homes(self) -> None:
        """Empty every home and put back what a new account has."""
        for user in USERS:
            home = self._layout.home / user.name
            home.mkdir(mode=0o700, exist_ok=True)
            for entry in home.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
            (home / ".bashrc").write_text(_BASHRC, encoding="utf-8")
            (home / ".ssh").mkdir(mode=0o700)
            if not user.certificate:
                shutil.copy(f"{self.plain_key}.pub", home / ".ssh/authorized_keys")
            for path in (home, *home.rglob("*")):
                os.chown(path, user.uid, user.uid)

    def remove_credentials(self) -> None:
        """Remove the keys, certificates and credentials that clients have left in the site's folder for them."""
        for path in self._client.iterdir():
            if path in (self.known_hosts, self.plain_key, self.plain_key.with_name("id_plain.pub")):
                continue
            if path.is_dir():
                shutil.rmtree(path)  # the `step` client makes ~/.step
            else:
                path.unlink()

    def ssh_command(self, user: User, key: Path, *command: str) -> list[str]:
        """Return the command line of OpenSSH's client, with strict host-key checking against `known_hosts`."""
        options = {
            "User": user.name,
            "IdentityFile": str(key),
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": str(self.known_hosts),
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes",
            "BatchMode": "yes",
            "ConnectTimeout": "10",
            "LogLevel": "ERROR",
        }
        arguments = [argument for name, value in options.items() for argument in ("-o", f"{name}={value}")]
        return ["ssh", "-F", "/dev/null", *arguments, self.address, *command]

    def _relay_answers(self) -> bool:
        try:
            self.relay.send()
        except OSError:
            return False
        return True

    def _write_accounts(self) -> None:
        """Write the machines' names, and add the site's users to the accounts of the host."""
        etc = self._layout.machine_etc
        hosts = "".join(f"{self._layout.address(m.number)} {m.hostname}\n" for m in MACHINES)
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{self._layout.address(FRONT.number)} {LOGIN_NAME}\n{hosts}")
        lines = {
            "passwd": [f"{user.name}:x:{user.uid}:{user.uid}::{user.home}:{user.shell}\n" for user in USERS],
            "group": [f"{user.name}:x:{user.uid}:\n" for user in USERS],
            # `*` and not `!`: no password will ever match, but the account is not locked.
            "shadow": [f"{user.name}:*:19000:0:99999:7:::\n" for user in USERS],
        }
        for name, added in lines.items():
            with (etc / name).open("a", encoding="utf-8") as output:
                output.writelines(added)

    def _sshd_folder(self, machine: Machine) -> Path:
        return self._layout.etc / "ssh" / machine.hostname

    def _configure_sshd(self, machine: Machine) -> None:
        folder = self._sshd_folder(machine)
        folder.mkdir(parents=True, exist_ok=True)
        key = folder / "ssh_host_ed25519_key"
        keys.make_key(key)
        keys.sign_host_key(self._authorities, key, [LOGIN_NAME, self.address, machine.address, machine.hostname])
        # OpenSSH 9.8 and newer refuses an address after failed logins, and here all have the relay's.
        penalties = (roots.root(self._layout.slurm) / "usr/lib/openssh/sshd-session").exists()
        (folder / "sshd_config").write_text(f"""\
{"PerSourcePenalties no" if penalties else ""}
Port {SSH_PORT}
ListenAddress {machine.address}
PidFile /run/sshd.pid
HostKey {key}
HostCertificate {key}-cert.pub
# The principal of a certificate is the login name: no AuthorizedPrincipalsFile.
TrustedUserCAKeys {self._authorities.user_key}.pub
AuthorizedKeysFile none
PasswordAuthentication no
# Who shows no valid certificate is asked to open a link.
KbdInteractiveAuthentication yes
UsePAM yes
PermitRootLogin no
AllowUsers {" ".join(user.name for user in USERS)}
LogLevel VERBOSE
Subsystem sftp internal-sftp
Match User {PLAIN_KEY_USER.name}
    AuthorizedKeysFile .ssh/authorized_keys
""")


def _greets(address: str) -> bool:
    """Whether an SSH server says its name there; an open port alone is not enough."""
    try:
        with socket.create_connection((address, SSH_PORT), timeout=5) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False
