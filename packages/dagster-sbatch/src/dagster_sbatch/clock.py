"""The time of this machine, read in one place, so that tests can move it; times as text."""

from datetime import UTC, datetime


def now() -> datetime:
    """Return this machine's time, in UTC."""
    return datetime.now(UTC)


def written(moment: datetime) -> str:
    """Return a time as text for people and files, for example `2026-11-24 09:05:12 UTC`."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def duration(seconds: float) -> str:
    """Return a length of time as text with its two largest units, for example `29 d 23 h`."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    rest = int(abs(seconds))
    parts: list[str] = []
    for name, size in units:
        count, rest = divmod(rest, size)
        if count or (name == "s" and not parts):
            parts.append(f"{count} {name}")
    return " ".join(parts[:2])
