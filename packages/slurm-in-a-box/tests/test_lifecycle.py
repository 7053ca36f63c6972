"""Start, inspect and end sites, with the command and from Python."""

import compileall
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slurm_in_a_box import CERTIFICATE_USER, CPU_PARTITION, NotInstalledError, SimulatedSite, interpreter, requirements
from slurm_in_a_box import site as site_module
from slurm_in_a_box.command_line import main
from slurm_in_a_box.machines import MEMORY_CGROUPS

CPU_DEV = (f"--partition={CPU_PARTITION}", f"--qos=dev_{CPU_PARTITION}", "--time=5")
SECOND = f"lifecycle-{os.getpid()}"
NAMESPACES = ("mnt", "net", "pid", "uts", "ipc")


OWNER_THAT_IS_KILLED = f"""
import os, signal
from {SimulatedSite.__module__} import SimulatedSite
with SimulatedSite.temporary(prefix="{SECOND}") as slurm_site:
    job = slurm_site.submit("exec sleep 1000", *{CPU_DEV})
    slurm_site.wait_for_job(job, "RUNNING")
    print(slurm_site.layout.name, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def interfaces(bridge: str) -> set[str]:
    """Those of one site: other sites may start and end meanwhile."""
    listing = subprocess.run(["ip", "-json", "link", "show"], capture_output=True, text=True, check=True)
    names = {interface["ifname"] for interface in json.loads(listing.stdout)}
    return {name for name in names if name == bridge or name.startswith(f"{bridge}-")}


def mounts(state: str) -> set[str]:
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    return {point for line in lines if (point := line.split()[4]).startswith(state)}


def cgroups(bridge: str) -> set[str]:
    return {str(path) for path in Path("/sys/fs/cgroup").glob(f"*/simulated-site-{bridge}-*")}


def namespaces(process: Path) -> set[str]:
    """The namespaces of a process that are not this one's."""
    try:
        mine = {name: (Path("/proc/self/ns") / name).readlink() for name in NAMESPACES}
        return {str(link) for name, own in mine.items() if (link := (process / "ns" / name).readlink()) != own}
    except OSError:  # it has ended meanwhile
        return set()


def processes_of(site_namespaces: set[str], state: str) -> list[str]:
    """Command lines of every process that is in one of the namespaces, or names the site's folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text(encoding="utf-8").replace("\0", " ")
        except OSError:
            continue
        if state in command or namespaces(process) & site_namespaces:
            found.append(command)
    return found


@pytest.mark.cluster
def test_temporary_sites_run_side_by_side_replace_one_whose_owner_was_killed_and_leave_nothing(
    slurm_site: SimulatedSite,
) -> None:
    killed = subprocess.run([sys.executable, "-c", OWNER_THAT_IS_KILLED], capture_output=True, text=True, check=False)
    assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, f"{SECOND}-1\n"), killed.stderr
    left = SimulatedSite.running(f"{SECOND}-1")
    assert all(left.status().values())

    with SimulatedSite.temporary(prefix=SECOND) as second:
        assert second.layout.name == f"{SECOND}-1"
        assert second.squeue("--noheader") == ""
        bridge, state = second.layout.bridge, str(second.layout.state)
        assert interfaces(bridge) and mounts(state)
        assert second.login.address != slurm_site.login.address
        for each in (slurm_site, second):
            each.wait_for_job(each.submit("hostname", *CPU_DEV))
            ssh = subprocess.run(each.login_command("true"), capture_output=True, check=False, timeout=60)
            assert ssh.returncode == 0
        site_namespaces = set[str]().union(*map(namespaces, machine_processes(second)))
        assert len(site_namespaces) == len(NAMESPACES) * len(second.machines)
        assert len(processes_of(site_namespaces, state)) > len(second.machines)
        assert bool(cgroups(bridge)) is MEMORY_CGROUPS

    assert not interfaces(bridge)
    assert not mounts(state)
    assert cgroups(bridge) == set()
    assert processes_of(site_namespaces, state) == []
    assert {entry.name for entry in second.layout.state.iterdir()} == {"in-use", "log"}
    assert all(slurm_site.status().values())
    shutil.rmtree(second.layout.state)


def test_a_temporary_site_takes_no_name_that_another_process_uses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    named: list[str] = []
    monkeypatch.setattr(requirements, "check_system", lambda: None)
    monkeypatch.setattr(site_module, "state_folder", lambda name: tmp_path / name)
    monkeypatch.setattr(SimulatedSite, "up", lambda name, *_: named.append(name))
    monkeypatch.setattr(SimulatedSite, "down", lambda name: None)
    with SimulatedSite.temporary(), SimulatedSite.temporary():
        pass
    with SimulatedSite.temporary():
        pass
    assert named == ["test-1", "test-2", "test-1"]


def machine_processes(slurm_site: SimulatedSite) -> list[Path]:
    """The first process of every machine."""
    found = []
    for machine in slurm_site.machines.values():
        parent = (slurm_site.layout.run / "machines" / machine.hostname / "pid").read_text(encoding="ascii").strip()
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii")
        found += [Path("/proc") / child for child in children.split()]
    return found


@pytest.mark.cluster
def test_up_again_leaves_what_runs_alone(slurm_site: SimulatedSite) -> None:
    job = slurm_site.submit("exec sleep 1000", *CPU_DEV)
    slurm_site.wait_for_job(job, "RUNNING")
    before = machine_processes(slurm_site)
    again = SimulatedSite.up(slurm_site.layout.name)
    assert machine_processes(again) == before
    assert again.job_state(job) == "RUNNING"


@pytest.mark.cluster
def test_commands(slurm_site: SimulatedSite, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def sim(*arguments: str) -> tuple[int, str]:
        code = main(["--name", slurm_site.layout.name, *arguments])
        return code, capfd.readouterr().out

    assert sim("status")[0] == 0
    assert sim("login", "--", "id", "-un") == (0, sim("login", "true")[1] + "xy12345\n")
    assert sim("login", "--", "exit 3")[0] == 3
    code, dotenv = sim("env")
    assert code == 0
    assert f"SLURM_EDGE_NODE_HOST={slurm_site.login.address}\n" in dotenv
    command = dotenv.splitlines()[1].removeprefix("#")
    subprocess.run(["/bin/sh", "-c", command], env={"HOME": str(tmp_path), "PATH": os.defpath}, check=True)
    assert (tmp_path / ".ssh" / "known_hosts").read_bytes() == slurm_site.login.known_hosts.read_bytes()
    assert sim("fault", "ca-down")[0] == 0
    assert sim("status")[0] == 1
    assert sim("fault", "repair")[0] == 0
    assert sim("status")[0] == 0
    assert sim("fault", "node-off")[0] == 2
    assert sim("fault", "node-off", "n9999")[0] == 1
    assert sim("fault", "scancel", "nonsense")[0] == 2
    assert sim("fault", "sbatch", "nonsense")[0] == 1


@pytest.mark.cluster
def test_nothing_of_users_stays_after_a_reset(slurm_site: SimulatedSite) -> None:
    slurm_site.submit("exec sleep 1000", *CPU_DEV)
    slurm_site.run_on_login(CERTIFICATE_USER, "mkdir -p dagster-slurm/run; sleep 1000 >/dev/null 2>&1 &")
    assert [process.command for process in slurm_site.processes_on_login()] == ["sleep 1000"]
    slurm_site.run_on_login(CERTIFICATE_USER, "echo left >/tmp/left")
    slurm_site.environment()
    slurm_site.login_command()
    slurm_site.reset()
    assert slurm_site.processes_on_login() == []
    assert slurm_site.squeue("--noheader") == ""
    assert sorted(entry.name for entry in (slurm_site.layout.home / CERTIFICATE_USER.name).iterdir()) == [
        ".bashrc",
        ".ssh",
    ]
    assert slurm_site.run_on_node("login01", "ls /tmp").stdout == ""
    assert slurm_site.authentik.tokens() == []
    assert {file.name for file in slurm_site.login.known_hosts.parent.iterdir()} == {
        "known_hosts",
        "id_plain",
        "id_plain.pub",
    }


def test_sites_that_start_at_once_compile_their_common_packages_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiled: list[Path] = []

    def compile_slowly(folder: Path, **_: object) -> None:
        compiled.append(folder)
        threading.Event().wait(0.2)  # long enough for the others to come

    monkeypatch.setattr(compileall, "compile_dir", compile_slowly)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(interpreter.compile_packages, [tmp_path] * 3))
    assert compiled == [tmp_path]
    (tmp_path / "new_package").mkdir()
    os.utime(tmp_path, (time.time() + 1, time.time() + 1))
    interpreter.compile_packages(tmp_path)
    assert compiled == [tmp_path] * 2


def test_without_root_it_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["up"]) == 2
    assert capsys.readouterr().err.startswith("python -m slurm_in_a_box: the simulated site needs ")


def test_state_must_be_where_every_machine_can_see_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(requirements, "check_system", lambda: None)
    monkeypatch.setenv("SIMULATED_SITE_STATE", "/tmp/below")
    assert main(["status"]) == 1
    assert "must not lie below /tmp" in capsys.readouterr().err


def test_missing_packages_are_named_and_not_installed_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "missing_packages", lambda: ["debootstrap", "procps"])
    with pytest.raises(NotInstalledError, match="packages are missing: debootstrap procps"):
        requirements.ensure_packages(install=False)
