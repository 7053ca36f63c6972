"""The known_hosts files of OpenSSH, as sshd(8) describes them under "SSH_KNOWN_HOSTS FILE FORMAT"."""

import base64
import binascii
import functools
import hashlib
import hmac
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dagster_sbatch.auth.certificate import fingerprint

CERT_AUTHORITY = "@cert-authority"
REVOKED = "@revoked"
_log = logging.getLogger("dagster_sbatch.ssh")


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
    """The lines of all known_hosts files, and the authorities of the site's entry."""

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

    def matching(self, name: str, marker: str) -> list[Entry]:
        """Return the files' entries of that kind for a name."""
        return [entry for entry in self.entries if entry.marker == marker and entry.matches(name)]


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
    try:
        version, salt, digest = hashed[1:].split("|")
        expected = hmac.new(base64.b64decode(salt), name.encode(), hashlib.sha1).digest()
        return version == "1" and hmac.compare_digest(base64.b64decode(digest), expected)
    except ValueError:
        return False


def _matches_patterns(patterns: str, name: str) -> bool:
    """Return whether a name matches a list of patterns with `*`, `?` and `!`, as in ssh_config(5) under PATTERNS."""
    found = False
    for pattern in patterns.lower().split(","):
        text = re.escape(pattern.removeprefix("!")).replace(r"\*", ".*").replace(r"\?", ".")
        if re.fullmatch(text, name):
            if pattern.startswith("!"):
                return False
            found = True
    return found
