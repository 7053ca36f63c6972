"""Renew access to the supercomputer: the SSH certificate and the stored secrets; or show its state."""

import json
import sys
from pathlib import Path

from dagster_sbatch import clock
from dagster_sbatch.auth import AccessError, AccessHealth, BootstrapError, HealthItem, Report, check_health, refresh
from dagster_sbatch.auth.keys import certificate_path
from dagster_sbatch.auth.ways import read_access
from dagster_sbatch.commands.command_line import entry_point, make_parser, print_table
from dagster_sbatch.project import Project
from dagster_sbatch.settings import Settings

DESCRIPTION = """\
Renew the SSH certificate with the stored secrets: an authentik API token and an app password, which are in the file
ASC_AUTHENTIK_CREDENTIALS_FILE. Both are replaced before they expire. ASC_AUTHENTIK_API_TOKEN is needed only the first
time, or when both have expired.

The settings are those of the supercomputer (scripts/docs settings), also if DAGSTER_DEPLOYMENT is not set. The output
holds no secret.
"""
EPILOG = """\
examples:
  scripts/refresh_step_auth.py                         renew the certificate now, and the secrets if due
  scripts/refresh_step_auth.py --rotate-credentials    replace both stored secrets, and request no certificate
  scripts/refresh_step_auth.py --rotate-credentials --refresh-step-after-rotate
  scripts/refresh_step_auth.py --status                show what there is, how long it lasts, and what happens next
  scripts/refresh_step_auth.py --status --json | jq .verdict

exit codes:
  0  done; with --status: access works
  1  a person has to act; the text says how
  2  wrong usage, or wrong settings
  3  temporary: a server does not answer, or clocks differ; a retry may help. With --status: a refresh fails, and access
     still works
"""


@entry_point(wrong=2)
def main(project: Project) -> int:
    parser = make_parser(DESCRIPTION, EPILOG)
    parser.add_argument("--rotate-credentials", action="store_true", help="create or replace both stored secrets")
    parser.add_argument("--refresh-step-after-rotate", action="store_true", help="then also renew the certificate")
    parser.add_argument("--status", action="store_true", help="show the state of the access, from files alone")
    parser.add_argument("--json", action="store_true", help="with --status: for programs")
    asked = parser.parse_args()
    if asked.refresh_step_after_rotate and not asked.rotate_credentials:
        parser.error("--refresh-step-after-rotate needs --rotate-credentials")
    if asked.status and asked.rotate_credentials:
        parser.error("--status changes nothing: use it without --rotate-credentials")
    if asked.json and not asked.status:
        parser.error("--json needs --status")
    settings = project.load_settings(supercomputer=True)
    if asked.status:
        health = check_health(settings)
        show_json(health) if asked.json else show(health, settings)
        return {"ok": 0, "due": 0, "failing": 3, "broken": 1}[health.verdict]
    try:
        report = refresh(
            settings,
            rotation="now" if asked.rotate_credentials else "due",
            certificate="no" if asked.rotate_credentials and not asked.refresh_step_after_rotate else "now",
        )
    except AccessError as error:
        print(error, file=sys.stderr)
        print_consequences(error, settings)
        return 3 if error.temporary else 1
    show_report(report, settings)
    return 0


def print_consequences(error: AccessError, settings: Settings) -> None:
    """Say whether access still works, and whether a retry may help."""
    certificate = read_access(settings).valid_certificate
    if certificate and not isinstance(error, BootstrapError):  # which says so itself
        print(f"Access works until {clock.written(certificate.valid_before)}.", file=sys.stderr)
    if error.temporary:
        print("The cause may pass by itself: run the command again later.", file=sys.stderr)


def show_report(report: Report, settings: Settings) -> None:
    if report.rotated_with:
        token = "ASC_AUTHENTIK_API_TOKEN" if report.rotated_with == "bootstrap" else "the stored API token"
        print(f"New API token and app password in {settings.credentials_file}, made with {token}.")
    if report.certificate and report.issued_with and settings.edge_node_key_path:
        path = certificate_path(settings.edge_node_key_path)
        password = "ASC_OIDC_APP_PASSWORD" if report.issued_with == "direct" else "the stored app password"
        print(
            f"New certificate {path}, requested with {password}: "
            f"for {', '.join(report.certificate.principals)}, until {clock.written(report.certificate.valid_before)}."
        )
    if not report.certificate and not report.rotated_with:
        print(f"There is nothing to renew: {check_health(settings).summary}.")
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def show(health: AccessHealth, settings: Settings) -> None:
    """Print a table, and the paths below it, since they do not fit into 80 columns."""
    rows = []
    for item in health.items:
        until, remaining = item.valid_until, health.remaining(item)
        left = clock.duration(remaining.total_seconds()) if remaining and item.state == "valid" else item.state
        rows.append((item.name, f"{until:%Y-%m-%d %H:%M}" if until else "", left, next_action(item, health)))
    print_table(("what", "valid until (UTC)", "remaining", "replaced after"), rows)
    places = [f"{item.name}: {item.where.replace(str(Path.home()), '~', 1)}" for item in health.items]
    account = "@".join(filter(None, (settings.edge_node_user, settings.edge_node_host)))
    state = f"{account}: {health.verdict}\n{health.summary[:1].upper()}{health.summary[1:]}"
    for line in (*places, "", state, *health.notes):
        print(line)


def next_action(item: HealthItem, health: AccessHealth) -> str:
    if item.renew_at is None:
        return "" if item.state == "not used" else "see below" if item.valid_until is None else "never, it ends"
    return f"{item.renew_at:%Y-%m-%d %H:%M}" if item.renew_at > health.now else "the next refresh"


def show_json(health: AccessHealth) -> None:
    """Print the state as JSON: times are ISO 8601 in UTC, lengths are hours."""
    items = {}
    for item in health.items:
        remaining = health.remaining(item)
        items[item.name.replace(" ", "_").lower()] = {
            "where": item.where,
            "state": item.state,
            "valid_until": item.valid_until.isoformat() if item.valid_until else None,
            "remaining_hours": remaining.total_seconds() / 3600 if remaining else None,
            "replaced_from": item.renew_at.isoformat() if item.renew_at else None,
        }
    document = {
        "verdict": health.verdict,
        "summary": health.summary,
        "items": items,
        "next_refresh": health.next_refresh.isoformat() if health.next_refresh else None,
        "failing": {
            part: {"since": found.since.isoformat(), "count": found.count, "error": found.error}
            for part, found in health.failing.items()
        },
        "notes": list(health.notes),
    }
    print(json.dumps(document, indent=2))
