"""What the code location offers, as the UI would show it."""

from pathlib import Path

import dagster as dg

from dagster_sbatch import FakeCompute
from musica_pipelines.assets.flight_delays import delay_features, months
from musica_pipelines.definitions import defs
from resources import SUPERCOMPUTER_SITE_OVERRIDES

ASSETS = {"flights", "delay_features", "delay_sweep", "delay_model", "delay_forest"}
OBSERVED = {"musica_access", "musica_budget"}


def test_the_definitions_are_loadable() -> None:
    dg.Definitions.validate_loadable(defs)


def test_every_asset_says_whose_and_of_what_kind_it_is() -> None:
    specs = defs.resolve_all_asset_specs()
    assert {spec.key.to_user_string() for spec in specs} == ASSETS | OBSERVED
    for spec in specs:
        assert spec.description
        assert spec.owners
        assert spec.kinds
        assert spec.group_name == ("access" if spec.key.to_user_string() in OBSERVED else "flight_delays")


def test_every_asset_has_a_check() -> None:
    checks = {key for definition in defs.assets or () if isinstance(definition, dg.AssetsDefinition)
              for key in definition.check_keys}  # fmt: skip
    checks |= {key for definition in defs.asset_checks or () for key in definition.check_keys}
    assert {key.asset_key.to_user_string() for key in checks} == ASSETS | OBSERVED


def test_every_asset_links_to_its_function() -> None:
    linked = set()
    for spec in defs.resolve_all_asset_specs():
        name, references = spec.key.to_user_string(), spec.metadata.get("dagster/code_references")
        if references:
            *_, file = references.code_references
            lines = Path(file.file_path).read_text().splitlines()[file.line_number - 1 :]
            assert lines[0] == "@dg.asset("
            assert next(line for line in lines if line.startswith("def ")).startswith(f"def {name}(")
            linked.add(name)
    assert linked == ASSETS


def test_the_pipeline_job_covers_all_assets_over_twelve_months() -> None:
    job = defs.resolve_job_def("flight_delays")
    assert {key.to_user_string() for key in job.asset_layer.selected_asset_keys} == ASSETS
    assert job.partitions_def is not None
    assert len(job.partitions_def.get_partition_keys()) == 12


def test_each_month_of_delay_features_is_a_task_with_its_own_numbers() -> None:
    keys = months.get_partition_keys()
    compute = FakeCompute(site_overrides=SUPERCOMPUTER_SITE_OVERRIDES, metadata={"rows": 3})
    tags = {"dagster/asset_partition_range_start": keys[0], "dagster/asset_partition_range_end": keys[-1]}
    result = dg.materialize([delay_features], resources={"compute": compute}, tags=tags)
    (call,) = compute.calls
    assert [task.name for task in call.plan.tasks] == keys
    events = result.asset_materializations_for_node("delay_features")
    assert {event.partition: event.metadata["rows"].value for event in events} == dict.fromkeys(keys, 3)
