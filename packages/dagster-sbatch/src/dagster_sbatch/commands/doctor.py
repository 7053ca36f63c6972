"""Check everything between the settings and a job on the supercomputer, and say what to fix first."""

import json
import textwrap
from collections.abc import Mapping

import dagster as dg
from rich.console import Console
from rich.markup import escape

from dagster_sbatch.commands.command_line import entry_point, make_parser
from dagster_sbatch.commands.project_history import choose_instance
from dagster_sbatch.configuration import check_configuration
from dagster_sbatch.inspect.diagnosis import Finding, examine
from dagster_sbatch.project import Project
from dagster_sbatch.slurm.units import count_of

DESCRIPTION = """\
Check everything between your settings and a job on the supercomputer: settings, Dagster's home, credentials,
certificate, network, host authority, login, Slurm, partitions, storage, deployment folder, Python, projects, locks,
jobs of runs that this Dagster does not know, the published environment. The doctor stops at the first check that
fails, and says how to fix it. Then it asks Slurm about each asset's own job script: when the job could start, or why
Slurm would refuse it.

The doctor submits nothing. It renews the certificate if that is due, writes and removes a file of 1 MB in the
deployment folder, and runs the assets' own code on this machine up to the call of compute.run. Its last line says
"ready", or names the first thing to fix.
"""
EPILOG = """\
examples:
  scripts/doctor
  DAGSTER_DEPLOYMENT=production_supercomputer scripts/doctor --settings     # for CI
  scripts/doctor --json | jq '.[] | select(.state != "ok")'

exit codes: 0 ready (warnings do not count), 1 you must fix something first, 2 wrong usage
"""
NAMES = 17  # characters of names; a longer one has a line of its own
INDENT = 9 + NAMES
MARKS = {"ok": "[green]ok     [/green]", "warning": "[yellow]warning[/yellow]", "broken": "[red]broken [/red]"}


@entry_point()
def main(project: Project, definitions: dg.Definitions) -> int:
    parser = make_parser(DESCRIPTION, EPILOG)
    parser.add_argument(
        "--settings",
        action="store_true",
        help="check only the settings of DAGSTER_DEPLOYMENT and the sites; open no connection",
    )
    parser.add_argument("--json", action="store_true", help="for programs: a list of name, state, found, fix")
    asked = parser.parse_args()
    if asked.settings:
        return check_settings(project)
    choose_instance(project)
    return diagnose(project, definitions, as_json=asked.json)


def check_settings(project: Project) -> int:
    """Check the settings of the deployment, for instance in CI, where there is no connection."""
    settings = check_configuration(project)
    site = f", {settings.supercomputer_site}" if settings.supercomputer_site else "; DAGSTER_DEPLOYMENT chooses another"
    print(f"the settings are correct: {settings.deployment}{site}")
    return 0


def diagnose(project: Project, definitions: dg.Definitions, *, as_json: bool) -> int:
    findings = {}
    for name, finding in examine(project, definitions):
        findings[name] = finding
        if not as_json:
            show(name, finding)
    document = [{"name": name, **finding._asdict()} for name, finding in findings.items()]
    print(json.dumps(document, indent=2) if as_json else conclusion(findings))
    return int(any(finding.state == "broken" for finding in findings.values()))


def show(name: str, finding: Finding) -> None:
    """Print the result of a check, wrapped beside its name."""
    console = Console(highlight=False, soft_wrap=True, emoji=False)
    width = max(console.width, 60) - INDENT
    text = f"{finding.found}\n-> {finding.fix}" if finding.fix else finding.found
    first, *more = [piece for line in text.splitlines() for piece in wrap(line, width)]
    head = f"{MARKS[finding.state]} [bold]{name:{NAMES}}[/bold]"
    if len(name) > NAMES:
        console.print(head)
        head = " " * (INDENT - 1)
    console.print(f"{head} {escape(first)}")
    for piece in more:
        console.print(f"{' ' * INDENT}{piece}", markup=False)


def wrap(line: str, width: int) -> "list[str]":
    """Split a line at spaces; what is indented (a command, a list) and what has no spaces stays whole."""
    if line.startswith(" "):
        return [line]
    return textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) or [""]


def conclusion(findings: Mapping[str, Finding]) -> str:
    for name, finding in findings.items():
        if finding.state == "broken":
            return f"first thing to fix: {name}"
    warnings = sum(finding.state == "warning" for finding in findings.values())
    return f"ready, with {count_of(warnings, 'warning')}" if warnings else "ready"
