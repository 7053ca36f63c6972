"""What tests of `scripts/upgrade` share: small files that are like wheels of the engine, and a death at any moment."""

import os
import sys
import zipfile
from pathlib import Path

from dagster_sbatch.commands.vendored import Wheel

CHANGELOG = """\
# Changes

## 1.10.0

Faster.

## 1.2.0 (2027)

### In your own files

- two
  twice

### Corrected

- nothing of yours

## 1.1.0

### In your own files

- one

## 1.0.0

### In your own files

- zero
"""


def make_wheel(folder: Path, version: str, left_out: str = "-") -> Wheel:
    """A file that is like a wheel of the engine. Its changelog ends with its version, and may lack a change."""
    folder.mkdir(exist_ok=True)
    path = folder / f"dagster_sbatch-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        changes = CHANGELOG[CHANGELOG.index(f"\n## {version}") :].replace(f"\n- {left_out}\n", "\n")
        archive.writestr("dagster_sbatch/CHANGELOG.md", changes)
        archive.writestr(f"dagster_sbatch-{version}.dist-info/METADATA", "")
    return Wheel(path)


def kill_at(moment: int, project: Path) -> None:
    """End this process without any clean-up before it makes its nth change below a folder."""
    changes = 0

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal changes
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not writes and event not in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        path = str(arguments[0])
        if path.startswith(f"{project}/") or not path.startswith("/"):  # shutil.rmtree uses names within a folder
            changes += 1
            if changes == moment:
                os._exit(9)

    sys.addaudithook(audit)
