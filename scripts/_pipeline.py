"""Materialise the whole example in this process: the child of scripts/demo, which shows what this one logs.

In one run over all months, without a daemon. The history goes where `dagster dev` shows it.
"""

import dagster as dg

from musica_pipelines.assets.flight_delays import months
from musica_pipelines.definitions import defs


def main() -> int:
    """Exit code: 0 if every asset was materialised."""
    keys = months.get_partition_keys()
    tags = {"dagster/asset_partition_range_start": keys[0], "dagster/asset_partition_range_end": keys[-1]}
    with dg.DagsterInstance.get() as instance:
        job = defs.resolve_job_def("flight_delays")
        return 0 if job.execute_in_process(instance=instance, tags=tags, raise_on_error=False).success else 1


if __name__ == "__main__":
    raise SystemExit(main())
