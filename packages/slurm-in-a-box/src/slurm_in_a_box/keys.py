"""Keys and certificates of a site, all of them test values made anew for each site.

A root and an intermediate for step-ca's TLS, and two SSH authorities: one signs users (step-ca holds its key), one
signs the login nodes' host keys, as MUSICA's does.
"""

import datetime
import hashlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Authorities:
    """Files of the site's certificate authorities, below one folder."""

    folder: Path

    @property
    def root_certificate(self) -> Path:
        """PEM of the root of step-ca's TLS."""
        return self.folder / "root_ca.crt"

    @property
    def intermediate_certificate(self) -> Path:
        """PEM of the certificate that step-ca signs its own TLS certificate with."""
        return self.folder / "intermediate_ca.crt"

    @property
    def user_key(self) -> Path:
        """Private key that signs users' SSH certificates; its public half is beside it, as `.pub`."""
        return self.folder / "ssh_user_ca_key"

    @property
    def host_key(self) -> Path:
        """Private key that signs the login nodes' SSH host keys; its public half is beside it, as `.pub`."""
        return self.folder / "ssh_host_ca_key"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the root certificate in DER, in hex: what ASC_STEP_FINGERPRINT holds."""
        certificate = x509.load_pem_x509_certificate(self.root_certificate.read_bytes())
        return hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest()

    def create(self) -> None:
        """Make them all, unless they are there."""
        if self.root_certificate.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        root, intermediate = _tls_key(self.folder / "root_ca_key"), _tls_key(self.folder / "intermediate_ca_key")
        _sign_authority("Simulated intermediate CA", intermediate, root, 0, self.intermediate_certificate)
        for key in (self.user_key, self.host_key):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "256", "-m", "PEM", "-N", "", "-C", key.name, "-f", key],
                check=True,
            )
        _sign_authority("Simulated root CA", root, root, 1, self.root_certificate)


def make_key(file: Path) -> None:
    """Make an unencrypted ed25519 SSH key, `file` (mode 0600) and `file.pub`, in place of any that is there."""
    file.unlink(missing_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test-value", "-f", file], check=True)


def sign_user_key(authorities: Authorities, key: Path, principal: str, validity: str) -> Path:
    """Certify a user's key with the site's user CA directly, without step-ca; return the path of the certificate.

    Args:
        validity: in the format of ssh-keygen(1) `-V`, for example `-1m:+1h`, or `-2h:-1h` for one that has expired.
    """
    _sign(authorities.user_key, key, principal, ["-n", principal, "-V", validity])
    return key.with_name(key.name + "-cert.pub")


def sign_host_key(authorities: Authorities, key: Path, names: list[str]) -> None:
    """Certify a host key for all names and addresses that clients may use."""
    _sign(authorities.host_key, key, names[0], ["-h", "-n", ",".join(names), "-V", "-1d:+3650d"])


def _sign(authority: Path, key: Path, identity: str, options: list[str]) -> None:
    subprocess.run(
        ["ssh-keygen", "-q", "-s", authority, "-I", identity, *options, key.with_name(key.name + ".pub")], check=True
    )


def _tls_key(file: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    encoded = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as output:
        output.write(encoded)
    return key


def _sign_authority(
    name: str, key: ec.EllipticCurvePrivateKey, issuer: ec.EllipticCurvePrivateKey, path_length: int, file: Path
) -> None:
    """Write the certificate of an authority, signed by the root's key."""
    now = datetime.datetime.now(datetime.UTC)
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_common_name(name))
        .issuer_name(_common_name("Simulated root CA"))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), critical=False)
        .sign(issuer, hashes.SHA256())
    )
    file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
