"""For tests of the credentials: settings, who works, and a process that kills itself at a chosen step."""

import os
import secrets
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import SSHCertificateBuilder, SSHCertificateType, load_ssh_private_key

from dagster_sbatch.auth.credentials_file import Credentials
from dagster_sbatch.auth.keys import certificate_path, ensure_key
from dagster_sbatch.settings import Settings
from slurm_in_a_box import CERTIFICATE_USER, AuthentikControl, SimulatedSite
from support import ROOT

USER, EMAIL, CLIENT_ID, PREFIX = "xy12345", "xy12345@sim.test", "musica-step", "dagster-slurm"
DAY = 86400.0


def environment(base_url: str, folder: Path) -> dict[str, str]:
    """The document's variables for an authentik without a CA, and without any secret."""
    return {
        "DAGSTER_DEPLOYMENT": "production_supercomputer",
        "SLURM_SUPERCOMPUTER_SITE": "musica",
        "SLURM_EDGE_NODE_HOST": "musica.test",
        "SLURM_EDGE_NODE_USER": USER,
        "SLURM_EDGE_NODE_KEY_PATH": str(folder / "id_musica"),
        "SLURM_DEPLOYMENT_BASE_PATH": "/home/xy12345/dagster-slurm",
        "ASC_OIDC_CLIENT_ID": CLIENT_ID,
        "ASC_OIDC_USERNAME": USER,
        "ASC_OIDC_TOKEN_URL": f"{base_url}/application/o/token/",
        "ASC_AUTHENTIK_API_BASE": base_url,
        "ASC_AUTHENTIK_CREDENTIALS_FILE": str(folder / "musica-auth.env"),
        "ASC_AUTHENTIK_TOKEN_IDENTIFIER": PREFIX,
        "ASC_STEP_CA_URL": "https://127.0.0.1:1",
        "ASC_STEP_FINGERPRINT": "0" * 64,
    }


def settings_of(variables: dict[str, str]) -> Settings:
    """The settings that these variables make, and nothing else."""
    return Settings.model_validate(variables)


def bootstrap_token(control: AuthentikControl) -> str:
    """An API token as a person makes it in the web interface."""
    return control.create_token(USER, "api", f"bootstrap-{secrets.token_hex(4)}")


def made_here(control: AuthentikControl) -> set[str]:
    """Identifiers of the tokens at authentik that bear our prefix."""
    return {token.identifier for token in control.tokens(USER) if token.identifier.startswith(PREFIX)}


def api_token_works(settings: Settings, value: str) -> bool:
    """Ask authentik."""
    answer = httpx.get(
        f"{settings.authentik_api_base}/api/v3/core/users/me/", headers={"Authorization": f"Bearer {value}"}
    )
    return answer.status_code == 200


def app_password_works(settings: Settings, value: str) -> bool:
    """Ask authentik."""
    form = {
        "grant_type": "client_credentials",
        "client_id": settings.oidc_client_id,
        "username": settings.oidc_username,
        "password": value,
        "scope": "openid profile email",
    }
    return httpx.post(str(settings.oidc_token_url), data=form).status_code == 200


def key_of(variables: dict[str, str]) -> Path:
    """The private key."""
    return Path(variables["SLURM_EDGE_NODE_KEY_PATH"])


def logs_in(site: SimulatedSite, variables: dict[str, str]) -> bool:
    """Whether the key and its certificate open the login node."""
    command = site.login.ssh_command(CERTIFICATE_USER, key_of(variables), "true")
    return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0


def age_certificate(site: SimulatedSite, variables: dict[str, str]) -> None:
    """Put one in the place of the certificate that is valid, and due."""
    path = site.mint_certificate(key_of(variables), validity="-50m:+10m")
    begun = time.time() - 50 * 60
    os.utime(path, (begun, begun))


def delete_token(settings: Settings, owner: Credentials, identifier: str) -> None:
    """Delete a token at authentik behind the back of whoever uses it."""
    assert owner.api_token
    url = f"{settings.authentik_api_base}/api/v3/core/tokens/{identifier}/"
    httpx.delete(url, headers={"Authorization": f"Bearer {owner.api_token.value}"}).raise_for_status()


KILLED_AT_STEP = """\
import os, pathlib, signal, sys
from resources import PROJECT
from dagster_sbatch.auth import http, refresh
from dagster_sbatch.setting_files import load_settings

left = int(sys.argv[1])

def step(function):
    def counted(*arguments, **named):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return counted

http.Http.call = step(http.Http.call)
os.fsync = step(os.fsync)
pathlib.Path.replace = step(pathlib.Path.replace)
settings = PROJECT.load_settings()
refresh(settings, rotation=sys.argv[2], certificate=sys.argv[3])
print(left)
"""
"""Arguments: how many steps (HTTP calls, syncs, renames) to allow, then the wishes of `refresh`."""


def start(program: str, variables: dict[str, str], *arguments: str) -> "subprocess.Popen[str]":
    """Start a Python program with these variables alone."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env={"PATH": os.environ["PATH"], **variables},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def release(processes: "list[subprocess.Popen[str]]") -> list[str]:
    """Let programs that read a line from stdin first begin at once; what each has said on stdout."""
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    said = []
    for process in processes:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        said.append(out.strip())
    return said


def secrets_of(control: AuthentikControl) -> set[str]:
    """Every secret that authentik has issued or was sent since its last reset."""
    found = {token.key for token in control.tokens()}
    for request in control.requests():
        found.add(request.authorization.removeprefix("Bearer "))
        found.update(urllib.parse.parse_qs(request.body).get("password", []))
        if isinstance(request.response, dict):
            found.update(str(request.response.get(name, "")) for name in ("key", "access_token", "id_token"))
    return {secret for secret in found if len(secret) > 20}


def certify(key: Path, seconds: float) -> None:
    """A certificate for so long, of no authority in particular: for where nobody logs in."""
    ensure_key(key)
    private = load_ssh_private_key(key.read_bytes(), password=None)
    assert isinstance(private, Ed25519PrivateKey)
    now = int(time.time())
    builder = SSHCertificateBuilder().public_key(private.public_key()).type(SSHCertificateType.USER)
    builder = builder.valid_principals([USER.encode()]).valid_after(now - 60).valid_before(int(now + seconds))
    certificate_path(key).write_bytes(builder.sign(Ed25519PrivateKey.generate()).public_bytes())


@contextmanager
def watch_command_lines() -> Iterator[set[str]]:
    """Collect the command lines of all processes of this machine, looked at without a pause."""
    seen: set[str] = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with suppress(OSError):
                    seen.add(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        stop.set()
        watcher.join()
