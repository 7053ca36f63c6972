"""Renew access when that is due, or asked for: under a lock, after the files were read again."""

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from dagster_sbatch import clock
from dagster_sbatch.auth.access_errors import AccessError, UnavailableError
from dagster_sbatch.auth.credentials_file import explained
from dagster_sbatch.auth.keys import Certificate
from dagster_sbatch.auth.refresher import Refresher, Report, When
from dagster_sbatch.auth.ways import read_access
from dagster_sbatch.settings import Settings

LOCK_SECONDS = 150.0
"""Longer than a refresh can take: all calls together 60 s (`http.BUDGET_SECONDS`), the last one a little more."""
LOCK_SECONDS_WITH_CERTIFICATE, POLL_SECONDS = 5.0, 0.05
REFUSED_AGE = timedelta(minutes=15)
"""A younger certificate that is refused is not replaced: the next one would be refused, too."""

_log = logging.getLogger(__name__)


@explained()
def ensure_certificate(settings: Settings) -> Certificate | None:
    """Return a valid certificate to connect with, renewing it first if that is due.

    While it is not due, this only reads files. A renewal that fails is a warning as long as the certificate is valid,
    and is not retried for a minute or more. Without a valid certificate, all processes together retry once in 2, 4, 8
    ... seconds, 60 at most; meanwhile each raises the same error.
    Returns the certificate; None on the login node, and where plain keys are used: no certificate, and no ASC_ variable
    is set.
    Raises BootstrapError: there is no way to get one; known from files alone, before any network.
    Raises AccessError: there is none now; `temporary` says whether a retry may help. Never an OSError: the caller would
    take that for a lost connection.
    """
    if settings.on_login_node:
        return None
    access = read_access(settings)
    certificate = access.valid_certificate
    if certificate and (not access.certificate_due or not access.renewable or access.pausing("certificate")):
        return certificate
    report = refresh(settings, patient=True)
    for warning in report.warnings:
        _log.warning("%s", warning)
    return report.certificate


def replace_refused_certificate(settings: Settings, refused: object) -> bool:
    """Replace a valid certificate that a server has refused, and return whether there is another one.

    The centre may have revoked it, changed the key of its authority, or the user's login name.

    `refused`: the certificate with which the client tried to log in; None if that is not known.
    """
    if settings.edge_node_key_path is None:  # a key of ~/.ssh/config, which nothing renews
        return False
    access = read_access(settings)
    found = access.valid_certificate
    if found and refused and found != refused:  # another process has replaced it
        return True
    if found and access.now - found.obtained >= REFUSED_AGE and not access.pausing("certificate"):
        with suppress(AccessError):
            return refresh(settings, refused=found, patient=True).certificate != found
    return False


@explained()
def refresh(
    settings: Settings,
    rotation: When = "due",
    certificate: When = "due",
    *,
    refused: Certificate | None = None,
    patient: bool = False,
) -> Report:
    """Replace the secrets (`rotation`) and the certificate as asked for, one process at a time.

    `refused`: a certificate that a server has refused: it is replaced, unless another process has done that. `patient`:
    without a certificate that works, raise the error of the last try if that is too recent to try again.
    Raises BootstrapError: there is no way to get a certificate, and none is valid, or one was asked for `now`.
    Raises AccessError: a part that was asked for `now` failed, or there is no certificate that works.
    """
    if settings.on_login_node:
        return Report()
    access = read_access(settings)
    needed = access.valid_certificate in (None, refused) or "now" in (rotation, certificate)
    if access.plain_key:
        if rotation == "now":
            raise AccessError(f"{access.key} is a plain key, and no ASC_ variable is set: nothing to replace")
        return Report()
    if not access.renewable and (access.valid_certificate in (None, refused) or certificate == "now"):
        raise access.explain({})
    try:
        seconds = LOCK_SECONDS if needed else LOCK_SECONDS_WITH_CERTIFICATE
        with explained(settings.credentials_file), refresh_lock(settings.credentials_file, seconds):
            return Refresher(settings).run(rotation, certificate, refused, access.now if patient else None)
    except AccessError as error:  # of the lock, or of a file
        if needed:
            raise
        return Report(access.valid_certificate, warnings=[f"{error}. The certificate is still valid"])


@contextmanager
def refresh_lock(credentials_file: Path, seconds: float) -> Iterator[None]:
    """Hold the lock `<credentials file>.lock`; the system releases it when the process ends.

    Raises UnavailableError: another process holds it for longer; the text names it.
    Raises OSError: the lock file cannot be written.
    """
    from filelock import FileLock, Timeout

    path = credentials_file.with_name(credentials_file.name + ".lock")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = FileLock(
            path, timeout=seconds, mode=0o600, poll_interval=POLL_SECONDS, on_acquired=_sign, fallback_to_soft=False
        )
        held = lock.acquire()
    except Timeout:
        holder = path.read_text().strip() or "its name is not known"
        raise UnavailableError(
            f"Another process has been refreshing the credentials for more than {seconds:.0f} s: {holder}. "
            "It times out by itself after some minutes; if it does not, end that process"
        ) from None
    with held:
        yield


def _sign(descriptor: int) -> None:
    """Write into the lock file who holds it: the program's name without its arguments, which might be secret."""
    program = Path(sys.argv[0]).name or "python"
    text = f"process {os.getpid()} ({program}) on {socket.gethostname()} since {clock.written(clock.now())}\n"
    with suppress(OSError):  # a full disk: the lock holds without a name
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
