"""Paths as users write them in the settings: absolute, or beginning with a variable of the place where they lie."""

import os
import re
from pathlib import Path

from dagster_sbatch.errors import nearest

VARIABLES = ("HOME", "DATA", "SCRATCH")  # what a path may begin with, each behind a `$`; `~` is `$HOME`
FORMS = "/absolute/path, ~/path, $HOME/path, $DATA/path, $SCRATCH/path"
BRACES = re.compile(r"\$\{(" + "|".join(VARIABLES) + r")\}")
"""python-dotenv replaces this by the variable of this machine, which most often is empty."""
_START = re.compile(r"(?:~|\$(" + "|".join(VARIABLES) + r"))(?=/|$)")
_VARIABLE = re.compile(r"(?:^|/)\$\{?(\w+)")


def check_remote_path(text: str) -> str:
    """Return a path on the supercomputer as it was written, without slashes at its end.

    Raises ValueError: it has none of FORMS; the text names them, or the variable that may have been meant.
    """
    _check_variables(text)
    if not text.startswith("/") and not _START.match(text):
        raise ValueError(f"{text!r} is not an absolute path. Valid forms: {FORMS}")
    return text.rstrip("/") or "/"


def expand_here(text: str) -> Path:
    """Return a path on this machine without `~` and variables; it may be relative.

    Raises ValueError: it has another variable than VARIABLES, or one that is not set here.
    """
    _check_variables(text)
    found = _START.match(text)
    if not found:
        try:
            return Path(text).expanduser()
        except RuntimeError:
            raise ValueError(f"{text!r}: there is no such user on this machine. Write the path itself") from None
    name = found[1] or "HOME"
    if not os.environ.get(name):
        raise ValueError(f"{text!r} begins with ${name}, which is not set on this machine. Write the path itself")
    return Path(os.environ[name] + text[found.end() :])


def read_local_path(path: Path) -> Path:
    """Return an absolute path on this machine; see `expand_here`.

    Raises ValueError: it is relative, and would be another file in each folder in which a process begins.
    """
    found = expand_here(str(path))
    if not found.is_absolute():
        raise ValueError(f"{str(path)!r} is not an absolute path. Valid forms: {FORMS}")
    return found


def to_shell(text: str) -> str:
    """Return a path with one of FORMS as a word of a POSIX shell on the supercomputer."""
    found = _START.match(text)
    start = f'"${found[1] or "HOME"}"' if found else ""
    rest = text[found.end() :] if found else text
    return start + "'" + rest.replace("'", "'\"'\"'") + "'"


def _check_variables(text: str) -> None:
    """Raise ValueError for a part that begins as a variable does, but is none of VARIABLES or not the first part."""
    start = _START.match(text)
    found = _VARIABLE.search(text, start.end() if start else 0)
    if not found:
        return
    if found[1] in VARIABLES:
        raise ValueError(f"{text!r}: ${found[1]} counts only as the first part, without braces. Valid forms: {FORMS}")
    hint = nearest(f"${found[1]}", [f"${each}" for each in VARIABLES])
    raise ValueError(f"{text!r}: ${found[1]} is unknown{hint}")
