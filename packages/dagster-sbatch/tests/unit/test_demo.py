"""The table and the progress of the demo. The template's tests run the demo itself."""

import sys
from pathlib import Path
from types import SimpleNamespace

import dagster as dg
import pytest
from rich.progress import Progress

from dagster_sbatch.commands.demo import EVENT, WIDTH, _show, materialise, numbers


def test_only_numbers_are_in_the_table() -> None:
    assert numbers("a", [{"rows": 3, "share": 0.5, "done": True, "unit": "mm"}, {"rows": 4}]) == {
        "result": "rows 3, share 0.5"
    }


def test_a_job_without_assets_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = dg.define_asset_job("estimates", selection=dg.AssetSelection.groups("estimates"))
    monkeypatch.setitem(sys.modules, "project", SimpleNamespace(defs=dg.Definitions(jobs=[job])))
    assert materialise("project", "estimates", "here", tmp_path) == 1
    assert "The job estimates selects no asset. Select your own" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("message", "shown"),
    [("12 rows", "12 rows" + " " * 33), ("x" * WIDTH, "x" * WIDTH), ("x" * 41, "x" * 39 + "…")],
)
def test_a_long_message_is_cut_and_ends_with_dots(message: str, shown: str) -> None:
    line = f"2013-11-22 10:00:00 +0000 - dagster - INFO - job - {'0' * 36} - 12 - asset - {message}\n"
    progress = Progress()
    _show(progress, {"asset": progress.add_task("")}, EVENT.search(line))
    assert progress.tasks[0].description == shown
