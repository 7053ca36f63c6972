"""Host keys and certificates of every kind, sshd to show them, and OpenSSH's own ssh as the reference."""

import getpass
import os
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from dagster_sbatch.settings import Settings
from dagster_sbatch.ssh import AuthenticationError, HostKeyError, client_config, connect, connection

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
needs_sshd = pytest.mark.skipif(SSHD is None, reason="sshd is not installed")


class Forge:
    """A folder of keys, each made when it is first asked for; the name says the kind: `rsa`, `ed25519-2`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd wants it, and its service makes it

    def key(self, name: str) -> Path:
        """The private key of that name, without a certificate."""
        path = self.folder / name
        if not path.exists():
            options = ["-t", name.split("-", maxsplit=1)[0], "-N", "", "-C", "", "-f", str(path)]
            subprocess.run(["ssh-keygen", "-q", *options], check=True)
        return path

    def public(self, name: str) -> str:
        """`type base64` of a key."""
        return Path(f"{self.key(name)}.pub").read_text().strip()

    def lines(self, text: str) -> str:
        """A known_hosts file, written with `<name>` in place of keys."""
        for name in {word[1:-1] for word in text.split() if word.startswith("<")}:
            text = text.replace(f"<{name}>", self.public(name))
        return text

    def certify(self, name: str, options: str) -> None:
        """Make or replace the certificate of a key: `-s authority` and further options of ssh-keygen(1)."""
        words = shlex.split(options)
        words[words.index("-s") + 1] = str(self.key(words[words.index("-s") + 1]))
        subprocess.run(["ssh-keygen", "-q", "-I", "test", *words, f"{self.key(name)}.pub"], check=True)

    def sshd(self, *names: str, certified: str = "", extra: str = "") -> list[str]:
        """The command of an sshd for one connection on its standard input, with these host keys."""
        file = self.folder / "sshd_config"
        keys = [f"HostKey {self.key(name)}" for name in names]
        if certified:
            keys.append(f"HostCertificate {self.key(certified)}-cert.pub")
        file.write_text("\n".join([*keys, "UsePAM no", "StrictModes no", "AuthorizedKeysFile none", extra]))
        assert SSHD
        return [SSHD, "-i", "-f", str(file)]


def start(sshd: list[str], processes: list[subprocess.Popen[bytes]]) -> socket.socket:
    """A connection to an sshd that is started for it and appended to the processes."""
    ours, theirs = socket.socketpair()
    with theirs:
        end = theirs.fileno()
        processes.append(subprocess.Popen(sshd, stdin=end, stdout=end, stderr=subprocess.DEVNULL))
    return ours


def openssh_trusts(sshd: list[str], known_hosts: Path, host: str, port: int, key: Path) -> bool:
    """Whether OpenSSH's ssh gets beyond the host key."""
    options = {
        "ProxyCommand": shlex.join(sshd),
        "UserKnownHostsFile": str(known_hosts),
        "GlobalKnownHostsFile": "/dev/null",
        "StrictHostKeyChecking": "yes",
        "UpdateHostKeys": "no",
        "BatchMode": "yes",
        "IdentitiesOnly": "yes",
        "IdentityFile": str(key),
    }
    arguments = [argument for name, value in options.items() for argument in ("-o", f"{name}={value}")]
    command = ["ssh", "-F", "/dev/null", *arguments, "-p", str(port), host, "true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    if "Host key verification failed" in done.stderr:
        return False
    assert "Permission denied" in done.stderr, done.stderr
    return True


def our_error(
    sshd: list[str], known_hosts: Path, host: str, port: int, key: Path, host_authorities: tuple[str, ...] = ()
) -> HostKeyError | None:
    """Why our connection does not get beyond the host key, if it does not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(known_hosts.parent))
        patch.setattr(client_config, "SYSTEM_KNOWN_HOSTS", Path("/dev/null"))
        folder = known_hosts.parent / ".ssh"
        folder.mkdir(exist_ok=True)
        (folder / "config").write_text(f"UserKnownHostsFile {known_hosts}\n")
        processes: list[subprocess.Popen[bytes]] = []
        patch.setattr(connection, "_connect_tcp", lambda _: start(sshd, processes))
        settings = Settings(
            SLURM_EDGE_NODE_HOST=host,
            SLURM_EDGE_NODE_PORT=port,
            SLURM_EDGE_NODE_USER=getpass.getuser(),
            SLURM_EDGE_NODE_KEY_PATH=key,
        )
        try:
            connect(settings, lambda _: None, host_authorities).close()
        except HostKeyError as error:
            return error
        except AuthenticationError:
            return None  # it has got so far
        finally:
            for process in processes:
                process.wait(30)
    raise AssertionError("sshd has let somebody in whom it does not know")
