"""The user's private SSH key on this machine, and the certificate beside it."""

import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from dagster_sbatch.atomic_write import replace_file
from dagster_sbatch.auth.access_errors import AccessError, MisconfiguredError, UnsafeFileError
from dagster_sbatch.auth.certificate import Certificate, on_the_wire

if TYPE_CHECKING:
    from cryptography.hazmat.primitives import serialization


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
    Raises MisconfiguredError: there is a public half without the private one.
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
        raise MisconfiguredError(f"{public_path(key)} is there without its private key {key}. Move it away")
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
