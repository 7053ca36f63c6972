"""The table and the progress of the demo. The template's tests run the demo itself."""

import sys
from pathlib import Path
from types import SimpleNamespace

import dagster as dg
import pytest
from rich.console import Console
from rich.progress import Progress

from dagster_sbatch.commands.demo import (
    EVENT,
    WIDTH,
    Run,
    _follow,
    _show,
    execute,
    materialise,
    numbers,
    run_of_job,
    runs_of_each,
)


def test_only_numbers_are_in_the_table() -> None:
    assert numbers("a", [{"rows": 3, "share": 0.5, "done": True, "unit": "mm"}, {"rows": 4}]) == {
        "result": "rows 3, share 0.5"
    }


@dg.asset(group_name="one")
def plain() -> None: ...


@dg.asset(group_name="one", deps=[plain], partitions_def=dg.StaticPartitionsDefinition(["a", "b"]))
def by_letter(context: dg.AssetExecutionContext) -> None:
    context.add_output_metadata({"key": context.partition_key})


@dg.asset(deps=[plain], partitions_def=dg.DailyPartitionsDefinition("2026-11-01", end_date="2026-11-04"))
def by_day() -> None: ...


@dg.asset(partitions_def=dg.DynamicPartitionsDefinition(name="stations"))
def by_station() -> None: ...


@dg.asset_check(asset=by_day)
def complete() -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=True)


@dg.multi_asset(outs={"late": dg.AssetOut(), "early": dg.AssetOut()})
def both() -> tuple[int, int]:
    return 1, 2


DEFS = dg.Definitions(
    assets=[by_day, by_letter, plain, by_station, both, dg.AssetSpec("seen")],
    asset_checks=[complete],
    jobs=[
        dg.define_asset_job("none", selection=dg.AssetSelection.groups("estimates")),
        dg.define_asset_job("letters", selection=dg.AssetSelection.groups("one")),
    ],
)


def test_each_asset_has_a_run_with_its_newest_partition() -> None:
    """Those that have no partition yet have none, nor those that the project only observes."""
    runs = runs_of_each(DEFS, dg.AssetSelection.all())
    day, letter = Run(["by_day"], "2026-11-03", "2026-11-03"), Run(["by_letter"], "b", "b")
    assert sorted(runs) == [day, letter, Run(["early", "late"]), Run(["plain"])]
    assert runs.index(Run(["plain"])) < min(runs.index(day), runs.index(letter))
    with dg.DagsterInstance.ephemeral() as instance:
        done = list(execute(DEFS, runs, instance))
    assert sum(len(each.get_asset_materialization_events()) for each in done) == 5
    assert sum(len(each.get_asset_check_evaluations()) for each in done) == 1


def test_a_selection_of_assets_leaves_the_others_out() -> None:
    assert runs_of_each(DEFS, dg.AssetSelection.assets("plain")) == [Run(["plain"])]


def test_a_job_is_one_run_over_all_partitions() -> None:
    (run,) = run_of_job(DEFS, "letters")
    assert (sorted(run.assets), run.first, run.last) == (["by_letter", "plain"], "a", "b")


def test_a_job_without_assets_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "project", SimpleNamespace(defs=DEFS))
    assert materialise("project", "none", "here", tmp_path) == 1
    assert "No asset is selected. Select at least one" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("message", "shown"),
    [("12 rows", "12 rows" + " " * 33), ("x" * WIDTH, "x" * WIDTH), ("x" * 41, "x" * 39 + "…")],
)
def test_a_long_message_is_cut_and_ends_with_dots(message: str, shown: str) -> None:
    line = f"2013-11-22 10:00:00 +0000 - dagster - INFO - job - {'0' * 36} - 12 - asset - {message}\n"
    progress = Progress()
    _show(progress, {"asset": progress.add_task("")}, EVENT.search(line))
    assert progress.tasks[0].description == shown


@pytest.mark.parametrize("code", [0, 1])
def test_an_asset_whose_end_is_not_in_the_log_has_a_time_if_the_run_succeeds(tmp_path: Path, code: int) -> None:
    """Dagster shows the output of a step by `tail`, and ends that with the step: the last lines may be lost."""
    line = f"2013-11-22 10:00:00 +0000 - dagster - DEBUG - job - {'0' * 36} - 12 - asset - STEP_START - Started."
    child = [sys.executable, "-c", f"print({line!r}, flush=True); raise SystemExit({code})"]
    ended, seconds = _follow(Console(), child, {}, tmp_path / "log", {"asset": dg.AssetKey("asset")})
    assert ended == code
    assert (seconds[dg.AssetKey("asset")] > 0) == (code == 0)
