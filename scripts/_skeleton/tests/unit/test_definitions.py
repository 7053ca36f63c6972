"""What the code location offers, as the UI shows it."""

import dagster as dg
from musica_pipelines.definitions import defs


def test_the_definitions_are_loadable() -> None:
    dg.Definitions.validate_loadable(defs)


def test_assets_are_found() -> None:
    found = {spec.key.to_user_string() for spec in defs.resolve_all_asset_specs()}
    assert {"pi_estimate", "musica_access"} <= found


def test_the_job_runs_the_assets_of_its_group() -> None:
    keys = defs.resolve_job_def("estimates").asset_layer.selected_asset_keys
    assert dg.AssetKey("pi_estimate") in keys
