"""A file system that fails for a moment: what cannot be read then does not count as absent."""

import errno
import os
from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from dagster_sbatch.slurm.gateway.agent import claims, jobs, releases, run_directories, tasks


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (run_directories.has, [".", "failed"]),  # a result that was rejected would be used
        (run_directories.runs, [None, {"runs": "."}, None]),  # sensors would forget jobs
        (tasks.is_array, ["."]),  # an array job would be followed as a single one
        (jobs.submit_once, [".", "KEY", {"files": None}]),  # there would be no run to adopt
        (claims.clean, [None, {"runs": ".", "names": []}, None]),
        (releases.remove_unused, ["."]),  # no package would be needed
        (releases.idle, ["."]),
    ],
)
def test_what_cannot_be_read_now_does_not_count_as_absent(
    function: Callable[..., object], arguments: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stat(path: str, **_: object) -> NoReturn:
        raise OSError(errno.ESTALE, "Stale file handle", path)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(OSError, match="Stale file handle"):
        function(*arguments)
