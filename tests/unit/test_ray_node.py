"""What a node of a Ray job does around Ray: ports, memory, its folder, and leaving nothing behind."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import node
from tests.simulated_site import wait_until

import job_cluster
import ports

JOB = Path(node.__file__).parent


def test_ports_that_are_taken_or_claimed_are_passed_over() -> None:
    (first, second), claims = ports.claim_ports(2, 100)
    (third,), more = ports.claim_ports(1, 100)
    assert third not in (first, second)
    for claim in (*claims, *more):
        claim.close()
    with socket.create_server(("", first)):
        (other,), again = ports.claim_ports(1, first - ports.PORTS.start)
        assert other != first
    again[0].close()


def test_a_port_that_was_chosen_and_is_taken_is_named() -> None:
    with socket.create_server(("", 0)) as server:
        taken = server.getsockname()[1]
        with pytest.raises(job_cluster.NodeError, match=f"={taken} cannot be had: Address already in use"):
            ports.check_ports(["--verbose", "--node-manager-port=0", f"--metrics-export-port={taken}"])
        ports.check_ports([f"--min-worker-port={taken}", "--node-manager-port=0", "--verbose"])
    ports.check_ports([f"--metrics-export-port={taken}"])


@pytest.mark.parametrize(
    ("given", "environ", "expected"),
    [
        (None, {}, []),
        (5, {}, ["--object-store-memory=5"]),
        (None, {"SLURM_MEM_PER_NODE": "10"}, [f"--object-store-memory={3 << 20}", f"--memory={7 << 20}"]),
        (1 << 20, {"SLURM_MEM_PER_CPU": "2", "SLURM_CPUS_ON_NODE": "4"},
         [f"--object-store-memory={1 << 20}", f"--memory={7 << 20}"]),
    ],
)  # fmt: skip
def test_the_memory_is_the_jobs(given: int | None, environ: dict[str, str], expected: list[str]) -> None:
    assert node.memory_arguments(given, environ) == expected


def test_the_folder_is_private_and_new(tmp_path: Path) -> None:
    folder = tmp_path / "r-1"
    folder.mkdir(mode=0o755)
    (folder / "left by an earlier life of the job").touch()
    node.make_private_folder(folder)
    assert list(folder.iterdir()) == []
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "r-1"
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    with pytest.raises(job_cluster.NodeError, match="belongs to user 12345"):
        node.make_private_folder(folder)


def test_gpus_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    node.check_gpus(2)
    with pytest.raises(job_cluster.NodeError, match="2 of 4 GPUs: Slurm gave CUDA_VISIBLE_DEVICES='0,1'"):
        node.check_gpus(4)


def test_what_ray_start_says_of_its_dead_comes_first() -> None:
    output = "started\n ERR scripts.py:87 -- raylet [exit code=-9]\n" + "[state-dump] x\n" * 99 + "last\n" * 30
    first, *more = node.explain(1, output).splitlines()
    assert first == "`ray start` ended with exit code 1: raylet [exit code=-9]"
    assert more == ["last"] * job_cluster.TAIL_LINES
    assert node.explain(1, "begun\nOSError: why\n\n").startswith("`ray start` ended with exit code 1: OSError: why\n")


def test_the_first_failure_counts_and_the_others_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_JOB_STATE", str(tmp_path))
    job_cluster.fail("Ray on n1: broken\nits log")
    job_cluster.fail("Ray on n2: broken, too")
    assert (tmp_path / "failed").read_text() == "Ray on n1: broken\nits log\n"
    assert capsys.readouterr().err == "Ray on n2: broken, too\n"


def test_a_daemon_that_went_its_own_way_is_ended_too(tmp_path: Path) -> None:
    program = f"""
import ctypes, os, subprocess, sys, time
sys.path.insert(0, {str(JOB)!r})
import job_cluster
import node
import ports
ctypes.CDLL(None).prctl(node.PR_SET_CHILD_SUBREAPER, 1)
subprocess.run(["setsid", "--fork", "sh", "-c", "echo $$ >pid; exec sleep 600"])
while not os.path.exists("pid") or not open("pid").read().strip():
    time.sleep(0.01)
node.kill_descendants()
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=60)
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the daemon is gone", 10)


def test_ray_start_does_not_load_what_the_other_commands_need() -> None:
    look = "import start, sys; print('start' in start.import_command_line().cli.commands, 'pandas' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", look], env={"PYTHONPATH": str(JOB)}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True False\n"
