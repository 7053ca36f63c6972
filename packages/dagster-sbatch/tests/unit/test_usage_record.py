"""What a job script records of its sampler's answer, with samplers that answer late, in pieces, or not at all."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from dagster_sbatch.slurm import SlurmRequest, allocate, render_job_script
from dagster_sbatch.slurm.gateway.agent import job_record
from resources import PROJECT
from slurm_in_a_box import wait_until

SITE = PROJECT.load_site("musica")
SAMPLER = """\
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: None)
with open("pid", "w") as file:
    file.write(str(os.getpid()))
os.rename("pid", "ready")
sys.stdin.readline()
"""
LATE = "time.sleep(3)\nprint('{\"seconds\": 7}', flush=True)\nsys.stdin.read()"
"""As on a node that stands still for three seconds."""
IN_PIECES = "print('{\"sec', end='', flush=True)\ntime.sleep(3)\nprint('onds\": 7}', flush=True)\nsys.stdin.read()"


@contextmanager
def started(folder: Path, answer: str, body: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a job with a sampler, in a process group of its own, which is killed at the end."""
    (folder / "sampler").mkdir()
    (folder / "sampler" / "sampler.py").write_text(SAMPLER + answer)
    request = allocate(SlurmRequest(), SITE).request
    (folder / "job.sh").write_text(render_job_script(request, SITE, job_name="k", about={}, environment={}, body=body))
    for name in ("stdout", "stderr"):
        (folder / name).touch()
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "17"}
    with subprocess.Popen(["bash", "job.sh"], cwd=folder, env=environment, start_new_session=True) as job:
        try:
            yield job
        finally:
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)


def end_of(folder: Path) -> dict[str, Any]:
    """The job's own record of its end, as the agent reads it."""
    agent: Any = job_record
    found: dict[str, Any] = agent.events_of(str(folder)).get("end", {})
    return found


@pytest.mark.parametrize(
    ("answer", "usage"),
    [
        ("print('{\"seconds\": 7}', flush=True)", {"seconds": 7}),
        (LATE, {"seconds": 7}),
        (IN_PIECES, None),
        ("sys.stdin.read()", None),
        ("", None),  # it has ended
    ],
    ids=["at once", "late", "in pieces", "never", "ended"],
)
def test_the_end_of_a_job_is_recorded_with_what_its_sampler_says_in_time(
    answer: str, usage: object, tmp_path: Path
) -> None:
    with started(tmp_path, answer, "until [ -e ready ]; do sleep 0.02; done; exit 5") as job:
        assert job.wait(60) == 5
    end = end_of(tmp_path)
    assert (end["code"], end["usage"]) == (5, usage)


def test_a_job_leaves_no_sampler_behind(tmp_path: Path) -> None:
    """If Slurm finds a process after the job script's end, it kills that and sleeps for a second."""
    answer = "print('{\"seconds\": 7}', flush=True)\nsys.stdin.read()\ntime.sleep(0.5)\n"
    with started(tmp_path, answer, "until [ -e ready ]; do sleep 0.02; done; exit 5") as job:
        assert job.wait(60) == 5
        assert not psutil.pid_exists(int((tmp_path / "ready").read_text()))
    assert end_of(tmp_path)["usage"] == {"seconds": 7}


def test_a_job_does_not_wait_long_for_a_sampler_that_does_not_end(tmp_path: Path) -> None:
    answer = "print('{\"seconds\": 7}', flush=True)\ntime.sleep(600)\n"
    with started(tmp_path, answer, "until [ -e ready ]; do sleep 0.02; done") as job:
        assert job.wait(60) == 0
    assert end_of(tmp_path)["usage"] == {"seconds": 7}


def test_a_job_that_slurm_ends_waits_for_its_sampler_once(tmp_path: Path) -> None:
    """Slurm kills it soon. The second record has the answer, if there is time for that."""
    with started(tmp_path, LATE, "trap '' TERM; until [ -e go ]; do sleep 0.02; done") as job:
        wait_until((tmp_path / "ready").exists, "its sampler runs", 60)
        job.terminate()
        wait_until(lambda: bool(end_of(tmp_path)), "the record", 60)
        assert (end_of(tmp_path)["code"], end_of(tmp_path)["usage"]) == (None, None)
        (tmp_path / "go").touch()
        job.wait(60)
    assert (end_of(tmp_path)["code"], end_of(tmp_path)["usage"]) == (None, {"seconds": 7})
