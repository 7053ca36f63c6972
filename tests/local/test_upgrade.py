"""`scripts/upgrade`: a project that its owner has edited runs with a newer engine, and returns to the older one."""

import functools
import http.server
import re
import shutil
import ssl
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dagster_sbatch.commands.upgrade import upgrade
from dagster_sbatch.commands.vendored import find_wheels
from dagster_sbatch.errors import ConfigurationError
from support import ROOT
from support.new_project import CHANGE, PACKAGE, made_in, newer_engine, run_in
from support.tls import self_signed

pytestmark = pytest.mark.local

ASSET = f'''\
"""The owner's asset."""

import dagster as dg
from dagster_sbatch import ComputeResource, ScriptLauncher, SlurmRequest

from {PACKAGE}.assets.estimates import WORKLOADS


@dg.asset(check_specs=[dg.AssetCheckSpec("near_pi", asset="coarse_pi")])
def coarse_pi(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    """Pi, from few points."""
    return compute.run(
        context,
        workload=WORKLOADS / "pi_estimate.py",
        launcher=ScriptLauncher(),
        request=SlurmRequest(time_limit="00:05:00"),
        extras={{"points": 100}},
    ).get_materialize_result()
'''
SITE = '    "borealis": {"partitions": {"batch": {"cores": 128, "mem": "256G"}}},\n'
JOB = '= (dg.define_asset_job("coarse", selection="coarse_pi"),)'
ENGINES_OWN = ["pixi.toml", "pyproject.toml", "requirements/dev.txt", "vendor/dagster_sbatch-1.0.0-py3-none-any.whl"]
"""What an upgrade changes in a project, beside the new wheel."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with an asset, a site and a job of its owner, who keeps the quick tests only."""
    folder = made_in(tmp_path_factory.mktemp("project"))
    (folder / PACKAGE / "assets" / "coarse.py").write_text(ASSET)
    sites = folder / "resources" / "__init__.py"
    sites.write_text(sites.read_text().replace('    "musica": {', f'{SITE}    "musica": {{', 1))
    jobs = folder / "jobs" / "pipelines.py"
    jobs.write_text(jobs.read_text().replace("= ()", JOB))
    for slow in ("cluster", "local"):
        shutil.rmtree(folder / "tests" / slow)
    assert run_in(folder, "git", "add", "--all").returncode == 0
    commit = ("-c", "user.name=me", "-c", "user.email=me@localhost", "commit", "--quiet", "--message", "mine")
    assert run_in(folder, "git", *commit).returncode == 0
    return folder


def changed(project: Path) -> list[str]:
    """The files that differ from the last commit."""
    return run_in(project, "git", "diff", "--name-only", "HEAD").stdout.splitlines()


def installed(project: Path) -> str:
    """The version of the engine in the project's environment."""
    code = "import importlib.metadata as m; print(m.version('dagster-sbatch'))"
    return run_in(project, f"{project}/.venv/bin/python", "-c", code).stdout.strip()


def test_an_edited_project_runs_with_a_newer_engine_and_returns(project: Path, tmp_path: Path) -> None:
    wheel = newer_engine(tmp_path, "1.1.0")
    done = run_in(project, sys.executable, "scripts/upgrade", str(wheel.path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All tests pass" in done.stdout
    assert f"also make them by hand:\n\n1.1.0\n{CHANGE}" in done.stdout
    assert changed(project) == ENGINES_OWN
    assert "\n./vendor/dagster_sbatch-1.1.0-py3-none-any.whl \\\n" in (project / "requirements" / "dev.txt").read_text()
    assert installed(project) == "1.1.0"
    run = run_in(project, f"{project}/.venv/bin/dg", "launch", "--job", "coarse")
    assert run.returncode == 0, run.stderr
    assert "Materialized value coarse_pi" in run.stdout + run.stderr

    back = run_in(project, sys.executable, "scripts/upgrade", "--back")
    assert back.returncode == 0, back.stdout + back.stderr
    assert f"undo them by hand:\n\n1.1.0\n{CHANGE}" in back.stdout
    assert run_in(project, "git", "status", "--porcelain").stdout == ""
    assert installed(project) == "1.0.0"
    again = run_in(project, sys.executable, "scripts/upgrade", "--back")
    assert again.returncode == 1
    assert "There is no engine to return to" in again.stderr


def test_an_engine_that_fails_the_tests_stays_until_back(project: Path, tmp_path: Path) -> None:
    wheel = newer_engine(
        tmp_path, "1.1.1", {"src/dagster_sbatch/run/compute.py": ("class ComputeResource(", "class Renamed(")}
    )
    done = run_in(project, sys.executable, "scripts/upgrade", str(wheel.path))
    assert done.returncode == 3
    assert "A test fails. Its output is above." in done.stdout
    assert "\n  scripts/upgrade --back\n" in done.stdout
    assert installed(project) == "1.1.1"
    assert run_in(project, sys.executable, "scripts/upgrade", "--back").returncode == 0
    assert run_in(project, "git", "status", "--porcelain").stdout == ""


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("no-such-file.whl", "is not a file, a folder, an address with https:// or a version"),
        ("http://localhost/dagster_sbatch-1.1.0-py3-none-any.whl", "an address with https://"),
        (".", "is not a clone of the template"),
        ("broken/dagster_sbatch-1.1.0-py3-none-any.whl", "cannot be read"),
        ("broken/dagster-1.13.0-py3-none-any.whl", "is not a wheel of dagster-sbatch or slurm-in-a-box"),
        ("99.0", "dagster-sbatch==99.0 cannot be downloaded"),
        ("https://me:secret@localhost:1/x-1.whl?key=secret", r"(?s)^https://\*+@\S+/x-1\.whl\?\*+ cannot(?!.*secret)"),
    ],
)
def test_a_source_that_is_none_changes_nothing(
    source: str, reason: str, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")
    (tmp_path / "broken").mkdir()
    for name in ("dagster_sbatch-1.1.0", "dagster-1.13.0"):
        (tmp_path / "broken" / f"{name}-py3-none-any.whl").write_text("no archive")
    with pytest.raises(ConfigurationError, match=reason):
        upgrade(project, source, tmp_path)
    assert changed(project) == []


def test_dependencies_that_cannot_be_resolved_change_nothing(project: Path, tmp_path: Path) -> None:
    wheel = newer_engine(tmp_path, "1.2.0", {"pyproject.toml": ('"psutil>=7"', '"psutil>=7", "psutil<7"')})
    done = run_in(project, sys.executable, "scripts/upgrade", str(wheel.path), UV_OFFLINE="1")
    assert done.returncode == 1
    assert "dev.txt could not be resolved" in done.stderr
    assert "psutil<7" in done.stderr
    assert "Nothing was changed." in done.stderr
    assert run_in(project, "git", "status", "--porcelain").stdout == ""


def test_a_clone_of_the_template_is_a_source(tmp_path: Path) -> None:
    assert sorted(find_wheels(str(ROOT), tmp_path)) == ["dagster-sbatch", "slurm-in-a-box"]


def test_a_clone_may_lack_the_box(tmp_path: Path) -> None:
    """That of the project stays."""
    (tmp_path / "clone" / "packages").mkdir(parents=True)
    (tmp_path / "clone" / "packages" / "dagster-sbatch").symlink_to(ROOT / "packages" / "dagster-sbatch")
    assert list(find_wheels(str(tmp_path / "clone"), tmp_path)) == ["dagster-sbatch"]


def test_a_version_is_taken_from_the_index_that_pip_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = tmp_path / "index"
    index.mkdir()
    newer_engine(index, "1.1.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    assert find_wheels("1.1.0", tmp_path)["dagster-sbatch"].version == "1.1.0"


def test_a_version_that_pip_does_not_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ConfigurationError, match=r"(?s)==9\.9 cannot be downloaded.*not that of uv\. Name"):
        find_wheels("9.9", tmp_path)


def test_an_engine_that_cannot_be_installed_says_how_to_return(project: Path) -> None:
    """An upgrade to a broken wheel was killed before it could return by itself."""
    (project / ENGINES_OWN[-1]).write_text("no wheel")
    with (project / "requirements" / "dev.txt").open("a") as file:
        file.write("# another one\n")
    done = run_in(project, sys.executable, "scripts/upgrade", "--back")
    assert done.returncode == 1
    (restore,) = (line for line in done.stdout.splitlines() if line.startswith("  git restore "))
    assert run_in(project, *restore.split()).returncode == 0
    assert run_in(project, "git", "status", "--porcelain").stdout == ""
    assert run_in(project, sys.executable, "scripts/upgrade", "--help").returncode == 0


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    return self_signed(tmp_path / "certificate.pem")


class Pages(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; those below /closed need a password."""

    def do_GET(self) -> None:
        if self.path.startswith("/closed/"):
            self.send_error(401)
        else:
            super().do_GET()


@pytest.fixture
def address(tmp_path: Path, certificate: Path) -> Iterator[str]:
    """The https address of a wheel, on a server that no public authority knows."""
    wheel = newer_engine(tmp_path, "1.1.0")
    handler = functools.partial(Pages, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"https://127.0.0.1:{server.server_port}/{wheel.path.name}"
    server.shutdown()
    server.server_close()


def test_an_address_is_trusted_if_the_systems_store_trusts_it(
    address: str, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenSSL reads the system's store; SSL_CERT_FILE is its name for another one."""
    for name in ("PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_DIR", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"PIP_CONFIG_FILE": "/dev/null", "PIP_RETRIES": "0", "NO_PROXY": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    made = tmp_path / "made"
    made.mkdir()
    with pytest.raises(ConfigurationError, match=r"(?is)cannot be downloaded.*certificate"):
        find_wheels(address, made)
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):  # of OpenSSL, of pip
        monkeypatch.setenv(name, str(certificate))
        assert find_wheels(address, made)["dagster-sbatch"].version == "1.1.0"
        monkeypatch.delenv(name)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with pytest.raises(ConfigurationError, match=r"(?s)^(?!.*Traceback).*401"):
        find_wheels(re.sub(r"(?<=\d)/", "/closed/", address), tmp_path / "none")
