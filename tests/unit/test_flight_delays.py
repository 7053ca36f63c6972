"""The example's own calculations."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from delay_sweep import Trials, sample_parameters
from support import ROOT

from flight_delays import evaluation, source, storage
from flight_delays.features import FEATURES, LABEL, build_features


@pytest.fixture(scope="module")
def january() -> pd.DataFrame:
    return source.read_flights(["2013-01"])["2013-01"]


def test_the_features_do_not_depend_on_what_happened(january: pd.DataFrame) -> None:
    """Change everything that is known only after the scheduled departure: the features stay, the label does not."""
    other = january.copy()
    outcome = ["dep_time", "dep_delay", "arr_time", "arr_delay", "air_time"]
    arrived = other["arr_delay"].notna()
    other.loc[arrived, outcome] = other.loc[arrived, outcome] + 60
    before, after = build_features(january), build_features(other)
    pd.testing.assert_frame_equal(before[list(FEATURES)], after[list(FEATURES)])
    assert (before[LABEL] != after[LABEL]).any()


def test_the_weather_is_at_least_an_hour_old(january: pd.DataFrame) -> None:
    table = build_features(january)
    arrived = january[january["arr_delay"].notna()].reset_index(drop=True)
    row = int(arrived.index[(arrived["origin"] == "JFK") & (arrived["day"] == 10) & (arrived["hour"] == 12)][0])
    weather = source.read_weather()
    hour = arrived["time_hour"][row] - pd.Timedelta(hours=1)
    observed = weather[(weather["origin"] == "JFK") & (weather["time_hour"] == hour)].iloc[0]
    assert table["temp"][row] == pytest.approx(observed["temp"])
    assert table["visib"][row] == pytest.approx(observed["visib"])


def test_features_have_no_nulls_and_codes_are_the_same_every_month(january: pd.DataFrame) -> None:
    december = source.read_flights(["2013-12"])["2013-12"]
    for flights in (january, december):
        table = build_features(flights)
        assert not table.isna().any().any()
        assert len(table) == flights["arr_delay"].notna().sum()
    codes = [build_features(flights[flights["carrier"] == "UA"])["carrier"].unique() for flights in (january, december)]
    assert codes[0] == codes[1]


def test_the_count_of_the_source_is_independent_of_the_tables(january: pd.DataFrame) -> None:
    assert source.count_flights(["2013-01"]) == {"2013-01": 27004}
    assert len(january) == 27004


@pytest.mark.parametrize("month", ["2014-01", "2013-13", "January", ""])
def test_a_month_that_is_not_in_the_data(month: str) -> None:
    with pytest.raises(SystemExit, match="2013-01 to 2013-12"):
        source.read_flights([month])


def test_missing_features_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("DATA_ROOT", str(tmp_path_factory.mktemp("data")))
    with pytest.raises(SystemExit, match=r"2013-01, 2013-02 .* materialise"):
        storage.read_features(["2013-01", "2013-02"])


@pytest.mark.parametrize(
    ("score", "wanted"),
    [([0.1, 0.2, 0.8, 0.9], 1.0), ([0.9, 0.8, 0.2, 0.1], 0.0), ([0.5, 0.5, 0.5, 0.5], 0.5), ([0, 1, 0, 1], 0.5)],
)
def test_auc(score: list[int], wanted: float) -> None:
    assert evaluation.auc(pd.Series([0, 0, 1, 1]), np.array(score)) == wanted


def test_it_runs_without_dagster(january: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/testing.md says; it writes where its asset does."""
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    table = build_features(january).sample(200, random_state=1)
    for month in evaluation.TRAINING_MONTHS + evaluation.VALIDATION_MONTHS + evaluation.HELD_OUT_MONTHS:
        storage.write_table(storage.features_file(month), table)
    storage.trials_file().parent.mkdir()
    storage.trials_file().write_text(json.dumps([{**sample_parameters(1)[0], "rounds": 2}]))
    program = ROOT / "musica_pipelines" / "workloads" / "delay_model.py"
    subprocess.run([sys.executable, program], check=True)
    assert storage.model_file("delay_model").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"delay_features", "delay_model", "delay_sweep"}


def test_no_month_is_used_twice() -> None:
    months = evaluation.TRAINING_MONTHS + evaluation.VALIDATION_MONTHS + evaluation.HELD_OUT_MONTHS
    assert len(set(months)) == len(months) == 12


def test_a_sweep_can_be_repeated() -> None:
    assert sample_parameters(5) == sample_parameters(5)
    assert sample_parameters(9)[:5] == sample_parameters(5)


def test_a_sweep_goes_on_from_the_trials_that_were_finished_with_the_same_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    for month in evaluation.TRAINING_MONTHS + evaluation.VALIDATION_MONTHS:
        storage.features_file(month).parent.mkdir(exist_ok=True)
        storage.features_file(month).write_text(month)
    drawn = sample_parameters(3)
    for number, auc in ((2, 0.6), (3, 0.7)):
        Trials(drawn).add({"trial": number, "auc": auc, **drawn[number - 1]})
    again = Trials(drawn)
    assert again.resumed == 2
    assert [result["trial"] for result in again.ranked] == [3, 2]
    assert Trials(sample_parameters(4)).resumed == 0
    storage.features_file("2013-01").write_text("other data")
    assert Trials(drawn).resumed == 0
    again.remove()
    assert not list(tmp_path.glob("delay_sweep/*"))
