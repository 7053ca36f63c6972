"""Join the weather and the planes to the flights of one month, and encode what a model may know before departure."""

import time

import pandas as pd
from dagster_pipes import open_dagster_pipes

from flight_delays import reporting, storage
from flight_delays.features import FEATURES, LABEL, LATE_MINUTES, build_features


def main() -> None:
    with open_dagster_pipes() as pipes:
        begun, month = time.monotonic(), pipes.partition_key
        path, target = storage.flights_file(month), storage.features_file(month)
        if not path.exists():
            raise SystemExit(f"{path} does not exist: materialise the partition {month} of flights first")
        flights = pd.read_parquet(path)
        table = build_features(flights)
        storage.write_table(target, table)
        arrived, written = int(flights["arr_delay"].notna().sum()), storage.count_rows(target)
        nulls, late = int(table.isna().sum().sum()), float(table[LABEL].mean())
        pipes.log.info(f"{written} rows, {late:.1%} late -> {storage.name(target)}")
        pipes.report_asset_check(
            "one_row_per_arrival", passed=written == arrived, metadata={"arrivals": arrived, "written": written}
        )
        pipes.report_asset_check("no_nulls", passed=nulls == 0, metadata={"nulls": nulls})
        schema = {name: ("float32", meaning) for name, meaning in FEATURES.items()}
        schema[LABEL] = ("int8", f"1: arrived {LATE_MINUTES} minutes late or more")
        pipes.report_asset_materialization(
            metadata={
                "rows": written,
                "late_share": round(late, 4),
                "seconds": round(time.monotonic() - begun, 3),
                "dagster/column_schema": reporting.column_schema(schema),
            }
        )


if __name__ == "__main__":
    main()
