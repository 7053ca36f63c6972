"""A file system that fails for a moment: what cannot be read then does not count as absent."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dagster_sbatch.slurm.gateway.agent import (
    building,
    claims,
    disk,
    images,
    interpreters,
    jobs,
    releases,
    run_directories,
    tasks,
    transfer,
)


@pytest.fixture(autouse=True)
def stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that cannot be read, `stale` in the working directory; by relative paths, nor what lies in it."""
    folder = tmp_path / "stale"

    def spoil(function: str) -> None:
        real = getattr(os, function)

        def fail(path: Any, *arguments: Any, **options: Any) -> Any:
            if not isinstance(path, int) and (Path(path) == folder or Path(path).parts[:1] == (folder.name,)):
                raise OSError(errno.ESTALE, "Stale file handle", path)
            return real(path, *arguments, **options)

        monkeypatch.setattr(os, function, fail)

    monkeypatch.chdir(tmp_path)
    spoil("stat")
    spoil("listdir")
    return folder


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (run_directories.has, ["stale", "failed"]),  # a result that was rejected would be used
        (run_directories.runs, [None, {"runs": "stale"}, None]),  # sensors would forget jobs
        (tasks.is_array, ["stale"]),  # an array job would be followed as a single one
        (jobs.submit_once, ["stale", "KEY", {"files": None}]),  # there would be no run to adopt
        (claims.clean, [None, {"runs": "stale", "names": []}, None]),
        (releases.remove_unused, ["stale"]),  # no package would be needed
        (releases.idle, ["stale"]),
        (images.problem_of, ["stale"]),  # a folder would be opened as a file, and the step would fail
        (images.identity_of, ["stale"]),
        (images.problem_here, ["sh", "image.sif", "data", ["stale"]]),  # Container(binds=...) would be wrong
        (interpreters.choose, [{"python": "stale"}]),  # the folder would be started as an interpreter
        (building.is_whole, ["stale", "packages.json"]),  # they would be installed again
        (transfer.put, [None, {"path": "./stale", "sha256": "0" * 64, "bytes": 1}, None]),  # it would be sent again
    ],
)
def test_what_cannot_be_read_now_does_not_count_as_absent(
    function: Callable[..., object], arguments: list[Any]
) -> None:
    with pytest.raises(OSError, match="Stale file handle"):
        function(*arguments)


def test_a_folder_above_the_base_path_that_cannot_be_read_now_does_not_count_as_safe(stale: Path) -> None:
    runs = stale / "base" / "runs"
    runs.mkdir(parents=True)
    with pytest.raises(OSError, match="Stale file handle"):
        disk.check(str(runs))  # type: ignore[no-untyped-call]
