"""Unpack the published flights: one parquet file a month."""

import time

from dagster_pipes import open_dagster_pipes

from flight_delays import reporting, source, storage

COLUMNS = {
    "time_hour": "scheduled hour of departure, UTC",
    "sched_dep_time": "HHMM, local time",
    "dep_delay": "minutes; null where cancelled",
    "arr_delay": "minutes; null where cancelled or diverted",
    "carrier": "airline",
    "tailnum": "plane",
    "origin": "airport in New York",
    "dest": "airport",
}


def main() -> None:
    with open_dagster_pipes() as pipes:
        months = reporting.partition_keys(pipes)
        begun = time.monotonic()
        tables = source.read_flights(months)
        reading = time.monotonic() - begun
        for month, table in tables.items():
            begun = time.monotonic()
            path = storage.flights_file(month)
            storage.write_table(path, table)
            pipes.log.info(f"{month}: {len(table)} flights -> {path}")
            seconds = reading / len(months) + time.monotonic() - begun
            numbers = {
                "rows": len(table),
                "cancelled": int(table["dep_delay"].isna().sum()),
                "seconds": round(seconds, 3),
            }
            reporting.report_partition(pipes, month, numbers)
        expected = source.count_flights(months)
        written = {month: storage.count_rows(storage.flights_file(month)) for month in months}
        pipes.report_asset_check(
            "rows_match_source",
            passed=written == expected,
            metadata={"expected": sum(expected.values()), "written": sum(written.values())},
        )
        kinds = tables[months[0]].dtypes
        schema = {str(name): (str(kind), COLUMNS.get(str(name), "")) for name, kind in kinds.items()}
        pipes.report_asset_materialization(metadata={"dagster/column_schema": reporting.column_schema(schema)})


if __name__ == "__main__":
    main()
