"""What the code location offers, as the UI would show it."""

import dagster as dg

from musica_pipelines.definitions import defs

ASSETS = {"pi_estimate"}


def test_the_definitions_are_loadable() -> None:
    dg.Definitions.validate_loadable(defs)


def test_every_asset_says_whose_and_of_what_kind_it_is() -> None:
    specs = defs.resolve_all_asset_specs()
    assert {spec.key.to_user_string() for spec in specs} == ASSETS | {"musica_access"}
    for spec in specs:
        assert spec.description
        assert spec.owners
        assert spec.kinds


def test_the_job_covers_all_assets() -> None:
    job = defs.resolve_job_def("estimates")
    assert {key.to_user_string() for key in job.asset_layer.selected_asset_keys} == ASSETS
