"""Show what an asset would submit to Slurm, without submitting it."""

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import dagster as dg
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dagster_sbatch.auth import AccessError
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.inspect.preview import Preview, preview_asset, try_script
from dagster_sbatch.inspect.runs import open_runs
from dagster_sbatch.project import Project
from dagster_sbatch.slurm.gateway import RefusedError
from dagster_sbatch.ssh import SshError

DESCRIPTION = """\
Show what an asset would submit to Slurm: where it would run, what it requests of each node, which project is charged,
the highest possible cost, and the batch script. Nothing is submitted, and without --test-only nothing is connected to.

The asset's own code runs here up to its call of compute.run, in a temporary Dagster instance, with the resources and IO
managers of the project. A graph asset is shown step by step; steps that need the result of another are left out.

Settings are those of a supercomputer deployment (docs/settings.md); what is not set is shown as <NAME OF THE VARIABLE>.
"""
EPILOG = """\
examples:
  scripts/preview delay_sweep
  scripts/preview flights --partition 2013-01
  SLURM_QOS=dev_zen4_0768 scripts/preview flights --partition 2013-01 --script > job.sh
  scripts/preview delay_sweep --test-only
  scripts/preview my_asset --config-json '{"ops": {"my_asset": {"config": {"trials": 3}}}}'

exit codes: 0 shown, 1 the asset could not run like this (the reason is printed), 2 wrong usage, 3 the supercomputer
cannot be reached
"""
PATIENCE = 60.0
"""Seconds for the supercomputer to answer."""


def main(project: Project, definitions: dg.Definitions) -> int:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("asset", help="asset key, for instance delay_sweep")
    parser.add_argument("--partition", metavar="KEY", help="partition key, for instance 2013-01")
    parser.add_argument("--script", action="store_true", help="print the batch script alone")
    parser.add_argument(
        "--test-only",
        action="store_true",
        help="ask Slurm for the expected start, or why it would refuse the job; show that and the project alone",
    )
    parser.add_argument("--config-json", metavar="JSON", type=run_config, help="run config, as in Dagster's launchpad")
    asked = parser.parse_args()
    try:
        previews = preview_asset(definitions, asked.asset, asked.partition, asked.config_json)
        if asked.test_only:
            return test(project, previews)
    except (ConfigurationError, RefusedError) as error:
        return complain(f"{asked.asset}: {error}", 1)
    except (AccessError, SshError) as error:
        return complain(str(error), 3)
    for preview in previews:
        if not asked.script:
            show(preview)
        print(preview.script, end="")
    return 0


def run_config(text: str) -> Mapping[str, Any]:
    """Parse --config-json; a text that is no JSON object is wrong usage."""
    with suppress(json.JSONDecodeError):
        config = json.loads(text)
        if isinstance(config, dict):
            return config
    raise argparse.ArgumentTypeError(f'{text!r} is no JSON object; an example is {{"ops": {{}}}}')


def complain(text: str, code: int) -> int:
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
    return code


def test(project: Project, previews: Sequence[Preview]) -> int:
    settings = project.load_settings(supercomputer=True)
    with open_runs(settings, project, PATIENCE) as runs:
        projects = runs.gateway.projects()
        answers = [try_script(runs.gateway, preview, projects) for preview in previews]
    for _, said in answers:
        print(said)
    return 0 if all(accepted for accepted, _ in answers) else 1


def show(preview: Preview) -> None:
    console = Console()
    table = Table.grid(padding=(0, 2))
    for name, value in preview.summary.items():
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    console.print(table)
    for note in preview.plan.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    console.rule("job.sh")
