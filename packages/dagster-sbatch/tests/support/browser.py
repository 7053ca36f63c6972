"""A headless Chromium for the tests that look at the UI."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from playwright.sync_api import FloatRect, Locator, Page, expect, sync_playwright
from playwright.sync_api import TimeoutError as PageTimeoutError

from support import ROOT

FLAGS = """
    --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync
    """.split()
PATIENCE = 60_000
"""Milliseconds for a page to show what it should."""
IMAGES = (ROOT / "docs" / "images", ROOT / "packages" / "dagster-sbatch" / "docs" / "images")


@contextmanager
def open_ui(url: str) -> Iterator[Page]:
    """Dagster's UI at that address, without its side bar. Skips where there is no Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 900}, base_url=url)
        page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        page.goto("/overview")
        page.get_by_text("Hide navigation").click()  # more room for what the tests look at
        yield page
        browser.close()


def visit(page: Page, path: str, text: str) -> None:
    """Open a page, and wait until it shows a text; open it anew if it does not.

    On a busy machine, Dagster's page may know an asset and not its code location: it calls it external, and stays so.
    """
    for _ in range(2):
        page.goto(path)
        with suppress(PageTimeoutError):
            page.get_by_text(text, exact=True).first.wait_for(timeout=PATIENCE / 2)
            return
    page.goto(path)
    expect(page.get_by_text(text, exact=True).first).to_be_visible()


def expect_partitions(page: Page, asset: str, selected: str, **numbers: int) -> None:
    """Open the partitions of an asset, with one selected, and wait until the page shows how many are in a state.

    Args:
        page: of the browser.
        asset: its name.
        selected: the key of the partition.
        numbers: of partitions by state, in lower case.
    """
    page.goto(f"/assets/{asset}?view=partitions&partition={selected}")
    for state, number in numbers.items():
        expect(page.get_by_text(f"{state.capitalize()} ({number})", exact=True)).to_be_visible()


def open_failure(page: Page, run_id: str) -> Locator:
    """Open the whole message of the failed step of a run."""
    page.goto(f"/runs/{run_id}?logs=type:STEP_FAILURE")
    page.get_by_text("View full message").click()
    return page.get_by_role("dialog")


def take(page: Page, name: str, folder: Path, clip: FloatRect | None = None) -> None:
    """A screenshot of a page that has come to rest; with UPDATE_SCREENSHOTS=1 it becomes the documentation's.

    Args:
        page: of the browser.
        name: of the picture.
        folder: where it is written otherwise.
        clip: the part of the page, in pixels; None: all that is visible.
    """
    with suppress(PageTimeoutError):  # on a busy machine the next question comes before the last answer
        page.wait_for_load_state("networkidle", timeout=10_000)
    documented = next(images for images in IMAGES if (images / name).exists())
    target = documented if os.environ.get("UPDATE_SCREENSHOTS") else folder
    page.screenshot(path=target / name, animations="disabled", clip=clip)
    assert 20_000 < (target / name).stat().st_size < 250_000
