"""What the workload's program of a Ray job does until all nodes have joined."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import driver

import job_cluster


def test_the_more_nodes_are_missing_the_longer_is_the_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_STATE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    names = [f"n{number}" for number in range(100)]
    (tmp_path / "nodes").write_text("\n".join(names) + "\n")
    job_cluster.publish(job_cluster.HEAD_FILE, {"ray_address": "10.0.0.1:6379"})
    pauses = list[float]()

    def sleep(seconds: float) -> None:
        """Wait until the next node has joined."""
        pauses.append(seconds)
        job_cluster.publish(job_cluster.joined_file(names.pop()), {"address": "10.0.0.1"})

    monkeypatch.setattr(driver, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=sleep))
    assert driver.await_cluster(60) == "10.0.0.1:6379"
    expected = [min(missing * job_cluster.POLL_SECONDS, driver.LONGEST_POLL) for missing in range(100, 0, -1)]
    assert pauses == expected
    assert pauses[0] == driver.LONGEST_POLL
    assert pauses[-1] == job_cluster.POLL_SECONDS


def test_the_first_failure_appears_with_its_text_and_the_others_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slurm may kill the program of a node that fails while it writes, since another node has failed as well."""
    monkeypatch.setenv("RAY_JOB_STATE", str(tmp_path))
    there: list[bool] = []

    class Text(str):
        __slots__ = ()

        def __format__(self, _: str) -> str:
            there.append((tmp_path / "failed").exists())
            return str(self)

    job_cluster.fail(Text("Ray on n1: broken\nits log"))
    assert there == [False]
    job_cluster.fail("Ray on n2: broken, too")
    assert [path.name for path in tmp_path.iterdir()] == ["failed"]
    assert (tmp_path / "failed").read_text() == "Ray on n1: broken\nits log\n"
    assert capsys.readouterr().err == "Ray on n2: broken, too\n"


def test_a_failure_that_a_full_disk_does_not_record_is_on_stderr(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_JOB_STATE", str(tmp_path))
    (tmp_path / f"failed-{socket.gethostname()}-{os.getpid()}").symlink_to("/dev/full")
    job_cluster.fail("Ray on n1: broken")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == "Ray on n1: broken\n"


def test_a_failure_that_the_shell_records_appears_with_its_text_too(tmp_path: Path) -> None:
    """The shell's `echo` looks whether the file is there before it has its text."""
    script = (Path(job_cluster.__file__).parent / "cluster.sh").read_text()
    (function,) = re.findall(r"^ray_failed\(\) .*?^}$", script, re.MULTILINE | re.DOTALL)
    look = 'echo() { [ ! -e "$RAY_JOB_STATE/failed" ] || : >"$RAY_JOB_STATE/early"; builtin echo "$@"; }'
    variables = {"RAY_JOB_STATE": str(tmp_path), "PATH": os.environ["PATH"]}
    for text, there in (("no python", {"failed"}), ("nor here", {"failed", "early"})):
        subprocess.run(["bash", "-c", f"{look}\n{function}\nray_failed '{text}'"], env=variables, check=True)
        assert {path.name for path in tmp_path.iterdir()} == there
    assert (tmp_path / "failed").read_text() == "no python\n"
