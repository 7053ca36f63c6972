"""What a person sees: the real UI in a headless Chromium.

With UPDATE_SCREENSHOTS=1 the pictures of the README are taken anew; look at them before you commit.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from musica_pipelines.assets.flight_delays import TRIALS
from support.browser import open_ui, take
from support.dagster_dev import DagsterDev

pytestmark = pytest.mark.local

ASSETS = ("flights", "delay_features", "delay_sweep", "delay_model", "delay_forest")


@pytest.fixture(scope="module")
def page(dagster_dev: DagsterDev, whole_example: str) -> Iterator[Page]:
    with open_ui(dagster_dev.url) as page:
        yield page


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
