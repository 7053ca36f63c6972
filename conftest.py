"""For all tests: a clean environment, and what cannot run here is skipped with its reason, or fails in CI."""

import os
import shutil
import signal
from collections.abc import Generator
from pathlib import Path

import pytest

from dagster_sbatch import project
from dagster_sbatch.commands.dev import find_daemon
from dagster_sbatch.setting_files import load_settings
from slurm_in_a_box import SimulatedSite

SITE = "slurm-in-a-box"
PREFIXES = ("DAGSTER_", "SLURM_", "SBATCH_", "ASC_", "RAY_", "GIT_", "PYTHONWARNINGS", "DATA_ROOT")
"""Beginnings of the names of variables. A hook of git has GIT_..., which name the repository of its user."""


def pytest_configure() -> None:
    """Begin with the default actions of signals, however pytest was started."""
    reset_signals()


def reset_signals() -> None:
    """Give SIGINT and SIGTERM their default actions: processes that tests start inherit what is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Settings of the person who runs the tests reach no test: variables, dotenv files, git's configuration."""
    empty = tmp_path_factory.getbasetemp() / "no-dotenv-files"
    monkeypatch.setattr(
        project, "load_settings", lambda sites, _, supercomputer=False: load_settings(sites, empty, supercomputer)
    )
    for name in list(os.environ):
        if name.startswith(PREFIXES):
            monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")


@pytest.fixture
def no_other_daemon() -> None:
    """For tests of this repository's scripts/dev, which does not start beside a Dagster that a person has started."""
    if pid := find_daemon(Path(__file__).parent):
        pytest.skip(f"a Dagster daemon of this repository runs: process {pid}")


@pytest.fixture(autouse=True)
def signals_as_before() -> Generator[None, None, None]:
    """A command that a test calls in this process leaves handlers of its own."""
    yield
    reset_signals()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mix the files of unit, local and cluster tests: on several workers, some wait while others compute.

    Those of the simulated site come first: without it, others fail, too. The last ones are unit tests only: they are
    short, so no worker is left alone with a long file.
    """
    kinds: dict[Path, int] = {}
    for item in items:
        kind = 0 if item.get_closest_marker("cluster") else 1 if item.get_closest_marker("local") else 2
        kinds[item.path] = min(kind, kinds.get(item.path, kind))
    places = {}
    for kind, end in enumerate((0.6, 0.6, 1)):
        paths = sorted((path for path in kinds if kinds[path] == kind), key=lambda path: SITE not in path.parts)
        places |= {path: end * number / len(paths) for number, path in enumerate(paths)}
    items.sort(key=lambda item: places[item.path])


@pytest.fixture
def site(slurm_site: SimulatedSite) -> SimulatedSite:
    """The simulated site after a reset (`slurm_in_a_box.plugin`)."""
    return slurm_site


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With CI=true a skipped test is a failed one."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true":
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report


@pytest.fixture
def shellcheck() -> str:
    """Path of shellcheck; skips where there is none."""
    path = shutil.which("shellcheck")
    if path is None:
        pytest.skip("shellcheck is not installed")
    return path
