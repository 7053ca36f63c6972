"""A machine whose locale is not UTF-8: paths, files and output are, as on every other machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dagster_sbatch import children
from dagster_sbatch.launchers import SrunLauncher
from dagster_sbatch.slurm import SlurmRequest
from support.agent_fixtures import HURRIED, Prepare
from support.played_slurm import PlayedSlurm
from support.workload_asset import PIPES, materialize

LOCALE = "de_AT.ISO-8859-1"
PRINTS = f"{PIPES}    print('fertig ✓')\n    pipes.report_asset_materialization(metadata={{'rows': 7}})\n"


@pytest.fixture
def locale(tmp_path: Path) -> dict[str, str]:
    """Variables that choose it."""
    made = subprocess.run(["localedef", "-c", "-f", "ISO-8859-1", "-i", "de_AT", tmp_path / LOCALE], check=False)
    if made.returncode or not (tmp_path / LOCALE).exists():
        pytest.skip("the sources of locales are not installed (package locales on Debian)")
    return {"LOCPATH": str(tmp_path), "LC_ALL": LOCALE}


def test_paths_and_output_are_utf_8_on_the_supercomputer(
    prepare: Prepare,
    played_slurm: PlayedSlurm,
    locale: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(children, "_ALWAYS", children._ALWAYS | {"LOCPATH"})
    base = played_slurm.runs.parent / "Größe '€'"
    for name, value in {**locale, "SLURM_DEPLOYMENT_BASE_PATH": str(base)}.items():
        monkeypatch.setenv(name, value)
    prepare(HURRIED)
    outcome = materialize(PRINTS, tmp_path)
    assert (outcome.error, outcome.materializations[None][0]["rows"]) == ("", 7)
    assert capfd.readouterr().out.endswith("fertig ✓\n")


def test_the_cause_of_a_failed_rank_is_utf_8(locale: dict[str, str], tmp_path: Path) -> None:
    """The program that starts the ranks reads none of Python's variables, so PYTHONUTF8 does not count."""
    program = r"import os; os.write(2, 'St\u00f6rung \u2717\n'.encode()); raise SystemExit(75)"
    command = SrunLauncher().local_command(SlurmRequest(), ["-c", program])
    environment, folder = {**os.environ, **locale}, tmp_path / "work"
    folder.mkdir()
    done = subprocess.run(command, cwd=folder, env=environment, start_new_session=True, timeout=60, check=False)
    assert done.returncode == os.EX_TEMPFAIL
    assert (tmp_path / "cause").read_text().endswith("\nStörung ✗")


def test_commands_write_utf_8(locale: dict[str, str], tmp_path: Path) -> None:
    """To the terminal, and into files: a project, and what a container reads."""
    code = """
import sys
from pathlib import Path
from dagster_sbatch.commands.command_line import entry_point
from dagster_sbatch.text_file import write_text
@entry_point()
def main():
    write_text(Path("file"), "fertig \\u2713")
    print(sys.flags.utf8_mode, "fertig \\u2713")
    return 0
main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=locale, capture_output=True, check=False)
    assert (done.stdout.decode(), done.stderr) == ("0 fertig ✓\n", b"")
    assert (tmp_path / "file").read_bytes().decode() == "fertig ✓"
