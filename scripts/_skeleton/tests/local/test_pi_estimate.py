"""The first asset, materialised on this machine."""

import math

import dagster as dg
import pytest
from dagster_sbatch import ComputeResource, Project
from musica_pipelines.assets.estimates import POINTS, pi_estimate

pytestmark = pytest.mark.local


def test_pi_is_estimated(project: Project) -> None:
    result = dg.materialize([pi_estimate], resources={"compute": ComputeResource.of(project)})
    (event,) = result.asset_materializations_for_node("pi_estimate")
    assert event.metadata["points"].value == POINTS
    assert event.metadata["pi"].value == pytest.approx(math.pi, abs=0.02)
    (check,) = result.get_asset_check_evaluations()
    assert check.passed
