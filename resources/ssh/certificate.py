"""OpenSSH's certificates, of hosts and of users (OpenSSH's PROTOCOL.certkeys)."""

import base64
import datetime
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    SSHCertificate,
    SSHCertificateType,
    SSHCertPublicKeyTypes,
    load_ssh_public_identity,
)

from resources.ssh.known_hosts import fingerprint

_FOREVER = 2**64 - 1


@dataclass(frozen=True)
class Certificate:
    """What a certificate says; `signature_problem` tells whether its authority has really said so.

    Attributes:
        key: the public key that it certifies, as sent over the wire.
        authority: the public key that has signed it, as sent over the wire.
        principals: names of hosts or users that it is valid for.
        valid_after: seconds since 1970 from which on it is valid.
        valid_before: seconds since 1970 from which on it is not valid any more.
        critical_options: names of restrictions that whoever accepts it must know.
        signature_problem: why the signature does not count, or empty.
    """

    for_host: bool
    key: bytes
    authority: bytes
    principals: tuple[str, ...]
    valid_after: int
    valid_before: int
    critical_options: tuple[str, ...]
    signature_problem: str

    @classmethod
    def parse(cls, line: bytes) -> "Certificate | None":
        """Read a certificate from `type base64 [comment]`; None for a plain public key.

        Raises:
            ValueError: it is damaged, or of a type that is not supported.
        """
        try:
            identity = load_ssh_public_identity(line)
            if not isinstance(identity, SSHCertificate):
                return None
            authority = _on_the_wire(identity.signature_key())
        except UnsupportedAlgorithm as error:
            raise ValueError(str(error)) from None
        return cls(
            for_host=identity.type is SSHCertificateType.HOST,
            key=_on_the_wire(identity.public_key()),
            authority=authority,
            principals=tuple(name.decode(errors="replace") for name in identity.valid_principals),
            valid_after=identity.valid_after,
            valid_before=identity.valid_before,
            critical_options=tuple(name.decode(errors="replace") for name in identity.critical_options),
            signature_problem=_signature_problem(identity),
        )

    def validity_problem(self, now: float) -> str:
        """Why it is not valid at a time (in seconds since 1970), or empty."""
        if now < self.valid_after:
            return "is not valid yet (is the clock of this machine right?)"
        return "has expired" if now >= self.valid_before else ""

    def __str__(self) -> str:
        names = ", ".join(self.principals) or "nobody"
        begin, end = _utc(self.valid_after), _utc(self.valid_before)
        return f"for {names}; valid from {begin} to {end}; signed by the authority {fingerprint(self.authority)}"


def _on_the_wire(key: SSHCertPublicKeyTypes) -> bytes:
    return base64.b64decode(key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()[1])


def _signature_problem(certificate: SSHCertificate) -> str:
    if bytes(certificate._inner_sig_type) == b"ssh-rsa":  # it has no public name; a test holds this one
        return "is signed with SHA-1, which is not safe"
    try:
        certificate.verify_cert_signature()
    except (InvalidSignature, ValueError):
        return "has a forged or damaged signature"
    return ""


def _utc(seconds: int) -> str:
    if seconds in (0, _FOREVER):
        return "always" if seconds == 0 else "for ever"
    try:
        return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, ValueError, OSError):
        return f"second {seconds}"
