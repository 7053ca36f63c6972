"""The user's private key and the certificate beside it; OpenSSH certificates of users and hosts (PROTOCOL.certkeys)."""

import base64
import hashlib
import shlex
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from dagster_sbatch import clock
from dagster_sbatch.atomic_write import replace_file
from dagster_sbatch.auth.access_errors import AccessError, ClockError, UnsafeFileError
from dagster_sbatch.errors import printable
from dagster_sbatch.settings import Settings

if TYPE_CHECKING:
    from cryptography.hazmat.primitives import serialization

_FOREVER = datetime(9999, 1, 1, tzinfo=UTC)
_ALWAYS = datetime.fromtimestamp(0, UTC)


@dataclass(frozen=True)
class Certificate:
    """What a certificate says; `signature_problem` tells whether its authority has really said so."""

    for_host: bool  # whether it is a host's certificate rather than a user's
    key: bytes  # the public key that it certifies, as sent over the wire (RFC 4253, section 6.6)
    authority: bytes  # the public key that signed it, likewise
    principals: tuple[str, ...]  # the login names or host names that it is for
    valid_after: datetime  # when its validity begins
    valid_before: datetime  # when its validity ends; in the year 9999 if it does not
    critical_options: tuple[str, ...]  # names of restrictions that whoever accepts it must know
    signature_problem: str  # why the signature does not count, or empty
    # When it was written to its file here, within its validity; step-ca dates the begin a minute back
    obtained: datetime

    @classmethod
    def parse(cls, line: bytes, written: datetime = _ALWAYS) -> "Certificate | None":
        """Read a certificate from `type base64 [comment]`; None for a plain public key.

        `written`: when it was written to its file.
        Raises ValueError: it is damaged, or of a type that is not supported.
        """
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import (
            SSHCertificate,
            SSHCertificateType,
            load_ssh_public_identity,
        )

        try:
            identity = load_ssh_public_identity(line)
            if not isinstance(identity, SSHCertificate):
                return None
            authority = on_the_wire(identity.signature_key())
        except UnsupportedAlgorithm as error:
            raise ValueError(str(error)) from None
        begin, end = _time(identity.valid_after), _time(identity.valid_before)
        return cls(
            for_host=identity.type is SSHCertificateType.HOST,
            key=on_the_wire(identity.public_key()),
            authority=authority,
            principals=tuple(printable(name.decode(errors="replace")) for name in identity.valid_principals),
            valid_after=begin,
            valid_before=end,
            critical_options=tuple(printable(name.decode(errors="replace")) for name in identity.critical_options),
            signature_problem=_signature_problem(identity, authority),
            obtained=min(max(begin, written), end),
        )

    def validity_problem(self, now: datetime) -> str:
        """Return why it is not valid at a time; empty if it is."""
        if now < self.valid_after:
            begin = clock.written(self.valid_after)
            return f"is not valid before {begin}, but this machine's clock shows {clock.written(now)}. Check that clock"
        return f"expired at {clock.written(self.valid_before)}" if now >= self.valid_before else ""

    def renew_at(self, skew_minutes: float | None) -> datetime:
        """Return when it should be replaced: after two thirds of its life, or this many minutes before its end.

        `skew_minutes`: ASC_STEP_REFRESH_SKEW; at most half of its life counts.
        """
        life = self.valid_before - self.obtained
        if skew_minutes is None:
            return self.obtained + life * 2 / 3
        return self.valid_before - min(timedelta(minutes=skew_minutes), life / 2)

    def principals_problem(self, settings: Settings) -> str:
        """Return a warning if it is not for the login name; empty if it is."""
        if settings.edge_node_user in self.principals:
            return ""
        by_email = settings.oidc_username is not None
        other = "ask the centre to correct your email at authentik" if by_email else "get a certificate for that name"
        return (
            f"The certificate is for the login names {', '.join(self.principals) or '(none)'}, not for "
            f"SLURM_EDGE_NODE_USER={settings.edge_node_user}. The login node may refuse it. Set SLURM_EDGE_NODE_USER "
            f"to one of those, or {other}"
        )

    def check_own_clock(self) -> None:
        """Raise ClockError if this certificate, which is new, is not valid by this machine's clock."""
        if self.validity_problem(clock.now()):
            raise ClockError(
                f"The new certificate is valid from {clock.written(self.valid_after)} until "
                f"{clock.written(self.valid_before)}, but this machine's clock shows {clock.written(clock.now())}. "
                "Set this machine's clock"
            )

    def __str__(self) -> str:
        names = ", ".join(self.principals) or "nobody"
        begin = "always" if self.valid_after == _ALWAYS else clock.written(self.valid_after)
        end = "for ever" if self.valid_before == _FOREVER else clock.written(self.valid_before)
        return f"for {names}; valid from {begin} to {end}; signed by the authority {fingerprint(self.authority)}"


def fingerprint(key: bytes) -> str:
    """Return the fingerprint of a public key as `ssh-keygen -l` prints it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(key).digest()).decode().rstrip("=")


def type_of(key: bytes) -> str:
    """Return the type of a public key or a certificate, such as `ssh-ed25519`; it comes first, after its length."""
    return key[4 : 4 + int.from_bytes(key[:4], "big")].decode(errors="replace")


def on_the_wire(key: "serialization.SSHPublicKeyTypes") -> bytes:
    """Return a public key as it is sent over the wire (RFC 4253, section 6.6)."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return base64.b64decode(key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()[1])


def _signature_problem(certificate: "serialization.SSHCertificate", authority: bytes) -> str:
    from cryptography.exceptions import InvalidSignature

    # A certificate ends with the authority's key and the signature, each after its length; so does the signature's type
    signature = base64.b64decode(certificate.public_bytes().split()[1]).rpartition(authority)[2]
    if signature[8:].startswith(b"ssh-rsa"):
        return "is signed with SHA-1, which is not safe"
    try:
        certificate.verify_cert_signature()
    except (InvalidSignature, ValueError):
        return "has a forged or damaged signature"
    return ""


def _time(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC) if seconds < _FOREVER.timestamp() else _FOREVER


class KeyFileError(AccessError):
    """The private key cannot be used; the text says how to change that."""


class CertificateError(AccessError):
    """There is no key, or no certificate that belongs to it; a refresh makes both."""


def certificate_path(key: Path) -> Path:
    """Return where OpenSSH reads the certificate of a private key."""
    return key.with_name(key.name + "-cert.pub")


def public_path(key: Path) -> Path:
    """Return where the public half of a private key lies. It is written for people, and never read."""
    return key.with_name(key.name + ".pub")


def read_private_key(key: Path) -> "serialization.SSHPrivateKeyTypes":
    """Read a private key without a passphrase, in any of OpenSSH's formats.

    Raises CertificateError: it is missing.
    Raises KeyFileError: others can read it, it has a passphrase, or it is not a private SSH key.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

    name = shlex.quote(str(key))
    try:
        data, mode = key.read_bytes(), key.stat().st_mode
        try:
            private = load_ssh_private_key(data, password=None)
        except ValueError:
            private = load_pem_private_key(data, password=None)  # type: ignore[assignment]  # its user checks the kind
    except FileNotFoundError:
        raise CertificateError(f"The private key {key} (SLURM_EDGE_NODE_KEY_PATH) does not exist") from None
    except OSError as error:
        raise KeyFileError(f"The private key {key} cannot be read: {error.strerror}") from None
    except TypeError:  # cryptography's way to say that a passphrase is missing
        raise KeyFileError(
            f"The private key {key} has a passphrase, and nobody is there to type it. Use a separate key without one, "
            f"for this purpose only; or remove the passphrase:\n  ssh-keygen -p -N '' -f {name}"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise KeyFileError(f"{key} is not a private SSH key (RSA, ECDSA or Ed25519), or it is damaged") from None
    if mode & 0o077:
        raise KeyFileError(f"Others can read the private key {key}, and log in with it:\n  chmod 600 {name}")
    return private


def read_certificate(key: Path) -> Certificate:
    """Read the certificate beside a private key, valid or not.

    Raises CertificateError: there is none, or it is not a user certificate of this key.
    Raises KeyFileError: the key cannot be used.
    """
    path = certificate_path(key)
    private = read_private_key(key)
    try:
        line, written = path.read_bytes(), datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except OSError as error:
        raise CertificateError(f"{path}: {(error.strerror or 'cannot be read').lower()}") from None
    certificate = _parse_user_certificate(line, path, written)
    if certificate.key != on_the_wire(private.public_key()):
        raise CertificateError(f"{path} is not a certificate of the key {key}")
    return certificate


def write_certificate(key: Path, line: str) -> Certificate:
    """Check a new certificate for a key, and replace the old one by it.

    Raises CertificateError: it is not a user certificate of this key; the old one stays.
    """
    path = certificate_path(key)
    certificate = _parse_user_certificate(line.encode(), path, datetime.now(UTC))
    if certificate.key != on_the_wire(read_private_key(key).public_key()):
        raise CertificateError("The certificate authority has certified another key than the one sent. Tell the centre")
    replace_file(path, line.strip() + "\n", mode=0o644)
    return read_certificate(key)


def ensure_key(key: Path) -> str:
    """Return the public line of a private key, which is made (ed25519, mode 0600, no passphrase) if there is none.

    Raises KeyFileError: there is a key that cannot be used.
    Raises AccessError: there is a public half without the private one.
    Raises UnsafeFileError: the key is a symbolic link to nowhere.
    Raises OSError: the files cannot be written.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    if key.exists():
        return read_private_key(key).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    if key.is_symlink():
        raise UnsafeFileError(f"{key} is a symbolic link to nowhere. Remove it:\n  rm {shlex.quote(str(key))}")
    if public_path(key).exists():
        raise AccessError(f"{public_path(key)} has no private key {key} beside it. Move it away")
    private = Ed25519PrivateKey.generate()
    public = private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode() + " musica-pipelines"
    replace_file(key, private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode())
    replace_file(public_path(key), public + "\n", mode=0o644)
    return public


def _parse_user_certificate(line: bytes, path: Path, written: datetime) -> Certificate:
    try:
        certificate = Certificate.parse(line, written)
    except ValueError:
        raise CertificateError(f"{path} does not hold an SSH certificate") from None
    if certificate is None or certificate.for_host:
        raise CertificateError(f"{path} does not hold an SSH user certificate")
    return certificate
