"""A supercomputer whose locale is not UTF-8: paths and output are, as on every other machine."""

import subprocess
from pathlib import Path

import pytest

from dagster_sbatch import children
from support.agent_fixtures import HURRIED, Prepare
from support.played_slurm import PlayedSlurm
from support.workload_asset import PIPES, materialize

LOCALE = "de_AT.ISO-8859-1"
PRINTS = f"{PIPES}    print('fertig ✓')\n    pipes.report_asset_materialization(metadata={{'rows': 7}})\n"


def test_paths_and_output_are_utf_8_whatever_the_locale_is(
    prepare: Prepare,
    played_slurm: PlayedSlurm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    made = subprocess.run(["localedef", "-c", "-f", "ISO-8859-1", "-i", "de_AT", tmp_path / LOCALE], check=False)
    if made.returncode or not (tmp_path / LOCALE).exists():
        pytest.skip("the sources of locales are not installed (package locales on Debian)")
    monkeypatch.setattr(children, "_ALWAYS", children._ALWAYS | {"LOCPATH"})
    base = played_slurm.runs.parent / "Größe '€'"
    variables = {"LOCPATH": tmp_path, "LC_ALL": LOCALE, "SLURM_DEPLOYMENT_BASE_PATH": base}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    prepare(HURRIED)
    outcome = materialize(PRINTS, tmp_path)
    assert (outcome.error, outcome.materializations[None][0]["rows"]) == ("", 7)
    assert capfd.readouterr().out.endswith("fertig ✓\n")
