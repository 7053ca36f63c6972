"""The example in a real `dagster dev`: what it stores and logs, and what a person sees in a headless Chromium.

With UPDATE_SCREENSHOTS=1 the pictures of the README are taken anew; look at them before you commit.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from musica_pipelines.assets.flight_delays import TRIALS
from support import ROOT
from support.browser import open_ui, take
from support.dagster_dev import DagsterDev

pytestmark = pytest.mark.local

ASSETS = ("flights", "delay_features", "delay_sweep", "delay_model", "delay_forest")


@pytest.fixture(scope="module")
def dagster_dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DagsterDev]:
    """`dagster dev` with the project's code location, an empty home, and DATA_ROOT alone set."""
    parent = tmp_path_factory.mktemp("dagster")
    folder, home = parent / "project", parent / "home"
    for path in (folder, home):
        path.mkdir()
    for name in ("dagster.yaml", "workspace.yaml"):
        shutil.copy(ROOT / name, folder)
    environment = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    server = DagsterDev(folder, {**environment, "HOME": str(home), "DATA_ROOT": str(parent / "data")})
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def whole_example(dagster_dev: DagsterDev) -> str:
    """Id of a run over all assets and all months."""
    months = {"dagster__asset_partition_range_start": "2013-01", "dagster__asset_partition_range_end": "2013-12"}
    run_id = dagster_dev.launch(*ASSETS, **months)
    assert dagster_dev.wait(run_id, 300) == "SUCCESS"
    return run_id


@pytest.fixture(scope="module")
def page(dagster_dev: DagsterDev, whole_example: str) -> Iterator[Page]:
    with open_ui(dagster_dev.url) as page:
        yield page


def test_nothing_is_complained_about_but_dagster_dev_itself(dagster_dev: DagsterDev, whole_example: str) -> None:
    text = dagster_dev.log.read_text()
    complaints = [line for line in text.splitlines() if "Warning" in line or "Traceback" in line]
    assert complaints
    for line in complaints:
        assert "SupersessionWarning: Function `dev_command` is superseded" in line
    assert "telemetry" not in text.lower()
    outputs = [
        path.read_text() for path in (dagster_dev.folder / ".dagster" / "compute_logs" / whole_example).rglob("*.err")
    ]
    assert outputs
    for output in outputs:
        assert "STEP_SUCCESS" in output
        assert not re.search(r"(Beta|Preview|Deprecation|Supersession)Warning|Traceback", output)


def test_every_month_of_a_run_over_all_has_its_own_numbers(dagster_dev: DagsterDev, whole_example: str) -> None:
    for asset in ("flights", "delay_features"):
        events = [event for event in dagster_dev.materializations(asset) if event["runId"] == whole_example]
        assert sorted(event["partition"] for event in events) == [f"2013-{month:02}" for month in range(1, 13)]
        rows = {event["partition"]: event["rows"] for event in events}
        assert len(set(rows.values())) == 12
        if asset == "flights":
            assert (rows["2013-01"], rows["2013-02"], rows["2013-12"]) == (27004, 24951, 28135)
            assert sum(rows.values()) == 336_776


def test_the_graph_shows_all_assets_materialised(page: Page, tmp_path: Path) -> None:
    page.goto("/locations/__repository__@musica_pipelines/asset-groups/flight_delays")
    for asset in ASSETS:
        expect(page.get_by_text(asset, exact=True).first).to_be_visible()
    expect(page.get_by_text("12 partitions", exact=True)).to_have_count(2)
    expect(page.get_by_text("Materialized", exact=True)).to_have_count(3)
    expect(page.get_by_text(re.compile(r"^(\d) / \1 Passed$"))).to_have_count(5)
    take(page, "asset-graph.png", tmp_path)


def test_a_materialised_asset_shows_numbers_checks_and_a_plot(page: Page, tmp_path: Path) -> None:
    page.goto("/assets/delay_model")
    expect(page.get_by_text("baseline_auc", exact=True)).to_be_visible()
    expect(page.get_by_text("flight-delays", exact=True).first).to_be_visible()
    expect(page.get_by_text(re.compile(r"^0\.6\d+$")).first).to_be_visible()
    page.locator("tr", has_text="model.ubj").evaluate("row => row.hidden = true")  # where this machine keeps its data
    take(page, "delay-model.png", tmp_path)
    page.get_by_text("Plots", exact=True).click()
    expect(page.locator("canvas").first).to_be_visible()


def test_a_picture_is_shown(page: Page) -> None:
    page.goto("/assets/delay_model")
    page.get_by_text("[Show Markdown]").first.click(timeout=60_000)
    picture = page.locator("img[alt=calibration]")
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.naturalWidth") > 300


def test_all_ranks_trained_one_forest(page: Page) -> None:
    page.goto("/assets/delay_forest")
    for name, value in (("ranks", 4), ("trees", 160), ("rows", 273355)):
        expect(page.get_by_role("row", name=re.compile(rf"^{name} .* {value}$"))).to_be_visible()


def test_the_table_of_trials_is_shown(page: Page) -> None:
    page.goto("/assets/delay_sweep")
    trials = page.locator("table", has_text="max_depth").last
    expect(trials.locator("tr")).to_have_count(1 + TRIALS)
    for heading in ("trial", "auc", "max_depth", "device"):
        expect(trials.get_by_text(heading, exact=True)).to_be_visible()


def test_the_columns_are_described(page: Page) -> None:
    page.goto("/assets/delay_features")
    expect(page.get_by_text("minutes after midnight, local time, as scheduled")).to_be_visible()


def test_checks_passed(page: Page) -> None:
    page.goto("/assets/delay_model?view=checks")
    expect(page.get_by_text("better_than_baseline").first).to_be_visible()
    expect(page.get_by_text("Passed", exact=True)).to_be_visible()
    expect(page.get_by_text("late rate by hour of departure in the training months")).to_be_visible()


def test_two_months_at_once(dagster_dev: DagsterDev) -> None:
    runs = {month: dagster_dev.launch("flights", dagster__partition=month) for month in ("2013-03", "2013-04")}
    for month, rows in {"2013-03": 28834, "2013-04": 28330}.items():
        assert dagster_dev.wait(runs[month]) == "SUCCESS"
        newest = dagster_dev.materializations("flights", month)[0]
        assert (newest["runId"], newest["rows"]) == (runs[month], rows)
