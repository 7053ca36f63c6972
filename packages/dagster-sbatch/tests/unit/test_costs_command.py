"""What `scripts/costs` prints: sums, budgets, proposals, and what is not known. Slurm's answers are made up."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch import Project
from dagster_sbatch.commands import costs
from dagster_sbatch.commands.project_history import HISTORY
from dagster_sbatch.costs.proposal import Proposal
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import SlurmRequest
from dagster_sbatch.slurm.gateway import Share, Usage
from support import ROOT
from unit.test_ledger import JOB, KEY, USAGE

NAMED = replace(JOB, comment=f"key={KEY},asset=group/my_asset")
USED = "The last job of this size used at most 00:20:00 of 02:00:00."
SMALLER = Proposal(USED, SlurmRequest(), 'SlurmRequest(mem="2G")')
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(usage)` gives exit code and output of the command in a project in `tmp_path`, started from elsewhere."""
    (tmp_path / "project").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "project" / "dagster.yaml").write_text((ROOT / "dagster.yaml").read_text())
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("DAGSTER_HOME", "")  # the command sets it in this process
    monkeypatch.delenv("DAGSTER_HOME")
    settings = Settings.model_validate({"SLURM_SUPERCOMPUTER_SITE": "musica"})
    monkeypatch.setattr(Project, "load_settings", lambda *_, **__: settings)

    def make(usage: Usage, *options: str) -> tuple[int, str]:
        @contextmanager
        def open_runs(*_: object) -> Iterator[Any]:
            yield SimpleNamespace(gateway=SimpleNamespace(usage=lambda _: usage))

        monkeypatch.setattr(costs, "open_runs", open_runs)
        monkeypatch.setattr("sys.argv", ["scripts/costs", "--since", "2026-11-01", *options])
        code = costs.main(Project(tmp_path / "project"))
        said = capsys.readouterr()
        assert said.err == ""
        assert not (tmp_path / "elsewhere" / HISTORY).exists()
        return code, "\n".join(line.rstrip() for line in said.out.splitlines())

    return make


def test_sums_and_budgets_are_shown(run: Run) -> None:
    share = Share("p1", "", "gres/gpu", limit=6000, used=1800, running=60)
    code, said = run(replace(USAGE, jobs=[NAMED, JOB, replace(NAMED, name="shell", comment="")], shares=[share]))
    assert code == 0
    assert said == (
        "p1: 70 of 100 GPU-hours are left (GrpTRESMins of p1).\n"
        "  Running jobs use at most 1 more, waiting jobs 0.\n"
        "  The last 14 days used 1.71 per day: it lasts 40 days.\n"
        "\n"
        "asset           jobs  node-hours  GPU-hours\n"
        "(other)            1           2          8\n"
        "(unknown)          1           2          8\n"
        "group/my_asset     1           2          8\n"
        "all                3           6         24"
    )


def test_without_any_job(run: Run) -> None:
    assert run(replace(USAGE, jobs=[])) == (0, "No job of your projects has run since 2026-11-01.")


def test_a_number_that_slurm_does_not_know_is_left_out(run: Run) -> None:
    without = replace(NAMED, tres={"node": 2})
    assert run(replace(USAGE, jobs=[without], private=True), "--by", "project,user") == (
        0,
        "project  user  jobs  node-hours\n"
        "p1       xy       1           2\n"
        "all               1           2\n"
        "Slurm hides the jobs of other users from you: only your own jobs count.",
    )
    assert run(replace(USAGE, jobs=None, shares=None, trouble=["sacct: Connection refused"])) == (
        1,
        "not known: sacct: Connection refused",
    )


def test_the_proposals_of_the_last_runs_are_shown(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the assets in the table. The history is the project's, also if the command was started in another folder."""
    project = tmp_path / "project"
    with monkeypatch.context() as patch:
        patch.setenv("DAGSTER_HOME", str(project))
        patch.chdir(project)
        with dg.DagsterInstance.get() as instance:
            for name in ("group/my_asset", "other", "b"):
                key, text = dg.AssetKey.from_user_string(name), dg.MetadataValue.md(SMALLER.text)
                instance.report_runless_asset_event(dg.AssetMaterialization(key, metadata={"proposal": text}))
    code, said = run(replace(USAGE, jobs=[NAMED, replace(NAMED, comment=f"key={KEY},asset=a+b")]))
    assert code == 0
    assert "a, b               1           2          8" in said
    assert said.partition(" 16\n")[2] == (
        "\nRequests that would have been enough for the last runs; scripts/preview ASSET explains one:\n"
        f'\nb: {USED}\n  SlurmRequest(mem="2G")\n\n'
        f'group/my_asset: {USED}\n  SlurmRequest(mem="2G")'
    )


@pytest.mark.parametrize(
    ("option", "text"), [("--by=weeks", "'weeks' is unknown; valid are asset, week"), ("--since=x", "is not a day")]
)
def test_wrong_usage_is_named(
    option: str, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["scripts/costs", option])
    with pytest.raises(SystemExit) as ended:
        costs.main(Project(tmp_path))
    assert ended.value.code == 2
    assert text in capsys.readouterr().err
