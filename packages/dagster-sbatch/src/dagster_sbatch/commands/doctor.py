"""Check everything between the settings and a job on the supercomputer, and say what to fix first."""

import argparse
import json
import os
import sys
import textwrap
from dataclasses import asdict

import dagster as dg
from rich.console import Console
from rich.markup import escape

from dagster_sbatch.configuration import check_configuration
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.inspect.doctor import Finding, examine
from dagster_sbatch.project import Project

DESCRIPTION = """\
Check everything between your settings and a job on the supercomputer: settings, Dagster's home, credentials,
certificate, network, host authority, login, Slurm, partitions, storage, deployment folder, Python, projects, jobs that
no run here knows of, what is published. It stops at the first check that fails, and says how to fix that. At the end it
asks Slurm about each asset's own job script: when the job could start, or why it would be refused.

Nothing is submitted. The certificate is renewed if that is due; in the deployment folder, a file of 1 MB is written and
removed; the assets' own code runs here up to its call of compute.run. The last line says "ready", or names the first
thing to fix.
"""
EPILOG = """\
examples:
  scripts/doctor
  DAGSTER_DEPLOYMENT=production_supercomputer scripts/doctor --settings     # for CI
  scripts/doctor --json | jq '.[] | select(.state != "ok")'

exit codes: 0 ready (warnings do not count), 1 something is to be fixed first, 2 wrong usage
"""
INDENT = 26
MARKS = {"ok": "[green]ok     [/green]", "warning": "[yellow]warning[/yellow]", "broken": "[red]broken [/red]"}


def main(project: Project, definitions: dg.Definitions) -> int:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--settings", action="store_true", help="check the settings and the sites' entries alone, connect to nothing"
    )
    parser.add_argument("--json", action="store_true", help="for programs: a list of name, state, found, fix")
    asked = parser.parse_args()
    if asked.settings:
        return check_settings(project)
    os.chdir(project.root)  # where dagster.yaml is, and the history that it names
    os.environ.setdefault("DAGSTER_HOME", str(project.root))
    findings = []
    for finding in examine(project, definitions):
        findings.append(finding)
        if not asked.json:
            show(finding)
    if asked.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        print(conclusion(findings))
    return int(any(finding.state == "broken" for finding in findings))


def check_settings(project: Project) -> int:
    """Check the settings of the deployment that is set: for CI, where nothing can be connected to."""
    try:
        settings = check_configuration(project)
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 1
    site = f", {settings.supercomputer_site}" if settings.supercomputer_site else ""
    print(f"the settings are right: {settings.deployment}{site}")
    return 0


def show(finding: Finding) -> None:
    """Print a finding, wrapped beside its name."""
    console = Console(highlight=False, soft_wrap=True)
    width = max(console.width, 60) - INDENT
    text = f"{finding.found}\n-> {finding.fix}" if finding.fix else finding.found
    first, *more = [piece for line in text.splitlines() for piece in wrap(line, width)]
    console.print(f"{MARKS[finding.state]} [bold]{finding.name:17}[/bold] {escape(first)}")
    for piece in more:
        console.print(f"{' ' * INDENT}{piece}", markup=False)


def wrap(line: str, width: int) -> "list[str]":
    """Split a line at spaces; what is indented (a command, a list) and what has no spaces stays whole."""
    if line.startswith(" "):
        return [line]
    return textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) or [""]


def conclusion(findings: list[Finding]) -> str:
    """Say "ready", or name the first thing to fix."""
    first = next((finding for finding in findings if finding.state == "broken"), None)
    if first:
        return f"first thing to fix: {first.name}"
    warnings = sum(finding.state == "warning" for finding in findings)
    return f"ready, with {warnings} warning{'s' if warnings > 1 else ''}" if warnings else "ready"
