"""What bash makes of the batch script of an array job: folders, contexts and records of its tasks."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from dagster_pipes import encode_param

from dagster_sbatch.launchers import CommandLauncher
from dagster_sbatch.slurm import SlurmRequest
from dagster_sbatch.slurm.gateway.agent import run_directories
from resources import PROJECT
from support.array_run import files_of
from support.programs import make

SITE = PROJECT.load_site("musica")
SHOW = 'cat context.json; echo "$DAGSTER_PIPES_CONTEXT $DAGSTER_PIPES_MESSAGES"; exit 3'


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The run directory of an array job with 20 tasks."""
    run_directories.lay_out(str(tmp_path / "KEY-1"), files_of(SITE, "KEY-1", SHOW, 20))
    return tmp_path / "KEY-1"


def start(run: Path, index: int, job: int = 100, **variables: str) -> int:
    """Run a task as Slurm would; return its exit code."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(run), "SLURM_JOB_ID": str(job + index + 1), **variables}
    environment |= {"SLURM_ARRAY_JOB_ID": str(job), "SLURM_ARRAY_TASK_ID": str(index)}
    with (run / f"tasks/{index}.stdout").open("ab") as stdout, (run / f"tasks/{index}.stderr").open("ab") as stderr:
        return subprocess.run(
            ["bash", "job.sh"], cwd=run, env=environment, stdout=stdout, stderr=stderr, timeout=60, check=False
        ).returncode


def listed(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "tasks").iterdir() if not path.name.isdigit())


@pytest.mark.parametrize("index", [0, 7, 19])
def test_a_task_has_its_own_context_and_its_own_record(run: Path, index: int) -> None:
    assert listed(run) == []
    assert start(run, index) == 3
    assert (run / "job").readlink() == Path("100")
    shown = f'{{"common": 1, "task": {index}}}\ncontext{index} messages{index}\n'
    assert (run / f"tasks/{index}.stdout").read_text() == shown
    assert (run / f"tasks/{index}.stderr").read_text() == ""
    assert listed(run) == [f"{index}.started", f"{index}.stderr", f"{index}.stdout"]
    task = run / f"tasks/{index}"
    assert json.loads((task / "context.json").read_text()) == {"common": 1, "task": index}
    started, ended = map(json.loads, (task / "events").read_text().splitlines())
    assert "started" in started
    sizes = {"messages.jsonl": len((task / "messages.jsonl").read_bytes()), "stdout": len(shown), "stderr": 0}
    assert (ended["code"], ended["began"], ended["sizes"]) == (3, started["time"], sizes)
    assert (task / "cause").read_text() == ""


@pytest.mark.parametrize("options", ["errexit", "noclobber", "xtrace"])
def test_what_a_login_profile_sets_for_a_person_does_not_matter(options: str, run: Path, tmp_path: Path) -> None:
    """Where `cd` looks first, another `cd`, and options, which come with SHELLOPTS as well as from a login shell."""
    profile = {"SHELLOPTS": options, "BASH_FUNC_cd%%": '() {  builtin cd "$@" && ls\n}'}
    elsewhere = tmp_path / "elsewhere/tasks/7"
    elsewhere.mkdir(parents=True)
    (run / "tasks/7/context.json").write_text("of a former start")
    assert start(run, 7, 100, CDPATH=str(elsewhere.parents[1]), **profile) == 3
    assert list(elsewhere.iterdir()) == []
    shown = '{"common": 1, "task": 7}\ncontext7 messages7\n'
    assert (run / "tasks/7.stdout").read_text() == shown
    assert (run / "tasks/7.stderr").read_text() in ("", "+ set +euxC\n")
    assert json.loads((run / "tasks/7/events").read_text().splitlines()[-1])["code"] == 3


def test_a_task_may_remove_its_own_output(tmp_path: Path) -> None:
    command = "rm ../7.stdout; echo more >&2"
    run_directories.lay_out(str(tmp_path / "KEY-1"), files_of(SITE, "KEY-1", command, 20))
    assert start(tmp_path / "KEY-1", 7) == 0
    task = tmp_path / "KEY-1/tasks/7"
    sizes = {"messages.jsonl": len((task / "messages.jsonl").read_bytes()), "stderr": 5}
    assert json.loads((task / "events").read_text().splitlines()[-1])["sizes"] == sizes


def test_the_tasks_of_a_second_array_job_end_at_once(run: Path) -> None:
    assert start(run, 1) == 3
    before = (run / "tasks/1/events").read_text()
    assert (start(run, 1, job=500), start(run, 2, job=500)) == (0, 0)
    assert (run / "tasks/1/events").read_text() == before
    assert not (run / "tasks/2.started").exists()


@pytest.mark.parametrize("job", [100, 500])
def test_the_agent_may_have_recorded_the_job_before_its_first_task_starts(run: Path, job: int) -> None:
    (run / "job").symlink_to("100")
    assert start(run, 1, job) == (3 if job == 100 else 0)
    assert (run / "tasks/1.started").exists() == (job == 100)
    assert (run / "job").readlink() == Path("100")


def test_a_task_that_cannot_compare_its_job_with_the_recorded_one_fails(run: Path) -> None:
    """The disk is full, say: the task must not end as if another job had its work."""
    (run / "job").symlink_to("100")
    (run / "100").symlink_to("missing/folder")
    assert start(run, 1) == 1
    assert "100" in (run / "tasks/1.stderr").read_text()


def test_a_task_that_starts_again_keeps_its_folder(run: Path) -> None:
    """Its mark may be missing: it was killed before its folder was complete, or the file system fails for a moment."""
    for _ in range(2):
        assert start(run, 4) == 3
    (run / "tasks/4.started").unlink()
    assert start(run, 4) == 3
    records = [json.loads(line) for line in (run / "tasks/4/events").read_text().splitlines()]
    assert ["started" in record for record in records] == 3 * [True, False]


@pytest.mark.parametrize("mark", ["tasks/4/failed", "end"])
def test_a_task_that_starts_again_when_no_step_follows_it_ends_at_once(run: Path, mark: str) -> None:
    """Slurm, or an administrator, has requeued it: the step has submitted another task for it, or all are over."""
    assert start(run, 4) == 3
    before = (run / "tasks/4/events").read_text()
    (run / mark).touch()
    assert start(run, 4) == 0
    assert (run / "tasks/4/events").read_text() == before


def test_an_array_job_that_appears_after_its_cancellation_does_nothing(run: Path) -> None:
    """Slurm has accepted it though sbatch reported an error. The run stays one that has no job."""
    (run / "cancelled").touch()
    assert start(run, 4) == 0
    assert (listed(run), (run / "job").is_symlink()) == (["4.stderr", "4.stdout"], False)


def test_a_task_that_cannot_make_its_folder_fails(run: Path) -> None:
    """It ends with an error on its stderr, not as if it had succeeded."""
    (run / "tasks/6").rmdir()
    (run / "tasks/6").write_text("in the way")
    assert start(run, 6) == 1
    assert "tasks/6" in (run / "tasks/6.stderr").read_text()
    assert not (run / "tasks/6.started").exists()


@pytest.mark.parametrize("name", ["tasks.jsonl", "tasks.pipes"])
def test_a_task_whose_context_was_removed_fails(name: str, run: Path) -> None:
    """The site has removed old files while it waited: it says which, and does not begin with an empty context."""
    (run / name).unlink()
    assert start(run, 6) == 1
    assert f"{name}: No such file" in (run / "tasks/6.stderr").read_text()
    assert (run / "tasks/6.stdout").read_text() == ""


def test_a_program_of_any_language_runs_as_a_task(tmp_path: Path) -> None:
    """The launcher's files lie in the run directory, above the task's folder; `pipes` writes the task's messages."""
    run, launcher, request = tmp_path / "KEY-1", CommandLauncher(), SlurmRequest()
    program = make(tmp_path, '#!/bin/sh\npipes log "of task $(basename "${PWD%/work}") $1"\n')
    body = f"PYTHON={shlex.quote(sys.executable)}\n{launcher.render(request, [str(program), 'a b'])}"
    files = {**files_of(SITE, "KEY-1", body, 2), **launcher.files(request)}
    context: dict[str, object] = {"asset_keys": [], "extras": {}, "run_id": "r", "job_name": "j", "retry_number": 0}
    files["context.head"] = json.dumps(context)[:-1]
    paths = (encode_param({"path": f"{run}/tasks/1/{name}"}) for name in ("context.json", "messages.jsonl"))
    files["tasks.pipes"] = "none none\n" + " ".join(paths) + "\n"
    run_directories.lay_out(str(run), files)
    assert start(run, 1) == 0, (run / "tasks/1.stderr").read_text()
    messages = [json.loads(line) for line in (run / "tasks/1/messages.jsonl").read_text().splitlines() if line]
    assert [each["method"] for each in messages] == ["job_started", "opened", "closed", "exit_code_decides", "log"]
    assert messages[-1]["params"]["message"] == "of task 1 a b"
