"""The command line of `scripts/preview`."""

import sys

import dagster as dg
import pytest

from dagster_sbatch import Project
from dagster_sbatch.commands import preview
from support import ROOT


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        *[(f"--config-json={text}", f"{text!r} is not a JSON object") for text in ("trials=3", "3", "[]")],
        *[
            (f"--partition-range={text}", f"{text!r} is not a range")
            for text in ("2013-01", "2013-01..2013-02", "...2013-02", "2013-01...")
        ],
    ],
)
def test_wrong_usage(
    option: str, wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["scripts/preview", "anything", option])
    with pytest.raises(SystemExit) as ended:
        preview.main(Project(ROOT), dg.Definitions())
    assert ended.value.code == 2
    assert wrong in capsys.readouterr().err
