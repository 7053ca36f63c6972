"""Jobs over the assets."""

import dagster as dg

estimates_job = dg.define_asset_job(
    "estimates", selection=dg.AssetSelection.groups("estimates"), description="All assets of the first file."
)
