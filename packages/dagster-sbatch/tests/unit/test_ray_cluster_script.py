"""The shell script around a job's Ray cluster, with a sham Slurm."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dagster_sbatch.launchers import ray

JOB = Path(ray.__file__).parent / "job"
WATCHING = "until [ -e watching ]; do sleep 0.01; done; "
"""Begins a sham srun that ends when the script has started everything."""
WORKS = "run_workload() { echo $BASHPID >workload.pid; exec sleep 60; }"


def run_cluster_script(
    folder: Path, text: str, srun: str, scontrol: str = "echo n1", functions: str = WORKS
) -> subprocess.CompletedProcess[str]:
    """Run a text of cluster.sh in a folder, as the job script does, with a sham srun and scontrol."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, script in (("srun", srun), ("scontrol", scontrol)):
        (programs / name).write_text(f"#!/bin/bash\n{script}\n")
        (programs / name).chmod(0o755)
    (folder / "ray").mkdir(exist_ok=True)
    (folder / "ray/watch.py").write_text("import pathlib, time\npathlib.Path('watching').touch()\ntime.sleep(60)\n")
    (folder / "cluster.sh").write_text(text)
    script = f'began=$(date +%s.%N); run_python() {{ exec "$PYTHON" "$@"; }}; {functions}; . ./cluster.sh 1 program.py'
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "PYTHON": sys.executable}
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_shell_part_of_ray_is_clean(shellcheck: str) -> None:
    command = [shellcheck, "--severity=style", str(JOB / "cluster.sh")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 0)


def test_the_heads_file_is_there_before_any_node_asks_for_it(tmp_path: Path) -> None:
    """An NFS client that got "no such file" as an answer may repeat that for a minute."""
    done = run_cluster_script(
        tmp_path, (JOB / "cluster.sh").read_text(), f'{WATCHING}ls "$RAY_JOB_STATE" >seen; exit 3'
    )
    assert done.returncode == 1
    assert "head.json" in (tmp_path / "seen").read_text()


def test_a_job_that_starts_again_uses_nothing_of_its_former_start(tmp_path: Path) -> None:
    """Also if Slurm does not know that it has started before: its controller has lost the latest state."""
    text = (JOB / "cluster.sh").read_text()
    for code in (3, 4):
        run_cluster_script(tmp_path, text, f'ls "$RAY_JOB_STATE" >seen; touch "$RAY_JOB_STATE/left"; exit {code}')
        assert (tmp_path / "cause").read_text().startswith("Ray: srun ended with exit code ")
        assert "left" not in (tmp_path / "seen").read_text()


def test_the_names_of_the_nodes_are_there_for_the_workload_and_an_error_of_slurm_is_the_cause(tmp_path: Path) -> None:
    """The workload's program may run in a container, without commands of Slurm."""
    text = (JOB / "cluster.sh").read_text()
    for name, scontrol in (("named", "echo n1; echo n2; echo warning >&2"), ("unnamed", "echo no hosts >&2; exit 3")):
        folder = tmp_path / name
        folder.mkdir()
        done = run_cluster_script(folder, text, f"{WATCHING}exit 3", scontrol)
        assert done.returncode == 1
    assert (tmp_path / "named/ray/state/nodes").read_text() == "n1\nn2\n"
    said = "`scontrol show hostnames` failed on .*, so the names of the job's nodes are unknown: no hosts\n"
    assert re.fullmatch(f"Ray: {said}", (tmp_path / "unnamed/cause").read_text())
    assert not (tmp_path / "unnamed/workload.pid").exists()


@pytest.mark.parametrize("full", ["", "token", "nodes"])
def test_a_full_disk_is_the_cause_and_nothing_is_started(full: str, tmp_path: Path) -> None:
    """Without these files, some nodes and the workload would wait for one another. `full`: the file without room."""
    mkdir = "echo 'mkdir: cannot create: No space left on device' >&2; exit 1"
    if full:
        mkdir = f'/bin/mkdir "$1" && ln -s /dev/full "$1/{full}"'
    text = f"mkdir() {{ ({mkdir}); }}\n" + (JOB / "cluster.sh").read_text()
    done = run_cluster_script(tmp_path, text, "touch started; sleep 60")
    cause = f"cannot write to the run directory {tmp_path}: No space left on device. If the disk or your quota is full"
    assert done.returncode == 1
    assert cause in (tmp_path / "cause").read_text()
    assert cause in done.stderr
    assert not (tmp_path / "started").exists()
    assert not (tmp_path / "workload.pid").exists()


def test_a_workload_whose_process_a_full_disk_does_not_record_ends_with_its_cluster(tmp_path: Path) -> None:
    """The shell has written no number: the disk was full by then. The workload waits for its cluster."""
    hangs = f"import sys; sys.path[:0] = [{str(JOB)!r}]; import job_cluster, time; job_cluster.end_with_parent()"
    (tmp_path / "hangs.py").write_text(f"{hangs}; open('hangs', 'w').close(); time.sleep(600)\n")
    (tmp_path / "workload.pid").symlink_to("/dev/full")
    works = 'run_workload() { (echo $BASHPID >workload.pid; exec "$PYTHON" hangs.py); }'
    srun = 'until [ -e hangs ]; do sleep 0.01; done; ln -s /dev/full "$RAY_JOB_STATE/failed-$HOSTNAME-$PPID"; exit 1'
    text = (JOB / "cluster.sh").read_text().replace("start_seconds=60", "start_seconds=0")
    done = run_cluster_script(tmp_path, text, srun, functions=works)
    assert done.returncode == 1
    assert "Ray: srun ended with exit code 1, and no node has reported why" in done.stderr


def test_a_container_that_does_not_start_on_a_node_is_the_cause_and_one_that_still_starts_is_ended(
    tmp_path: Path,
) -> None:
    """The nodes have failed before the workload's container runs; the workload would wait for them."""
    slow = "run_workload() { until grep -q srun ray/state/failed; do sleep 0.05; done; sleep 0.3; " + WORKS[17:]
    text = (JOB / "cluster.sh").read_text()
    done = run_cluster_script(tmp_path, text, f'{WATCHING}echo "no python9" >cause; exit 127', functions=slow)
    assert done.returncode == 1
    assert (tmp_path / "cause").read_text() == "no python9\n"
    assert "srun ended with exit code 127, and no node has reported why" in done.stderr


def test_a_bash_that_is_too_old_is_named(tmp_path: Path) -> None:
    text = (JOB / "cluster.sh").read_text().replace("BASH_VERSINFO", "SHAM_VERSION")
    done = run_cluster_script(tmp_path, f"SHAM_VERSION=(4 2)\n{text}", "exit 0")
    assert done.returncode == 1
    assert "and 4.3 or later is needed" in (tmp_path / "cause").read_text()
    assert not (tmp_path / "workload.pid").exists()


def test_an_srun_that_ends_before_anybody_waits_for_it_ends_the_job(tmp_path: Path) -> None:
    """Bash forgets a coprocess as soon as it has ended."""
    begin = 'kill -0 "$nodes" 2>/dev/null && wait -n'
    before, after = (JOB / "cluster.sh").read_text().split(begin)
    ended = 'while kill -0 "$nodes" 2>/dev/null; do :; done\n'
    done = run_cluster_script(tmp_path, before + ended + begin + after, "echo unknown option >&2; exit 3")
    assert done.returncode == 1
    assert (tmp_path / "cause").read_text().startswith("Ray: srun ended with exit code ")
