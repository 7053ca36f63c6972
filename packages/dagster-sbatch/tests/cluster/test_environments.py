"""Environments on the simulated site: made from wheels, published whole or not at all, whatever happens meanwhile."""

import copy
import os
import platform
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch.auth import ensure_certificate
from dagster_sbatch.environments import (
    Comparison,
    Environment,
    Environments,
    EnvironmentSpec,
    deployed,
    read_code,
    read_lock,
)
from dagster_sbatch.environments.interpreter import Interpreter
from dagster_sbatch.environments.wheels import Wheel, gather_wheels
from dagster_sbatch.inspect.remote_runs import open_runs
from dagster_sbatch.launchers import ScriptLauncher
from dagster_sbatch.project import Project
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.sites import SITES
from dagster_sbatch.slurm import SlurmRequest, load_site
from dagster_sbatch.slurm.gateway import Gateway, RefusedError, choose_channel
from resources import PROJECT, build_resources
from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite, wait_until
from slurm_in_a_box.storage import MODULE, MODULE_PYTHON
from support import ROOT
from support.environments import lines_of_the_lock, make_source

pytestmark = pytest.mark.cluster
BASE = f"{CERTIFICATE_USER.home}/dagster-slurm"
FOLDER = f"{BASE}/environments"
BALLAST = 6 << 20
OLD = """\
#!/bin/sh
printf '\\036%s\\n' '{"given": "/opt/old", "version": "3.9.18", "implementation": "cpython"}'
"""
"""Answers as an interpreter that is too old does; the site has none."""
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
    """Where pip looks: pip and dagster-pipes as the project's lock has them, and a package that is source only."""
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


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    """A program with a package below a package beside it."""
    folder = tmp_path / "workloads"
    (folder / "helpers" / "deep").mkdir(parents=True)
    (folder / "helpers" / "__init__.py").touch()
    (folder / "helpers" / "deep" / "__init__.py").write_text("WORD = 'one'\n")
    (folder / "main.py").write_text(PROGRAM)
    return folder / "main.py"


class Client:
    """A deployment: a connection, and what it is told."""

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
    """What a deployment fetches is here already: for tests of what follows."""
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


def test_staging_packs_on_demand_and_edited_code_is_used_at_once(
    site: SimulatedSite, workload: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = metadata(materialize(workload))
    assert (first["word"], first["package"]) == ("one", "a package")
    (name,) = names(site)
    assert first["python"] == f"{FOLDER}/{name}/bin/python"
    told = capfd.readouterr().err
    for words in ("fetching the wheels", "sent 100 % of", "MB/s", "installing 3 wheels", "verifying"):
        assert words in told

    packages = there(site, f"cd {FOLDER} && stat -c '%i %Z' packages/*/packages.json wheels/*/*")
    (workload.parent / "helpers" / "deep" / "__init__.py").write_text("WORD = 'two'\n")
    second = metadata(materialize(workload))
    assert second["word"] == "two"
    assert len(names(site)) == 2
    assert there(site, f"cd {FOLDER} && stat -c '%i %Z' packages/*/packages.json wheels/*/*") == packages
    told = capfd.readouterr().err
    assert "verifying" in told
    assert "MB/s" not in told
    assert f"{workload.parent} is in no git repository: all 3 files in it are sent: helpers/__init__.py" in told
    assert there(site, f"find {FOLDER}/{name} -newer {FOLDER}/{name}/environment.json -type f") == ""
    nothing_is_unfinished(site)


@pytest.mark.usefixtures("fetched")
def test_unchanged_content_costs_one_round_trip(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    made = client.ensure()
    requests: list[object] = []
    exchange = client.gateway.exchange

    def count(*asked: Any, data: bytes) -> object:
        requests.extend(asked)
        return exchange(*asked, data=data)

    monkeypatch.setattr(client.gateway, "exchange", count)
    assert client.ensure() == made
    assert len(requests) == 1


@pytest.mark.usefixtures("fetched")
def test_an_environment_is_isolated_and_sealed(site: SimulatedSite, client: Client) -> None:
    """Whatever the user's profile, a module or a pip.conf over there say."""
    there(site, "mkdir -p .config/pip strange; printf '[install]\\ntarget = /tmp/elsewhere\\n' >.config/pip/pip.conf; "
                "echo 'raise SystemExit(\"strange\")' >strange/ballast.py; touch strange/sitecustomize.py; "
                "echo 'echo greetings; export PYTHONPATH=$HOME/strange' >.bash_profile")  # fmt: skip
    python = client.ensure().python
    run = f"cd /tmp && {python} -c 'import ballast, pip; print(ballast.__file__, pip.__file__)'"
    listing = f"cd {FOLDER} && find . -type f | sort"
    before = there(site, listing)
    assert there(site, run).count(f"{FOLDER}/") == 2
    assert there(site, "ls -d /tmp/elsewhere || true") == ""
    assert there(site, listing) == before
    assert "denied" in site.run_on_login(CERTIFICATE_USER, f"touch {python}.x", check=False).stderr


@pytest.mark.usefixtures("fetched")
def test_a_connection_that_breaks_while_wheels_are_sent(site: SimulatedSite, client: Client) -> None:
    def drop_once() -> None:
        done, total = client.sizes[-1]
        if 0.3 * total < done < total and not client.troubles:
            client.troubles.append("dropped by the test")
            site.faults.drop_connections()

    client.on_sent = drop_once
    python = client.ensure().python
    assert len(client.troubles) > 1
    done = [size for size, _ in client.sizes]
    assert done == sorted(done)  # never from the beginning again
    assert there(site, f"{python} -c 'import ballast; print(ballast.WORD)'") == "a package"
    nothing_is_unfinished(site)


@pytest.mark.usefixtures("fetched")
def test_two_deployments_at_once(site: SimulatedSite, wanted: EnvironmentSpec) -> None:
    with Client(wanted) as one, Client(wanted) as two, ThreadPoolExecutor() as pool:
        made = [future.result() for future in [pool.submit(one.ensure), pool.submit(two.ensure)]]
        installed = [step for step in (*one.steps, *two.steps) if step.startswith("installing")]
    assert made[0] == made[1]
    assert names(site) == [made[0].name]
    assert len(installed) == 1
    nothing_is_unfinished(site)


@pytest.mark.usefixtures("fetched")
@pytest.mark.parametrize("moment", ["installing", "verifying"])
def test_killed_while_it_publishes(site: SimulatedSite, wanted: EnvironmentSpec, moment: str) -> None:
    def kill_once(step: str) -> None:
        if step.startswith(moment) and not killed:
            agents = [each for each in site.processes_on_login() if "import sys, zlib" in each.command]
            for each in agents:
                killed.append(each)
                site.run_on_node(each.machine, f"kill -KILL {each.pid}", check=False)

    killed: list[Any] = []
    with Client(wanted, kill_once) as client:
        made = client.ensure()
        assert killed
        assert sum(step.startswith(moment) for step in client.steps) > 1
        assert names(site) == [made.name]
        nothing_is_unfinished(site)


@pytest.mark.usefixtures("fetched")
def test_a_client_that_goes_away_leaves_nothing_running(site: SimulatedSite, wanted: EnvironmentSpec) -> None:
    class GoneError(Exception):
        pass

    def go(step: str) -> None:
        if step.startswith("installing"):
            raise GoneError

    with pytest.raises(GoneError), Client(wanted, go) as client:
        client.ensure()
    wait_until(lambda: not site.processes_on_login(), "no process on the login nodes", 30)
    with Client(wanted) as client:
        assert names(site) == []
        client.ensure()
    nothing_is_unfinished(site)


@pytest.mark.usefixtures("fetched")
def test_a_full_disk_while_wheels_are_sent(site: SimulatedSite, client: Client) -> None:
    with site.faults.disk_full(), pytest.raises(RefusedError, match="No space left"):
        client.ensure()
    client.ensure()


@pytest.mark.usefixtures("fetched")
def test_a_full_disk_while_it_installs(site: SimulatedSite, wanted: EnvironmentSpec) -> None:
    fault = site.faults.disk_full()

    def fill(step: str) -> None:
        if step.startswith("installing"):
            fault.inject()

    with Client(wanted, fill) as client, pytest.raises(RefusedError, match="No space left"):
        client.ensure()
    assert names(site) == []
    fault.repair()
    with Client(wanted) as client:
        client.ensure()
    nothing_is_unfinished(site)


@pytest.mark.usefixtures("fetched")
def test_the_interpreter_comes_from_the_candidates_after_the_setup_commands(
    site: SimulatedSite, wanted: EnvironmentSpec, site_python: tuple[str, str]
) -> None:
    there(site, f"mkdir modules; cd modules; ln -s {site_python[0]} python-new; cat >python-old <<'END'\n{OLD}END\n"
                "chmod +x python-old")  # fmt: skip
    load = ["echo 'the module greets'; export PATH=$HOME/modules:$PATH"]
    none = pytest.raises(RefusedError, match=r"no Python 3\.11 to 3\.13 on login0\d: of python9, python-new, none")
    with Client(wanted, python_candidates=["python9", "python-new"]) as client, none:
        client.compare()
    too_old = pytest.raises(RefusedError, match=r"/opt/old is 3\.9\.18\. Name another .* set SLURM_PYTHON")
    with Client(wanted, python_candidates=["python9", "python-old"], setup_commands=load) as client, too_old:
        client.compare()
    with Client(wanted, python_candidates=["python-old", "python-new"], setup_commands=load) as client:
        python = client.compare().environment.interpreter
    assert (python.executable, python.version) == site_python


@pytest.mark.usefixtures("fetched")
def test_a_module_provides_the_python_of_agent_environment_and_job(
    site: SimulatedSite, workload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only login shells have `module`, nothing else has that interpreter, and its PYTHONHOME breaks the environment."""
    musica = SITES["musica"]
    monkeypatch.setitem(musica, "setup_commands", [f"module load {MODULE}"])
    monkeypatch.setitem(musica, "python_candidates", [MODULE_PYTHON])
    workload.write_text(PROGRAM.replace('"word": WORD', '"word": WORD, "module": os.environ["EBROOTPYTHON"]'))
    workload.write_text("import os\n" + workload.read_text())
    assert metadata(materialize(workload))["module"] == f"{site.layout.state}/software/{MODULE}"


def test_what_cannot_be_imported_is_not_published(
    site: SimulatedSite, client: Client, site_python: tuple[str, str]
) -> None:
    client.wanted = EnvironmentSpec(client.wanted.code, client.wanted.lock, python=site_python[0])
    with pytest.raises(RefusedError, match="No module named 'dagster_pipes'"):
        client.ensure()
    assert names(site) == []


@pytest.mark.smoke
@pytest.mark.usefixtures("fetched")
def test_production_runs_only_what_was_published(
    site: SimulatedSite,
    workload: Path,
    client: Client,
    site_python: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DAGSTER_DEPLOYMENT", "production_supercomputer")
    assert "nothing has been published" in failure_of(materialize(workload))
    assert site.squeue("--noheader") == ""

    assert client.environments.publish(client.ensure(), "v1")
    assert metadata(materialize(workload))["word"] == "one"

    helper = workload.parent / "helpers" / "deep" / "__init__.py"
    helper.write_text("WORD = 'two'\n")
    said = failure_of(materialize(workload))
    assert f"{helper} is changed" in said
    assert "revision v1" in said
    assert "scripts/deploy_environment.py" in said

    client.wanted = EnvironmentSpec(read_code(workload.parent), client.wanted.lock)
    assert client.environments.publish(client.ensure(), "v2")
    assert not client.environments.publish(client.ensure(), "v2")
    assert metadata(materialize(workload))["word"] == "two"

    assert client.environments.roll_back()["revision"] == "v1"
    assert "is changed" in failure_of(materialize(workload))
    helper.write_text("WORD = 'one'\n")
    assert metadata(materialize(workload))["word"] == "one"
    with pytest.raises(RefusedError, match="nothing to go back to"):
        client.environments.roll_back()

    monkeypatch.setenv("SLURM_PYTHON", site_python[0])
    assert f"SLURM_PYTHON: {site_python[0]}, was not set" in failure_of(materialize(workload))


@pytest.mark.usefixtures("fetched")
def test_old_environments_go_but_none_that_a_job_uses(site: SimulatedSite, workload: Path, client: Client) -> None:
    (workload.parent / "helpers" / "deep" / "__init__.py").write_text("import time\ntime.sleep(600)\n")
    context = threading.Thread(target=materialize, args=(workload,), daemon=True)
    context.start()
    wait_until(lambda: "RUNNING" in site.squeue("--noheader", "--format=%T"), "a running job", 120)
    (live,) = names(site)
    idle = client.ensure().name
    there(site, f"touch -d '2 days ago' {FOLDER}/{live} {FOLDER}/{idle}")

    settings = PROJECT.load_settings()
    with open_runs(settings, PROJECT) as runs:
        assert runs.environments_in_use() == {live}
    script = ROOT / "scripts" / "deploy_environment.py"
    command = [sys.executable, str(script), "--remove", "--older-than", "1"]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"removed 1: {idle}\n"), done.stderr
    assert names(site) == [live]
    assert there(site, f"ls -d {FOLDER}/packages/*")  # the live one's

    site.cluster.cancel_all()
    context.join(120)
    assert not context.is_alive()
    there(site, f"touch -d '2 days ago' {FOLDER}/* {FOLDER}/wheels/*")
    assert client.environments.remove([live]) == [live]
    assert there(site, f"ls {FOLDER} {FOLDER}/packages {FOLDER}/wheels").split("\n") == [
        f"{FOLDER}:", "packages", "wheels", "", f"{FOLDER}/packages:", "", f"{FOLDER}/wheels:",
    ]  # fmt: skip


def test_the_script_with_an_interpreter_that_exists_there(site: SimulatedSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real lock: `ray` and `dagster_pipes` are imported on the login node."""
    monkeypatch.setenv("SLURM_PYTHON", site.environment()["SLURM_PYTHON"])
    script = ROOT / "scripts" / "deploy_environment.py"

    def run(*options: str) -> tuple[int, str]:
        done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    code, said = run("--check")
    assert (code, "nothing has been published yet" in said) == (1, True), said
    assert "in 0 wheels would be sent" in said
    assert names(site) == []
    code, said = run()
    assert (code, "published: " in said) == (0, True), said
    code, said = run()
    assert (code, "published already" in said) == (0, True), said
    code, said = run("--check")
    assert (code, "production runs what is here" in said) == (0, True), said
    assert "current" in run("--list")[1]
    assert run("--rollback")[0] == 3
    assert run("--remove")[0] == 2
    monkeypatch.setenv("SLURM_PYTHON", "/usr/bin/no-python")
    code, said = run()
    assert (code, "SLURM_PYTHON=/usr/bin/no-python does not run on login" in said) == (3, True), said
    monkeypatch.setenv("SLURM_QOS", "")
    monkeypatch.setenv("SLURM_EDGE_NODE_PORT", "no")
    assert run("--list")[0] == 2
