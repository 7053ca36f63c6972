"""The listing in the engine's README is a code location."""

import importlib
import re
import sys
from pathlib import Path

import dagster as dg
import pytest

from support import ROOT


def test_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (listing,) = re.findall(r"```python\n(.*?)```", (ROOT / "packages/dagster-sbatch/README.md").read_text(), re.DOTALL)
    (tmp_path / "location.py").write_text(listing)
    (tmp_path / "workloads").mkdir()
    (tmp_path / "workloads" / "counts.py").write_text(
        "from dagster_pipes import open_dagster_pipes\n"
        "with open_dagster_pipes() as pipes:\n    pipes.report_asset_materialization(metadata={'rows': 3})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    location = importlib.import_module("location")
    try:
        dg.Definitions.validate_loadable(location.defs)
        assert all(spec.description for spec in location.defs.resolve_all_asset_specs()), "none exists by a check only"
        result = dg.materialize([location.counts], resources=location.defs.resources)
        (event,) = result.asset_materializations_for_node("counts")
        assert event.metadata["rows"].value == 3
    finally:
        del sys.modules["location"]
