"""For all tests: they ignore the variables and dotenv files of the person who runs them."""

import os
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest
from dagster_sbatch.commands import demo
from resources import PROJECT

PREFIXES = ("DAGSTER_", "SLURM_", "SBATCH_", "ASC_", "RAY_")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the variables that are settings."""
    for name in list(os.environ):
        if name.startswith(PREFIXES) or name == "DATA_ROOT":
            monkeypatch.delenv(name)


@pytest.fixture
def materialise_demo(tmp_path: Path) -> Callable[[], set[str]]:
    """Return a function that materialises what DEMO selects, and returns the names of what the assets reported.

    It uses the locked packages of this project, no dotenv files, and another folder for the data.
    """
    from jobs.pipelines import DEMO
    from musica_pipelines.definitions import defs

    for name in ("requirements", "pyproject.toml"):
        (tmp_path / name).symlink_to(PROJECT.root / name)
    config = {"resources": {"compute": {"config": {"root": str(tmp_path)}}}}

    def materialise() -> set[str]:
        names: set[str] = set()
        with dg.DagsterInstance.ephemeral() as instance:
            for done in demo.execute(defs, demo.runs_of_each(defs, DEMO), instance, config):
                assert not [check.check_name for check in done.get_asset_check_evaluations() if not check.passed]
                for event in done.get_asset_materialization_events():
                    names.update(event.materialization.metadata)
        return names

    return materialise
