"""Jobs over the assets, and what the demo and the tests materialise."""

from typing import Any

import dagster as dg

pipelines: tuple[Any, ...] = ()
"""Your jobs, such as `dg.define_asset_job("nightly", selection="my_asset")`."""

DEMO = dg.AssetSelection.all()
"""What `scripts/demo` and `scripts/test` materialise; of a partitioned asset, the newest partition. If that takes too
long, select less: `dg.AssetSelection.assets("small_asset")`."""
