"""What may still be written to a folder on the login node, by df and quota there."""

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Room:
    """What may still be written to a folder."""

    kib: int | None  # KiB; None if not known
    files: int | None  # number of files; None if not known, or if the file system does not count them

    def __str__(self) -> str:
        parts = [] if self.kib is None else [f"{self.kib / (1 << 20):,.1f} GB"]
        parts += [] if self.files is None else [f"{self.files:,} files"]
        return f"{' and '.join(parts)} free" if parts else "free space not known"


# Columns source, avail, itotal, iavail; df prints "-" for a number that it does not know.
_DF = re.compile(r"^(.*?) +(-?\d+|-) +(\d+|-) +(\d+|-)$", re.M)
# Columns of `quota -w -p`: the file system, then used, quota, limit and grace of its KiB and of its files.
_QUOTA = re.compile(r"^\s*(\S+)\s+(\d+)\*?\s+(\d+)\s+(\d+)\s+\d+\s+(\d+)\*?\s+(\d+)\s+(\d+)\s+\d+\s*$", re.M)


def parse_room(df: str, quotas: str) -> Room:
    """Return the room of a folder: what its file system has left, or what the user's quota leaves if that is less.

    `df`: its output. `quotas`: the output of `quota -w -p`, or its error.
    """
    source, *columns = [("", "-", "-", "-"), *_DF.findall(df)][-1]
    kib, total, files = (None if column == "-" else max(0, int(column)) for column in columns)
    rooms = [Room(kib, files if total else None)]  # btrfs, CephFS and BeeGFS count no inodes: they show 0 of 0
    for name, *numbers in _QUOTA.findall(quotas):
        if name == source:
            used_kib, soft_kib, hard_kib, used_files, soft_files, hard_files = map(int, numbers)
            rooms.append(Room(_left(used_kib, hard_kib or soft_kib), _left(used_files, hard_files or soft_files)))
    return Room(_least(each.kib for each in rooms), _least(each.files for each in rooms))


def _left(used: int, limit: int) -> int | None:
    return max(0, limit - used) if limit else None


def _least(numbers: Iterable[int | None]) -> int | None:
    return min((number for number in numbers if number is not None), default=None)
