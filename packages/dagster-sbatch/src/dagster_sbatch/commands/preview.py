"""Show what an asset would submit to Slurm, without submitting it."""

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import dagster as dg
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from dagster_sbatch.commands.command_line import entry_point, make_parser, make_trouble_printer
from dagster_sbatch.commands.project_history import open_history
from dagster_sbatch.errors import ConfigurationError, NoSettingsFileError
from dagster_sbatch.inspect.asset_preview import Preview, preview_asset, supercomputer_deployment
from dagster_sbatch.inspect.dry_run import ask_usage, try_script
from dagster_sbatch.inspect.remote_runs import open_runs
from dagster_sbatch.project import Project
from dagster_sbatch.settings import Settings

DESCRIPTION = """\
Show what an asset would submit to Slurm, and submit nothing. The output has the partition, the request per node, the
project that is charged, the highest possible cost, whether a limit forbids it, what earlier runs have used, a request
that would be enough, and the batch script. Without --test-only, no connection is opened.

It runs the asset's own code on this machine up to the call of compute.run, in a temporary Dagster instance, with the
resources and IO managers of the project. It shows a graph asset step by step, without the steps that need the result of
another step.

It reads the settings of the supercomputer (scripts/docs settings), also if DAGSTER_DEPLOYMENT is not set. As long as
envs/ has no file for one, it shows <NAME> in place of a variable that is not set.
"""
EPILOG = """\
examples:
  scripts/preview my_asset
  scripts/preview my_asset --partition 2013-01 --script > job.sh
  scripts/preview my_asset --test-only
  scripts/preview my_asset --config-json '{"ops": {"my_asset": {"config": {"trials": 3}}}}'

exit codes: 0 done, 1 the asset could not run like this (the reason is printed), 2 wrong usage,
3 the supercomputer cannot be reached
"""
PATIENCE = 60.0  # seconds for the supercomputer to answer


@entry_point()
def main(project: Project, definitions: dg.Definitions) -> int:
    parser = make_parser(DESCRIPTION, EPILOG)
    parser.add_argument("asset", help="asset key; or ASSET:CHECK for an asset check that calls compute.run")
    partitions = parser.add_mutually_exclusive_group()
    partitions.add_argument("--partition", metavar="KEY", help="partition key")
    partitions.add_argument(
        "--partition-range", metavar="FIRST...LAST", type=partition_range, help="one run over these partitions"
    )
    parser.add_argument("--script", action="store_true", help="print only the batch script")
    parser.add_argument(
        "--test-only",
        action="store_true",
        help="ask Slurm when the job could start (and when with the proposed request), or why it would refuse it, and "
        "check the job's image, modules and environment there; print only that and the project",
    )
    parser.add_argument("--config-json", metavar="JSON", type=run_config, help="run config, as in Dagster's launchpad")
    asked = parser.parse_args()
    first, last = asked.partition_range or (asked.partition, None)
    try:
        settings = project.load_settings(supercomputer=True)
    except NoSettingsFileError:
        if asked.test_only:
            raise
        settings = None
    try:
        with supercomputer_deployment(settings) if settings else nullcontext(), open_history(project) as history:
            previews = preview_asset(definitions, asked.asset, first, asked.config_json, last=last, history=history)
    except ConfigurationError as error:
        raise ConfigurationError(f"{asked.asset}: {error}") from None
    if settings and asked.test_only:
        return test(project, settings, previews)
    for preview in previews:
        print(preview.script, end="")
        if not asked.script:
            show(preview)
    if refusals := [f"{preview.step}: {preview.refusal}" for preview in previews if preview.refusal]:
        raise ConfigurationError("\n".join(refusals))
    return 0


def partition_range(text: str) -> tuple[str, str]:
    """Parse --partition-range, which is written as for `dagster asset materialize`."""
    first, dots, last = text.partition("...")
    if not (first and dots and last):
        raise argparse.ArgumentTypeError(f"{text!r} is not a range; an example is 2013-01...2013-12")
    return first, last


def run_config(text: str) -> Mapping[str, Any]:
    """Parse --config-json; a text that is not a JSON object is wrong usage."""
    with suppress(json.JSONDecodeError):
        config = json.loads(text)
        if isinstance(config, dict):
            return config
    raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object; an example is {{"ops": {{}}}}')


def test(project: Project, settings: Settings, previews: Sequence[Preview]) -> int:
    with open_runs(settings, project, PATIENCE, make_trouble_printer()) as runs:
        projects, usage = runs.gateway.projects(), ask_usage(runs.gateway, settings)
        answers = [try_script(runs.gateway, preview, projects, usage) for preview in previews]
    for _, said in answers:
        print(said)
    return 0 if all(accepted for accepted, _ in answers) else 1


def show(preview: Preview) -> None:
    """Print the summary: below the script, so that it is what a terminal shows."""
    console = Console(emoji=False)
    console.rule()
    table = Table.grid(Column(style="bold"), Column(overflow="fold"), padding=(0, 2))  # no path is cut off
    for name, value in preview.summary.items():
        table.add_row(name, escape(value))
    console.print(table)
    for note in preview.plan.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
