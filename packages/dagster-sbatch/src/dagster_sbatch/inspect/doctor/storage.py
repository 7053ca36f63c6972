"""How much room is left in a folder, from what df(1) and quota(1) print."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

# The three numbers and the share after the name of a file system; df prints "-" for what it does not know.
_DF = re.compile(r"\s(\d+|-)\s+(-?\d+|-)\s+(-?\d+|-)\s+(?:\d+%|-)\s")
_SOURCE = re.compile(r"(.*?)\s+(?:\d+|-)\s+(?:-?\d+|-)\s+(?:-?\d+|-)\s+(?:\d+%|-)\s")
# `quota -w -p`: the file system, then used, quota, limit and grace of its KiB and of its files.
_QUOTA = re.compile(r"^\s*(\S+)\s+(\d+)\*?\s+(\d+)\s+(\d+)\s+\d+\s+(\d+)\*?\s+(\d+)\s+(\d+)\s+\d+\s*$", re.M)


@dataclass(frozen=True)
class Room:
    """What may still be written to a folder.

    Attributes:
        kib: KiB; None if not known.
        files: number of files; None if not known, or if the file system does not count them.
    """

    kib: int | None
    files: int | None

    def __str__(self) -> str:
        parts = [] if self.kib is None else [f"{self.kib / (1 << 20):,.1f} GB"]
        parts += [] if self.files is None else [f"{self.files:,} files"]
        return f"{' and '.join(parts)} free" if parts else "free space not known"


def parse_room(text: str, quotas: str = "") -> Room:
    """Return the room of a folder: what its file system has left, or a quota leaves, whichever is less.

    Args:
        text: what `df -Pk` prints, the character 0x1d, what `df -Pi` prints; anything of it may be missing.
        quotas: what `quota -w -p` prints, or why it does not.
    """
    space, _, inodes = text.partition("\x1d")
    _, kib = _last(space)
    total, files = _last(inodes)
    source = next((found[1] for line in space.splitlines()[::-1] if (found := _SOURCE.match(line))), "")
    room = [Room(kib, files if total else None)]  # btrfs, CephFS and BeeGFS count no inodes and say 0 of 0
    for name, *numbers in _QUOTA.findall(quotas):
        if name == source:
            used_kib, soft_kib, hard_kib, used_files, soft_files, hard_files = map(int, numbers)
            room.append(Room(_left(used_kib, hard_kib or soft_kib), _left(used_files, hard_files or soft_files)))
    return Room(_least(each.kib for each in room), _least(each.files for each in room))


def _last(text: str) -> tuple[int | None, int | None]:
    """Total and free of the last line of a df that has them."""
    found = [match for line in text.splitlines() if (match := _DF.search(f"{line} "))]
    if not found:
        return None, None
    total, _, free = found[-1].groups()
    return _number(total), _number(free)


def _number(text: str) -> int | None:
    return None if text == "-" else max(0, int(text))


def _left(used: int, limit: int) -> int | None:
    return max(0, limit - used) if limit else None


def _least(numbers: Iterable[int | None]) -> int | None:
    return min((number for number in numbers if number is not None), default=None)
