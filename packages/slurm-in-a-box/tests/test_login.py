"""Logging in: the chain from an app password to a shell, and every way that must be refused."""

import shutil
import subprocess
import time
import urllib.error
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import SSHCertificate, load_ssh_public_identity

from slurm_in_a_box import (
    CERTIFICATE_USER,
    LOGIN_NAME,
    PLAIN_KEY_USER,
    TCSH_USER,
    SimulatedSite,
    User,
    wait_until,
)
from slurm_in_a_box.layout import LOGIN_NODES

pytestmark = pytest.mark.cluster


def log_in(
    slurm_site: SimulatedSite, user: User, key: Path, command: str = "hostname"
) -> subprocess.CompletedProcess[str]:
    """Run a command with OpenSSH's client under strict host-key checking."""
    arguments = slurm_site.login.ssh_command(user, key, command)
    return subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return tmp_path / "id_test"


def certificate(key: Path) -> SSHCertificate:
    """Read the certificate that belongs to a key."""
    identity = load_ssh_public_identity(Path(f"{key}-cert.pub").read_bytes())
    assert isinstance(identity, SSHCertificate)
    return identity


def test_chain_from_bootstrap_token_to_logged_in_shell(slurm_site: SimulatedSite, key: Path) -> None:
    environment = slurm_site.environment()
    bearer = {"Authorization": f"Bearer {environment['ASC_AUTHENTIK_API_TOKEN']}"}
    with httpx.Client(base_url=environment["ASC_AUTHENTIK_API_BASE"], headers=bearer) as authentik:
        tokens = "/api/v3/core/tokens/"
        authentik.post(tokens, json={"identifier": "shell", "intent": "app_password"}).raise_for_status()
        app_password = authentik.get(f"{tokens}shell/view_key/").json()["key"]
    signed = slurm_site.certificate_authority.sign_with_step(key, slurm_site.id_token(app_password))
    assert signed.returncode == 0, signed.stderr
    shell = log_in(slurm_site, CERTIFICATE_USER, key, "id -un; sinfo --noheader | wc -l")
    assert shell.stdout.splitlines()[1:] == ["xy12345", "2"]
    assert certificate(key).valid_principals == [b"xy12345", b"xy12345@sim.test"]


def test_bashrc_prints_on_both_streams(slurm_site: SimulatedSite) -> None:
    shell = subprocess.run(slurm_site.login_command("true"), capture_output=True, text=True, check=True, timeout=60)
    assert "node hours left" in shell.stdout
    assert "maintenance" in shell.stderr


def test_both_login_nodes_answer_at_one_address_with_different_keys(slurm_site: SimulatedSite, key: Path) -> None:
    slurm_site.mint_certificate(key)
    seen: set[str] = set()

    def both() -> bool:
        seen.add(log_in(slurm_site, CERTIFICATE_USER, key).stdout.splitlines()[-1])
        return len(seen) == 2

    wait_until(both, "both login nodes")
    assert seen == {"login01", "login02"}
    host_keys = {(slurm_site.layout.etc / "ssh" / node / "ssh_host_ed25519_key.pub").read_bytes() for node in seen}
    assert len(host_keys) == 2


def test_login_nodes_have_addresses_of_their_own_under_the_same_authority(slurm_site: SimulatedSite, key: Path) -> None:
    slurm_site.mint_certificate(key)
    for node in LOGIN_NODES:
        command = slurm_site.login.ssh_command(CERTIFICATE_USER, key, "hostname")
        command[command.index(slurm_site.login.address)] = slurm_site.machines[node.hostname].address
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout.splitlines()[-1] == node.hostname


def test_known_hosts_has_one_line_and_host_of_another_authority_is_refused(
    slurm_site: SimulatedSite, key: Path
) -> None:
    line = slurm_site.login.known_hosts.read_text(encoding="utf-8")
    assert line.startswith("@cert-authority ")
    assert line.count("\n") == 1
    assert LOGIN_NAME in line
    slurm_site.mint_certificate(key)
    command = slurm_site.login.ssh_command(CERTIFICATE_USER, key, "hostname")
    other = key.with_name("known_hosts")
    user_authority = Path(f"{slurm_site.certificate_authority.authorities.user_key}.pub").read_text(encoding="utf-8")
    other.write_text(f"@cert-authority {slurm_site.login.address} {user_authority}", encoding="utf-8")
    command = [argument.replace(str(slurm_site.login.known_hosts), str(other)) for argument in command]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 255
    assert "Host key verification failed" in done.stderr


@pytest.mark.parametrize(
    ("validity", "principal"),
    [("-2h:-1h", CERTIFICATE_USER), ("+1h:+2h", CERTIFICATE_USER), ("-1m:+1h", TCSH_USER)],
    ids=["expired", "not yet valid", "another user's"],
)
def test_wrong_certificates_are_refused(slurm_site: SimulatedSite, key: Path, validity: str, principal: User) -> None:
    slurm_site.mint_certificate(key, principal, validity)
    refused = log_in(slurm_site, CERTIFICATE_USER, key)
    assert refused.returncode == 255
    assert "Permission denied (publickey,keyboard-interactive)" in refused.stderr


def test_plain_key_is_refused_unless_the_user_is_the_plain_key_one(slurm_site: SimulatedSite) -> None:
    shutil.copy(
        f"{slurm_site.login.plain_key}.pub", slurm_site.layout.home / CERTIFICATE_USER.name / ".ssh/authorized_keys"
    )
    refused = log_in(slurm_site, CERTIFICATE_USER, slurm_site.login.plain_key)
    assert "Permission denied (publickey,keyboard-interactive)" in refused.stderr
    assert log_in(slurm_site, PLAIN_KEY_USER, slurm_site.login.plain_key).returncode == 0


def test_user_whose_shell_is_not_bash(slurm_site: SimulatedSite) -> None:
    command = slurm_site.login_command("echo $shell", user=TCSH_USER)
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "/bin/tcsh\n"


def test_certificate_of_seconds_expires(slurm_site: SimulatedSite, key: Path) -> None:
    slurm_site.certificate_authority.set_validity("5s")
    app_password = slurm_site.authentik.create_token(CERTIFICATE_USER.name, "app_password", "short")
    signed = slurm_site.certificate_authority.sign_with_step(key, slurm_site.id_token(app_password))
    assert signed.returncode == 0, signed.stderr
    short = certificate(key)
    assert short.valid_before - time.time() <= 5
    wait_until(lambda: time.time() > short.valid_before, "the end of the certificate", 10)
    assert "Permission denied (publickey,keyboard-interactive)" in log_in(slurm_site, CERTIFICATE_USER, key).stderr


def test_step_ca_takes_a_token_once(slurm_site: SimulatedSite, key: Path) -> None:
    app_password = slurm_site.authentik.create_token(CERTIFICATE_USER.name, "app_password", "twice")
    token = slurm_site.id_token(app_password)
    assert slurm_site.certificate_authority.sign_with_step(key, token).returncode == 0
    again = slurm_site.certificate_authority.sign_with_step(key.with_name("again"), token)
    assert again.returncode == 1
    assert "lacked necessary authorization" in again.stderr


def test_expired_app_password_gets_no_token(slurm_site: SimulatedSite) -> None:
    slurm_site.authentik.set_lifetimes(token=30 * 24 * 3600)
    app_password = slurm_site.authentik.create_token(CERTIFICATE_USER.name, "app_password", "month")
    assert slurm_site.id_token(app_password)
    slurm_site.authentik.advance_clock(31 * 24 * 3600)
    with pytest.raises(urllib.error.HTTPError, match="400") as refused:
        slurm_site.id_token(app_password)
    assert b"invalid_grant" in refused.value.read()


def test_environment_file_holds_the_documents_names_an_interpreter_and_leave_for_plain_http(
    slurm_site: SimulatedSite,
) -> None:
    assert set(slurm_site.environment()) <= {
        "SLURM_PYTHON",
        "SLURM_EDGE_NODE_HOST",
        "SLURM_EDGE_NODE_USER",
        "SLURM_EDGE_NODE_KEY_PATH",
        "SLURM_DEPLOYMENT_BASE_PATH",
        "SLURM_PARTITION",
        "SLURM_QOS",
        "SLURM_SUPERCOMPUTER_SITE",
        "DAGSTER_DEPLOYMENT",
        "ASC_ALLOW_HTTP",
        "ASC_OIDC_CLIENT_ID",
        "ASC_OIDC_USERNAME",
        "ASC_OIDC_TOKEN_URL",
        "ASC_OIDC_APP_PASSWORD",
        "ASC_AUTHENTIK_API_BASE",
        "ASC_AUTHENTIK_CREDENTIALS_FILE",
        "ASC_AUTHENTIK_API_TOKEN",
        "ASC_AUTHENTIK_TOKEN_IDENTIFIER",
        "ASC_STEP_CA_URL",
        "ASC_STEP_FINGERPRINT",
    }
