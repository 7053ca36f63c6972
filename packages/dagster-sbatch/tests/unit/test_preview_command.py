"""The command line of `scripts/preview`."""

import signal
import sys
import time
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch import ComputeResource, Project
from dagster_sbatch.commands import preview
from resources import build_resources
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


def test_ctrl_c_is_no_fault_of_the_asset(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    @dg.asset
    def slow(compute: ComputeResource) -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(sys, "argv", ["scripts/preview", "slow"])
    monkeypatch.setenv("DAGSTER_HOME", str(ROOT))
    assert preview.main(Project(ROOT), dg.Definitions(assets=[slow], resources=build_resources())) == 130
    assert tuple(capsys.readouterr()) == ("", "")


def test_the_summary_cuts_no_path_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = f"/data/{'folder/' * 20}job.sh"
    shown: Any = SimpleNamespace(summary={"files": path}, plan=SimpleNamespace(notes=()))
    for columns in ("40", "80"):
        monkeypatch.setenv("COLUMNS", columns)
        preview.show(shown)
        assert path in "".join(capsys.readouterr().out.removeprefix("─" * int(columns)).split())
