"""What the tests share. The template at the root of the repository is the project that they use."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]
"""The repository, which is the template."""
ENGINE = ROOT / "packages" / "dagster-sbatch" / "src" / "dagster_sbatch"
"""The sources of the engine."""
