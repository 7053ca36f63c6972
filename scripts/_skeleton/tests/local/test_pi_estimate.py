"""The asset to begin with, materialised."""

import math
from pathlib import Path

import dagster as dg
import pytest

from musica_pipelines.assets.estimates import POINTS, pi_estimate
from resources import build_resources

pytestmark = pytest.mark.local


def test_pi_is_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    result = dg.materialize([pi_estimate], resources=build_resources())
    (event,) = result.asset_materializations_for_node("pi_estimate")
    assert event.metadata["points"].value == POINTS
    assert event.metadata["pi"].value == pytest.approx(math.pi, abs=0.02)
    (check,) = result.get_asset_check_evaluations()
    assert check.passed
