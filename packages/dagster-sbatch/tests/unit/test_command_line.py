"""What the commands share."""

import sys
from typing import Any

import pytest

from dagster_sbatch import Project
from dagster_sbatch.commands import doctor
from dagster_sbatch.commands.command_line import print_table
from support import ROOT

HEADINGS = ("job", "state", "asset", "Dagster run", "last change")
ROWS = [("12345678", "PENDING (Resources)", "a[b] [/c] :bug: " + "d" * 90, "3f2a9c1d", "11-28 03:00:00")]


def test_a_table_shows_what_it_is_given_on_one_line_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    """By default, Rich reads [b] as bold, [/c] as an error and :bug: as a picture."""
    print_table(HEADINGS, ROWS, folded=("state", "asset"))
    assert capsys.readouterr().out.splitlines()[1].split() == " ".join(ROWS[0]).split()


def test_a_narrow_terminal_cuts_nothing_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "30")
    print_table(HEADINGS, ROWS, folded=("state", "asset"))
    shown = capsys.readouterr().out
    for word in ("12345678", "PENDING", "3f2a9c1d", "11-28 03:00:00"):
        assert word in shown


def test_an_interrupted_doctor_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def examine(*_: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", examine)
    monkeypatch.setattr(sys, "argv", ["scripts/doctor"])
    monkeypatch.setenv("DAGSTER_HOME", str(ROOT))
    definitions: Any = None
    assert doctor.main(Project(ROOT), definitions) == 130
