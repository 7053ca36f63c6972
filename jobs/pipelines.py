"""Jobs over the assets."""

import dagster as dg

pipelines = (
    dg.define_asset_job(
        "flight_delays",
        selection=dg.AssetSelection.groups("flight_delays"),
        description="The whole example. A range of months is one run.",
    ),
)
