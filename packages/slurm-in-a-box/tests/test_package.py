"""The package as its users have it: the wheel, the README's example, and what the plugin does where no site can run."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slurm_in_a_box import RequirementsError, SimulatedSite, command_line, requirements

PACKAGE = Path(__file__).parents[1]
(EXAMPLE,) = re.findall(r"^```python\n(.*?)^```", (PACKAGE / "README.md").read_text(encoding="utf-8"), re.M | re.S)
NO_ROOT = "import os\nos.geteuid = lambda: 1000\n"


def run(*arguments: str, folder: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run this interpreter in a folder outside of the repository."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Somebody's project: the README's test, and nothing else."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "test_answer.py").write_text(EXAMPLE, encoding="utf-8")
    return folder


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with the wheel installed."""
    built = run("-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist"), folder=PACKAGE)
    assert built.returncode == 0, built.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    options = ["--no-deps", "--no-index", "--disable-pip-version-check", "--root-user-action=ignore"]
    target = tmp_path / "installed"
    done = run("-m", "pip", "install", *options, "--target", str(target), str(wheel), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.cluster
def test_the_readmes_test_passes_with_the_wheel_while_another_run_of_tests_has_its_site(
    slurm_site: SimulatedSite, project: Path, installed: Path
) -> None:
    job = slurm_site.submit("exec sleep 1000", "--partition=zen4_0768", "--qos=zen4_0768")
    slurm_site.wait_for_job(job, "RUNNING")
    variables = {"PYTHONPATH": str(installed), "CI": "true"}
    where = run("-c", "import slurm_in_a_box; print(slurm_in_a_box.__file__)", folder=project, **variables)
    assert where.stdout.startswith(str(installed))
    done = run("-m", "pytest", "test_answer.py", folder=project, **variables)
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert slurm_site.job_state(job) == "RUNNING"
    assert all(slurm_site.status().values())


def test_every_command_of_the_documentation_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[argparse.Namespace] = []

    def note(options: argparse.Namespace) -> int:
        called.append(options)
        return 0

    monkeypatch.setattr(requirements, "check_system", lambda: None)
    for name in ("up", "down", "status", "login", "env", "fault"):
        monkeypatch.setattr(command_line, f"_{name}", note)
    pages = [PACKAGE / "README.md", PACKAGE / "docs" / "simulated-site.md"]
    blocks = [block for page in pages for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.M | re.S)]
    commands = re.findall(rf"{command_line.PROGRAM} ([^#>)\n]*)", "".join(blocks))
    assert [command_line.main(command.split()) for command in commands] == [0] * len(commands)
    assert len(called) == len(commands) > 7


@pytest.mark.parametrize(("ci", "outcome"), [("", "1 skipped"), ("true", "1 error")])
def test_where_no_site_can_run_a_test_is_skipped_with_the_reason_and_fails_in_ci(
    ci: str, outcome: str, project: Path
) -> None:
    (project / "conftest.py").write_text(NO_ROOT, encoding="utf-8")
    done = run("-m", "pytest", "-rs", "test_answer.py", folder=project, CI=ci)
    assert outcome in done.stdout
    assert "the simulated site needs root" in done.stdout


def test_a_root_without_the_path_of_root_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As after `su`, which keeps the PATH of the user before."""
    (tmp_path / "unshare").symlink_to("/bin/true")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RequirementsError, match="programs that PATH lacks: add /usr/sbin"):
        requirements.check_system()
