"""Where the example keeps its files, and how they are written: whole or not at all."""

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq


def data_root() -> Path:
    """Return the folder below which every workload reads and writes (environment variable DATA_ROOT)."""
    try:
        return Path(os.environ["DATA_ROOT"])
    except KeyError:
        raise SystemExit("DATA_ROOT is not set: it names the folder for this workload's files") from None


def flights_file(month: str) -> Path:
    """Return the file with the flights of one month, `YYYY-MM`: one row per scheduled flight."""
    return data_root() / "flights" / f"{month}.parquet"


def features_file(month: str) -> Path:
    """Return the file with the model features of one month, `YYYY-MM`: one row per flight that arrived."""
    return data_root() / "delay_features" / f"{month}.parquet"


def trials_file() -> Path:
    """Return the file with the trials of the newest sweep, best first."""
    return data_root() / "delay_sweep" / "trials.json"


def finished_trials(sweep: str) -> Path:
    """Return the folder of an unfinished sweep, with one file per finished trial."""
    return data_root() / "delay_sweep" / f"unfinished-{sweep}"


def features_version(months: Iterable[str]) -> str:
    """Return a text that changes when the features of one of these months are written anew."""
    states = [features_file(month).stat() for month in months]
    return " ".join(f"{state.st_mtime_ns}/{state.st_size}" for state in states)


def model_file(asset: str) -> Path:
    """Return the file of the model that an asset has trained, in XGBoost's own format."""
    return data_root() / asset / "model.ubj"


def name(path: Path) -> str:
    """Return a path relative to the data root, for messages."""
    return str(path.relative_to(data_root()))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary name beside `path`, then rename: readers see the old file or the new one.

    Raises:
        SystemExit: the folder cannot be written to; the message names it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        text = f"cannot write {path}: {error.strerror}. Is there room, and is DATA_ROOT ({data_root()}) yours to write?"
        raise SystemExit(text) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as parquet, atomically."""
    write_atomically(path, lambda part: table.to_parquet(part, index=False))


def count_rows(path: Path) -> int:
    """Return the number of rows of a parquet file, from its footer."""
    return int(pq.read_metadata(path).num_rows)


def read_features(months: Iterable[str]) -> pd.DataFrame:
    """Return the features of several months, one after the other.

    Raises:
        SystemExit: months that have not been materialised; the message lists them.
    """
    wanted = list(months)
    missing = [month for month in wanted if not features_file(month).exists()]
    if missing:
        raise SystemExit(
            f"delay_features has no data for {', '.join(missing)} below {data_root()}: "
            "materialise these partitions of flights and delay_features first"
        )
    return pd.concat([pd.read_parquet(features_file(month)) for month in wanted], ignore_index=True)
