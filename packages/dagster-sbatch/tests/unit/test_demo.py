"""The table of the demo. The template's tests run the demo itself."""

from dagster_sbatch.commands.demo import numbers


def test_only_numbers_are_in_the_table() -> None:
    assert numbers("a", [{"rows": 3, "share": 0.5, "done": True, "unit": "mm"}, {"rows": 4}]) == {
        "result": "rows 3, share 0.5"
    }
