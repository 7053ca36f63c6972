"""The command line of scripts/job."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dagster_sbatch import Project
from dagster_sbatch.commands import job
from dagster_sbatch.inspect import remote_runs
from dagster_sbatch.inspect.remote_runs import Runs
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm.gateway import StoppedError
from dagster_sbatch.slurm.gateway.agent import run_directories
from support import ROOT


@pytest.mark.parametrize("words", [["logs"], ["cancel"], ["state"], ["logs", "logs"], ["logs", "1184"]])
def test_an_action_without_a_job_is_wrong_usage(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["scripts/job", *words])
    with pytest.raises(SystemExit) as ended:
        job.main(Project(ROOT))
    shown = capsys.readouterr()
    assert (ended.value.code, shown.out) == (2, "")
    assert shown.err.endswith(f"name a job before the action, for example: scripts/job 1184 {words[0]}\n")


def test_a_login_node_that_cannot_be_reached_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And once: the command retries for a while, or for ever with --follow."""
    shown = []

    def make_gateway(_: object, __: object, ___: object, on_trouble: Callable[[str], None]) -> Any:
        def find_runs(_: str) -> None:
            for text in ("no route", "no route", "refused"):
                on_trouble(text)
                shown.append(capsys.readouterr().err)
            raise StoppedError

        return SimpleNamespace(runs=find_runs, close=lambda: None)

    settings = Settings.model_validate({"SLURM_SUPERCOMPUTER_SITE": "musica", "SLURM_EDGE_NODE_HOST": "login"})
    monkeypatch.setattr(Project, "load_settings", lambda *_, **__: settings)
    monkeypatch.setattr(remote_runs, "make_gateway", make_gateway)
    monkeypatch.setattr(sys, "argv", ["scripts/job"])
    assert job.main(Project(ROOT)) == 3
    assert shown == ["no route; trying again\n", "", "refused; trying again\n"]
    assert "login has not answered everything within 90 s. Last error: refused\n" in capsys.readouterr().err


def test_jobs_are_compared_with_the_history_of_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever folder the command is started in: dagster.yaml names the history by a relative path."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    for folder in (project, elsewhere):
        folder.mkdir()
    shutil.copy(ROOT / "dagster.yaml", project)
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("DAGSTER_HOME", "")  # the command sets it in this process
    monkeypatch.delenv("DAGSTER_HOME")
    monkeypatch.setattr(job, "left_jobs", lambda instance, _: instance.get_run_records())
    no_runs: Any = None
    job.show_left(Project(project), no_runs)
    assert (project / ".dagster" / "history").is_dir()
    assert not [*elsewhere.iterdir()]


def runs_of(*jobs: tuple[str, str, str, list[str]]) -> Runs:
    """Each with its key, its job, the run that submitted it, and its followers; the latest one last."""
    rows: list[dict[str, Any]] = [
        {"run": f"/runs/{key}", "job": number, "at": at, "end": None, "array": False, "followers": followers,
         "about": {"run": run, "root": run, "asset": "a", "partitions": ""}}
        for at, (key, number, run, followers) in enumerate(jobs)
    ]  # fmt: skip
    gateway: Any = SimpleNamespace(runs=lambda _: rows)
    return Runs(gateway, Settings())


def test_the_run_that_has_adopted_a_job_names_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    """The UI shows the id of the retry, and the run that it retries may have been deleted."""
    runs = runs_of(("a-1", "17", "f0f0f0f0", ["f0f0f0f0", "cafe0000"]), ("b-1", "18", "beef0000", []))
    for name in ("f0f0f0", "cafe00"):
        assert [run.key for run in runs.find(name)] == ["a-1"]
    no_arrays: Any = SimpleNamespace(task_counts=lambda _: {})
    job.show_table(runs.all(), no_arrays, now=False)
    assert [line.split()[-3] for line in capsys.readouterr().out.splitlines()[1:]] == ["cafe0000", "beef0000"]


def test_a_job_id_is_not_the_beginning_of_a_run_id() -> None:
    """Or `scripts/job 123456 cancel` would cancel the jobs of that run, too."""
    runs = runs_of(("a-1", "123456", "f0f0f0f0", []), ("b-1", "123457", "12345678", []))
    assert [run.key for run in runs.find("123456")] == ["a-1"]
    assert [run.key for run in runs.find("1234567")] == ["b-1"]


def test_a_job_id_that_slurm_has_used_again_names_the_latest_run(tmp_path: Path) -> None:
    """A controller that has lost its state begins with the first id; all other names of the older run still work.

    Even if the directory of the older run has changed since.
    """
    for at, (key, run_id) in enumerate([("b-1", "f0f0f0f0"), ("a-1", "beef0000")], 1):
        about = {"run": run_id, "root": run_id, "asset": "a", "partitions": ""}
        run_directories.lay_out(str(tmp_path / key), {"about.json": json.dumps(about)})  # type: ignore[no-untyped-call]
        (tmp_path / key / "job").symlink_to("17")
        os.utime(tmp_path / key / "about.json", (at, at))
        os.utime(tmp_path / key / "events", (5 - at, 5 - at))
    gateway: Any = SimpleNamespace(runs=lambda _: run_directories.runs(None, {"runs": str(tmp_path)}, None)["found"])  # type: ignore[no-untyped-call]
    runs = Runs(gateway, Settings())
    assert [run.key for run in runs.all()] == ["a-1", "b-1"]
    assert job.one(runs.find("17"), "17").key == "a-1"
    assert [run.key for name in ("b-1", "f0f0f0") for run in runs.find(name)] == ["b-1", "b-1"]


@pytest.mark.parametrize(
    ("err", "shown"), [(b"", "Nothing was written to stdout and stderr.\n"), (b"slow\n", "slow\n")]
)
def test_logs_say_that_they_are_empty(
    err: bytes, shown: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in job.STREAMS:
        monkeypatch.setitem(job.STREAMS, name, getattr(sys, name))

    def fetch(_: object, path: str, local: Path) -> None:
        local.write_bytes({"/run/stdout": b"", "/run/stderr": err}[path])

    monkeypatch.setattr(job, "fetch_file", fetch)
    runs: Any = SimpleNamespace(gateway=None)
    job.show_logs(runs, {"stdout": "/run/stdout", "stderr": "/run/stderr"})
    assert tuple(capfd.readouterr()) == ("", shown)
