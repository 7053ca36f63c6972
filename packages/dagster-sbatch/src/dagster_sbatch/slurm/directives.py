"""The options on the #SBATCH lines of a batch script."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from dagster_sbatch.errors import ConfigurationError

_LETTERS = {
    pair[0]: pair[2:]
    for pair in """
    A:account a:array B:extra-node-info b:begin c:cpus-per-task C:constraint d:dependency D:chdir e:error
    F:nodefile G:gpus H:hold i:input J:job-name k:no-kill L:licenses m:distribution M:clusters n:ntasks N:nodes
    O:overcommit o:output p:partition q:qos Q:quiet S:core-spec s:oversubscribe t:time v:verbose W:wait
    w:nodelist x:exclude
    """.split()
}
_WITHOUT_VALUE = frozenset(
    """
    contiguous exclusive get-user-env hold ignore-pbs nice no-kill no-requeue overcommit oversubscribe parsable
    propagate quiet reboot requeue spread-job test-only use-min-nodes verbose wait x11
    """.split()
)
"""Options whose value, if they have one, follows a `=` (man sbatch)."""


@dataclass(frozen=True)
class Directive:
    """An option on an #SBATCH line."""

    line: int  # its number, from 1
    name: str  # its long name, without dashes
    value: str  # empty if it has none

    def __str__(self) -> str:
        """Return it as on a command line."""
        return f"--{self.name}={self.value}" if self.value else f"--{self.name}"


def read_directives(script: str) -> list[Directive]:
    """Return the options of a batch script, in its order; sbatch reads them up to the first command.

    A comment may be indented; an indented #SBATCH is one.
    Raises ConfigurationError: a line cannot be read.
    """
    found: list[Directive] = []
    for number, line in _comments(script):
        if re.match(r"#SBATCH(\s|-)", line):
            found += _read_line(number, line.removeprefix("#SBATCH"))
    return found


def read_others(script: str) -> list[tuple[int, str]]:
    """Return the lines, with their numbers, that are for PBS or LSF; sbatch translates some of their options."""
    return [(number, line.strip()) for number, line in _comments(script) if re.match(r"#(PBS|BSUB)\s", line)]


def _comments(script: str) -> Iterator[tuple[int, str]]:
    """Yield the lines before the first command, with their numbers."""
    for number, line in enumerate(script.split("\n"), 1):
        if not re.match(r"\s*(#|$)", line):
            return
        yield number, line


def _read_line(number: int, text: str) -> list[Directive]:
    found: list[Directive] = []
    try:
        words = shlex.split(text, comments=True)
    except ValueError as error:
        raise ConfigurationError(f"line {number}: {error}") from None
    while words:
        word = words.pop(0)
        match = re.fullmatch(r"--([a-z][a-z0-9-]*)(?:=(.*))?|-([A-Za-z])=?(.*)", word)
        name = match and (match[1] or _LETTERS.get(match[3]))
        if not match or not name:
            raise ConfigurationError(f"line {number}: {word!r} is not an option of sbatch")
        value = match[2] if match[1] else match[4] or None
        if value is None and name not in _WITHOUT_VALUE:
            if not words:
                raise ConfigurationError(f"line {number}: {word} has no value")
            value = words.pop(0)
        found.append(Directive(number, name, value or ""))
    return found
