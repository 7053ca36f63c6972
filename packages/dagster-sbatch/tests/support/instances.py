"""Dagster instances with a storage of their own: copies of one, since Dagster takes 0.3 s to make its tables."""

import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import dagster as dg


def make_instance(folder: Path) -> None:
    """Make the folder of a new instance, for `DagsterInstance.from_config`; telemetry is off."""
    shutil.copytree(_empty().name, folder)


@cache
def _empty() -> "TemporaryDirectory[str]":
    made = TemporaryDirectory()
    Path(made.name, "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    dg.DagsterInstance.from_config(made.name).dispose()
    return made
