"""Array jobs as people see them with scripts/job: counts, a table of tasks, and each task's output, files and end."""

import os
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dagster_sbatch.inspect.remote_runs import Runs, open_runs
from resources import PROJECT
from slurm_in_a_box import wait_until
from support import ROOT, forked
from support.array_run import RUNS, files_of, new_key
from support.submission import submit_run

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("on_supercomputer")]

BODY = """
case $index in
  0) echo done ;;
  1) echo "no input of January" >&2; exit 7 ;;
  2) echo begun; sleep 600 ;;
esac
"""
"""Of tasks that run one after another: one succeeds, one fails, one runs, and the others wait."""


@dataclass(frozen=True)
class Submitted:
    """An array job."""

    job: str
    path: str


@pytest.fixture
def runs() -> Iterator[Runs]:
    with open_runs(PROJECT.load_settings(), PROJECT) as runs:
        yield runs


def submit(runs: Runs, body: str, tasks: int, max_running: int | None = None) -> Submitted:
    key = new_key()
    path = f"{RUNS}/{key}"
    job = submit_run(runs.gateway, path, files_of(PROJECT.load_site("musica"), key, body, tasks, max_running)).job
    return Submitted(job, path)


def job(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return forked.run([str(ROOT / "scripts" / "job"), *arguments], os.environ)


def refusal(*arguments: str) -> str:
    done = job(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr


def counts(runs: Runs) -> list[int]:
    (found,) = runs.task_counts(runs.all()).values()
    return [found[kind] for kind in ("done", "running", "waiting", "failed")]


def test_the_tasks_of_an_array_job_one_by_one(runs: Runs, tmp_path: Path) -> None:
    array = submit(runs, BODY, 4, max_running=1)
    wait_until(lambda: counts(runs) == [1, 1, 1, 1], "one task of each kind", 60)

    listed = job().stdout
    (row,) = [line.split() for line in listed.splitlines() if line.startswith(array.job)]
    assert " ".join(row).startswith(f"{array.job} 1 done, 1 running, 1 waiting, 1 failed a a-run ")
    assert max(map(len, listed.splitlines())) <= 80
    done = job(array.job)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = done.stdout.splitlines()
    rows = {words[0]: words[1:4] for line in shown if (words := line.split())}
    assert rows[f"{array.job}_0"] == ["n0", "COMPLETED", "0:0"]
    assert rows[f"{array.job}_1"] == ["n1", "FAILED", "7:0"]
    assert rows[f"{array.job}_2"] == ["n2", "RUNNING", "-"]
    assert rows[f"{array.job}_3"] == ["n3", "PENDING", "-"]
    assert shown[-3:] == [
        "4 tasks: 1 done, 1 running, 1 waiting, 1 failed", "To see one of them:", f"  scripts/job {array.job}_0",
    ]  # fmt: skip
    logs = job(array.job, "logs").stdout
    assert f"task {array.job}_1 (n1): FAILED 7:0" in logs
    assert "no input of January\n" in logs

    one = job(f"{array.job}_1", "logs")
    assert (one.stdout, one.stderr) == ("", "no input of January\n")
    assert job(f"{array.job}_1").stdout.splitlines()[-1] == f"{array.job}_1: {array.path}/tasks/1/"
    target = tmp_path / "context.json"
    assert job(f"{array.job}_1", "fetch", "context.json", "--to", str(target)).returncode == 0
    assert target.read_text() == '{"common": 1, "task": 1}\n'
    assert "has not started" in refusal(f"{array.job}_3", "logs")
    assert f"has no task 4. The highest index of its tasks is 3. To list them:\n  scripts/job {array.job}\n" in refusal(
        f"{array.job}_4"
    )

    followed: list[subprocess.CompletedProcess[str]] = []
    thread = threading.Thread(target=lambda: followed.append(job(f"{array.job}_2", "logs", "--follow")))
    thread.start()
    assert job(f"{array.job}_2", "cancel").stdout == f"task {array.job}_2: CANCELLED\n"
    thread.join(60)
    assert (followed[0].returncode, followed[0].stdout) == (0, "begun\n"), followed[0].stderr
    wait_until(lambda: counts(runs) == [2, 0, 0, 2], "the last task has run", 60)
