"""From flights to model features: only what is known an hour before the scheduled departure."""

import numpy as np
import pandas as pd

from . import source

LATE_MINUTES = 15
"""So many minutes after the scheduled arrival a flight counts as late, as in the US government's statistics."""

LABEL = "late"

FEATURES = {
    "month": "month of the scheduled departure",
    "weekday": "0 is Monday",
    "departure_minute": "minutes after midnight, local time, as scheduled",
    "flight_minutes": "scheduled arrival minus scheduled departure, local times, modulo a day",
    "distance": "miles",
    "carrier": "code of the airline",
    "origin": "code of the airport in New York",
    "destination": "code of the airport",
    "plane_age": "years; -1 where the register does not know",
    "plane_seats": "-1 where the register does not know",
    "temp": "degrees Fahrenheit, an hour before departure",
    "humid": "percent",
    "wind_speed": "miles an hour",
    "precip": "inches in the hour",
    "pressure": "millibars",
    "visib": "miles",
}
"""Name and meaning of every column that a model may see. What happens after departure is not among them."""

_WEATHER = ["temp", "humid", "wind_speed", "precip", "pressure", "visib"]


def build_features(flights: pd.DataFrame) -> pd.DataFrame:
    """Return one row per flight that arrived, with the columns of FEATURES (float32, no nulls) and LABEL (int8).

    Cancelled and diverted flights have no arrival and are left out. Weather that is missing takes the last value
    observed at that airport.
    """
    arrived = flights[flights["arr_delay"].notna()].reset_index(drop=True)
    scheduled = arrived["sched_dep_time"]
    departure_minute = scheduled // 100 * 60 + scheduled % 100
    arrival_minute = arrived["sched_arr_time"] // 100 * 60 + arrived["sched_arr_time"] % 100
    planes = source.read_planes().set_index("tailnum")
    airports = source.codes("airports.csv", "faa")
    built = arrived["tailnum"].map(planes["year"])
    local_day = pd.to_datetime(arrived[["year", "month", "day"]])
    columns = {
        "month": arrived["month"],
        "weekday": local_day.dt.day_of_week,
        "departure_minute": departure_minute,
        "flight_minutes": (arrival_minute - departure_minute) % 1440,
        "distance": arrived["distance"],
        "carrier": arrived["carrier"].map(source.codes("airlines.csv", "carrier")),
        "origin": arrived["origin"].map(airports),
        "destination": arrived["dest"].map(airports).fillna(-1),
        "plane_age": (arrived["year"] - built).fillna(-1),
        "plane_seats": arrived["tailnum"].map(planes["seats"]).fillna(-1),
        **_weather_before(arrived),
    }
    table = pd.DataFrame({name: columns[name].astype(np.float32) for name in FEATURES})
    table[LABEL] = (arrived["arr_delay"] >= LATE_MINUTES).astype(np.int8)
    return table


def _weather_before(flights: pd.DataFrame) -> dict[str, pd.Series]:
    """Return the last observation at the origin that is at least an hour older than the scheduled hour of departure."""
    observed = source.read_weather().sort_values("time_hour")
    observed[_WEATHER] = observed.groupby("origin")[_WEATHER].ffill()
    observed = observed.dropna(subset=_WEATHER)
    wanted = flights[["origin", "time_hour"]].assign(row=flights.index)
    wanted["time_hour"] -= pd.Timedelta(hours=1)
    joined = pd.merge_asof(
        wanted.sort_values("time_hour"), observed[["origin", "time_hour", *_WEATHER]], on="time_hour", by="origin"
    ).set_index("row")
    # The first hours of the year have nothing before them: the airport's first observation stands in.
    first = observed.groupby("origin")[_WEATHER].first()
    return {name: joined[name].fillna(joined["origin"].map(first[name])).reindex(flights.index) for name in _WEATHER}
