"""A file or folder that another agent removes while this one looks at it: it counts as absent."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dagster_sbatch.slurm.gateway.agent import building, claims, interpreters, paths, releases, run_directories

NEEDED = '{"name": 1, "kind": 1, "python": 1, "workloads": 1, "asked": 1, "lock": 1, "code": 1, "interpreter": 1, '


def lock_environments(base: Path) -> None:
    with building.locked(str(base), None):
        pass


LOOKS: dict[str, Callable[[Path], object]] = {
    ".bashrc": lambda _: paths.stamps(),
    "python": lambda base: interpreters.stamp({"python": f"{base}/python"}, {"executable": f"{base}/python"}),
    "packages": lock_environments,
    "environment": lambda base: releases.inventory(None, {"folder": str(base)}, None),
    "wheel": lambda base: releases.idle(str(base)),
    "KEY-1": lambda base: claims.clean(None, {"runs": str(base), "names": ["KEY-1"]}, None),
    "KEY-1.node-1.new": lambda base: claims.clean(None, {"runs": str(base), "names": []}, None),
    "KEY-2": lambda base: run_directories.runs(None, {"runs": str(base)}, None),
}
"""By the path that is removed: what looks at it."""


@pytest.mark.parametrize("name", LOOKS)
def test_what_is_removed_while_it_is_looked_at_counts_as_absent(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is removed before the first look, then before the second one, and so on."""
    path, looks, at = tmp_path / "base" / name, 0, 0

    def spoil(function: str) -> None:
        real = getattr(os, function)

        def look(asked: object, *arguments: object, **options: object) -> object:
            nonlocal looks
            if isinstance(asked, str) and Path(asked).is_relative_to(path):
                looks += 1
                if looks == at:
                    path.replace(tmp_path / f"removed-{at}")
            return real(asked, *arguments, **options)

        monkeypatch.setattr(os, function, look)

    monkeypatch.setenv("HOME", str(tmp_path / "base"))
    for each in ("stat", "listdir", "rename"):
        spoil(each)
    while looks >= at:
        looks, at = 0, at + 1
        path.mkdir(parents=True, exist_ok=True)
        for content in ("environment.json", "about.json"):
            (path / content).write_text(NEEDED + '"layer": 1, "run": 1, "asset": 1}')
        LOOKS[name](tmp_path / "base")
    assert at > 1
