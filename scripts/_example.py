"""What `scripts/new_project` leaves out of a copy: the example, the template's own tools, and the packages.

This is the one place that says so: name each new file of the example here. `tests/local/test_new_project.py`
searches a copy for WORDS and fails where one is left. What the copy has in their place is in `_skeleton/`.
"""

LEFT_OUT = (
    ".ci/newest-python",
    ".ci/test-options",
    "packages/*",  # a copy has their wheels in vendor/
    "CONTRIBUTING.md",
    "conftest.py",
    "docs/*",
    "musica_pipelines/assets/flight_delays.py",
    "musica_pipelines/workloads/*",
    "scripts/_example.py",
    "scripts/_skeleton/*",
    "scripts/check",
    "scripts/demo",
    "scripts/new_project",
    "tests/*",
)
"""Patterns of paths as fnmatch(3) reads them: `*` includes slashes. What `_skeleton/` has replaces what is here."""

WORDS = (
    "flight",
    "delay_features",
    "delay_sweep",
    "delay_model",
    "delay_forest",
    "count_planes",
    "xgboost",
    "packages/",
)
"""A file with one of these words, in capitals or not, belongs to the example or the template."""
