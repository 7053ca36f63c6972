"""For all tests: a clean environment, and what cannot run here is skipped with its reason, or fails in CI."""

import os
import shutil
import signal
from collections.abc import Generator

import pytest

from dagster_sbatch import project
from dagster_sbatch.setting_files import load_settings
from slurm_in_a_box import SimulatedSite

PREFIXES = ("DAGSTER_", "SLURM_", "SBATCH_", "ASC_", "RAY_")


def pytest_configure() -> None:
    """SIGINT and SIGTERM have their default actions however pytest was started: processes of tests inherit them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Settings of the person who runs the tests reach no test, by variables or by dotenv files."""
    empty = tmp_path_factory.getbasetemp() / "no-dotenv-files"
    monkeypatch.setattr(
        project, "load_settings", lambda sites, _, supercomputer=False: load_settings(sites, empty, supercomputer)
    )
    for name in list(os.environ):
        if name.startswith(PREFIXES) or name == "DATA_ROOT":
            monkeypatch.delenv(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On several workers, the files that take longest come first, as they stand: so no worker is left with one."""
    items.sort(
        key=lambda item: 0 if item.get_closest_marker("cluster") else 1 if item.get_closest_marker("local") else 2
    )


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
