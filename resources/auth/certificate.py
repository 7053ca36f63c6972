"""The user certificate and its key: their files on this machine."""

import shlex
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from resources.auth import clock
from resources.auth.errors import AccessError, ClockError, MisconfiguredError, UnsafeFileError
from resources.auth.files import replace_file
from resources.settings import Settings

_FOR_EVER = datetime(9999, 1, 1, tzinfo=UTC)


class CertificateError(AccessError):
    """There is no certificate that belongs to the key; the text says what is there instead."""


@dataclass(frozen=True)
class Certificate:
    """An SSH user certificate.

    Attributes:
        path: its file, `<key>-cert.pub`.
        principals: the login names that it is for.
        valid_after: when its validity begins.
        valid_before: when its validity ends.
        obtained: when it was written here, within its validity; step-ca dates the begin a minute back.
    """

    path: Path
    principals: tuple[str, ...]
    valid_after: datetime
    valid_before: datetime
    obtained: datetime

    def valid(self, now: datetime) -> bool:
        """Whether a server with the same clock accepts it now."""
        return self.valid_after <= now < self.valid_before

    def renew_at(self, skew_minutes: float | None) -> datetime:
        """From when on it should be replaced: two thirds of its life, or so many minutes before its end.

        Args:
            skew_minutes: ASC_STEP_REFRESH_SKEW; at most half of its life counts.
        """
        life = self.valid_before - self.obtained
        if skew_minutes is None:
            return self.obtained + life * 2 / 3
        return self.valid_before - min(timedelta(minutes=skew_minutes), life / 2)


def certificate_path(key: Path) -> Path:
    """Where OpenSSH looks for the certificate of a private key."""
    return key.with_name(key.name + "-cert.pub")


def public_path(key: Path) -> Path:
    """Where the public half of a private key lies."""
    return key.with_name(key.name + ".pub")


def read_certificate(key: Path) -> Certificate:
    """The certificate beside a private key, valid or not.

    Raises:
        CertificateError: there is none, or it is not of this key, or not a user certificate.
    """
    path, public = certificate_path(key), public_path(key)
    try:
        if not key.is_file():
            raise CertificateError(f"{key} does not exist, so {path.name} would be of no use")
        if key.stat().st_mode & 0o077:
            raise CertificateError(f"{key} can be read by others:  chmod 600 {shlex.quote(str(key))}")
        line, written = path.read_bytes(), path.stat().st_mtime
        known = public.read_text(errors="replace") if public.is_file() else ""
    except OSError as error:
        raise CertificateError(f"{path}: {(error.strerror or 'cannot be read').lower()}") from None
    certificate, of_key = parse_certificate(line, path, datetime.fromtimestamp(written, UTC))
    if known and _fields(known) != of_key:
        raise CertificateError(f"{path} is of another key than {public}")
    return certificate


def parse_certificate(line: bytes, path: Path, written: datetime) -> tuple[Certificate, tuple[str, ...]]:
    """The certificate in an OpenSSH public line, and type and base64 of the public key that it certifies.

    Args:
        line: `<type> <base64> [comment]`.
        path: where it lies or will lie.
        written: when it was put there.

    Raises:
        CertificateError: it is something else.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        PublicFormat,
        SSHCertificate,
        SSHCertificateType,
        load_ssh_public_identity,
    )

    try:
        parsed = load_ssh_public_identity(line)
    except (ValueError, UnsupportedAlgorithm):
        raise CertificateError(f"{path} does not hold an SSH certificate") from None
    if not isinstance(parsed, SSHCertificate) or parsed.type is not SSHCertificateType.USER:
        raise CertificateError(f"{path} does not hold an SSH user certificate")
    begin, end = _time(parsed.valid_after), _time(parsed.valid_before)
    names = tuple(name.decode(errors="replace") for name in parsed.valid_principals)
    public = parsed.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    return Certificate(path, names, begin, end, min(max(begin, written), end)), _fields(public)


def ensure_key(key: Path) -> str:
    """The public line of a private key, which is made (ed25519, mode 0600, no passphrase) only if there is none.

    Raises:
        UnsafeFileError: the key can be read by others, or the files cannot be written.
        MisconfiguredError: its public half is missing and cannot be had, or is of another key.
    """
    name = shlex.quote(str(key))
    if not key.exists():
        if key.is_symlink():
            raise UnsafeFileError(f"{key} is a symbolic link to nowhere: rm {name}")
        if public_path(key).exists():
            raise MisconfiguredError(
                f"{public_path(key)} is there without its private key {key}: move it out of the way"
            )
        return _make_key(key)
    if key.stat().st_mode & 0o077:
        raise UnsafeFileError(f"{key} can be read by others:  chmod 600 {name}")
    public, derived = public_path(key), _derive_public(key)
    repair = f"ssh-keygen -y -f {name} > {shlex.quote(str(public))}"
    if not public.is_file():
        if derived is None:
            raise MisconfiguredError(f"{public} is missing, and {key} does not open without a passphrase:  {repair}")
        return derived
    line = public.read_text(errors="replace")
    if derived is not None and _fields(line) != _fields(derived):
        raise MisconfiguredError(f"{public} is not the public half of {key}:  {repair}")
    return line.strip()


def write_certificate(key: Path, line: str) -> Certificate:
    """Check a new certificate for a key, and put it in the place of the old one.

    Raises:
        CertificateError: it is not a user certificate of this key; the old one stays.
    """
    path = certificate_path(key)
    _, of_key = parse_certificate(line.encode(), path, clock.now())
    if of_key != _fields(ensure_key(key)):
        raise CertificateError(
            "the certificate authority has certified another key than the one that was sent. Tell the centre"
        )
    replace_file(path, line.strip() + "\n", mode=0o644)
    return read_certificate(key)


def principals_problem(certificate: Certificate | None, settings: Settings) -> str:
    """Return a warning for a certificate that does not carry the login name; empty if it does."""
    if certificate is None or settings.edge_node_user in certificate.principals:
        return ""
    return (
        f"the certificate is for the login names {', '.join(certificate.principals) or '(none)'}, not for "
        f"SLURM_EDGE_NODE_USER={settings.edge_node_user}: the login node may refuse it. Set SLURM_EDGE_NODE_USER to "
        "one of those, or ask the centre to correct your email at authentik"
    )


def check_own_clock(certificate: Certificate) -> None:
    """Raise ClockError if a new certificate is not valid by this machine's clock."""
    now = clock.now()
    if not certificate.valid(now):
        raise ClockError(
            f"the new certificate is valid from {clock.written(certificate.valid_after)} until "
            f"{clock.written(certificate.valid_before)}, but this machine has {clock.written(now)}: set its clock"
        )


def _make_key(key: Path) -> str:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    made = Ed25519PrivateKey.generate()
    private = made.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()
    public = made.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode() + " musica-pipelines"
    replace_file(key, private)
    replace_file(public_path(key), public + "\n", mode=0o644)
    return public


def _derive_public(key: Path) -> str | None:
    """The public line, from the private key; None if that has a passphrase or a form that is not understood."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key

    try:
        private = load_ssh_private_key(key.read_bytes(), password=None)
        return private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None
    except OSError as error:
        raise UnsafeFileError(f"{key} cannot be read: {error.strerror}") from None


def _fields(line: str) -> tuple[str, ...]:
    """Type and base64 of a public line, without its comment."""
    return tuple(line.split()[:2])


def _time(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC) if seconds < _FOR_EVER.timestamp() else _FOR_EVER
