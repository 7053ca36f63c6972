"""The error for what a user has written, and its text: what is wrong, where, and what to do."""

import difflib
from collections.abc import Iterable

from pydantic import ValidationError


class ConfigurationError(ValueError):
    """A setting, a site override, a launcher or a Slurm request that cannot work. The text is meant for its author."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` if a known word is close to this one, else the list of all known words."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; valid are {', '.join(names)}"


def describe(error: ValidationError, where: str, fields: Iterable[str]) -> str:
    """Return the problems that pydantic found, one per line; for an unknown field, with the nearest known name.

    Args:
        error: what pydantic found.
        where: the thing that is wrong, for instance `RayLauncher`.
        fields: the known names on the top level.
    """
    lines = []
    for problem in error.errors(include_url=False, include_input=False):
        place = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown field {place!r}{nearest(str(problem['loc'][-1]), fields)}")
        else:
            text = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{where}: {place + ': ' if place else ''}{text}")
    return "\n".join(lines)
