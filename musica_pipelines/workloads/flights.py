"""Unpack the published flights: one parquet file per month."""

import time

from dagster_pipes import open_dagster_pipes

from flight_delays import reporting, source, storage

COLUMNS = {
    "year": "of the scheduled departure, local time, as all that follow",
    "month": "1 to 12",
    "day": "of the month",
    "dep_time": "actual departure, HHMM; null where cancelled",
    "sched_dep_time": "scheduled departure, HHMM",
    "dep_delay": "minutes, negative: early; null where cancelled",
    "arr_time": "actual arrival, HHMM; null where cancelled",
    "sched_arr_time": "scheduled arrival, HHMM",
    "arr_delay": "minutes, negative: early; null where cancelled or diverted",
    "carrier": "airline",
    "flight": "flight number",
    "tailnum": "plane",
    "origin": "airport in New York",
    "dest": "airport",
    "air_time": "minutes; null where cancelled or diverted",
    "distance": "miles",
    "hour": "of the scheduled departure",
    "minute": "of the scheduled departure",
    "time_hour": "scheduled hour of departure, UTC",
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
            pipes.log.info(f"{month}: {len(table)} flights -> {storage.name(path)}")
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
        schema = {str(name): (str(kind), COLUMNS[str(name)]) for name, kind in kinds.items()}
        pipes.report_asset_materialization(metadata={"dagster/column_schema": reporting.column_schema(schema)})


if __name__ == "__main__":
    main()
