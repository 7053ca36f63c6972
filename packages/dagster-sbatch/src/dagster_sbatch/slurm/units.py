"""Slurm's notations for time and memory; numbers of things as text."""

import re
from collections.abc import Sequence
from datetime import timedelta
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer, PlainValidator

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})")
_DURATION = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)")
_MEMORY = re.compile(r"(?P<number>0|[1-9]\d*)(?P<unit>[KMGT]?)")
_UNITS = {"K": 1, "M": 1024, "G": 1024**2, "T": 1024**3}


def parse_time(text: str) -> timedelta:
    """Return a time limit that is written in one of the forms of `sbatch --time`.

    Those are `minutes`, `minutes:seconds`, `hours:minutes:seconds`, `days-hours`, `days-hours:minutes` and
    `days-hours:minutes:seconds` (man sbatch).
    Raises ValueError: any other text, zero, and a time that is too long for a timedelta.
    """
    match = _TIME.fullmatch(text)
    if not match:
        raise ValueError(
            f"{text!r} is not a Slurm time: write hours:minutes:seconds as in '02:00:00', "
            "days-hours as in '1-12', or minutes as in '90'"
        )
    numbers = [int(part) for part in match["rest"].split(":")]
    if match["days"] is None and len(numbers) < 3:
        numbers = [0, *numbers]
    hours, minutes, seconds = (*numbers, 0, 0)[:3]
    try:
        total = timedelta(int(match["days"] or 0), hours=hours, minutes=minutes, seconds=seconds)
    except OverflowError:
        raise ValueError(f"{text!r} is too long: the longest time is {format_time(timedelta.max)}") from None
    if not total:
        raise ValueError(f"{text!r} is a time of zero")
    return total


def format_time(time: timedelta) -> str:
    """Return `D-HH:MM:SS`, or `HH:MM:SS` under a day: forms that Slurm and people read alike."""
    rest = time.seconds
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{time.days}-{clock}" if time.days else clock


def parse_duration(text: str) -> float | None:
    """Return the seconds of a time as squeue and sacct print it, `[D-[HH:]]MM:SS[.mmm]`; None for any other text.

    Other texts are UNLIMITED, NOT_SET and INVALID, which stands for less than 0 or more than a year.
    """
    match = _DURATION.fullmatch(text)
    if not match:
        return None
    days, hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def parse_memory(text: str) -> int:
    """Return the KiB of a memory size of `sbatch --mem`: a whole number and K, M, G or T (M if there is no unit).

    0 stands for all memory of a node.
    Raises ValueError: any other text.
    """
    match = _MEMORY.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is not a Slurm memory size: write a whole number and K, M, G or T, as in '64G'")
    return int(match["number"]) * _UNITS[match["unit"] or "M"]


def format_memory(kib: int) -> str:
    """Return a size in the largest unit in which it is a whole number."""
    for unit in "TGM":
        if kib % _UNITS[unit] == 0:
            return f"{kib // _UNITS[unit]}{unit}"
    return f"{kib}K"


def show_value(value: object) -> str:
    """Return the value of a field as an asset writes it: a time in Slurm's notation."""
    return repr(format_time(value) if isinstance(value, timedelta) else value)


def count_of(number: int, noun: str) -> str:
    """Return a number with the noun that it counts: `1 GPU`, `4 GPUs`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def list_names(names: Sequence[str], most: int) -> str:
    """Return the first names, and how many more there are than `most`."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _time(value: object) -> timedelta:
    """Read a time in Slurm's notation, or take one of at least a second as it is."""
    if isinstance(value, str):
        return parse_time(value)
    if isinstance(value, timedelta) and value >= timedelta(seconds=1):
        return value
    raise ValueError(
        f"{value!r} is not a time: write Slurm's notation as text, as in '02:00:00' or '1-12', "
        "or a timedelta of at least a second, as in timedelta(hours=2)"
    )


def _memory(value: object) -> object:
    """Check a memory size. A number is none: in quotes alone, as pydantic would say, it means so many MB."""
    if isinstance(value, str):
        parse_memory(value)
        return value
    raise ValueError(f"{value!r} is not a Slurm memory size: write a text with a unit (K, M, G or T), as in '64G'")


Time = Annotated[timedelta, PlainValidator(_time), PlainSerializer(format_time)]
Memory = Annotated[str, BeforeValidator(_memory)]
