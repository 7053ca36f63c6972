"""What a node of a Ray job does around Ray: ports, memory, its folder, and leaving nothing behind."""

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import tarfile
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import node
import watch
from slurm_in_a_box import wait_until

import checks
import folder
import job_cluster
import ports
import processes

JOB = Path(node.__file__).parent


def bind(port: int, uid: int) -> subprocess.Popen[str]:
    """Another user's process that listens on a port, or says why it cannot."""
    program = (
        f"import os, socket, sys; os.setuid({uid}); server = socket.socket()\n"
        "server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
        f"server.bind(('', {port})); server.listen(); print('listens', flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, text=True)


def test_claimed_ports_are_free_and_kept_from_others_and_ray_can_have_them() -> None:
    claims = ports.claim_ports(2)
    assert len(claims) == 2
    for port in claims:
        with socket.socket() as other, pytest.raises(OSError, match="Address already in use"):
            other.bind(("", port))  # what another launcher does
        assert not checks.is_ours(port)
        with socket.create_server(("", port)):  # what Ray does: with SO_REUSEADDR
            assert checks.is_ours(port)
    for claim in claims.values():
        claim.close()


def test_ports_that_are_taken_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as server:
        taken = server.getsockname()[1]
        monkeypatch.setattr(ports, "PORTS", range(taken, taken + 1))
        with pytest.raises(OSError, match="fewer than 1 free port"):
            ports.claim_ports(1)


def test_a_claim_does_not_show_which_port_it_holds() -> None:
    (claim,) = ports.claim_ports(1).values()
    listed = [line for name in ("tcp", "tcp6", "unix") for line in Path("/proc/net", name).read_text().splitlines()]
    inode = str(os.fstat(claim.fileno()).st_ino)
    assert [line for line in listed if inode in line.split()] == []
    claim.close()


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> node.Node:
    """The node of a head, whose state folder is made as cluster.sh makes it."""
    monkeypatch.setenv("RAY_JOB_STATE", str(tmp_path))
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    (tmp_path / "head.json").touch()
    return node.Node({})


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
def test_a_head_whose_port_another_user_has_taken_is_never_published(head: node.Node) -> None:
    """The other nodes would send the token of the cluster there."""
    claims = ports.claim_ports(2)
    port, dashboard = claims
    with bind(port, 12345) as thief:
        assert thief.stdout
        assert thief.stdout.readline() == "listens\n"
        with pytest.raises(job_cluster.NodeError, match=f"a process of another user listens on port {port}"):
            head._publish_head("10.0.0.1", port, dashboard, {})
        thief.communicate()
    assert job_cluster.read_published("head.json") is None
    for claim in claims.values():
        claim.close()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
def test_an_agent_whose_port_another_user_has_taken_ends_the_node(head: node.Node, tmp_path: Path) -> None:
    """Its number is in the command line of the raylet, which starts before the agent."""
    head._claims, head._folder = ports.claim_ports(4), tmp_path
    port = [*head._claims][-1]
    with bind(port, 12345) as thief:
        assert thief.stdout
        assert thief.stdout.readline() == "listens\n"
        with pytest.raises(job_cluster.NodeError, match=f"a process of another user listens on port {port}"):
            head._watch()
        thief.communicate()
    for claim in head._claims.values():
        claim.close()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
def test_a_dashboard_whose_port_another_user_has_taken_is_not_published(head: node.Node) -> None:
    """A browser would send the token of the cluster there."""
    ((dashboard, claim),) = ports.claim_ports(1).items()
    with bind(dashboard, 12345) as thief, socket.create_server(("", 0)) as server:
        assert thief.stdout
        assert thief.stdout.readline() == "listens\n"
        head._publish_head("10.0.0.1", server.getsockname()[1], dashboard, {})
        thief.communicate()
    published = job_cluster.read_published("head.json")
    assert published
    assert published["dashboard_address"] is None
    claim.close()


def test_a_head_is_published_with_its_dashboard(head: node.Node, tmp_path: Path) -> None:
    (tmp_path / "head.json").write_text('{"node": "n1", "addr')
    assert job_cluster.read_published("head.json") is None, "the head is writing it"
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        head._publish_head("10.0.0.1", port, port, {"Ray": "2.60.0"})
    assert job_cluster.read_published("head.json") == {
        "node": "n1",
        "ray_address": f"10.0.0.1:{port}",
        "dashboard_address": ["10.0.0.1", port],
        "versions": {"Ray": "2.60.0"},
    }


def ray_start(codes: list[int], output: Path) -> Any:
    """What begins a sham `ray start`: each reads its arguments and ends with the next exit code."""

    def begin(_: object) -> subprocess.Popen[str]:
        program = f"cat; echo; echo OSError: why; exit {codes.pop(0)}"
        with output.open("w") as file:
            return subprocess.Popen(["sh", "-c", program], stdin=subprocess.PIPE, stdout=file, text=True)

    return begin


@pytest.mark.parametrize(("codes", "works"), [([0], True), ([1, 0], True), ([1, 1], False), ([2, 0], False)])
def test_a_ray_that_does_not_start_is_started_a_second_time(
    codes: list[int], works: bool, head: node.Node, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """But one that does not know its arguments is not."""
    left, failed = list(codes), codes[-1] if codes[0] != 2 else 2
    killed: list[bool] = []
    monkeypatch.setattr(node, "end_descendants", lambda _: killed.append(True))
    monkeypatch.setattr(head, "_folder", tmp_path)
    begin = ray_start(left, tmp_path / "ray-start-n1.out")
    monkeypatch.setattr(head, "_import_ray", begin)
    reader, writer = os.pipe()  # the batch script keeps the node's standard input open
    with os.fdopen(reader) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        if works:
            head._start(begin(tmp_path), ["--head"])
        else:
            with pytest.raises(job_cluster.NodeError, match=f"`ray start` ended with exit code {failed}: OSError: why"):
                head._start(begin(tmp_path), ["--head"])
    os.close(writer)
    assert (tmp_path / "ray-start-n1.out").read_text() == '["--head"]\nOSError: why\n'
    assert len(killed) == (codes[0] == 1)
    assert len(left) == (codes[0] == 2)


def test_a_node_asks_for_the_head_less_often_the_longer_it_waits(
    head: node.Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But it joins late by a fiftieth of the time at most."""
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if sum(pauses) > 120:
            job_cluster.publish("head.json", {"versions": {}})

    monkeypatch.setattr(node, "_pause", pause)
    assert head._await_head({}) == {"versions": {}}
    assert pauses[0] == job_cluster.POLL_SECONDS
    assert len(pauses) < 300
    waited = [0.0, *accumulate(pauses)]
    assert all(pause <= max(job_cluster.POLL_SECONDS, waited[n] / 50) for n, pause in enumerate(pauses))


def test_a_port_that_was_chosen_and_is_taken_is_named() -> None:
    with socket.create_server(("", 0)) as server:
        taken = server.getsockname()[1]
        with pytest.raises(
            job_cluster.NodeError, match=f"cannot use the port of --metrics-export-port={taken}: Address already in use"
        ):
            checks.check_ports(["--verbose", "--node-manager-port=0", f"--metrics-export-port={taken}"])
        checks.check_ports([f"--min-worker-port={taken}", "--node-manager-port=0", "--verbose"])
    checks.check_ports([f"--metrics-export-port={taken}"])


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
    assert checks.memory_arguments(given, environ) == expected


def test_the_folder_is_private_and_new(tmp_path: Path) -> None:
    """What an earlier life of the job has left is removed; folders of other jobs and of other nodes stay."""
    earlier, *others = (folder.make_folder(tmp_path, *each) for each in (("7", "n1"), ("8", "n1"), ("7", "n2")))
    again = folder.make_folder(tmp_path, "7", "n1")
    assert sorted(tmp_path.iterdir()) == sorted([*others, again])
    assert not earlier.exists()
    assert again.stat().st_mode & 0o777 == 0o700
    assert len(f"/{again.name}/{node.RAY_FOLDER}") <= len("/r-abcd1234/ray")  # as RayLauncher counts


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_that_somebody_else_made_beforehand_stops_nothing(tmp_path: Path) -> None:
    for name in ("r-7", "r-abcd1234"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "job").write_text("7 n1")
        os.chown(tmp_path / name, 12345, 12345)
    made = folder.make_folder(tmp_path, "7", "n1")
    assert {path.name for path in tmp_path.iterdir()} == {"r-7", "r-abcd1234", made.name}


def test_big_logs_are_cut_and_small_ones_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A workload whose tasks print gigabytes must not keep the node, nor fill the user's quota."""
    monkeypatch.setattr(folder, "FILE_BYTES", 1000)
    monkeypatch.setattr(folder, "ALL_BYTES", 2500)
    logs = tmp_path / "logs"
    (logs / "old").mkdir(parents=True)
    (logs / "raylet.out").write_text("small")
    for name in ("one", "two", "old/three"):
        (logs / name).write_bytes(b"begin" + bytes(5000) + b"end")
    folder.keep_logs(logs, tmp_path / "logs-n1.tar.gz")
    with tarfile.open(tmp_path / "logs-n1.tar.gz") as archive:
        sizes = {entry.name: entry.size for entry in archive.getmembers()}
        note = archive.extractfile("logs-n1/LEFT_OUT")
        assert note
        text = note.read().decode()
        kept = [name for name in sizes if sizes[name] == 1000]
        assert sizes["logs-n1/raylet.out"] == 5
        assert len(kept) == 2
        for name in kept:
            end = archive.extractfile(name)
            assert end
            assert end.read().endswith(b"end")
    assert text.count("5008 bytes, the last 1000 are kept") == 2
    assert text.count("5008 bytes, left out") == 1


OLD_LISTING = "GPU 0: NVIDIA H100 (UUID: GPU-1)\nGPU 1: NVIDIA H100 (UUID: GPU-2)\n"
SLICES = """\
GPU 0: NVIDIA H100 (UUID: GPU-1)
  MIG 3g.47gb     Device  0: (UUID: MIG-1)
  MIG 3g.47gb     Device  1: (UUID: MIG-2)
GPU 1: NVIDIA H100 (UUID: GPU-2)
"""


@pytest.mark.parametrize(("listing", "expected"), [(OLD_LISTING, 2), (SLICES, 3), ("No devices were found\n", 0)])
def test_slices_of_a_gpu_count_as_gpus(listing: str, expected: int) -> None:
    assert checks.count_gpus(listing) == expected


@pytest.mark.parametrize(
    ("visible", "smi", "text"),
    [
        (None, "", "programs may use 0 of the 2 GPUs that the job requested here: CUDA_VISIBLE_DEVICES is not set."),
        ("", "", "programs may use 0 of the 2 GPUs that the job requested here: CUDA_VISIBLE_DEVICES is ''."),
        ("1", "", "programs may use 1 of the 2 GPUs that the job requested here: CUDA_VISIBLE_DEVICES is '1'."),
        ("0,1", "echo GPU 0: X", "nvidia-smi lists 1 of the 2 GPUs that the job requested here. It says: GPU 0: X."),
        ("0,1", "echo broken >&2; exit 9", "cannot be listed: nvidia-smi ended with exit code 9. It says: broken."),
        ("0,1", "exit 9", "nvidia-smi ended with exit code 9. It says: nothing."),
    ],
)  # fmt: skip
def test_why_a_node_has_too_few_gpus(
    visible: str | None, smi: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{smi}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(job_cluster.NodeError) as error:
        checks.check_gpus(2)
    assert text in str(error.value)
    assert "Exclude this node" in str(error.value)


@pytest.mark.parametrize("version", ["2.51.2", "2.9.3", "1.13.0"])
def test_a_ray_without_authentication_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    with pytest.raises(job_cluster.NodeError, match=f"Ray {version}.*is too old.*Install Ray 2.52 or later"):
        checks.versions()


@pytest.mark.parametrize("name", ["APPTAINER_CONTAINER", "SINGULARITY_CONTAINER", ""])
def test_a_missing_ray_is_named_with_its_image(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(_: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setenv(name or "OTHER", "/images/ray.sif")
    where = "in the image /images/ray.sif has no Ray. Install it" if name else "there is no Ray in the environment of"
    with pytest.raises(job_cluster.NodeError, match=where):
        checks.versions()


@pytest.mark.parametrize("version", ["2.52.0", "2.60.0rc1", "3.0.0.dev0"])
def test_a_ray_with_authentication_is_taken(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    assert checks.versions()["Ray"] == version


def test_a_failed_start_is_described_by_its_last_line() -> None:
    first, *more = node.describe_failed_start(1, "begun\n" * 30 + "OSError: why\n\n").splitlines()
    assert first == "`ray start` ended with exit code 1: OSError: why"
    assert more == ["begun"] * (job_cluster.TAIL_LINES - 1) + ["OSError: why"]


def test_the_death_of_a_process_comes_with_the_end_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "raylet.out").write_text("started\n" + "[state-dump] x\n" * 99 + "last\n" * 30)
    (tmp_path / "raylet.err").touch()
    first, *more = processes.describe_death({"raylet": -9, "monitor": 3}, tmp_path).splitlines()
    assert first == "raylet was killed by signal 9, monitor ended with exit code 3"
    assert more == ["The last lines of raylet.out:", *["last"] * job_cluster.TAIL_LINES]


def test_a_process_that_has_ended_is_named(tmp_path: Path) -> None:
    program = f"""
import os, subprocess, sys, time
sys.path.insert(0, {str(JOB)!r})
import processes
child = subprocess.Popen(["sleep", "600"])
while processes.process_name(child.pid) != "sleep":
    time.sleep(0.01)
assert processes.children()[os.getpid()] == [child.pid]
assert list(processes.reap()) == []
child.kill()
while not (ended := list(processes.reap())):
    time.sleep(0.01)
assert ended == [(child.pid, -9)], ended
assert list(processes.reap()) == []
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=60)


def test_a_daemon_that_went_its_own_way_is_ended_too(tmp_path: Path) -> None:
    program = f"""
import ctypes, os, subprocess, sys, time
sys.path[:0] = [{str(JOB)!r}, {str(Path(ports.__file__).parent)!r}]
import job_cluster
import node
ctypes.CDLL(None).prctl(node.PR_SET_CHILD_SUBREAPER, 1)
subprocess.run(["setsid", "--fork", "sh", "-c", "echo $$ >pid; exec sleep 600"])
while not os.path.exists("pid") or not open("pid").read().strip():
    time.sleep(0.01)
node.kill_descendants()
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=60)
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the daemon is gone")


def test_a_node_is_lost_when_it_is_not_alive_any_more(head: node.Node) -> None:
    """A node whose first start failed, and whose second did not, is alive, and on Ray's list of failed nodes."""
    for name, address in (("n1", "10.0.0.1"), ("n2", "10.0.0.2"), ("n3", "10.0.0.3")):
        job_cluster.publish(job_cluster.joined_file(name), {"address": address})
    busy, idle, failed = (SimpleNamespace(ip_address=f"10.0.0.{number}") for number in (1, 2, 1))
    status = SimpleNamespace(active_nodes=[busy], idle_nodes=[idle], failed_nodes=[failed])
    assert watch.find_lost(status, watch.joined_nodes()) == ["n3"]


def test_a_full_disk_does_not_end_the_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for target in ("/dev/full", tmp_path / "room"):
        Path("messages.jsonl").unlink(missing_ok=True)
        Path("messages.jsonl").symlink_to(target)
        watch.report("Ray: 2 node(s)")
    assert json.loads((tmp_path / "room").read_text())["params"]["message"] == "Ray: 2 node(s)"
