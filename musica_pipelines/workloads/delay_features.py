"""Join the weather and the planes to the flights, and encode what a model may know before departure."""

import time

import pandas as pd
from dagster_pipes import open_dagster_pipes

from flight_delays import reporting, storage
from flight_delays.features import FEATURES, LABEL, LATE_MINUTES, build_features


def main() -> None:
    with open_dagster_pipes() as pipes:
        arrived = written = nulls = 0
        for month in reporting.partition_keys(pipes):
            begun = time.monotonic()
            path = storage.flights_file(month)
            if not path.exists():
                raise SystemExit(f"{path} does not exist: materialise the partition {month} of flights first")
            flights = pd.read_parquet(path)
            table = build_features(flights)
            target = storage.features_file(month)
            storage.write_table(target, table)
            arrived += int(flights["arr_delay"].notna().sum())
            written += storage.count_rows(target)
            nulls += int(table.isna().sum().sum())
            pipes.log.info(f"{month}: {len(table)} rows, {table[LABEL].mean():.1%} late -> {storage.name(target)}")
            numbers = {
                "rows": len(table),
                "late_share": round(float(table[LABEL].mean()), 4),
                "seconds": round(time.monotonic() - begun, 3),
            }
            reporting.report_partition(pipes, month, numbers)
        pipes.report_asset_check(
            "one_row_an_arrival", passed=written == arrived, metadata={"arrivals": arrived, "written": written}
        )
        pipes.report_asset_check("no_nulls", passed=nulls == 0, metadata={"nulls": nulls})
        schema = {name: ("float32", meaning) for name, meaning in FEATURES.items()}
        schema[LABEL] = ("int8", f"1: arrived {LATE_MINUTES} minutes late or more")
        pipes.report_asset_materialization(metadata={"dagster/column_schema": reporting.column_schema(schema)})


if __name__ == "__main__":
    main()
