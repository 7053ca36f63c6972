"""The command line of `scripts/preview`."""

import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch import ComputeResource, Project, ScriptLauncher, SlurmRequest, project
from dagster_sbatch.commands import preview
from dagster_sbatch.setting_files import load_settings
from resources import PROJECT, build_resources
from support import ROOT, access


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


@pytest.mark.parametrize("deployment", ["", "development", "production_supercomputer"])
def test_a_trial_uses_the_settings_of_the_supercomputer_in_every_deployment(
    deployment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**access.environment("http://127.0.0.1:1", tmp_path), "DAGSTER_DEPLOYMENT": deployment}.items():
        monkeypatch.setenv(name, value)
    seen: list[str] = []
    runs = SimpleNamespace(gateway=SimpleNamespace(projects=lambda: None))
    monkeypatch.setattr(preview, "open_runs", lambda *_: nullcontext(runs))
    monkeypatch.setattr(preview, "open_history", lambda _: nullcontext())

    def preview_asset(*_: Any, **__: Any) -> list[Any]:
        seen.append(os.environ["DAGSTER_DEPLOYMENT"])
        return []

    monkeypatch.setattr(preview, "preview_asset", preview_asset)
    for options in (["--test-only"], []):
        monkeypatch.setattr(sys, "argv", ["scripts/preview", "sweep", *options])
        assert preview.main(PROJECT, dg.Definitions()) == 0
    assert seen == 2 * ["production_supercomputer" if "production" in deployment else "staging_supercomputer"]
    assert os.environ["DAGSTER_DEPLOYMENT"] == deployment


FILE = """\
DAGSTER_DEPLOYMENT=production_supercomputer
SLURM_SUPERCOMPUTER_SITE=musica
SLURM_EDGE_NODE_HOST=musica.example
SLURM_EDGE_NODE_USER=xy12345
SLURM_EDGE_NODE_KEY_PATH=~/.ssh/id_musica
SLURM_DEPLOYMENT_BASE_PATH=$DATA/here
SLURM_QOS=idle_zen4_0768
"""


@pytest.mark.parametrize(
    ("file", "code", "shown"),
    [
        (FILE, 0, ("--qos=idle_zen4_0768_h100x4", "$DATA/here/runs/")),
        (None, 0, ("<SLURM_DEPLOYMENT_BASE_PATH>/runs/",)),  # there is no account yet
        (FILE.replace("SLURM_DEPLOYMENT", "# "), 1, ("more variables", "SLURM_DEPLOYMENT_BASE_PATH=")),
    ],
    ids=["a file", "none", "half a file"],
)
def test_the_settings_are_those_of_the_supercomputer(
    file: str | None,
    code: int,
    shown: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """DAGSTER_DEPLOYMENT is not set, as in a shell of somebody who has filled in the file."""
    (tmp_path / "envs").mkdir()
    if file:
        (tmp_path / "envs" / ".env.musica").write_text(file)
    workload = tmp_path / "train.py"
    workload.touch()

    @dg.asset
    def train(context: dg.AssetExecutionContext, compute: ComputeResource) -> None:
        compute.run(context, workload=workload, launcher=ScriptLauncher(), request=SlurmRequest(gpus_per_node=1))

    monkeypatch.setattr(project, "load_settings", load_settings)
    monkeypatch.setattr(sys, "argv", ["scripts/preview", "train"])
    resources = {"compute": ComputeResource.of(Project(tmp_path))}
    assert preview.main(Project(tmp_path), dg.Definitions(assets=[train], resources=resources)) == code
    said = "".join(capsys.readouterr())
    assert [text for text in shown if text not in said] == []
