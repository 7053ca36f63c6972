"""Metadata that calls of `compute.run` in several threads of a step add to its materializations."""

import sys
from concurrent.futures import ThreadPoolExecutor

import dagster as dg

from dagster_sbatch.run.results import add_metadata

KEYS = [f"{number:03}" for number in range(300)]


def test_threads_lose_no_metadata_of_each_other() -> None:
    @dg.asset(partitions_def=dg.StaticPartitionsDefinition(KEYS), backfill_policy=dg.BackfillPolicy.single_run())
    def probe(context: dg.AssetExecutionContext) -> None:
        def add(key: str) -> None:
            add_metadata(context.op_execution_context, context.asset_key, key, {"own": key})

        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(add, KEYS))
        finally:
            sys.setswitchinterval(before)

    tags = {"dagster/asset_partition_range_start": KEYS[0], "dagster/asset_partition_range_end": KEYS[-1]}
    result = dg.materialize([probe], tags=tags)
    found = {event.partition: event.materialization.metadata for event in result.get_asset_materialization_events()}
    assert [key for key in KEYS if "own" not in found[key]] == []
