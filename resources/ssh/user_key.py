"""The user's private key and its certificate: loading them, and saying why a server may have refused them."""

import io
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

import paramiko
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    load_ssh_private_key,
)

from resources.ssh.certificate import Certificate
from resources.ssh.client_config import Hop
from resources.ssh.errors import AuthenticationError
from resources.ssh.known_hosts import fingerprint

_FOR_PEOPLE = "keyboard-interactive"
_RENEW = "Get a new certificate: python scripts/refresh_step_auth.py"

_KINDS = (
    (rsa.RSAPrivateKey, paramiko.RSAKey, PrivateFormat.TraditionalOpenSSL),
    (ec.EllipticCurvePrivateKey, paramiko.ECDSAKey, PrivateFormat.TraditionalOpenSSL),
    (ed25519.Ed25519PrivateKey, paramiko.Ed25519Key, PrivateFormat.OpenSSH),
)
"""Kinds of keys: for cryptography, for paramiko, and the layout that the one can hand the other."""


@dataclass(frozen=True)
class UserKey:
    """A private key, ready to be used.

    Attributes:
        private: with the certificate, if there is one; then that is what is shown to servers, and not the plain key.
    """

    path: Path
    private: paramiko.PKey
    certificate: Certificate | None

    @classmethod
    def load(cls, path: Path) -> "UserKey":
        """Read a private key without passphrase and the certificate beside it, if there is one.

        Raises:
            AuthenticationError: the key is missing, encrypted, damaged or open to others; or the certificate is damaged
                or another key's.
        """
        certificate_path = Path(f"{path}-cert.pub")
        certificate = _read_certificate(certificate_path)
        try:
            private = _load_private(path.read_bytes())
            if path.stat().st_mode & 0o077:
                raise AuthenticationError(
                    f"Others can read the private key {path}, and log in with it. Close it:\n"
                    f"  chmod 600 {shlex.quote(str(path))}"
                )
            if certificate:
                private.load_certificate(certificate_path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise AuthenticationError(f"There is no {error.filename} (SLURM_EDGE_NODE_KEY_PATH). {_RENEW}") from None
        except OSError as error:
            raise AuthenticationError(f"The private key {path} cannot be read: {error.strerror}") from None
        except TypeError:  # cryptography's word for a missing passphrase
            raise AuthenticationError(
                f"The private key {path} has a passphrase, and nobody is there to type it. Use a separate key without "
                f"one, whose certificate lives for hours only; or remove it: ssh-keygen -p -N '' -f {path}"
            ) from None
        except (ValueError, UnsupportedAlgorithm):
            raise AuthenticationError(f"{path} is not a private SSH key (RSA, ECDSA or Ed25519), or damaged") from None
        if certificate and certificate.key != _public(private):
            raise AuthenticationError(f"{certificate_path} is not a certificate of the key {path}. {_RENEW}")
        return cls(path, private, certificate)

    def refused(self, hop: Hop, methods: list[str], *, partial: bool) -> AuthenticationError:
        """Return the error to raise when a server has not let the key in.

        Args:
            hop: which server, and as which user.
            methods: the ways of logging in that it named in its answer.
            partial: it has accepted the key, and wants one of those ways in addition.
        """
        if partial:
            return AuthenticationError(
                f"{hop} has accepted the key {self.path} of {hop.user!r} and asks for a second factor: "
                f"{', '.join(methods)}. That is for people, and nobody is there to answer. "
                "Ask your computing centre for a way to log in with the certificate alone."
            )
        name = self.private.get_name()
        lines = [
            f"{hop} has refused to log in {hop.user!r}. It was shown",
            f"  the key {self.path} ({name} {fingerprint(_public(self.private))})",
            f"  with the certificate {self.path.name}-cert.pub, {self.certificate}"
            if self.certificate
            else "  without a certificate",
        ]
        if methods:
            lines.append(f"It takes: {', '.join(methods)}")
        if _FOR_PEOPLE in methods:
            lines.append(
                f"{_FOR_PEOPLE} is the login for people: a link to open in a browser, or a password. "
                "This program does not use it and needs a valid certificate."
            )
        return AuthenticationError("\n".join([*lines, self._advice(hop)]))

    def _advice(self, hop: Hop) -> str:
        certificate = self.certificate
        if certificate is None:
            return f"Many centres take certificates only, and there is no {self.path}-cert.pub. {_RENEW}"
        if certificate.for_host:
            return f"The certificate is a host's, not a user's. {_RENEW}"
        if problem := certificate.validity_problem(time.time()):
            return f"The certificate {problem}. {_RENEW}"
        if hop.user not in certificate.principals:
            return (
                f"The certificate is not for {hop.user!r}: set SLURM_EDGE_NODE_USER to a name that it is for, "
                "or get a certificate of that user."
            )
        return (
            f"The certificate is valid and for {hop.user!r}, so the server does not trust its authority, or has closed "
            f"the account. Try `ssh -v -i {self.path} -p {hop.port} {hop.user}@{hop.host}`; ask your computing centre."
        )


def _load_private(data: bytes) -> paramiko.PKey:
    """Read a private key in any of OpenSSH's formats. Paramiko's own reader fails on some (no comment, PKCS #8)."""
    try:
        key = load_ssh_private_key(data, password=None)
    except ValueError:
        key = load_pem_private_key(data, password=None)  # type: ignore[assignment]  # its kind is looked at below
    for kind, ours, layout in _KINDS:
        if isinstance(key, kind):
            text = key.private_bytes(Encoding.PEM, layout, NoEncryption()).decode()
            return ours.from_private_key(io.StringIO(text))
    raise ValueError("a kind of key that paramiko does not have")


def _public(key: paramiko.PKey) -> bytes:
    return bytes(key.asbytes())


def _read_certificate(path: Path) -> Certificate | None:
    try:
        certificate = Certificate.parse(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise AuthenticationError(f"{path} cannot be read as a certificate ({error}). {_RENEW}") from None
    if certificate is None:
        raise AuthenticationError(f"{path} holds a plain public key, not a certificate. {_RENEW}")
    return certificate
