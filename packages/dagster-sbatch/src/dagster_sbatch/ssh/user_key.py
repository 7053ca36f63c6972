"""The user's private key and its certificate, as paramiko needs them; and why a server may have refused them."""

import io
import shlex
from dataclasses import dataclass
from pathlib import Path

import paramiko
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from dagster_sbatch import clock
from dagster_sbatch.auth.keys import (
    Certificate,
    CertificateError,
    KeyFileError,
    certificate_path,
    fingerprint,
    public_path,
    read_certificate,
    read_private_key,
)
from dagster_sbatch.ssh import AuthenticationError
from dagster_sbatch.ssh.client_config import Hop

_KEYBOARD_INTERACTIVE = "keyboard-interactive"
_RENEW = "Get a new certificate:\n  scripts/refresh_step_auth.py"

_KINDS = (
    (rsa.RSAPrivateKey, paramiko.RSAKey, PrivateFormat.TraditionalOpenSSL),
    (ec.EllipticCurvePrivateKey, paramiko.ECDSAKey, PrivateFormat.TraditionalOpenSSL),
    (ed25519.Ed25519PrivateKey, paramiko.Ed25519Key, PrivateFormat.OpenSSH),
)
"""Kinds of keys: in cryptography, in paramiko, and the layout that both know. Paramiko's own reader fails on some keys
(without a comment, PKCS #8)."""


@dataclass(frozen=True)
class UserKey:
    """A private key, ready to be used."""

    path: Path  # its file
    private: paramiko.PKey  # with the certificate, if there is one; then servers are shown that, and not the plain key
    certificate: Certificate | None  # beside it

    @classmethod
    def load(cls, path: Path) -> "UserKey":
        """Read a private key without passphrase, and the certificate beside it if there is one.

        Raises AuthenticationError: the key or its certificate cannot be used (`dagster_sbatch.auth.keys`).
        """
        beside = certificate_path(path)
        try:
            private = _for_paramiko(read_private_key(path), path)
            certificate = read_certificate(path) if beside.exists() else None
        except KeyFileError as error:
            raise AuthenticationError(str(error)) from None
        except CertificateError as error:
            raise AuthenticationError(f"{error}. {_RENEW}") from None
        if certificate:
            private.load_certificate(beside.read_text(encoding="utf-8", errors="replace"))
        return cls(path, private, certificate)

    def refused(self, hop: Hop, methods: list[str], *, partial: bool) -> AuthenticationError:
        """Return the error to raise when a server has not let the key in.

        `methods`: the ways to log in that the server named in its answer. `partial`: it has accepted the key, and
        requires one of those ways in addition.
        """
        if partial:
            return AuthenticationError(
                f"{hop} has accepted the key {self.path} of {hop.user!r} and requires a second factor: "
                f"{', '.join(methods)}. Only a person could answer, and none is there. "
                "Ask your computing centre for a way to log in without it."
            )
        public = fingerprint(self.private.asbytes())
        lines = [
            f"{hop} has refused to log in {hop.user!r}. It was shown",
            f"  the key {self.path} ({self.private.get_name()} {public})",
            f"  with the certificate {self.path.name}-cert.pub, {self.certificate}"
            if self.certificate
            else "  without a certificate",
        ]
        if methods:
            lines.append(f"It accepts: {', '.join(methods)}")
        if _KEYBOARD_INTERACTIVE in methods:
            lines.append(
                f"{_KEYBOARD_INTERACTIVE} is the login for people: a link to open in a browser, or a password. "
                "This program does not use it."
            )
        return AuthenticationError("\n".join([*lines, self._advice(hop)]))

    def _advice(self, hop: Hop) -> str:
        certificate = self.certificate
        if certificate is None:
            return (
                f"If the site accepts plain keys, give it {public_path(self.path)}, for {hop.user!r}. If it accepts "
                "certificates only, get one: `scripts/docs credentials` says how."
            )
        if problem := certificate.validity_problem(clock.now()):
            return f"The certificate {problem}. {_RENEW}"
        if hop.user not in certificate.principals:
            return (
                f"The certificate is not for {hop.user!r}. Set SLURM_EDGE_NODE_USER to a name in the certificate, "
                f"or get a certificate for {hop.user!r}."
            )
        return (
            f"The certificate is valid and for {hop.user!r}, so the server does not trust its authority, or has closed "
            "the account. Ask your computing centre, with the output of\n"
            f"  ssh -v -i {shlex.quote(str(self.path))} -p {hop.port} {hop.user}@{hop.host}"
        )


def _for_paramiko(key: object, path: Path) -> paramiko.PKey:
    for kind, ours, layout in _KINDS:
        if isinstance(key, kind):
            text = key.private_bytes(Encoding.PEM, layout, NoEncryption()).decode()
            return ours.from_private_key(io.StringIO(text))
    raise AuthenticationError(f"{path} is not a private SSH key of a kind that is supported (RSA, ECDSA or Ed25519)")
