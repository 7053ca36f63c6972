"""For all tests: they ignore the variables and dotenv files of the person who runs them."""

import dataclasses
import os
from pathlib import Path

import pytest
from dagster_sbatch import Project
from resources import PROJECT

PREFIXES = ("DAGSTER_", "SLURM_", "SBATCH_", "ASC_", "RAY_")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the variables that are settings."""
    for name in list(os.environ):
        if name.startswith(PREFIXES) or name == "DATA_ROOT":
            monkeypatch.delenv(name)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """This project in another folder: with its locked packages and without dotenv files; the data goes there, too."""
    (tmp_path / "requirements").symlink_to(PROJECT.root / "requirements")
    return dataclasses.replace(PROJECT, root=tmp_path)
