"""The assets that DEMO in jobs/pipelines.py selects, materialised on this machine."""

from collections.abc import Callable

import pytest

pytestmark = pytest.mark.local


def test_the_assets_are_materialised_on_this_machine(materialise_demo: Callable[[], set[str]]) -> None:
    assert materialise_demo()
