"""`scripts/refresh_step_auth.py --status` in a terminal of 80 columns."""

import os
import subprocess
import sys
from pathlib import Path

from support import ROOT, access


def test_the_table_is_readable_at_80_columns(tmp_path: Path) -> None:
    """Each entry is on one line, and the long paths are below the table, whole."""
    home = tmp_path / ("a-long-name-of-a-home" * 3)
    home.mkdir()
    variables = access.environment("https://127.0.0.1:1", home)
    access.certify(Path(variables["SLURM_EDGE_NODE_KEY_PATH"]), access.DAY)
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "refresh_step_auth.py"), "--status"],
        env={**os.environ, **variables, "COLUMNS": "80"}, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    table, places = done.stdout.split("certificate: ")
    assert max(map(len, table.splitlines())) <= 80
    rows = [line.split("  ")[0].strip() for line in table.splitlines()[1:4]]
    assert rows == ["certificate", "API token", "app password"], table
    assert "23 h" in table
    assert places.splitlines()[0] == f"{variables['SLURM_EDGE_NODE_KEY_PATH']}-cert.pub"
