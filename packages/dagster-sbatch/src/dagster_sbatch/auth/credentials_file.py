"""The file with the two secrets that renew themselves: an authentik API token and an app password.

A dotenv file that python-dotenv and `source` read alike. Other variables in it are kept as they are.
"""

import json
import os
import re
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Literal

from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pydantic import SecretStr

from dagster_sbatch.atomic_write import replace_file
from dagster_sbatch.auth.access_errors import AccessError, UnsafeFileError

REFRESH_WINDOW = timedelta(days=7)
"""A secret is replaced this long before it expires, or a third of its lifetime before, if that is less."""

Source = Literal["stored", "bootstrap", "direct"]
"""Where a credential came from: the credentials file, ASC_AUTHENTIK_API_TOKEN, ASC_OIDC_APP_PASSWORD."""

_VARIABLES = {"api_token": "ASC_AUTHENTIK_API_TOKEN", "app_password": "ASC_OIDC_APP_PASSWORD"}
_SUFFIXES = ("", "_ID", "_EXPIRES_AT", "_CREATED_AT")  # of the variables of a secret, in the order of its fields
_RECORD, _USER = "ASC_AUTHENTIK_TOKEN_RECORD", "ASC_OIDC_USERNAME"
_OWN = {name + suffix for name in _VARIABLES.values() for suffix in _SUFFIXES} | {_RECORD, _USER}
_PLAIN = re.compile(r"[A-Za-z0-9_.:+@\- ]*")
_HEADER = """\
# Written by the project, which replaces these secrets before they expire. Do not copy this file: copies stop working.
# Status: scripts/refresh_step_auth.py --status
"""


@dataclass(frozen=True)
class Secret:
    """One secret of authentik's."""

    value: str = field(repr=False)  # the secret itself
    identifier: str = ""  # its name at authentik; empty if it is not known
    expires: datetime | None = None  # as authentik said
    created: datetime | None = None  # by this machine's clock, when it is one of ours

    def renew_at(self, skew_days: float | None) -> datetime | None:
        """Return when it should be replaced; None for at once, since it is not known when it expires.

        `skew_days`: ASC_AUTHENTIK_REFRESH_SKEW_DAYS; at most half the lifetime of it counts.
        """
        if self.expires is None:
            return None
        window = REFRESH_WINDOW if skew_days is None else timedelta(days=skew_days)
        if self.created is not None and self.created < self.expires:
            lifetime = self.expires - self.created
            window = min(window, lifetime / (3 if skew_days is None else 2))
        return self.expires - window

    def expired(self, now: datetime) -> bool:
        """Return whether it has certainly expired."""
        return self.expires is not None and self.expires <= now


@dataclass(frozen=True)
class Credentials:
    """What the credentials file holds; writers hold the lock (`renew.refresh_lock`)."""

    api_token: Secret | None = None  # makes tokens and app passwords
    app_password: Secret | None = None  # is exchanged for OIDC tokens
    user: str = ""  # ASC_OIDC_USERNAME of both; empty if it is not known
    record: tuple[str, ...] = ()  # identifiers of all tokens made here that are not known to be deleted
    others: str = field(default="", repr=False)  # lines of the file with other variables

    def renew_at(self, skew_days: float | None, now: datetime) -> datetime:
        """Return when the pair should be replaced: the earlier of both; `now` for an incomplete pair."""
        return min(each.renew_at(skew_days) or now if each else now for each in (self.api_token, self.app_password))

    @classmethod
    def read(cls, path: Path) -> "Credentials | None":
        """Return what the file holds, as far as it can be parsed; None where there is no file.

        Raises UnsafeFileError: others can read it, or could have written it; or it cannot be read.
        """
        with explained():
            text = read_private(path)
        if text is None:
            return None
        values = dotenv_values(stream=StringIO(text), interpolate=False)
        return cls(
            **{attribute: _parse_secret(name, values) for attribute, name in _VARIABLES.items()},
            user=values.get(_USER) or "",
            record=tuple((values.get(_RECORD) or "").split()),
            others="".join(
                binding.original.string.strip() + "\n"
                for binding in parse_stream(StringIO(text))
                if binding.key is not None and binding.key not in _OWN
            ),
        )

    def write(self, path: Path) -> None:
        """Replace the file, mode 0600.

        Raises UnsafeFileError: it cannot be written; the old file stays.
        Raises AccessError: a value has characters that not all readers of dotenv files understand alike.
        """
        lines = {_USER: self.user, _RECORD: " ".join(self.record)}
        for attribute, name in _VARIABLES.items():
            lines |= _render_secret(name, getattr(self, attribute))
        for name, value in lines.items():
            if not _PLAIN.fullmatch(value):
                raise AccessError(
                    f"{name} has characters that a credentials file cannot hold, so it was not stored. Tell the centre"
                )
        text = "".join(f"{name}={json.dumps(value)}\n" for name, value in lines.items())
        with explained():
            replace_file(path, _HEADER + text + self.others)


def candidates(stored: Secret | None, source: Source, given: SecretStr | None) -> dict[Source, str]:
    """Return the secrets to try, by where they come from: the stored one, then that of a variable (`source`)."""
    found: dict[Source, str] = {"stored": stored.value} if stored else {}
    return {**found, source: given.get_secret_value()} if given else found


def _parse_secret(name: str, values: dict[str, str | None]) -> Secret | None:
    value, identifier, expires, created = (values.get(name + suffix) or "" for suffix in _SUFFIXES)
    return Secret(value, identifier, _parse_time(expires), _parse_time(created)) if value else None


def _parse_time(text: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _render_secret(name: str, secret: Secret | None) -> dict[str, str]:
    if secret is None:
        return {}
    times = (moment.isoformat() if moment else "" for moment in (secret.expires, secret.created))
    texts = zip(_SUFFIXES, (secret.value, secret.identifier, *times), strict=True)
    return {name + suffix: text for suffix, text in texts if text}


@contextmanager
def explained(file: Path | str = "") -> Iterator[None]:
    """Turn an OSError into an AccessError: a run would take an OSError for a lost connection, and connect again.

    `file`: is named if the OSError names none.
    """
    try:
        yield
    except OSError as error:
        place = f"{error.filename or file}: " if error.filename or file else ""
        raise UnsafeFileError(
            f"A file that access needs cannot be used: {place}{error.strerror or error}. Check its folder, its "
            "permissions and the space on that disk"
        ) from error


def read_private(path: Path) -> str | None:
    """Return the text of a file that only its owner can read; None where there is no file.

    Raises UnsafeFileError: it is a symbolic link, not a plain file, of another owner, or readable by group or others.
    The last line of the text is the command that corrects it.
    Raises OSError: it cannot be read.
    """
    name = shlex.quote(str(path))
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError:
        if path.is_symlink():
            raise UnsafeFileError(
                f"{path} is a symbolic link to {path.readlink()}. A link to a file with secrets is not followed. "
                f'Put the file itself there:\n  f=$(readlink -f {name}) && rm {name} && mv "$f" {name}'
            ) from None
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UnsafeFileError(f"{path} is not a plain file. Move it away")
        if status.st_uid != os.geteuid():
            raise UnsafeFileError(
                f"{path} belongs to another user (uid {status.st_uid}), who could read and change it. "
                f"Move it away, and a new one is made:\n  mv {name} {shlex.quote(str(path) + '.foreign')}"
            )
        if status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            raise UnsafeFileError(f"{path} can be read by others (mode {mode:04o}). Close it:\n  chmod 600 {name}")
        with os.fdopen(os.dup(descriptor), encoding="utf-8", errors="replace") as file:
            return file.read()
    finally:
        os.close(descriptor)
