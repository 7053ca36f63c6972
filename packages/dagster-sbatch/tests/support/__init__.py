"""What the tests share. The template at the root of the repository is the project that they use."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]
"""The repository, which is the template."""
ENGINE = ROOT / "packages" / "dagster-sbatch" / "src" / "dagster_sbatch"
"""The sources of the engine."""
DOWNLOADS = {"XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", f"{Path.home()}/.cache")}
"""For a command with an empty home: uv and pip need not download and unpack the same wheels again."""
