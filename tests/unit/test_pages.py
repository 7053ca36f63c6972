"""Every command in the documentation is run by a test or says what it needs; every message that it quotes is one."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import dagster as dg
import pytest

from dagster_sbatch.settings import Settings
from support import ENGINE, ROOT

SCRIPTS = sorted(path for path in (ROOT / "scripts").iterdir() if not path.name.startswith("_") and path.is_file())
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("packages/dagster-sbatch/docs/*.md")),
    ROOT / "packages/dagster-sbatch/README.md",
]
VARIABLES = {str(field.validation_alias) for field in Settings.model_fields.values()}
AS_THEY_STAND = "tests/cluster/test_commands.py"
"""Runs what the pages say, literally."""
RUN_BY = {
    "git clone": AS_THEY_STAND,
    "cp envs/.env.musica.example": AS_THEY_STAND,
    "pipes ": "packages/dagster-sbatch/tests/local/test_programs.py",
    "read -rs": AS_THEY_STAND,
    "unset": AS_THEY_STAND,
    "scripts/costs": AS_THEY_STAND,
    "scripts/costs --": "packages/dagster-sbatch/tests/cluster/test_costs.py",
    "scripts/demo": ".ci/run",
    "scripts/deploy_environment.py": AS_THEY_STAND,
    "scripts/dev": AS_THEY_STAND,
    "scripts/doctor": AS_THEY_STAND,
    "SLURM_SUPERCOMPUTER_SITE=borealis scripts/doctor": "tests/cluster/test_another_site.py",
    "scripts/job": AS_THEY_STAND,
    "scripts/job 1184": "packages/dagster-sbatch/tests/cluster/test_job_arrays.py",
    "scripts/job 1184 ": "packages/dagster-sbatch/tests/cluster/test_upkeep.py",
    "scripts/job 3f2a9c1d": "packages/dagster-sbatch/tests/cluster/test_upkeep.py",
    "scripts/lock": AS_THEY_STAND,
    "scripts/new_project": "packages/dagster-sbatch/tests/support/new_project.py",
    "scripts/preview": AS_THEY_STAND,
    "scripts/refresh_step_auth.py": AS_THEY_STAND,
    "scripts/test": ".ci/run",
    "scripts/test --version": AS_THEY_STAND,
    ".venv/bin/dagster instance concurrency": "tests/unit/test_pages.py",
}
"""Beginnings of commands, and what runs them: the longest counts."""
PASSING_ON = ("scripts/dev", "scripts/sim", "scripts/test")
"""Their options are those of another program."""


def commands(page: Path) -> list[str]:
    """The lines of its blocks for a shell, without comments; not those that say what they need."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    kept = [line for line in lines if not re.search(r"# needs \w", line)]
    return [stripped for line in kept if (stripped := re.sub(r"(^|\s+)#.*", "", line).strip())]


def assignments(command: str) -> tuple[list[str], str]:
    """The names of the variables that a command begins with, and what comes after them."""
    begin = re.match(r"((?:[A-Z_]+=\S*\s*)*)(.*)", command)
    assert begin
    return re.findall(r"([A-Z_]+)=", begin[1]), begin[2]


def runner_of(command: str) -> str:
    """Who runs it, with whatever variables set before it."""
    _, rest = assignments(command)
    known = [beginning for beginning in RUN_BY if command.startswith(beginning) or rest.startswith(beginning)]
    return RUN_BY[max(known, key=len)] if known else ""


@cache
def help_of(script: str) -> str:
    """What a script says of itself in a folder of its own, where it leaves nothing."""
    with TemporaryDirectory() as folder:
        command = [str(ROOT / script), "--help"]
        environment = os.environ | {"PYTHONSAFEPATH": "1"}  # a script imports what lies beside it all the same
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        assert not any(Path(folder).iterdir())
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_explains_itself_from_any_folder(script: Path) -> None:
    assert os.access(script, os.X_OK)
    said = help_of(f"scripts/{script.name}")
    assert f"usage: scripts/{script.name}" in said
    assert "exit codes" in said.lower()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_command_is_run_by_a_test_or_says_what_it_needs(page: Path) -> None:
    for command in commands(page):
        names, rest = assignments(command)
        assert set(names) <= VARIABLES | {"DAGSTER_HOME"}, command
        if rest:
            assert runner_of(command), f"{page.name}: who runs this? {command}"
            check_options(rest)
        for name in re.findall(r"(?:read -rs|export|unset) ([A-Z_]+)", rest):
            assert name in VARIABLES, command


def check_options(command: str) -> None:
    """Options of our scripts exist."""
    script, *words = command.split()
    if script.startswith("scripts/") and script not in PASSING_ON:
        for option in (word for word in words if word.startswith("--")):
            assert option in help_of(script), f"{command}: {script} has no {option}"


def test_a_command_that_nobody_runs_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```bash\nscripts/doctor\nrm -rf ~  # a comment\nsystemctl status  # needs systemd\n```\n")
    with pytest.raises(AssertionError, match="who runs this"):
        test_every_command_is_run_by_a_test_or_says_what_it_needs(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_no_command_hides_in_a_block_of_another_kind(page: Path) -> None:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for kind, block in blocks if kind != "bash" for line in block.splitlines()]
    assert [
        line for line in lines if re.match(r"(sudo |\$ )?(scripts/[\w.]+ --|scripts/sim \w+|git |pixi|ssh |scp )", line)
    ] == []


@pytest.mark.parametrize("beginning", [each for each, runner in RUN_BY.items() if runner != AS_THEY_STAND])
def test_who_is_said_to_run_a_command_names_it(beginning: str) -> None:
    script = beginning.removeprefix("sudo ").split()[0]
    wanted = {
        ".venv/bin/dagster instance concurrency": "instance concurrency set gpu 4",
    }
    shown = wanted.get(beginning, beginning.removeprefix("sudo "))
    text = (ROOT / RUN_BY[beginning]).read_text()
    assert shown in text or f'"scripts" / "{script.removeprefix("scripts/")}"' in text


def test_a_pools_limit_can_be_set_like_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dagster.yaml").write_text((ROOT / "dagster.yaml").read_text())
    command = [str(Path(sys.executable).with_name("dagster")), *"instance concurrency set gpu 4".split()]
    environment = {"PATH": "/usr/bin:/bin", "DAGSTER_HOME": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "gpu" in done.stdout
    monkeypatch.chdir(tmp_path)  # where the history lies
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        (limit,) = instance.event_log_storage.get_pool_limits()
    assert (limit.name, limit.limit) == ("gpu", 4)


def test_every_message_that_the_troubleshooting_page_quotes_is_one() -> None:
    sources = [*ENGINE.rglob("*.py"), *(ROOT / "jobs").rglob("*.py")]
    sources += [path for path in (ROOT / "scripts").iterdir() if path.is_file()]
    trees = [ast.parse(path.read_text()) for path in sources]
    texts = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    written = [text for text in texts if isinstance(text, str)] + [path.read_text() for path in ENGINE.rglob("*.sh")]
    said = " ".join("\n".join(written).split())
    sections = (ROOT / "packages" / "dagster-sbatch" / "docs" / "troubleshooting.md").read_text().split("\n## ")[1:]
    rows = [
        row for each in sections if not each.startswith("The UI") for row in re.findall(r"^\| (`.*?) \|", each, re.M)
    ]
    messages = [message for row in rows for message in re.findall(r"`(.*?)`", row)]
    quoted = [fragment.strip() for message in messages for fragment in message.split("...") if fragment.strip()]
    assert [fragment for fragment in quoted if fragment not in said] == []
    assert len(quoted) > 50
