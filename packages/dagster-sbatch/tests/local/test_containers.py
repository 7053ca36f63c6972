"""Containers in `development`: used where this machine has the command and the image."""

import os
import sys
from pathlib import Path

import pytest

from dagster_sbatch.launchers import (
    BatchScriptLauncher,
    CommandLauncher,
    Container,
    RayLauncher,
    ScriptLauncher,
    SrunLauncher,
)
from dagster_sbatch.slurm import SlurmRequest
from support.containers import SIF, put_apptainer
from support.programs import make
from support.workload_asset import PIPES, materialize

pytestmark = pytest.mark.local
LOOK = (
    PIPES
    + "    import os\n    image, data = os.getenv('APPTAINER_CONTAINER', ''), os.environ['DATA_ROOT']\n"
    + "    pipes.report_asset_materialization(metadata={'image': image, 'data': data})\n"
)
IMAGE = Container("image.sif", python=sys.executable)


@pytest.fixture(autouse=True)
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """DATA_ROOT with an image, on a machine without apptainer."""
    path = tmp_path / "data"
    path.mkdir()
    (path / "image.sif").write_bytes(SIF)
    monkeypatch.setenv("DATA_ROOT", str(path))
    return path


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the machine's apptainer got at last."""
    folder = put_apptainer(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder / "arguments"


def test_each_launcher_uses_the_image_of_this_machine(arguments: Path, data_root: Path, tmp_path: Path) -> None:
    image = str(data_root / "image.sif")
    script = materialize(LOOK, tmp_path, launcher=ScriptLauncher(container=IMAGE))
    assert script.error == ""
    (metadata,) = script.materializations[None]
    assert (metadata["image"], metadata["data"]) == (image, str(data_root))
    words = arguments.read_text().split("\n")
    assert [words[0], words[words.index("env") - 1]] == ["exec", image]
    assert {f"--bind={data_root}", f"--bind={tmp_path}"} <= set(words)
    ranks = materialize(LOOK, tmp_path, launcher=SrunLauncher(container=IMAGE), request=SlurmRequest(ntasks_per_node=2))
    assert (ranks.error, ranks.materializations[None][0]["image"]) == ("", image)
    program = make(tmp_path, '#!/bin/sh\npipes materialize --metadata image="$APPTAINER_CONTAINER"\n')
    for launcher in (CommandLauncher(container=IMAGE), BatchScriptLauncher(container=IMAGE)):
        command = materialize(program, tmp_path, launcher=launcher)
        assert (command.error, command.materializations[None][0]["image"]) == ("", image)
    ray = materialize(LOOK, tmp_path, launcher=RayLauncher(container=IMAGE))
    assert (ray.error, ray.materializations[None][0]["image"]) == ("", image)


def test_without_apptainer_or_the_image_it_runs_without_a_container_and_says_so_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    outcome = materialize(LOOK, tmp_path, launcher=ScriptLauncher(container=IMAGE))
    assert (outcome.error, outcome.materializations[None][0]["image"]) == ("", "")
    said = "This machine has no apptainer. The workload runs without its container here."
    assert capfd.readouterr().err.count(said) == 1


@pytest.mark.usefixtures("arguments")
def test_an_image_that_this_machine_lacks_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    outcome = materialize(LOOK, tmp_path, launcher=ScriptLauncher(container=Container("$SCRATCH/image.sif")))
    assert outcome.error == ""
    assert "This machine has no container image $SCRATCH/image.sif. The workload runs" in capfd.readouterr().err


@pytest.mark.usefixtures("arguments")
def test_a_file_that_is_no_image_fails_the_step(data_root: Path, tmp_path: Path) -> None:
    (data_root / "image.sif").write_text("text\n")
    outcome = materialize(LOOK, tmp_path, launcher=ScriptLauncher(container=IMAGE))
    assert f"probe: {data_root}/image.sif on " in outcome.error
    assert "is not a container image" in outcome.error
