"""When the sampler of a job ends, and what it has started."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from slurm_in_a_box import wait_until
from support.programs import make

import sampler

JOB = "4711"


def test_the_sampler_ends_with_its_standard_input_and_what_it_started_ends_too(tmp_path: Path) -> None:
    """As the batch script asks: also after Slurm has sent SIGTERM."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '0, GPU-a, 40, 1000'\nexec sleep 600\n")
    smi.chmod(0o755)
    environment = {"SLURM_JOB_ID": JOB, "CUDA_VISIBLE_DEVICES": "0", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        [sys.executable, *sampler.PYTHON_OPTIONS, sampler.__file__, "job", "1", "1"],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def ask() -> str:
        assert process.stdin and process.stdout
        process.stdin.write("\n")
        process.stdin.flush()
        return process.stdout.readline()

    wait_until(lambda: '"gpu_percent": 40.0' in ask(), "the sampler has heard of the GPU", 30)
    (child,) = psutil.Process(process.pid).children()
    process.terminate()
    assert '"gpu_memory_mib": 1000.0' in ask()
    process.communicate(timeout=30)  # closes its standard input
    assert process.returncode == 0
    wait_until(lambda: not child.is_running(), "nvidia-smi has ended", 30)


def test_on_another_node_the_sampler_ends_when_slurm_ends_the_job() -> None:
    """Its srun may have ended before it has closed the sampler's standard input."""
    command = [sys.executable, *sampler.PYTHON_OPTIONS, sampler.__file__, "node", "0"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env={"SLURM_JOB_ID": JOB}, stdin=pipe, stdout=pipe) as process:
        assert process.stdout
        process.stdout.readline()
        process.terminate()
        assert process.wait(30) == -signal.SIGTERM


def test_what_the_sampler_started_on_other_nodes_has_ended_before_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If Slurm finds a process after the job script's end, it kills that and sleeps for a second."""
    make(tmp_path, "#!/bin/bash\ntrap 'sleep 0.3; exit' TERM\ntouch begun\nsleep 600 & wait\n", "srun")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", JOB)
    monkeypatch.chdir(tmp_path)
    first: Any = sampler.FirstNode(2, 0, 0)
    first.start_others()
    with first.others as srun:
        wait_until((tmp_path / "begun").exists, "its srun runs", 30)
        first.end()
        assert srun.returncode == 0


def test_a_start_that_slurm_has_replaced_by_another_one_ends_and_records_nothing(tmp_path: Path) -> None:
    """Its node was cut off from Slurm, but not from the file system."""
    (tmp_path / "events").write_text('{"started": "n1", "time": 1}\n')
    words = [sys.executable, *sampler.PYTHON_OPTIONS, sampler.__file__, "job", "1", "0"]
    script = 'trap "echo end >>events" EXIT TERM\ncoproc S { exec "$@"; }\n'
    script += 'echo >&"${S[1]}"; read -ru "${S[0]}"; touch begun; wait'
    make(tmp_path, f"#!/bin/bash\n{script}\n", "script")
    with subprocess.Popen([tmp_path / "script", *words], cwd=tmp_path, env={"SLURM_JOB_ID": JOB}) as process:
        try:
            wait_until((tmp_path / "begun").exists, "the sampler runs", 30)
            events = (tmp_path / "events").read_text() + '{"started": "n2", "time": 2}\n'
            (tmp_path / "events").write_text(events)
            assert process.wait(30) == -signal.SIGKILL
        finally:
            process.kill()
    assert (tmp_path / "events").read_text() == events
