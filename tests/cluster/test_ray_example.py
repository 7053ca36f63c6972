"""The example's sweep on the GPU nodes, preempted in the middle."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dagster as dg
import pytest

from musica_pipelines.assets.flight_delays import TRIALS, delay_sweep
from resources import build_resources
from slurm_in_a_box import CERTIFICATE_USER, GPU_PARTITION, SimulatedSite, wait_until
from support.background import only_job

from flight_delays import evaluation, source, storage
from flight_delays.features import build_features

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("on_supercomputer")]
MONTH = "2013-02"
ROWS = 3000


def lay_out_features(folder: Path) -> None:
    """The same few flights for each month: enough for trials that take a second."""
    table = build_features(source.read_flights([MONTH])[MONTH]).sample(ROWS, random_state=1)
    for month in evaluation.TRAINING_MONTHS + evaluation.VALIDATION_MONTHS:
        storage.write_table(storage.features_file(month), table)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, CERTIFICATE_USER.uid, CERTIFICATE_USER.uid)


def test_a_preempted_sweep_goes_on_from_its_finished_trials(
    site: SimulatedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = site.layout.home / CERTIFICATE_USER.name / "dagster-slurm" / "data"
    data.mkdir(parents=True)
    os.chown(data.parent, CERTIFICATE_USER.uid, CERTIFICATE_USER.uid)
    monkeypatch.setenv("DATA_ROOT", str(data))
    lay_out_features(data)
    monkeypatch.delenv("DATA_ROOT")
    monkeypatch.setenv("SLURM_QOS", f"idle_{GPU_PARTITION}")

    def preempt() -> None:
        wait_until(lambda: list(data.glob("delay_sweep/unfinished-*/trial-*.json")), "the first trial", 300)
        with site.faults.preemption(only_job(site, "RUNNING")):
            pass

    with ThreadPoolExecutor() as pool:
        disturbance = pool.submit(preempt)
        result = dg.materialize([delay_sweep], resources=build_resources())
        disturbance.result()
    (event,) = result.asset_materializations_for_node("delay_sweep")
    metadata = {name: value.value for name, value in event.metadata.items()}
    trials = json.loads((data / "delay_sweep" / "trials.json").read_text())
    assert sorted(trial["trial"] for trial in trials) == list(range(1, TRIALS + 1))
    assert 1 <= int(str(metadata["trials_resumed"])) < TRIALS
    assert {trial["host"] for trial in trials} == {"g4001", "g4002"}
    assert "had a GPU, but XGBoost could not use CUDA on it" in str(metadata["device"])
    assert not list(data.glob("delay_sweep/unfinished-*"))
    assert metadata["qos"] == f"idle_{GPU_PARTITION}"
