"""The environment with which the agent submits array jobs: that of a login shell, whatever the profile does."""

import os
from pathlib import Path
from typing import Any

import pytest

from dagster_sbatch.slurm.gateway.agent import disk, jobs, paths
from resources import PROJECT
from support.agent_fixtures import put
from support.array_run import files_of

PROFILE = """\
read -r line && export READ=$line
printf 'a welcome\\n17\\n'; echo problem >&2
sleep 60 & echo $! >~/left_behind
export LINES_OF='a = 1
b' BYTES=$'\\377' HOSTNAME SBATCH_ACCOUNT=p9 SBATCH_PARTITION=x SLURM_NTASKS=4 SQUEUE_FORMAT=x SACCT_FORMAT=x
of_user() { echo "$1"; }
export -f of_user
false
"""
OF_THE_AGENT = {
    "SSH_CLIENT": "10.0.0.1", "TMPDIR": "/tmp/agent", "DISPLAY": ":1", "XDG_RUNTIME_DIR": "/run/user/1", "LANG": "C",
    "BASH_ENV": "/nosuch", "PASSWORD": "secret", "SLURM_JOB_ID": "5", "SLURM_CONF": "/c", "SBATCH_ACCOUNT": "p2",
}  # fmt: skip
"""What the agent's own shell has; of these, only how to reach Slurm and the chosen project reach a job."""


@pytest.fixture
def run(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run directory of an array job that is not laid out yet; sbatch is found by the agent's PATH alone."""
    monkeypatch.setattr(paths, "PROFILE_PATIENCE", 60.0)
    put(slurm, "sbatch", 'env -0 >"$(dirname "$0")/variables"; echo 17')
    (tmp_path / "runs").mkdir(mode=0o700)
    return tmp_path / "runs" / "KEY-1"


def submit(run: Path, **request: Any) -> str:
    files = files_of(PROJECT.load_site("musica"), "KEY-1", "true", 3, **request)
    job, how = jobs.submit_once(str(run), "KEY-1", {"files": files})
    assert how == "submitted"
    return str(job)


def variables(slurm: Path) -> dict[bytes, bytes]:
    found = (slurm / "variables").read_bytes().split(b"\0")[:-1]
    return dict(each.split(b"=", 1) for each in found)


@pytest.mark.parametrize("account", ["", "p1"])
def test_tasks_get_what_the_profile_exports_and_nothing_of_the_agents_shell(
    account: str, run: Path, slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The profile prints, reads its input, leaves a process behind, and ends with an error."""
    for name, value in OF_THE_AGENT.items():
        monkeypatch.setenv(name, value)
    (tmp_path / ".bash_profile").write_text(PROFILE)
    assert submit(run, **({"account": account} if account else {})) == "17"
    os.kill(int((tmp_path / "left_behind").read_text()), 9)
    found = variables(slurm)
    assert (found[b"LINES_OF"], found[b"BYTES"]) == (b"a = 1\nb", b"\xff")
    assert (found[b"HOME"], found[b"SLURM_CONF"]) == (str(tmp_path).encode(), b"/c")
    assert found.get(b"SBATCH_ACCOUNT") == (None if account else b"p2")
    assert [name for name, value in OF_THE_AGENT.items() if found.get(name.encode()) == value.encode()] == [
        "SLURM_CONF", *([] if account else ["SBATCH_ACCOUNT"])
    ]  # fmt: skip
    others = {b"SBATCH_PARTITION", b"SLURM_NTASKS", b"SQUEUE_FORMAT", b"SACCT_FORMAT", b"SLURM_TIME_FORMAT"}
    assert not set(found) & {*others, b"READ", b"HOSTNAME", b"SHLVL"}


def test_functions_of_the_profile_are_exported(run: Path, tmp_path: Path) -> None:
    """Seen before sbatch, because here /bin/sh stands in its place: some kinds of it drop functions."""
    (tmp_path / ".bash_profile").write_text(PROFILE)
    assert paths.login_environment()["BASH_FUNC_of_user%%"] == '() {  echo "$1"\n}'
    os.kill(int((tmp_path / "left_behind").read_text()), 9)


@pytest.mark.parametrize(
    ("profile", "kind", "text"),
    [
        ("exit 3", "refused", "ended the shell, as `exit` and `exec zsh` do"),
        ("exec sleep 60", "temporary", "did not end within 0 s. See there what it waits for:\n  bash -lc true"),
    ],
)
def test_a_profile_that_does_not_end_submits_nothing(
    profile: str, kind: str, text: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the profile is corrected, the next request submits at once: there is no job to search for."""
    (tmp_path / ".bash_profile").write_text(profile)
    monkeypatch.setattr(paths, "PROFILE_PATIENCE", 0.5 if kind == "temporary" else 60.0)
    with pytest.raises(disk.RequestError) as failure:
        submit(run)
    assert failure.value.kind == kind
    assert text in str(failure.value)
    assert not (tmp_path / "bin" / "variables").exists()
    assert not (run / "tried").exists()
    monkeypatch.setattr(paths, "PROFILE_PATIENCE", 60.0)
    (tmp_path / ".bash_profile").unlink()
    assert submit(run) == "17"
