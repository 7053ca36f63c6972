"""The command `pipes`: what it refuses, and with which words. tests/local/test_programs.py has what it reports."""

import argparse
import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from dagster_pipes import DAGSTER_PIPES_CONTEXT_ENV_VAR, DAGSTER_PIPES_MESSAGES_ENV_VAR, encode_param

from dagster_sbatch.launchers.command.job import pipes_command
from slurm_in_a_box import wait_until
from support.programs import PICTURE

CONTEXT = {"asset_keys": ["a", "b"], "run_id": "r", "job_name": "j", "retry_number": 0}
EXTRAS = {"n": {"x": 1}, "partition_keys": [str(number) for number in range(12)]}
CHECKS = {"a": ["fine", "other"], "b": ["fine"]}


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The variables of a job of two assets."""
    (tmp_path / "context.json").write_text(json.dumps({**CONTEXT, "extras": EXTRAS}))
    (tmp_path / pipes_command.CHECKS).write_text(json.dumps(CHECKS))
    (tmp_path / "messages.jsonl").write_text('\n{"method": "job_started"}\n')
    return {
        DAGSTER_PIPES_CONTEXT_ENV_VAR: encode_param({"path": str(tmp_path / "context.json")}),
        DAGSTER_PIPES_MESSAGES_ENV_VAR: encode_param({"path": str(tmp_path / "messages.jsonl")}),
    }


def pipes(folder: Path, variables: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-I", str(pipes_command.__file__), *arguments],
        cwd=folder,
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_outside_a_job_it_says_so(tmp_path: Path) -> None:
    done = pipes(tmp_path, {}, "materialize", "--metadata", "rows=1")
    assert done.returncode == 1
    assert "was not started by Dagster" in done.stderr
    assert "CommandLauncher" in done.stderr


def test_after_the_job_it_says_so(tmp_path: Path, job: dict[str, str]) -> None:
    (tmp_path / "context.json").unlink()
    done = pipes(tmp_path, job, "log", "a")
    assert done.returncode == 1
    assert done.stderr == (
        f"pipes: {tmp_path}/context.json does not exist. The run has ended or was cancelled, so nothing is reported. "
        "Let the program wait for all processes that report.\n"
    )


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("n=12", 12),
        ("n=-1.5e3", -1500.0),
        ("n=true", True),
        ("n=0", 0),
        ("n=0.5", 0.5),
        ("n=007", "007"),
        ("n=-01.5", "-01.5"),
        ("n=nan", "nan"),
        ("n=1e999", "1e999"),
        ("n=a=b @c", "a=b @c"),
        ("n=", ""),
        (f"n={'1' * 5000}", "1" * 5000),
        ("n:text=12", {"type": "text", "raw_value": "12"}),
        ("n:float=12", {"type": "float", "raw_value": 12}),
        ("n:path=@/d", {"type": "path", "raw_value": "@/d"}),
        ('n:json={"a": [1]}', {"type": "json", "raw_value": {"a": [1]}}),
        ("n=@n.md", {"type": "md", "raw_value": "# T\n"}),
        ("n=@n.json", {"type": "json", "raw_value": [1]}),
    ],
)
def test_metadata_gets_its_type(argument: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "n.md").write_text("# T\n")
    (tmp_path / "n.json").write_text("[1]")
    found = pipes_command.read_metadata(argument)
    assert found == ("n", value)
    assert type(found[1]) is type(value)


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("rows", "'rows' is not of the form NAME=VALUE"),
        ("=3", "is not of the form"),
        ("n:int=1.5", "1.5 is not of type int"),
        ("n:float=NaN", "NaN is not of type float"),
        ("n:bool=yes", "yes is not of type bool"),
        ("n:number=1", "there is no type 'number'. Use one of text, md"),
        ("x" * 5000, f"'{'x' * 200}' is not of the form"),
        (f"n={'ä' * 50_001}", "the value of n has 100002 bytes, and metadata may have 100000. Make it smaller"),
        ("n=@deep.json", "deep.json is not a JSON object or list"),
        ("n=@none.png", "none.png cannot be read from "),
        ("n=@data.csv", "data.csv: of files, only .gif"),
        ("n=@bad.json", "bad.json is not a JSON object or list"),
        ("n=@large.png", "large.png has 100001 bytes, and metadata may have 100000"),
    ],
)
def test_metadata_that_cannot_be_reported(
    argument: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.csv").write_text("1")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "deep.json").write_text("[" * 90_000)
    (tmp_path / "large.png").write_bytes(PICTURE + bytes(100_001 - len(PICTURE)))
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        pipes_command.read_metadata(argument)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["materialize"], "targets multiple assets"),
        (["materialize", "--asset", "c"], "Expected one of `['a', 'b']`, got `c`"),
        (["materialize", "--partition", "1"], "The assets of this step are a, b. Name one of them: --asset KEY"),
        (["materialize", "--partition", "1", "--asset", "c"], "The assets of this step are a, b. Name one"),
        (
            ["materialize", "--partition", "z", "--asset", "a"],
            "This run has no partition 'z'. It has 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more.",
        ),
        (
            ["check", "nope", "--passed", "--asset", "a"],
            "a does not declare the check 'nope'. The checks of this step are: fine of a, other of a, fine of b. "
            "Correct the name, or declare the check: check_specs=[AssetCheckSpec('nope', asset=...)]",
        ),
        (["check", "other", "--passed", "--asset", "b"], "b does not declare the check 'other'."),
        (["check", "nope", "--passed"], "This step does not declare the check 'nope'."),
        (["extra", "m"], "Extra `m` is undefined"),
    ],
)
def test_what_dagster_refuses_fails_at_once(
    arguments: list[str], text: str, tmp_path: Path, job: dict[str, str]
) -> None:
    before = (tmp_path / "messages.jsonl").read_text()
    done = pipes(tmp_path, job, *arguments)
    assert done.returncode == 1
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "messages.jsonl").read_text() == before


def test_the_task_of_an_array_finds_the_checks_of_its_step(tmp_path: Path, job: dict[str, str]) -> None:
    task = tmp_path / "tasks" / "17"
    task.mkdir(parents=True)
    (tmp_path / "context.json").rename(task / "context.json")
    job[DAGSTER_PIPES_CONTEXT_ENV_VAR] = encode_param({"path": str(task / "context.json")})
    refused = pipes(tmp_path, job, "check", "nope", "--passed", "--asset", "a")
    assert (refused.returncode, "fine of a, other of a" in refused.stderr) == (1, True)
    assert pipes(tmp_path, job, "check", "fine", "--passed", "--asset", "a").returncode == 0


def test_a_run_without_partitions_says_so(tmp_path: Path, job: dict[str, str]) -> None:
    (tmp_path / "context.json").write_text(json.dumps({**CONTEXT, "asset_keys": ["a"], "extras": {}}))
    refused = pipes(tmp_path, job, "materialize", "--partition", "z")
    assert (refused.returncode, refused.stderr) == (1, "pipes: This run has no partitions. Leave out --partition.\n")


def test_a_second_report_counts_again_after_a_new_start_of_the_job(tmp_path: Path, job: dict[str, str]) -> None:
    report = ("materialize", "--asset", "a")
    assert pipes(tmp_path, job, *report).returncode == 0
    refused = pipes(tmp_path, job, *report)
    assert (refused.returncode, "The asset a has been reported already" in refused.stderr) == (1, True)
    assert pipes(tmp_path, job, "materialize", "--asset", "b").returncode == 0
    with (tmp_path / "messages.jsonl").open("a") as file:
        file.write('half a li\n{"method": "job_started"}\n')
    assert pipes(tmp_path, job, *report).returncode == 0


@pytest.mark.parametrize("rubbish", ["7", "[1]", '"text"', "{", "null"])
def test_a_line_that_is_no_message_does_not_stop_a_report(rubbish: str, tmp_path: Path, job: dict[str, str]) -> None:
    """The step says what is wrong with it."""
    with (tmp_path / "messages.jsonl").open("a") as messages:
        messages.write(f"{rubbish}\n")
    done = pipes(tmp_path, job, "materialize", "--asset", "a")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_second_result_of_a_check_is_refused(tmp_path: Path, job: dict[str, str]) -> None:
    result = ("check", "fine", "--passed", "--asset", "a")
    assert pipes(tmp_path, job, *result).returncode == 0
    refused = pipes(tmp_path, job, *result)
    assert (refused.returncode, "The check fine of a has been reported already" in refused.stderr) == (1, True)
    assert pipes(tmp_path, job, "check", "other", "--passed", "--asset", "a").returncode == 0
    assert pipes(tmp_path, job, "check", "fine", "--passed", "--asset", "b").returncode == 0


def test_wrong_arguments_report_nothing(tmp_path: Path, job: dict[str, str]) -> None:
    before = (tmp_path / "messages.jsonl").read_text()
    done = pipes(tmp_path, job, "materialize", "--metadata", "rows=1", "--metadata", "plot=@none.png")
    assert (done.returncode, "none.png cannot be read" in done.stderr) == (2, True)
    assert (tmp_path / "messages.jsonl").read_text() == before


def test_an_extra_is_printed(tmp_path: Path, job: dict[str, str]) -> None:
    assert pipes(tmp_path, job, "extra", "n").stdout == '{"x": 1}\n'


def test_it_waits_while_another_process_writes_its_message(tmp_path: Path, job: dict[str, str]) -> None:
    path = tmp_path / "messages.jsonl"
    with path.open("ab", buffering=0) as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        file.write(b'{"method": ')
        command = [sys.executable, "-I", pipes_command.__file__, "log", "mine"]
        with subprocess.Popen(command, env={"PATH": os.environ["PATH"], **job}) as process:
            waiting = re.compile(rf"-> POSIX .* {process.pid} ")
            blocked = lambda: waiting.search(Path("/proc/locks").read_text()) or process.poll() is not None  # noqa: E731
            wait_until(blocked, "it waits for the lock", 60)
            file.write(b'"theirs"}\n')
            fcntl.lockf(file, fcntl.LOCK_UN)
    lines = [json.loads(line)["method"] for line in path.read_text().splitlines() if line]
    assert lines == ["job_started", "theirs", "log"]


def test_of_several_reports_at_once_one_is_accepted(tmp_path: Path, job: dict[str, str]) -> None:
    path, count = tmp_path / "messages.jsonl", 4
    with path.open("a") as file:  # reading them takes a while
        file.write('{"method": "log", "params": {"message": "a line"}}\n' * 50_000)
    command = [sys.executable, "-I", pipes_command.__file__, "materialize", "--asset", "a"]
    with path.open("ab") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        processes = [
            subprocess.Popen(command, env={"PATH": os.environ["PATH"], **job}, stderr=subprocess.PIPE)
            for _ in range(count)
        ]
        waiting = re.compile(rf"-> POSIX .* ({'|'.join(str(each.pid) for each in processes)}) ")
        wait_until(lambda: len(waiting.findall(Path("/proc/locks").read_text())) == count, "all wait for the lock", 60)
    refused = [process.communicate()[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0] + [1] * (count - 1)
    assert sum(b"The asset a has been reported already" in text for text in refused) == count - 1


def test_a_message_that_the_disk_cannot_hold_leaves_nothing(tmp_path: Path, job: dict[str, str]) -> None:
    path = tmp_path / "messages.jsonl"
    before = path.read_bytes()
    command = ["bash", "-c", 'ulimit -f 1; exec "$@"', "-", sys.executable, "-I", "-B", pipes_command.__file__]
    done = subprocess.run(
        [*command, "log", "x" * 5000], env={"PATH": os.environ["PATH"], **job}, capture_output=True, check=False
    )
    assert (done.returncode, b"File too large" in done.stderr) == (1, True)
    assert path.read_bytes() == before
