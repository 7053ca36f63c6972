"""A full disk: programs of a job that cannot record their cause, and the agent that cannot record a job."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dagster_pipes import encode_param

from dagster_sbatch.launchers import CommandLauncher, SrunLauncher
from dagster_sbatch.slurm import SlurmRequest
from dagster_sbatch.slurm.gateway import RefusedError
from dagster_sbatch.slurm.gateway.agent import images
from support.agent_fixtures import HURRIED, NO_INODES, Prepare, put


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run directory, in which neither the cause nor the workload's process can be written."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name in ("cause", "workload.pid"):
        (tmp_path / name).symlink_to("/dev/full")
    (tmp_path / "context.json").write_text(json.dumps({"asset_keys": ["a"], "run_id": "", "extras": {}}))
    monkeypatch.setenv("DAGSTER_PIPES_CONTEXT", encode_param({"path": str(tmp_path / "context.json")}))
    monkeypatch.setenv("DAGSTER_PIPES_MESSAGES", encode_param({"path": str(tmp_path / "messages.jsonl")}))
    return tmp_path


def run(command: list[str]) -> tuple[int, str]:
    """Run a program in a group of its own: `ranks.py` ends its group."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, start_new_session=True)
    return done.returncode, done.stderr


def test_ranks(folder: Path) -> None:
    """The workload asks for a retry."""
    code, said = run(SrunLauncher().local_command(SlurmRequest(), ["-c", "raise SystemExit(75)"]))
    assert code == os.EX_TEMPFAIL
    assert said.startswith("rank 0 on ")
    assert said.endswith("This cause cannot be recorded: [Errno 28] No space left on device\n")


def test_a_program_that_cannot_be_executed(folder: Path) -> None:
    (folder / "program").write_text("#!/nowhere/sh\n")
    (folder / "program").chmod(0o755)
    code, said = run(CommandLauncher().local_command(SlurmRequest(), [str(folder / "program")]))
    assert (code, len(said.splitlines())) == (127, 1)
    assert "asks for /nowhere/sh in its first line" in said


def test_the_check_of_an_image(folder: Path) -> None:
    """A folder cannot be read now: the job is repeated."""
    (folder / "loop").symlink_to("loop")
    code, said = run([sys.executable, images.__file__, "sh", "a.sif", str(folder / "data"), str(folder / "loop")])
    assert (code, len(said.splitlines())) == (os.EX_TEMPFAIL, 1)
    assert "Too many levels of symbolic links" in said


def test_a_job_that_could_not_be_recorded_is_cancelled(prepare: Prepare, slurm: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "KEY"
    run.mkdir(parents=True, mode=0o700)
    for name in ("tried", "lock"):
        (run / name).touch()
    over, running = (f"JobName=KEY JobState={state} ExitCode=0:15 SubmitTime=1" for state in ("CANCELLED", "RUNNING"))
    times = "StartTime=Unknown EndTime=2"
    put(slurm, "squeue", f"[ -e '{tmp_path}/submitted' ] && echo '17|KEY' || true")
    put(slurm, "scontrol", f"[ -e '{tmp_path}/scancel' ] && echo '{over} {times}' || echo '{running} {times}'")
    put(slurm, "scancel", f"touch '{tmp_path}/scancel'")
    gateway = prepare(HURRIED + NO_INODES + "def spoil(): sys.modules['agent.jobs'].LATE = 0.5\n")
    with pytest.raises(RefusedError, match="Disk quota exceeded"):  # there is none, and nothing keeps one from coming
        gateway.cancel(str(run))
    (tmp_path / "submitted").touch()
    cancelled = gateway.cancel(str(run))
    assert cancelled is not None
    assert cancelled.state == "CANCELLED"
