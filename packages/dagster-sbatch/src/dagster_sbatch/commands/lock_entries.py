"""The lock files of a copy: those of the template without what only the example needs, and with the wheels in vendor/.

Nothing is resolved and no network is used: uv writes into a lock file which packages require each one. The result is
what `scripts/lock` writes in the copy.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

DIRECT = "(pyproject.toml"  # uv writes this behind a project's name where the project itself requires a package


@dataclass(frozen=True)
class Entry:
    """A package in a lock file."""

    name: str  # of the package
    lines: str  # its requirement and hashes, as they are in the file
    parents: tuple[str, ...]  # who requires it

    def render(self) -> str:
        """Return the lines that uv writes for it."""
        if len(self.parents) == 1:
            return f"{self.lines}    # via {self.parents[0]}\n"
        return f"{self.lines}    # via\n" + "".join(f"    #   {parent}\n" for parent in self.parents)


def parse(text: str) -> list[Entry]:
    """Return the entries of a lock file."""
    entries = []
    for block, name in re.findall(r"^(([\w.-]+).*\n(?: .*\n)*)", text, re.MULTILINE):
        parents = re.findall(r"^    #(?: via|  ) (\S.*)$", block, re.MULTILINE)
        entries.append(Entry(name, re.sub(r"^    #.*\n", "", block, flags=re.MULTILINE), tuple(parents)))
    return entries


def without(entries: Iterable[Entry], names: set[str]) -> list[Entry]:
    """Return the entries less the direct requirements with these names, and less what only those required."""
    kept = [
        replace(
            each, parents=tuple(parent for parent in each.parents if each.name not in names or DIRECT not in parent)
        )
        for each in entries
    ]
    while True:
        left = {each.name for each in kept if each.parents}
        fewer = [
            replace(each, parents=tuple(parent for parent in each.parents if DIRECT in parent or parent in left))
            for each in kept
            if each.parents
        ]
        if fewer == kept:
            return kept
        kept = fewer


def with_wheels(entries: Iterable[Entry], requirements: dict[str, str], project: str) -> list[Entry]:
    """Return the entries with those of wheels in vendor/, which the project requires itself.

    `requirements`: by package, the lines of its wheel.
    """
    wheels = [Entry(name, f"{lines}\n", (f"{project} {DIRECT})",)) for name, lines in requirements.items()]
    return sorted([*entries, *wheels], key=lambda each: each.name)


def render(entries: Iterable[Entry], old: str, new: str) -> str:
    """Return the text of a lock file, with the project renamed."""
    lines = []
    for each in entries:
        renamed = (parent.replace(old, new) for parent in each.parents)
        parents = tuple(sorted(renamed, key=lambda parent: (DIRECT not in parent, parent)))  # as uv does
        lines.append(replace(each, parents=parents).render())
    return "".join(lines)
