"""Signals of Slurm to a job: the record of its end, and what its workload gets."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from dagster_sbatch.launchers import ray
from dagster_sbatch.slurm import SlurmRequest, allocate, load_site, render_job_script
from slurm_in_a_box import wait_until
from support.background import STRESS
from support.dagster_dev import gone
from support.programs import make

import one_rank

STEP = "system.slice/slurmstepd.scope/job_17/step_batch/user/task_0"
MEMORY = "4:memory:/slurm/uid_1/job_17/step_batch/task_0"
CGROUPS = {
    "version 2": (f"0::/{STEP}", f"0::/{STEP}", True),
    "version 1": (*[f"5:freezer:/slurm/uid_1/job_17/step_batch\n{MEMORY}"] * 2, True),
    "memory only": (*[f"5:freezer:/\n{MEMORY}"] * 2, False),
    "another job": (*["0::/system.slice/slurmstepd.scope/job_171/step_batch/user/task_0"] * 2, False),
    "none": ("0::/", "0::/", False),
    "a step of srun, which gets its own": (f"0::/{STEP}", f"0::/{STEP.replace('batch', '0')}", False),
}
"""/proc/PID/cgroup of the job script and of its workload, and whether the workload needs the signal of the script."""


def read_events(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "events").read_text().splitlines()]


@contextmanager
def start_in_group(folder: Path, body: str, **variables: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a job in a process group of its own, which is killed at the end; its body has made the file `begun`."""
    site = load_site({}, "musica")
    request = allocate(SlurmRequest(), site).request
    text = render_job_script(request, site, job_name="k", about={}, environment={}, body=body)
    (folder / "job.sh").write_text(text)
    for name in ("stdout", "stderr"):
        (folder / name).touch()
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "17", **variables}
    with (
        (folder / "stderr").open("w") as stderr,
        subprocess.Popen(["bash", "job.sh"], cwd=folder, env=environment, stderr=stderr, start_new_session=True) as job,
    ):
        try:
            wait_until((folder / "begun").exists, "its body has begun", 60)
            yield job
        finally:
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)


def test_a_job_that_is_terminated_records_that_it_was_cut_short(tmp_path: Path) -> None:
    """An EXIT trap sees the status of the command before the signal, 0: that must not pass for a success."""
    with start_in_group(tmp_path, "sh -c 'touch begun; exec sleep 600'; touch later") as job:
        os.killpg(job.pid, signal.SIGTERM)  # as scancel does, to all processes of the job
        job.wait(60)
    assert read_events(tmp_path)[-1]["code"] is None
    assert not (tmp_path / "later").exists()


def test_a_workload_that_is_terminated_before_the_job_script_was_cut_short_as_well(tmp_path: Path) -> None:
    """Slurm signals one process after another."""
    with start_in_group(tmp_path, "sh -c 'echo $$ >pid; mv pid begun; exec sleep 600'") as job:
        workload = int((tmp_path / "begun").read_text())
        os.kill(workload, signal.SIGTERM)
        wait_until(lambda: gone(workload), "its end", 60)
        job.terminate()
        job.wait(60)
    assert read_events(tmp_path)[-1]["code"] is None


def test_a_workload_that_is_terminated_may_save_its_state(tmp_path: Path) -> None:
    """The record is there before SIGKILL may prevent it; the exit code of such a workload does not count.

    The job lasts until the workload has ended, which takes it 0.3 s here: then Slurm kills what is left.
    """
    save = "until [ -e go ]; do sleep 0.02; done; sleep 0.3; touch saved; exit 0"
    with start_in_group(tmp_path, f"bash -c 'trap \"{save}\" TERM; touch begun; sleep 600 & wait'\ntrue") as job:
        os.killpg(job.pid, signal.SIGTERM)
        wait_until(lambda: "code" in read_events(tmp_path)[-1], "the record", 60)
        assert job.poll() is None
        (tmp_path / "go").touch()
        job.wait(60)
    assert (tmp_path / "saved").exists()
    # Twice or more: a signal that comes just after a fork of bash runs the trap in the new shell as well.
    codes = [event["code"] for event in read_events(tmp_path)[1:]]
    assert codes[:2] == [None, None] and set(codes) == {None}


@pytest.mark.parametrize("seed", range(200 if STRESS else 5))
def test_signals_that_come_close_together_do_not_end_the_job_script(tmp_path: Path, seed: int) -> None:
    """The controller repeats its request to a node that is slow to answer, and the warning may come with it.

    A signal may come while bash reads `$(...)`. Handlers nest: bash itself ends after some 2,500 of them. There is no
    warning after the first SIGTERM.
    """
    chance = random.Random(seed)
    saves = "echo $$ >workload.pid; touch begun; until [ -e go ]; do sleep 0.02; done; touch saved"
    with start_in_group(tmp_path, f"bash -c 'trap \"\" TERM USR1; {saves}'") as job:
        for _ in range(400 if STRESS else 100):
            job.send_signal(chance.choice([signal.SIGTERM, signal.SIGUSR1]))
            time.sleep(chance.uniform(0, 0.0002))
        (tmp_path / "go").touch()
        job.wait(60)
    assert (tmp_path / "saved").exists()
    assert {event.get("code") for event in read_events(tmp_path)} == {None}
    assert len(read_events(tmp_path)) >= 2
    assert set((tmp_path / "stderr").read_text().splitlines()) <= {"time limit: 300 s left"}


def test_a_wait_that_ends_without_a_signal_does_not_end_the_job_script(tmp_path: Path) -> None:
    """After signals that came close together, bash 5.2 may end a later `wait` like that."""
    early = '() { if [ -e early ]; then builtin wait "$@"; else : >early; return 138; fi; }'
    body = "touch begun; until [ -e go ]; do sleep 0.02; done"
    with start_in_group(tmp_path, body, **{"BASH_FUNC_wait%%": early}) as job:
        wait_until((tmp_path / "early").exists, "a wait that ends early", 60)
        (tmp_path / "go").touch()
        assert job.wait(60) == 0
    assert read_events(tmp_path)[-1]["code"] == 0


@pytest.mark.parametrize(("cgroups", "of_workload", "gets_it"), CGROUPS.values(), ids=CGROUPS)
def test_sigterm_is_passed_on_where_slurm_sends_it_to_the_script_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cgroups: str, of_workload: str, gets_it: bool
) -> None:
    """Slurm signals its own child only if it knows the processes of a job by their cgroup, else all of them."""
    (tmp_path / "bin").mkdir()
    text = f'#!/bin/sh\nread -r pid <workload.pid\ncase $1 in /proc/$pid/*) echo "{of_workload}" ;;'
    make(tmp_path / "bin", f'{text}\n/proc/*) echo "{cgroups}" ;; *) exec /bin/cat "$@" ;; esac\n', "cat")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    waits = 'trap "echo >>saved; exit" TERM; echo $$ >workload.pid; touch begun; sleep 600 & wait'
    with start_in_group(tmp_path, f"bash -c '{waits}'\ntouch later") as job:
        job.terminate()
        wait_until(lambda: "code" in read_events(tmp_path)[-1], "the record", 60)
        if gets_it:
            job.wait(60)
        else:
            os.kill(int((tmp_path / "workload.pid").read_text()), signal.SIGKILL)
            job.wait(60)
    assert (tmp_path / "saved").exists() == gets_it
    assert not (tmp_path / "later").exists()


def test_of_a_former_start_no_process_is_warned_and_no_cause_is_left(tmp_path: Path) -> None:
    """A requeued job may run on another node, where another process of the user has that number."""
    traps = "trap 'exit 9' USR1; trap 'exit 0' TERM; touch ready; while :; do sleep 0.02; done"
    with subprocess.Popen(["bash", "-c", traps], cwd=tmp_path) as other:
        wait_until((tmp_path / "ready").exists, "its traps", 60)
        (tmp_path / "workload.pid").write_text(f"{other.pid}\n")
        (tmp_path / "cause").write_text("a node had no Python")
        with start_in_group(tmp_path, "touch begun; until [ -e go ]; do sleep 0.02; done") as job:
            job.send_signal(signal.SIGUSR1)
            wait_until(lambda: (tmp_path / "stderr").read_text() != "", "the warning", 60)
            (tmp_path / "go").touch()
            assert job.wait(60) == 0
        other.terminate()
        assert other.wait(60) == 0
    assert (tmp_path / "cause").read_text() == ""


DRIVER = """\
import pathlib, signal, sys, time
from job_cluster import end_with_parent
def save(*_):
    time.sleep(0.5)
    pathlib.Path("../saved").touch()
    sys.exit()
end_with_parent()
signal.signal(signal.SIGTERM, save)
pathlib.Path("../begun").touch()
while True: signal.pause()
"""


SECOND = '$(case $BASH_COMMAND in trap*) [ ! -e begun ] || kill "$own" ;; esac)'
"""What bash expands when it has read a command, and before it executes it: then, a second SIGTERM comes."""


@pytest.mark.parametrize(
    "order", ["all processes", "all processes, one twice", "the script alone", "the nodes, then the script"]
)
def test_the_workload_of_a_ray_cluster_may_save_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    """As any other, although the cluster ends at once. Slurm kills what is left when the job script has ended."""
    for folder in ("bin", "ray"):
        (tmp_path / folder).mkdir()
    for file in ("cluster.sh", "job_cluster.py"):
        shutil.copy(Path(ray.__file__).parent / "job" / file, tmp_path / "ray")
    (tmp_path / "ray/driver.py").write_text(DRIVER)
    (tmp_path / "ray/watch.py").write_text("import time\ntime.sleep(600)\n")
    make(tmp_path / "bin", "#!/bin/bash\necho $$ >srun.pid; trap 'exit 143' TERM; read -r\n", "srun")
    make(tmp_path / "bin", "#!/bin/sh\necho n1\n", "scontrol")
    text = CGROUPS["none" if order.startswith("all processes") else "version 2"][0]
    make(tmp_path / "bin", f'#!/bin/sh\ncase $1 in /proc/*) echo "{text}" ;; *) exec /bin/cat "$@" ;; esac\n', "cat")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    twice = f"own=$BASHPID PS4='{SECOND}'; set -x\n" if "twice" in order else ""
    with start_in_group(tmp_path, f"PYTHON={sys.executable}\n{twice}. ray/cluster.sh 1 program.py") as job:
        if order.startswith("all processes"):
            os.killpg(job.pid, signal.SIGTERM)
        elif order == "the script alone":
            job.terminate()
        else:
            nodes = int((tmp_path / "srun.pid").read_text())
            os.kill(nodes, signal.SIGTERM)
            wait_until(lambda: gone(nodes), "the end of the cluster", 60)
            job.terminate()
        job.wait(60)
    assert (tmp_path / "saved").exists()
    assert [event["code"] for event in read_events(tmp_path)[1:]] == [None, None]


@pytest.mark.parametrize("name", ["version 2", "version 1", "memory only", "another job", "none"])
def test_a_rank_gets_sigterm_from_the_process_that_slurm_signals(tmp_path: Path, name: str) -> None:
    text, _, expected = CGROUPS[name]
    (tmp_path / "cgroup").write_text(f"{text}\n")
    assert one_rank.are_known_by_cgroup(tmp_path / "cgroup", "17") == expected
