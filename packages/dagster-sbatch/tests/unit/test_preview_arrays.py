"""The preview of a run over several partitions."""

import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.inspect.asset_preview import Preview, preview_asset
from dagster_sbatch.launchers import ScriptLauncher
from dagster_sbatch.run.compute import ComputeResource
from resources import PROJECT
from support import ROOT

WORKLOAD = Path(__file__)
"""Any program that parses."""
MONTHS = dg.MonthlyPartitionsDefinition(start_date="2013-01", end_date="2014-01", fmt="%Y-%m")


@dg.asset(partitions_def=MONTHS, backfill_policy=dg.BackfillPolicy.single_run())
def counts(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    return compute.run(context, workload=WORKLOAD, launcher=ScriptLauncher()).get_materialize_result()


def preview(asset: str, first: str | None = None, last: str | None = None) -> Preview:
    definitions = dg.Definitions(assets=[counts], resources={"compute": ComputeResource.of(PROJECT)})
    (shown,) = preview_asset(definitions, asset, first, last=last)
    return shown


def test_a_range_is_one_run_over_its_partitions() -> None:
    assert preview("counts", "2013-02", "2013-04").plan.extras["partition_keys"] == ["2013-02", "2013-03", "2013-04"]
    assert preview("counts", "2013-02", "2013-02").plan.extras["partition_keys"] == ["2013-02"]


@pytest.mark.parametrize(
    ("first", "last", "text"),
    [
        ("2012-12", "2013-03", "'2012-12' is not a partition of the asset. Valid are 2013-01, "),
        ("2013-01", "2014-01", "'2014-01' is not a partition of the asset"),
        ("2013-04", "2013-02", "2013-04 comes after 2013-02. Write the range as 2013-02...2013-04"),
    ],
)
def test_a_range_that_is_none_says_what_to_write(first: str, last: str, text: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        preview("counts", first, last)
    assert text in str(error.value)


@pytest.mark.parametrize("text", ["2013-01", "2013-01..2013-02", "...2013-02", "2013-01..."])
def test_a_text_that_is_no_range_is_wrong_usage(text: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "preview"), "anything", f"--partition-range={text}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert f"{text!r} is no range" in done.stderr
