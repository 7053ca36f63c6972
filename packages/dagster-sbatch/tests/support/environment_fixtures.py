"""For tests of environments on the simulated site: a small lock file and index, a workload, and a client."""

import copy
import platform
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch.auth import ensure_certificate
from dagster_sbatch.environments import deployed, groups
from dagster_sbatch.environments.code import read_code
from dagster_sbatch.environments.deployed import Comparison, Environment, Environments, EnvironmentSpec, Progress
from dagster_sbatch.environments.lockfile import Interpreter, read_lock
from dagster_sbatch.environments.wheels import Wheel, gather_wheels
from dagster_sbatch.launchers import ScriptLauncher
from dagster_sbatch.project import Project
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.slurm import SlurmRequest, load_site
from dagster_sbatch.slurm.gateway import Gateway, choose_channel
from resources import PROJECT, build_resources
from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite
from support.environments import lines_of_the_lock, make_source

BASE = f"{CERTIFICATE_USER.home}/dagster-slurm"
FOLDER = f"{BASE}/environments"
BALLAST = 6 << 20
PROGRAM = """\
import sys
import ballast
from dagster_pipes import open_dagster_pipes
from helpers.deep import WORD

with open_dagster_pipes() as pipes:
    print(WORD)
    pipes.report_asset_materialization(metadata={"word": WORD, "package": ballast.WORD, "python": sys.executable})
"""


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index for pip: pip and dagster-pipes as the project's lock has them, and a package that is source only."""
    folder = tmp_path_factory.mktemp("index")
    wanted = folder / "lock.txt"
    wanted.write_text(lines_of_the_lock(["pip", "dagster-pipes"]))
    command = ["-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--dest", str(folder)]
    subprocess.run([sys.executable, *command, "--requirement", str(wanted)], check=True)
    wanted.write_text(wanted.read_text() + make_source(folder, "ballast", ballast=BALLAST))
    return folder


def pip_variables(index: Path) -> dict[str, str]:
    return {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index)}


@pytest.fixture(autouse=True)
def in_order(site: SimulatedSite, index: Path, client_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user with the document's variables and no others; a small lock instead of the cluster group's."""
    variables = {name: value for name, value in site.environment().items() if name != "SLURM_PYTHON"}
    for name, value in {**variables, **pip_variables(index), "HOME": str(client_home)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Project, "lock", index / "lock.txt")
    monkeypatch.setattr(groups, "GROUP", "none that requires more than that lock has")


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    """A program with a package below a package beside it."""
    folder = tmp_path / "workloads"
    (folder / "helpers" / "deep").mkdir(parents=True)
    (folder / "helpers" / "__init__.py").touch()
    (folder / "helpers" / "deep" / "__init__.py").write_text("WORD = 'one'\n")
    (folder / "main.py").write_text(PROGRAM)
    return folder / "main.py"


class Client(Progress):
    """A connection to the environments of a deployment, and the progress that it reports."""

    def __init__(
        self, wanted: EnvironmentSpec, on_step: Callable[[str], None] = lambda _: None, **of_site: Any
    ) -> None:
        settings = PROJECT.load_settings()
        overrides = copy.deepcopy(PROJECT.site_overrides)
        overrides["musica"].update(of_site)
        self.steps: list[str] = []
        self.troubles: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self.on_step = on_step
        self.on_sent: Callable[[], None] | None = None
        self.wanted = wanted
        channel = choose_channel(settings, ("python3",), ensure_certificate)
        self.stop = threading.Event()
        self.gateway = Gateway(channel, self.stop, self.troubles.append)
        self.environments = Environments(self.gateway, BASE, load_site(overrides, "musica"))

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.gateway.close()

    def compare(self) -> Comparison:
        with tempfile.TemporaryDirectory() as folder:
            return self.environments.compare(self.wanted, Path(folder), self)

    def ensure(self) -> Environment:
        return self.environments.ensure(self.wanted, self)

    def step(self, text: str) -> None:
        self.steps.append(text)
        self.on_step(text)

    def sent(self, done: int, total: int) -> None:
        self.sizes.append((done, total))
        if self.on_sent:
            self.on_sent()


def waiting_at(step: str) -> list[str]:
    """Return a setup command with which the command of that step waits for the file `go-on` in the user's home."""
    command = {"installing": "*' install '*", "verifying": "*importlib*"}[step]
    return [f'case "$*" in {command}) until [ -e ~/go-on ]; do sleep 0.05; done ;; esac']


def go_on(site: SimulatedSite) -> None:
    """Let a command that waits begin; a file without content needs no space on a full disk."""
    (site.layout.home / CERTIFICATE_USER.name / "go-on").touch()


@pytest.fixture
def wanted(workload: Path, index: Path) -> EnvironmentSpec:
    return EnvironmentSpec(read_code(workload.parent), read_lock(index / "lock.txt"))


@pytest.fixture(scope="module")
def site_python(running_slurm_site: SimulatedSite) -> tuple[str, str]:
    """Path and version of the machines' own Python."""
    ask = "import os, platform, sys; print(os.path.realpath(sys.executable), platform.python_version())"
    path, version = running_slurm_site.run_on_login(CERTIFICATE_USER, f"python3 -c '{ask}'").stdout.split()
    return path, version


@pytest.fixture(scope="module")
def gathered(index: Path, site_python: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[Wheel]:
    """The wheels for the site's Python."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in pip_variables(index).items():
            patch.setenv(name, value)
        python = Interpreter(*site_python, platform.machine(), "2.31")
        return gather_wheels(read_lock(index / "lock.txt"), python, tmp_path_factory.mktemp("wheels"), lambda: None)


@pytest.fixture
def fetched(gathered: list[Wheel], monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheels are here already: for tests of what follows."""
    monkeypatch.setattr(deployed, "gather_wheels", lambda *_: gathered)


@pytest.fixture
def client(wanted: EnvironmentSpec) -> Iterator[Client]:
    with Client(wanted) as made:
        yield made


def there(site: SimulatedSite, command: str) -> str:
    return site.run_on_login(CERTIFICATE_USER, command).stdout.strip()


def names(site: SimulatedSite) -> list[str]:
    """All environments, and whatever else lies beside them unasked."""
    listed = there(site, f"ls {FOLDER} 2>/dev/null || true")
    return [name for name in listed.split() if name not in ("packages", "wheels", "published.json")]


def nothing_is_unfinished(site: SimulatedSite) -> None:
    assert there(site, f"find {FOLDER} -name '*.new' -o -name '*.old' -o -name '*.part'") == ""


def materialize(workload: Path) -> dg.ExecuteInProcessResult:
    @dg.asset
    def answer(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        launcher, request = ScriptLauncher(), SlurmRequest(time_limit="5")
        return compute.run(context, workload=workload, launcher=launcher, request=request).get_materialize_result()

    return dg.materialize([answer], resources=build_resources(), raise_on_error=False)


def metadata(result: dg.ExecuteInProcessResult) -> dict[str, Any]:
    (event,) = result.asset_materializations_for_node("answer")
    return {name: value.value for name, value in event.metadata.items()}


def failure_of(result: dg.ExecuteInProcessResult) -> str:
    data = result.failure_data_for_node("answer")
    assert data is not None
    assert data.error is not None
    return data.error.message
