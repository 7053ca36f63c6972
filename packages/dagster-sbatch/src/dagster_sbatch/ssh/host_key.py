"""Decide whether a host key is trusted, by OpenSSH's rules for StrictHostKeyChecking=yes, and explain a refusal."""

import base64
import binascii
import functools
import logging
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dagster_sbatch import clock
from dagster_sbatch.auth.keys import Certificate, fingerprint, type_of
from dagster_sbatch.ssh import HostKeyError

CERT_AUTHORITY = "@cert-authority"
REVOKED = "@revoked"
_log = logging.getLogger("dagster_sbatch.ssh")
CERTIFICATE_SUFFIX = "-cert-v01@openssh.com"

_UNKNOWN_AUTHORITY = """\
Copy the line `@cert-authority PATTERN TYPE KEY` from your computing centre's documentation (for MUSICA it begins with
`@cert-authority *.asc.ac.at ecdsa-sha2-nistp256`). Check that `ssh-keygen -lf` shows the fingerprint of the authority
above for its key. Then append it to {file}."""
_UNKNOWN_KEY = """\
Ask your computing centre for a `@cert-authority` line, or for the fingerprints of its login nodes. If one of them is
equal to the one above, log in once by hand, compare again, and answer yes. That writes {file}:
  ssh -p {port} {host}"""
_CHANGED = """\
Either the centre has given the machine a new key and announces that; or the name stands for several machines; or
somebody intercepts the connection. Compare the fingerprint with those that the centre publishes. Only if it is one of
them, correct the lines above. Better: replace them by the centre's `@cert-authority` line, for all machines."""
_UNUSED = """
The site's entry names an authority for it, {authorities}. It is used only if you remove the lines above."""
_REVOKED = "Do not connect. The key was revoked, because somebody else may have it. Ask your computing centre."
_BAD_CERTIFICATE = "Tell your computing centre: only the centre can correct that."


@dataclass(frozen=True)
class Entry:
    """One line of a known_hosts file."""

    place: str  # `file:line`
    marker: str  # CERT_AUTHORITY, REVOKED, or empty for an ordinary host key
    hosts: str  # patterns, or one hashed name
    key_type: str  # for example `ssh-ed25519`
    key: bytes  # the public key as it is sent over the wire (RFC 4253, section 6.6)

    def matches(self, name: str) -> bool:
        """Return whether the line is for a name: a host in lower case, or `[host]:port`."""
        return _is_hash_of(self.hosts, name) if self.hosts.startswith("|") else _matches_patterns(self.hosts, name)

    def __str__(self) -> str:
        return f"{self.place}: {self.marker} {self.key_type} {fingerprint(self.key)}".replace(":  ", ": ")


@dataclass(frozen=True)
class KnownHosts:
    """The lines of all known_hosts files, as sshd(8) describes them, and the authorities of the site's entry."""

    files: tuple[Path, ...]  # those that were read, including missing ones
    entries: tuple[Entry, ...]
    site_authorities: tuple[Entry, ...] = ()

    @classmethod
    def read(cls, files: Iterable[Path], site_authorities: Iterable[str] = ()) -> "KnownHosts":
        """Read the files that exist; lines and files that cannot be read are reported and skipped.

        `files`: the user's first. `site_authorities`: lines that `parse_authority` accepts.
        """
        files = tuple(files)
        entries = tuple(entry for file in files for entry in _read_file(file))
        return cls(files, entries, tuple(map(parse_authority, site_authorities)))

    def matching(self, names: Sequence[str], marker: str) -> list[Entry]:
        """Return the files' entries of that kind for some names, in their order."""
        entries = [entry for entry in self.entries if entry.marker == marker]
        return list(dict.fromkeys(entry for name in names for entry in entries if entry.matches(name)))


@functools.cache
def warn_once(text: str) -> None:
    """Log a warning, once per process."""
    _log.warning(text)


def names_of(host: str, port: int) -> list[str]:
    """Return the names to search known_hosts for, in order: the first one that is known counts, as in ssh(1)."""
    host = host.lower()
    return [host] if port == 22 else [f"[{host}]:{port}", host]


def parse_authority(line: str) -> Entry:
    """Parse a `@cert-authority` line of a site's entry.

    Raises ValueError: it is no such line; the text says why.
    """
    words = line.split()
    if not words or words[0] != CERT_AUTHORITY:
        raise ValueError(f"the line does not begin with {CERT_AUTHORITY}")
    return _parse("SUPERCOMPUTER_SITE_OVERRIDES", words)


def _read_file(file: Path) -> list[Entry]:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        warn_once(f"{file} cannot be read and is skipped: {error.strerror}")
        return []
    entries = []
    for number, line in enumerate(text.split("\n"), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        place = f"{file}:{number}"
        try:
            entries.append(_parse(place, words))
        except ValueError as error:
            warn_once(f"{place} is not a line of a known_hosts file and is skipped: {error}")
    return entries


def _parse(place: str, words: list[str]) -> Entry:
    marker = words.pop(0) if words[0].startswith("@") else ""
    if marker not in (CERT_AUTHORITY, REVOKED, ""):
        raise ValueError(f"unknown marker {marker}")
    if len(words) < 3:
        raise ValueError("it needs names, the key's type and the key")
    hosts, key_type, encoded = words[:3]
    try:
        key = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        raise ValueError("the key is not base64") from None
    if _strings(key)[0] != key_type.encode():
        raise ValueError(f"the key is not of the type {key_type}")
    return Entry(place, marker, hosts, key_type, key)


def _strings(key: bytes) -> list[bytes]:
    """Return the strings of a public key, each of which follows its length in four bytes."""
    parts: list[bytes] = []
    while key or len(parts) < 2:
        end = 4 + int.from_bytes(key[:4], "big")
        if end > len(key):
            raise ValueError("the key is cut short or damaged")
        parts.append(key[4:end])
        key = key[end:]
    return parts


def _is_hash_of(hashed: str, name: str) -> bool:
    """Return whether `|1|salt|hash` (HashKnownHosts) is the hash of a name."""
    from paramiko import HostKeys

    with suppress(ValueError, AssertionError):  # it is damaged
        return bool(HostKeys.hash_host(name, hashed) == hashed)
    return False


def _matches_patterns(patterns: str, name: str) -> bool:
    """Return whether a name matches a list of patterns with `*`, `?` and `!`, as in ssh_config(5) under PATTERNS."""
    texts = {each: re.escape(each.removeprefix("!")).replace(r"\*", ".*") for each in patterns.lower().split(",")}
    found = [each for each, text in texts.items() if re.fullmatch(text.replace(r"\?", "."), name)]
    return bool(found) and not any(each.startswith("!") for each in found)


def check(blob: bytes, host: str, port: int, known: KnownHosts) -> None:
    """Return if the host key is trusted.

    A certificate is trusted if an authority that known_hosts names for the host has signed it, not with SHA-1, and it
    is a host's, has the name, is valid now and has no critical option. Otherwise its plain key is checked, as ssh(1)
    does. The site's authorities count only for hosts for which known_hosts names neither an authority nor a key.
    Stricter than ssh(1): a certificate without names is for no host, and a key revoked for a host is revoked on all
    its ports.

    `blob`: a host key or host certificate as it was sent in the key exchange; the machine has proved that it holds the
    private key. `host`: the name that was asked for; certificates and known_hosts are matched with it. `port`: if it is
    not 22, known_hosts is asked for `[host]:port`, then for `host`.
    Raises HostKeyError: it is not trusted; the text says why, what was shown, what is known, and what to do.
    """
    where = f"{host} (port {port})"
    try:
        certificate = Certificate.parse(type_of(blob).encode() + b" " + base64.b64encode(blob))
    except ValueError as error:
        raise HostKeyError(f"{where} has shown a damaged host key: {error}") from None
    names, key = names_of(host, port), certificate.key if certificate else blob
    shown = f"  {type_of(key)} {fingerprint(key)}" + (f"\n  with a certificate {certificate}" if certificate else "")
    shown_keys = (key, certificate.authority) if certificate else (key,)
    if revoked := [entry for entry in known.matching(names, REVOKED) if entry.key in shown_keys]:
        raise HostKeyError(_text(where, "its key is revoked", shown, revoked, known, _REVOKED))

    entries = trusted_entries(known, host, port)
    authorities = [entry for entry in entries if entry.marker == CERT_AUTHORITY]
    keys = [entry for entry in entries if not entry.marker]
    reason = _certificate_problem(certificate, host, authorities) if certificate else "no certificate"
    if not reason or key in [entry.key for entry in keys]:
        return

    if certificate and (authorities or not keys):
        signed = certificate.authority in [entry.key for entry in authorities]
        advice = _BAD_CERTIFICATE if signed else _UNKNOWN_AUTHORITY
    else:
        reason = "its key differs from the known one" if keys else "its key is not known"
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
    keys = next(filter(None, (known.matching([name], "") for name in names)), [])
    own = [*known.matching(names, CERT_AUTHORITY), *keys]
    return own or _site_authorities(known, names)


def preferred_algorithms(available: tuple[str, ...], host: str, port: int, known: KnownHosts) -> tuple[str, ...]:
    """Order the algorithms so that the server shows a key that can be checked, as ssh(1) does with HostKeyAlgorithms.

    First certificates, if known_hosts names an authority for the host; then types of known keys; then certificates
    without an authority, since the error can say more about one; then the rest.
    """
    by_authority = any(entry.marker == CERT_AUTHORITY for entry in trusted_entries(known, host, port))
    types = {entry.key_type for entry in known.matching(names_of(host, port), "")}

    def rank(algorithm: str) -> int:
        if algorithm.endswith(CERTIFICATE_SUFFIX):
            return 0 if by_authority else 2
        key_type = "ssh-rsa" if algorithm.startswith("rsa-sha2-") else algorithm
        return 1 if key_type in types else 3

    return tuple(sorted(available, key=rank))


def _site_authorities(known: KnownHosts, names: list[str]) -> list[Entry]:
    return [entry for entry in known.site_authorities if any(entry.matches(name) for name in names)]


def _certificate_problem(certificate: Certificate, host: str, authorities: list[Entry]) -> str:
    """Return why a host certificate is not trusted for a name; empty if it is."""
    expired = certificate.validity_problem(clock.now())
    options, signers = ", ".join(certificate.critical_options), [entry.key for entry in authorities]
    problems = (
        (not authorities, "no authority is known for its certificate"),
        (certificate.authority not in signers, "its certificate is signed by another authority than the known one"),
        (certificate.signature_problem, f"its certificate {certificate.signature_problem}"),
        (not certificate.for_host, "its certificate is a user's, not a host's"),
        (host.lower() not in certificate.principals, f"its certificate is not for the name {host}"),
        (expired, f"its certificate {expired}"),
        (options, f"its certificate has critical options that are not known: {options}"),
    )
    return next((reason for applies, reason in problems if applies), "")


def _text(where: str, reason: str, shown: str, entries: list[Entry], known: KnownHosts, advice: str) -> str:
    if entries:
        facts = ["Known for it:", *(f"  {entry}" for entry in entries)]
    else:
        files = (f"{file}{'' if file.exists() else ' (missing)'}" for file in known.files)
        facts = [f"Nothing is known for it in {', '.join(files)}"]
    return "\n".join([f"{where} is not trusted: {reason}. It has shown", shown, *facts, advice])
