"""Workloads that need more than their own file, for tests here and on the simulated site."""

from pathlib import Path
from typing import Any

ARGUMENTS = ["--name", "a b", "", "-m"]
ENV = {"MINE": "a'b $HOME", "RANDOM": "no number"}
REPORT = """
import os, sys
from dagster_pipes import open_dagster_pipes
from shared.words import WORD
{imports}
with open_dagster_pipes() as pipes:
    mine = [os.environ["MINE"], os.environ["RANDOM"]]
    metadata = {{"args": sys.argv[1:], "word": WORD, "near": NEAR, "main": __name__, "mine": mine}}
    pipes.report_asset_materialization(metadata=metadata)
"""


def _write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def make_program(root: Path) -> tuple[Path, dict[str, Any]]:
    """A program in a subfolder, with a module beside it and one that other folders share."""
    report = REPORT.format(imports="from beside import NEAR")
    _write(root, {"shared/words.py": "WORD = 1", "climate/beside.py": "NEAR = 2", "climate/prog.py": report})
    return root / "climate" / "prog.py", {"args": ARGUMENTS, "env": ENV}


def make_package(root: Path) -> tuple[Path, dict[str, Any]]:
    """A package with relative imports."""
    report = REPORT.format(imports="from .inner import NEAR")
    files = {"shared/words.py": "WORD = 1", "climate/model/__init__.py": "", "climate/model/__main__.py": report}
    _write(root, {**files, "climate/model/inner.py": "from ..beside import NEAR", "climate/beside.py": "NEAR = 2"})
    return root / "climate" / "model", {"args": ARGUMENTS, "env": ENV}


def check_metadata(found: dict[str, Any]) -> None:
    """That all of it was found, and the arguments and variables came as they were."""
    assert found["args"] == ARGUMENTS
    assert found["mine"] == list(ENV.values())
    assert (found["word"], found["near"], found["main"]) == (1, 2, "__main__")
