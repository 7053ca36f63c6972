"""scripts/refresh_step_auth.py as a person runs it, and where no secret may be seen."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dagster_sbatch.auth import (
    refresh,
)
from dagster_sbatch.auth.keys import certificate_path
from slurm_in_a_box import SimulatedSite
from support import ROOT, access

pytestmark = pytest.mark.cluster


Script = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def script(variables: dict[str, str], tmp_path: Path) -> Script:
    """Runs scripts/refresh_step_auth.py as a user, in an empty home and from any folder."""

    def run(*options: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
        chosen: dict[str, str | None] = {**variables, "DAGSTER_DEPLOYMENT": None, **changes}
        environment = {name: value for name, value in chosen.items() if value is not None}
        return subprocess.run(
            [sys.executable, ROOT / "scripts" / "refresh_step_auth.py", *options],
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "COLUMNS": "200", **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


def test_the_script_does_what_the_document_says(script: Script, variables: dict[str, str], site: SimulatedSite) -> None:
    file, key = Path(variables["ASC_AUTHENTIK_CREDENTIALS_FILE"]), access.key_of(variables)
    done = script("--rotate-credentials")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"New API token and app password in {file}, made with ASC_AUTHENTIK_API_TOKEN.\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert not certificate_path(key).exists()  # no certificate was requested
    done = script(ASC_AUTHENTIK_API_TOKEN=None)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(
        f"New certificate {certificate_path(key)}, requested with the stored app password: for xy12345"
    )
    assert access.logs_in(site, variables)
    first = certificate_path(key).read_text()
    done = script("--rotate-credentials", "--refresh-step-after-rotate", ASC_AUTHENTIK_API_TOKEN=None)
    assert done.returncode == 0
    assert "with the stored API token" in done.stdout
    assert "New certificate" in done.stdout
    assert certificate_path(key).read_text() != first
    assert len(access.made_here(site.authentik)) == 2


def test_the_script_tells_how_access_is(script: Script, variables: dict[str, str], site: SimulatedSite) -> None:
    done = script("--status", ASC_AUTHENTIK_API_TOKEN=None)
    assert done.returncode == 1
    assert ": broken\nNo access to" in done.stdout
    assert script().returncode == 0
    done = script("--status")
    assert done.returncode == 0
    assert "xy12345@" in done.stdout
    assert ": ok\nNext refresh at 20" in done.stdout
    for words in ("certificate", "API token", "app password", "15 h 59 min", "29 d 23 h"):
        assert words in done.stdout
    document = json.loads(script("--status", "--json").stdout)
    assert document["verdict"] == "ok"
    assert document["items"]["certificate"]["remaining_hours"] == pytest.approx(16, abs=0.1)
    assert document["items"]["api_token"]["remaining_hours"] == pytest.approx(30 * 24, abs=0.1)
    access.age_certificate(site, variables)
    with site.faults.certificate_authority_down():
        assert refresh(access.settings_of(variables)).warnings
    done = script("--status")
    assert done.returncode == 3
    assert ": failing\nThe certificate could not be renewed since" in done.stdout


def test_the_script_ends_with_the_codes_of_its_help(
    script: Script, variables: dict[str, str], site: SimulatedSite
) -> None:
    for wrong in (["--refresh-step-after-rotate"], ["--json"], ["--status", "--rotate-credentials"], ["--no-such"]):
        assert script(*wrong).returncode == 2
    assert script(SLURM_EDGE_NODE_PORT="ssh").returncode == 2
    assert script(ASC_AUTHENTIK_API_TOKEN=None).returncode == 1
    with site.faults.authentik_down():
        done = script("--rotate-credentials")
        assert done.returncode == 3
        assert done.stderr.endswith("\nThe cause may pass by itself: run the command again later.\n")
    assert script().returncode == 0
    with site.faults.certificate_authority_down():
        done = script()
        assert done.returncode == 3
        assert "\nAccess works until 20" in done.stderr
    done = script(ALL_PROXY="socks5://127.0.0.1:1080", ASC_OIDC_TOKEN_URL="https://auth.example.test/token/")
    assert done.returncode == 1
    assert done.stderr.startswith("The proxy ALL_PROXY=socks5://127.0.0.1:1080 cannot be used: ")


def test_no_secret_is_printed(script: Script, variables: dict[str, str], site: SimulatedSite) -> None:
    password = site.authentik.create_token(access.USER, "app_password", "by-hand")
    runs = [
        script("--rotate-credentials", "--refresh-step-after-rotate"),
        script("--rotate-credentials", ASC_AUTHENTIK_API_TOKEN=password),
        script("--status"),
        script("--status", "--json"),
        script(ASC_OIDC_CLIENT_ID="nobody", ASC_OIDC_APP_PASSWORD=password),
    ]
    secrets = access.secrets_of(site.authentik)
    assert len(secrets) > 5
    for done in runs:
        assert not [secret for secret in secrets if secret in done.stdout + done.stderr]


def test_no_secret_is_in_a_command_line_or_a_file_that_others_can_read(
    site: SimulatedSite, variables: dict[str, str], tmp_path: Path
) -> None:
    with access.watch_command_lines() as seen:
        process = access.start(access.KILLED_AT_STEP, variables, "1000", "now", "now")
        out, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    secrets = access.secrets_of(site.authentik)
    assert any("dagster_sbatch.auth" in line for line in seen)  # it does look
    assert not [secret for secret in secrets if any(secret in line for line in (*seen, out, errors))]
    for path in access.key_of(variables).parent.iterdir():
        text, mode = path.read_text(errors="replace"), path.stat().st_mode & 0o777
        if mode & 0o077:
            assert not [secret for secret in secrets if secret in text]
            assert "PRIVATE KEY" not in text
