"""The units of deploy/systemd/: well formed, and their processes can be restarted during a run without loss."""

import os
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cluster.test_reboot import LOCATION, write_programs
from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite
from support import ROOT
from support.dagster_dev import DagsterDev, wait_for

ORDER = ("code", "daemon", "webserver")
UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with the project in it, as the units expect it."""
    folder = tmp_path / "home"
    (folder / "run").mkdir(parents=True)
    (folder / UNITS[0].stem.rpartition("-")[0]).symlink_to(ROOT)
    return folder


def test_the_units_are_well_formed(home: Path) -> None:
    """systemd says nothing: neither of the keys nor of the programs, which exist."""
    verifier = shutil.which("systemd-analyze")
    if verifier is None:
        pytest.skip("systemd-analyze is not installed")
    done = subprocess.run(
        [verifier, "--user", "verify", *map(str, UNITS)],
        env={"PATH": os.environ["PATH"], "HOME": str(home), "XDG_RUNTIME_DIR": "/tmp"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert len(UNITS) == 3


class Unit:
    """A unit file, and its processes without systemd."""

    def __init__(self, path: Path, home: Path) -> None:
        text = path.read_text().replace("%h", str(home)).replace("%t", str(home / "run"))
        entries = [line.partition("=") for line in text.splitlines() if "=" in line and not line.startswith("#")]
        self._values = {name: value for name, _, value in entries if name != "Environment"}
        words = [word for name, _, value in entries if name == "Environment" for word in shlex.split(value)]
        self._environment = dict(word.split("=", 1) for word in words)
        self._environment["DAGSTER_DEPLOYMENT"] = "staging_supercomputer"  # nothing has been published here
        self._main: psutil.Process | None = None
        self._left: list[psutil.Process] = []
        self.name = path.stem.rpartition("-")[2]

    def start(self, variables: dict[str, str], log: Path, replaced: dict[str, str]) -> None:
        """Start its command in its folder, with words of it replaced; return when it is ready."""
        where: dict[str, Any] = {"cwd": self._values["WorkingDirectory"], "env": {**variables, **self._environment}}
        command = [replaced.get(word, word) for word in shlex.split(self._values["ExecStart"])]
        with log.open("ab") as output:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            self._main = psutil.Popen(command, start_new_session=True, **where, **streams)
            if "ExecStartPost" in self._values:
                post = shlex.split(self._values["ExecStartPost"])
                subprocess.run(post, check=True, timeout=120, **where, **streams)

    def stop(self) -> None:
        """As `systemctl stop` does."""
        assert self._main
        if self._values.get("KillMode") == "process":
            self._left += self._main.children(recursive=True)
            self._main.terminate()
            self._main.wait(90)
        else:
            self.end_all()

    def end_all(self) -> None:
        """SIGTERM to every process, as at the end of the machine; they end in good time."""
        first = [*self._left, *([self._main] if self._main else [])]
        ended = [*first, *(child for each in first for child in descendants(each))]
        for process in ended:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(ended, timeout=60)
        for process in alive:
            process.kill()
        self._main, self._left = None, []
        assert alive == []


def descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


class Services(DagsterDev):
    """The three units, in a project folder of the test."""

    def __init__(self, folder: Path, environment: dict[str, str], home: Path) -> None:
        super().__init__(folder, environment)
        self._variables = environment
        self.units = {unit.name: unit for unit in (Unit(path, home) for path in UNITS)}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = str(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self._port}"

    def start(self, *names: str) -> None:
        """Start units, in that order, as systemd does by their After=."""
        replaced = {"3000": self._port, "musica_pipelines.definitions": "waiting_location"}
        for name in names or ORDER:
            self.units[name].start(self._variables, self.log.with_name(f"{name}.log"), replaced)
        wait_for(self.answers, 300, f"the services answer; see {self.log.parent}/*.log")

    def stop(self, *names: str) -> None:
        for name in names:
            self.units[name].stop()

    def end_all(self) -> None:
        for name in reversed(ORDER):
            self.units[name].end_all()

    def answers(self) -> bool:
        """Whether the UI has the code location."""
        entries = "locationEntries { locationOrLoadError { __typename } }"
        try:
            found = self.ask(f"{{ workspaceOrError {{ ... on Workspace {{ {entries} }} }} }}")["workspaceOrError"]
        except httpx.TransportError:
            return False
        (entry,) = found["locationEntries"]
        location = entry["locationOrLoadError"]
        return bool(location and location["__typename"] == "RepositoryLocation")


@pytest.fixture
def services(site: SimulatedSite, tmp_path: Path, client_home: Path) -> Iterator[Services]:
    """Started, with an asset whose workload waits."""
    folder = client_home / UNITS[0].stem.rpartition("-")[0]
    (client_home / "run").mkdir()
    folder.mkdir()
    shutil.copy(ROOT / "dagster.yaml", folder)
    shutil.copytree(ROOT / "deploy", folder / "deploy")
    (folder / ".venv").symlink_to(ROOT / ".venv")
    (folder / "waiting_location.py").write_text(LOCATION)
    programs = write_programs(tmp_path / "waiting")
    variables = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    variables |= {**site.environment(), "HOME": str(client_home), "WAITERS": str(programs)}
    variables["DATA_ROOT"] = f"{CERTIFICATE_USER.home}/data"
    made = Services(folder, variables, client_home)
    try:
        made.start()
        yield made
    finally:
        made.end_all()


@pytest.mark.cluster
def test_a_run_outlives_restarts_of_all_services(services: Services, site: SimulatedSite) -> None:
    def jobs() -> list[str]:
        listed = site.squeue("--noheader", "--states=all", "--format=%i %T %k").splitlines()
        return [line for line in listed if f"run={first}" in line]

    first = services.launch("dies")
    wait_for(lambda: [each for each in jobs() if "RUNNING" in each], 120, "the job runs")
    # `systemctl restart` of the UI, and of the code server, before which the daemon stops: the run goes on.
    services.stop("webserver", "daemon", "code")
    services.start()
    assert services.status(first) == "STARTED"
    # A reboot: every process is told to end. The run is interrupted, and its retry goes on with the job.
    services.end_all()
    services.start()
    assert services.status(first) == "FAILURE"
    retry = wait_for(lambda: services.re_execution_of(first), 240, "it is retried")
    wait_for(lambda: services.status(retry) == "STARTED", 120, "the retry has begun")
    site.run_on_login(CERTIFICATE_USER, "mkdir -p data && touch data/go")
    assert services.wait(retry) == "SUCCESS"
    assert len(jobs()) == 1
    assert [event["runId"] for event in services.materializations("dies")] == [retry]
