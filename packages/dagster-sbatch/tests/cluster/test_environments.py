"""Environments on the simulated site: made from wheels, whole or not at all, whatever happens meanwhile."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dagster_sbatch.environments.deployed import EnvironmentSpec
from dagster_sbatch.sites import SITES
from dagster_sbatch.slurm.gateway import RefusedError
from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite, wait_until
from slurm_in_a_box.storage import MODULE, MODULE_PYTHON
from support.environment_fixtures import (
    FOLDER,
    PROGRAM,
    Client,
    go_on,
    materialize,
    metadata,
    names,
    nothing_is_unfinished,
    there,
    waiting_at,
)
from support.environment_fixtures import client as client
from support.environment_fixtures import fetched as fetched
from support.environment_fixtures import gathered as gathered
from support.environment_fixtures import in_order as in_order
from support.environment_fixtures import index as index
from support.environment_fixtures import site_python as site_python
from support.environment_fixtures import wanted as wanted
from support.environment_fixtures import workload as workload

pytestmark = pytest.mark.cluster
OLD = """\
#!/bin/sh
printf '\\036%s\\n' '{"given": "/opt/old", "version": "3.9.18", "implementation": "cpython"}'
"""
"""Describes itself as an interpreter that is too old does; the site has none."""


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
    assert "is in no git repository, so everything in it is sent (3 files): helpers/__init__.py" in told
    assert there(site, f"find {FOLDER}/{name} -newer {FOLDER}/{name}/environment.json -type f") == ""
    nothing_is_unfinished(site)


@pytest.mark.usefixtures("fetched")
def test_unchanged_content_costs_one_round_trip(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    made = client.ensure()
    requests: list[object] = []
    exchange = client.gateway.exchange

    def count(asked: Any, **more: Any) -> object:
        requests.extend(asked)
        return exchange(asked, **more)

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
            go_on(site)

    killed: list[Any] = []
    with Client(wanted, kill_once, setup_commands=waiting_at(moment)) as client:
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

    setup = waiting_at("installing")
    with pytest.raises(GoneError), Client(wanted, go, setup_commands=setup) as client:
        client.ensure()
    wait_until(lambda: not site.processes_on_login(), "no process on the login nodes")
    go_on(site)
    with Client(wanted, setup_commands=setup) as client:
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
            go_on(site)

    setup = waiting_at("installing")
    with Client(wanted, fill, setup_commands=setup) as client, pytest.raises(RefusedError, match="No space left"):
        client.ensure()
    assert names(site) == []
    fault.repair()
    with Client(wanted, setup_commands=setup) as client:
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
