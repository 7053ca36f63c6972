"""Decide whether a host key is trusted, by OpenSSH's rules for StrictHostKeyChecking=yes, and explain a refusal."""

import base64
from dataclasses import dataclass

from dagster_sbatch.auth import clock
from dagster_sbatch.auth.certificate import Certificate, fingerprint
from dagster_sbatch.ssh import HostKeyError
from dagster_sbatch.ssh.known_hosts import CERT_AUTHORITY, REVOKED, Entry, KnownHosts, names_of

CERTIFICATE_SUFFIX = "-cert-v01@openssh.com"

_UNKNOWN_AUTHORITY = """\
Copy the line `@cert-authority PATTERN TYPE KEY` from your computing centre's documentation (for MUSICA it begins with
`@cert-authority *.asc.ac.at ecdsa-sha2-nistp256`). Check that `ssh-keygen -lf` shows the fingerprint of the authority
above for its key. Then append it to {file}."""
_UNKNOWN_KEY = """\
Ask your computing centre for a `@cert-authority` line, or for the fingerprints of its login nodes. If one of them is
the one above, log in once, compare again, and answer yes, which writes {file}:
  ssh -p {port} {host}"""
_CHANGED = """\
The centre may have given the machine a new key, which it then announces; the name may stand for several machines; or
somebody intercepts the connection. Compare the fingerprint with those that the centre publishes. Only if it is one of
them, correct the lines above; better, put the centre's `@cert-authority` line there, which covers all machines."""
_UNUSED = """
SUPERCOMPUTER_SITE_OVERRIDES names an authority for it, {authorities}, which counts once the lines above are removed."""
_REVOKED = "Do not connect. The key was revoked, since somebody else may have it. Ask your computing centre."
_BAD_CERTIFICATE = "Only your computing centre can correct that. Tell it."


@dataclass(frozen=True)
class HostKey:
    """What a machine has shown, after it proved that it holds the private key."""

    key: bytes  # the plain public key as sent over the wire
    certificate: Certificate | None  # of that key, where it showed one

    @classmethod
    def parse(cls, blob: bytes) -> "HostKey":
        """Read a host key or host certificate as it was sent in the key exchange.

        Raises ValueError: it is damaged.
        """
        certificate = Certificate.parse(_type_of(blob) + b" " + base64.b64encode(blob))
        return cls(certificate.key if certificate else blob, certificate)

    def __str__(self) -> str:
        certificate = f"\n  with a certificate {self.certificate}" if self.certificate else ""
        return f"  {_type_of(self.key).decode()} {fingerprint(self.key)}{certificate}"


def check(blob: bytes, host: str, port: int, known: KnownHosts) -> None:
    """Return if the host key is trusted.

    A certificate is trusted if an authority that known_hosts names for the host has signed it, not with SHA-1, and it
    is a host's, has the name, is valid now and has no critical option. Otherwise its plain key is checked, as ssh(1)
    does. The site's authorities count only for hosts for which known_hosts names neither an authority nor a key.
    Stricter than ssh(1): a certificate without names is for no host, and a key revoked for a host is revoked on all
    its ports.

    `host`: the name that was asked for; certificates and known_hosts are matched with it. `port`: if it is not 22,
    known_hosts is asked for `[host]:port`, then for `host`.
    Raises HostKeyError: it is not trusted; the text says why, what was shown, what is known, and what to do.
    """
    where = f"{host} (port {port})"
    try:
        shown = HostKey.parse(blob)
    except ValueError as error:
        raise HostKeyError(f"{where} has shown a damaged host key: {error}") from None
    names = names_of(host, port)
    shown_keys = (shown.key, shown.certificate.authority) if shown.certificate else (shown.key,)
    if revoked := [entry for entry in _matching(known, names, REVOKED) if entry.key in shown_keys]:
        raise HostKeyError(_text(where, "its key is revoked", shown, revoked, known, _REVOKED))

    entries = trusted_entries(known, host, port)
    authorities = [entry for entry in entries if entry.marker == CERT_AUTHORITY]
    keys = [entry for entry in entries if not entry.marker]
    reason = _certificate_problem(shown.certificate, host, authorities) if shown.certificate else "no certificate"
    if not reason or shown.key in [entry.key for entry in keys]:
        return

    if shown.certificate and (authorities or not keys):
        signed = shown.certificate.authority in [entry.key for entry in authorities]
        advice = _BAD_CERTIFICATE if signed else _UNKNOWN_AUTHORITY
    else:
        reason = "its key is another than the known one" if keys else "its key is not known"
        advice = _CHANGED if keys else _UNKNOWN_KEY
    advice = advice.format(host=host, port=port, file=known.files[0])
    if entries and (unused := [entry for entry in _site_authorities(known, names) if entry not in entries]):
        advice += _UNUSED.format(authorities=", ".join(fingerprint(entry.key) for entry in unused))
    raise HostKeyError(_text(where, reason, shown, entries, known, advice))


def trusted_entries(known: KnownHosts, host: str, port: int) -> list[Entry]:
    """Return the entries that a machine is checked with: authorities first, then plain keys.

    Those of the files, as ssh(1) reads them; the site's authorities where the files have none of both.
    """
    names = names_of(host, port)
    keys = next(filter(None, (known.matching(name, "") for name in names)), [])
    own = [*_matching(known, names, CERT_AUTHORITY), *keys]
    return own or _site_authorities(known, names)


def preferred_algorithms(available: tuple[str, ...], host: str, port: int, known: KnownHosts) -> tuple[str, ...]:
    """Order the algorithms so that the server shows a key that can be checked, as ssh(1) does with HostKeyAlgorithms.

    First certificates, if known_hosts names an authority for the host; then types of known keys; then certificates
    without an authority, since the error can say more about one; then the rest.
    """
    by_authority = any(entry.marker == CERT_AUTHORITY for entry in trusted_entries(known, host, port))
    types = {entry.key_type for entry in _matching(known, names_of(host, port), "")}

    def rank(algorithm: str) -> int:
        if algorithm.endswith(CERTIFICATE_SUFFIX):
            return 0 if by_authority else 2
        key_type = "ssh-rsa" if algorithm.startswith("rsa-sha2-") else algorithm
        return 1 if key_type in types else 3

    return tuple(sorted(available, key=rank))


def _type_of(blob: bytes) -> bytes:
    return blob[4 : 4 + int.from_bytes(blob[:4], "big")]


def _matching(known: KnownHosts, names: list[str], marker: str) -> list[Entry]:
    entries = [entry for name in names for entry in known.matching(name, marker)]
    return list(dict.fromkeys(entries))


def _site_authorities(known: KnownHosts, names: list[str]) -> list[Entry]:
    return [entry for entry in known.site_authorities if any(entry.matches(name) for name in names)]


def _certificate_problem(certificate: Certificate, host: str, authorities: list[Entry]) -> str:
    """Return why a host certificate is not trusted for a name; empty if it is."""
    expired = certificate.validity_problem(clock.now())
    options = ", ".join(certificate.critical_options)
    problems = (
        (not authorities, "no authority is known for its certificate"),
        (
            certificate.authority not in [entry.key for entry in authorities],
            "its certificate is signed by another authority than the known one",
        ),
        (certificate.signature_problem, f"its certificate {certificate.signature_problem}"),
        (not certificate.for_host, "its certificate is a user's, not a host's"),
        (host.lower() not in certificate.principals, f"its certificate is not for the name {host}"),
        (expired, f"its certificate {expired}"),
        (options, f"its certificate has critical options that are not known: {options}"),
    )
    return next((reason for applies, reason in problems if applies), "")


def _text(where: str, reason: str, shown: HostKey, entries: list[Entry], known: KnownHosts, advice: str) -> str:
    if entries:
        facts = ["Known for it:", *(f"  {entry}" for entry in entries)]
    else:
        files = (f"{file}{'' if file.exists() else ' (missing)'}" for file in known.files)
        facts = [f"Nothing is known for it in {', '.join(files)}"]
    return "\n".join([f"{where} is not trusted: {reason}. It has shown", str(shown), *facts, advice])
