"""From an authentik token to a certificate that opens the login node: real step-ca, real sshd, both ways of asking."""

import json
import logging
import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from resources import SUPERCOMPUTER_SITE_OVERRIDES
from resources.auth import (
    AccessError,
    BootstrapError,
    ClockError,
    MisconfiguredError,
    RefusedError,
    UnavailableError,
    check_health,
    ensure_certificate,
    refresh,
)
from resources.auth.certificate import certificate_path, public_path
from resources.auth.http import Http
from resources.settings import ROOT, load_settings
from resources.ssh import connect
from tests import access
from tests.simulated_site import CERTIFICATE_USER, Disturbance, SimulatedSite

pytestmark = pytest.mark.cluster
DOCUMENT = ROOT / "envs" / ".env.musica.example"


@pytest.fixture
def variables(site: SimulatedSite) -> dict[str, str]:
    """The document's, with a bootstrap token."""
    site.authentik.set_lifetimes(token=30 * access.DAY)
    return site.environment()


@pytest.fixture
def without_secret(variables: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name != "ASC_AUTHENTIK_API_TOKEN"}


@pytest.fixture(params=["http", "step"])
def client(request: pytest.FixtureRequest, site: SimulatedSite, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """ASC_STEP_CLIENT, with the real `step` on PATH."""
    monkeypatch.setenv("PATH", f"{Path(site.certificate_authority.step).parent}{os.pathsep}{os.environ['PATH']}")
    return {"ASC_STEP_CLIENT": request.param}


def key_of(variables: dict[str, str]) -> Path:
    return Path(variables["SLURM_EDGE_NODE_KEY_PATH"])


def logs_in(site: SimulatedSite, variables: dict[str, str]) -> bool:
    command = site.login.ssh_command(CERTIFICATE_USER, key_of(variables), "true")
    return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0


def age_certificate(site: SimulatedSite, variables: dict[str, str]) -> None:
    """Put one in the place of the certificate that is valid, and due."""
    path = site.mint_certificate(key_of(variables), validity="-50m:+10m")
    begun = time.time() - 50 * 60
    os.utime(path, (begun, begun))


# What opens the login node


def test_each_of_the_four_ways_is_enough(
    site: SimulatedSite, variables: dict[str, str], without_secret: dict[str, str], client: dict[str, str]
) -> None:
    key, file = key_of(variables), Path(variables["ASC_AUTHENTIK_CREDENTIALS_FILE"])
    # 3: an API token, which makes the credentials file
    refresh(access.settings_of({**variables, **client}))
    assert logs_in(site, variables)
    # 1: a valid certificate, and nothing else
    stored = file.read_text()
    file.unlink()
    assert ensure_certificate(access.settings_of({**without_secret, **client}))
    assert not file.exists()
    # 2: stored credentials, and nothing else
    file.touch(mode=0o600)
    file.write_text(stored)
    certificate_path(key).unlink()
    report = refresh(access.settings_of({**without_secret, **client}))
    assert (report.issued_with, report.rotated_with) == ("stored", None)
    assert logs_in(site, variables)
    # 4: an app password, and nothing else
    file.unlink()
    certificate_path(key).unlink()
    password = {"ASC_OIDC_APP_PASSWORD": site.authentik.create_token(access.USER, "app_password", "by-hand")}
    settings = access.settings_of({**without_secret, **client, **password})
    assert refresh(settings).issued_with == "direct"
    assert logs_in(site, variables)
    assert not file.exists()
    health = check_health(settings)
    assert health.verdict == "ok"
    assert any("not self-renewing, ends with the app password" in note for note in health.notes)


def test_a_good_certificate_is_returned_without_asking_anybody(
    site: SimulatedSite, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = access.settings_of(variables)
    first = ensure_certificate(settings)
    monkeypatch.setattr(Http, "call", None)
    assert first is not None
    assert ensure_certificate(settings) == first
    assert first.principals == ("xy12345", "xy12345@sim.test")


def test_the_document_filled_in_and_otherwise_verbatim_works(
    site: SimulatedSite, variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = []
    for line in DOCUMENT.read_text().splitlines():
        name, is_set, _ = line.partition("=")
        ours = variables.get(name, "") if name not in ("SLURM_EDGE_NODE_KEY_PATH", *_WITH_HOME) else line.split("=")[1]
        lines.append(f"{name}={ours}" if is_set and not line.startswith("#") else line)
    path = tmp_path / "envs" / ".env.musica"
    path.parent.mkdir()
    path.touch(mode=0o600)
    path.write_text("\n".join(lines))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DAGSTER_DEPLOYMENT", "production_supercomputer")
    monkeypatch.setenv("ASC_ALLOW_HTTP", variables["ASC_ALLOW_HTTP"])
    settings = load_settings(SUPERCOMPUTER_SITE_OVERRIDES, tmp_path)
    assert ensure_certificate(settings)
    home = tmp_path / "home"
    assert {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()} == {
        ".ssh/id_musica",
        ".ssh/id_musica.pub",
        ".ssh/id_musica-cert.pub",
        ".config/dagster-slurm/musica-auth.env",
        ".config/dagster-slurm/musica-auth.env.lock",
    }
    assert (home / ".ssh").stat().st_mode & 0o777 == 0o700
    assert logs_in(site, {"SLURM_EDGE_NODE_KEY_PATH": str(home / ".ssh/id_musica")})


_WITH_HOME = ("ASC_AUTHENTIK_CREDENTIALS_FILE",)


def test_what_a_person_got_with_step_is_taken_as_it_is(
    site: SimulatedSite, without_secret: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    password = site.authentik.create_token(access.USER, "app_password", "by-hand")
    done = site.certificate_authority.sign_with_step(key_of(without_secret), site.id_token(password))
    assert done.returncode == 0, done.stderr
    before = {path: path.read_bytes() for path in key_of(without_secret).parent.glob("id_musica*")}
    assert len(before) == 3
    monkeypatch.setattr(Http, "call", None)
    settings = access.settings_of(without_secret)
    assert ensure_certificate(settings)
    assert {path: path.read_bytes() for path in before} == before
    assert "not self-renewing, ends at" in check_health(settings).summary


def test_the_key_that_step_made_is_kept_when_its_certificate_is_renewed(
    site: SimulatedSite, variables: dict[str, str], client: dict[str, str]
) -> None:
    password = site.authentik.create_token(access.USER, "app_password", "by-hand")
    done = site.certificate_authority.sign_with_step(key_of(variables), site.id_token(password))
    assert done.returncode == 0, done.stderr
    key, public = key_of(variables).read_bytes(), public_path(key_of(variables)).read_bytes()
    first = certificate_path(key_of(variables)).read_bytes()
    assert refresh(access.settings_of({**variables, **client}), certificate="now").issued_with == "stored"
    assert (key_of(variables).read_bytes(), public_path(key_of(variables)).read_bytes()) == (key, public)
    assert certificate_path(key_of(variables)).read_bytes() != first
    assert logs_in(site, variables)


def test_both_clients_get_the_same_certificate(
    site: SimulatedSite, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(site.certificate_authority.step).parent}{os.pathsep}{os.environ['PATH']}")
    found = []
    for client in ("http", "step"):
        settings = access.settings_of({**variables, "ASC_STEP_CLIENT": client})
        certificate = refresh(settings, certificate="now").certificate
        assert certificate
        listing = subprocess.run(
            ["ssh-keygen", "-L", "-f", certificate.path], capture_output=True, text=True, check=True
        ).stdout
        found.append([line for line in listing.splitlines() if "Serial" not in line and "Valid" not in line])
    assert found[0] == found[1]


def test_a_due_certificate_is_renewed_before_it_ends(site: SimulatedSite, variables: dict[str, str]) -> None:
    age_certificate(site, variables)
    certificate = ensure_certificate(access.settings_of(variables))
    assert certificate
    assert (certificate.valid_before - datetime.now(UTC)).total_seconds() > 15 * 3600


# No way in


def test_without_any_way_it_says_so_before_it_asks_anybody(
    site: SimulatedSite, without_secret: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Http, "call", None)
    site.mint_certificate(key_of(without_secret), validity="-2h:-1h")
    file = Path(without_secret["ASC_AUTHENTIK_CREDENTIALS_FILE"])
    file.touch(mode=0o600)
    file.write_text("ASC_AUTHENTIK_API_TOKEN=test-api-token\nASC_AUTHENTIK_API_TOKEN_EXPIRES_AT=2026-01-02T03:04:05Z\n")
    for function in (ensure_certificate, refresh):
        with pytest.raises(BootstrapError) as error:
            function(access.settings_of(without_secret))
        text = str(error.value)
        for words in (
            "1. a valid certificate\n     now: expired at 20",
            "its API token expired at 2026-01-02 03:04:05 UTC and it has no app password",
            "3. an API token in ASC_AUTHENTIK_API_TOKEN\n     now: not set",
            "4. an app password in ASC_OIDC_APP_PASSWORD\n     now: not set",
            "step ssh certificate 'your.email@example.com'",
            "scripts/refresh_step_auth.py --rotate-credentials --refresh-step-after-rotate",
        ):
            assert words in text
        assert "test-api-token" not in text
    file.chmod(0o644)
    with pytest.raises(BootstrapError, match=r"musica-auth\.env can be read by others \(mode 0644\):  chmod 600 "):
        ensure_certificate(access.settings_of(without_secret))
    assert check_health(access.settings_of(without_secret)).verdict == "broken"


def test_variables_that_are_missing_are_named(without_secret: dict[str, str]) -> None:
    lacking = {name: value for name, value in without_secret.items() if name not in ("ASC_OIDC_CLIENT_ID",)}
    settings = access.settings_of({**lacking, "ASC_OIDC_APP_PASSWORD": "test-app-password"})
    with pytest.raises(BootstrapError, match=r"4\. an app password.*\n     now: ASC_OIDC_CLIENT_ID not set") as error:
        ensure_certificate(settings)
    assert "Ways 2 to 4 need this besides: ASC_OIDC_CLIENT_ID not set" in str(error.value)


def test_refused_secrets_are_told_way_by_way(without_secret: dict[str, str], site: SimulatedSite) -> None:
    password = site.authentik.create_token(access.USER, "app_password", "by-hand")
    wrong = {"ASC_AUTHENTIK_API_TOKEN": password, "ASC_OIDC_APP_PASSWORD": "test-wrong-password"}
    with pytest.raises(BootstrapError) as error:
        ensure_certificate(access.settings_of({**without_secret, **wrong}))
    text = str(error.value)
    assert (
        "3. an API token in ASC_AUTHENTIK_API_TOKEN\n     now: ASC_AUTHENTIK_API_TOKEN: refused, since it is an App"
        in text
    )
    assert "4. an app password in ASC_OIDC_APP_PASSWORD\n     now: ASC_OIDC_APP_PASSWORD: authentik refused it" in text
    assert password not in text
    assert "test-wrong-password" not in text


def test_a_file_that_cannot_renew_any_more_is_told_while_the_certificate_works(
    site: SimulatedSite, without_secret: dict[str, str]
) -> None:
    site.mint_certificate(key_of(without_secret))
    file = Path(without_secret["ASC_AUTHENTIK_CREDENTIALS_FILE"])
    file.write_text("ASC_OIDC_APP_PASSWORD=test-app-password\n")
    file.chmod(0o644)
    settings = access.settings_of(without_secret)
    assert ensure_certificate(settings)
    health = check_health(settings)
    assert health.verdict == "failing"
    assert "nothing can be renewed" in health.summary
    assert "chmod 600" in health.summary


def test_a_folder_that_cannot_be_written_to_keeps_what_works(
    site: SimulatedSite, variables: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    settings = access.settings_of({**variables, "ASC_AUTHENTIK_CREDENTIALS_FILE": str(tmp_path / "file" / "auth.env")})
    age_certificate(site, variables)
    report = refresh(settings)
    assert report.certificate
    assert "the lock" in report.warnings[0]
    certificate_path(key_of(variables)).unlink()
    with pytest.raises(BootstrapError, match="cannot be read: Not a directory"):
        ensure_certificate(settings)


def test_a_plain_key_needs_nothing(site: SimulatedSite, without_secret: dict[str, str]) -> None:
    plain = {name: value for name, value in without_secret.items() if not name.startswith("ASC_")}
    settings = access.settings_of({**plain, "SLURM_EDGE_NODE_KEY_PATH": str(site.login.plain_key)})
    assert ensure_certificate(settings) is None
    assert check_health(settings).verdict == "ok"
    with pytest.raises(BootstrapError):  # no key either: there is nothing to log in with
        ensure_certificate(access.settings_of(plain))


def test_a_stored_app_password_that_was_deleted_is_replaced(variables: dict[str, str], site: SimulatedSite) -> None:
    settings = access.settings_of(variables)
    refresh(settings)
    from resources.auth.credentials import CredentialsFile

    stored = CredentialsFile(settings.credentials_file).read()
    assert stored
    assert stored.app_password
    access.delete_token(settings, stored, stored.app_password.identifier)
    report = refresh(settings, certificate="now")
    assert (report.rotated_with, report.issued_with) == ("stored", "stored")


# Servers that are away, wrong or of another time


def test_a_ca_that_is_down_keeps_what_works(
    site: SimulatedSite, variables: dict[str, str], client: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    settings = access.settings_of({**variables, **client})
    with site.faults.certificate_authority_down():
        with pytest.raises(UnavailableError, match=rf"{site.certificate_authority.url}.*refused"):
            ensure_certificate(settings)
        passwords = [each.body for each in site.authentik.requests() if each.path.startswith("/application/o/token/")]
        assert len(passwords) >= 3  # a fresh token for each try
        age_certificate(site, variables)
        with caplog.at_level(logging.WARNING, "resources.auth"):
            assert ensure_certificate(settings)
        assert not caplog.messages  # it has just failed, and is not asked again at once
        report = refresh(settings)
        assert report.issued_with is None
        assert "could not be renewed" in report.warnings[0]
        health = check_health(settings)
        assert health.verdict == "failing"
        assert health.failing["certificate"].count == 2
    assert refresh(settings).issued_with == "stored"
    assert check_health(settings).verdict == "ok"


def test_an_authentik_that_is_down_keeps_what_works(
    site: SimulatedSite, variables: dict[str, str], client: dict[str, str]
) -> None:
    settings = access.settings_of({**variables, **client})
    refresh(settings)
    age_certificate(site, variables)
    with site.faults.authentik_down():
        report = refresh(settings)
        assert report.certificate
        assert report.issued_with is None
        assert site.identity_provider.url in report.warnings[0]
        certificate_path(key_of(variables)).unlink()
        with pytest.raises(UnavailableError):
            ensure_certificate(settings)
    assert refresh(settings).issued_with == "stored"


@pytest.mark.parametrize("kind", ["slow", "late", "error", "lost"])
def test_an_authentik_that_is_slow_or_fails_once_is_borne(
    site: SimulatedSite, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("resources.auth.http.TRY_SECONDS", 0.5)
    disturbance = Disturbance(kind, seconds=1, path="/application/o/token/", times=1)  # type: ignore[arg-type]
    with site.faults.authentik_disturbed(disturbance):
        assert refresh(access.settings_of(variables)).issued_with == "stored"


def test_clocks_that_differ_are_told_as_such(
    site: SimulatedSite, variables: dict[str, str], client: dict[str, str]
) -> None:
    settings = access.settings_of({**variables, **client})
    refresh(settings)
    age_certificate(site, variables)
    site.authentik.set_jwt_skew(120)
    report = refresh(settings)
    assert report.certificate
    assert report.issued_with is None
    assert "the clocks differ: authentik issued the token at" in report.warnings[0]
    certificate_path(key_of(variables)).unlink()
    with pytest.raises(ClockError) as error:
        ensure_certificate(settings)
    assert error.value.temporary
    site.authentik.set_jwt_skew(0)
    assert refresh(settings).issued_with == "stored"


def test_a_machine_whose_clock_is_wrong_is_told(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, site: SimulatedSite
) -> None:
    from datetime import timedelta

    from resources.auth import clock

    monkeypatch.setattr(clock, "now", lambda: datetime.now(UTC) - timedelta(hours=2))
    with pytest.raises(ClockError, match=r"but this machine has .*: set its clock"):
        ensure_certificate(access.settings_of(variables))


def test_a_wrong_fingerprint_stops_before_the_token_leaves(
    site: SimulatedSite, variables: dict[str, str], client: dict[str, str]
) -> None:
    refresh(access.settings_of(variables), certificate="no")
    wrong = {"ASC_STEP_FINGERPRINT": "0" * 64}
    with pytest.raises(MisconfiguredError, match="ASC_STEP_FINGERPRINT=0000"):
        ensure_certificate(access.settings_of({**variables, **client, **wrong}))


def test_a_ca_with_another_root_than_it_says_is_not_spoken_to(
    site: SimulatedSite, variables: dict[str, str], tmp_path: Path, client: dict[str, str]
) -> None:
    """Somebody in between answers with a root of his own."""
    server = _Impostor(tmp_path, site)
    try:
        with pytest.raises(MisconfiguredError, match="somebody is between you and it"):
            ensure_certificate(access.settings_of({**variables, **client, "ASC_STEP_CA_URL": server.url}))
        assert server.posts == 0
    finally:
        server.stop()


class _Impostor:
    """Answers `/root/...` with the certificate that it serves itself."""

    def __init__(self, folder: Path, site: SimulatedSite) -> None:
        from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

        key, certificate = folder / "key.pem", folder / "certificate.pem"
        made = ["openssl", "req", "-x509", "-newkey", "ed25519", "-nodes", "-days", "2", "-subj", "/CN=impostor"]
        subprocess.run([*made, "-keyout", key, "-out", certificate], check=True, capture_output=True)
        impostor = self
        self.posts = 0

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = json.dumps({"ca": certificate.read_text()}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                impostor.posts += 1

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def test_wrong_addresses_and_client_ids_are_told_as_such(variables: dict[str, str], site: SimulatedSite) -> None:
    refresh(access.settings_of(variables), certificate="no")
    base = site.identity_provider.url
    for wrong, words in (
        ({"ASC_OIDC_CLIENT_ID": "nobody"}, "authentik does not know ASC_OIDC_CLIENT_ID=nobody"),
        ({"ASC_OIDC_TOKEN_URL": f"{base}/application/o/other/"}, "ASC_OIDC_TOKEN_URL="),
        ({"ASC_STEP_CA_URL": base}, "is it the right certificate authority"),
        ({"ASC_OIDC_USERNAME": "somebody"}, "belongs to 'xy12345', not to ASC_OIDC_USERNAME=somebody"),
    ):
        with pytest.raises(AccessError) as error:
            refresh(access.settings_of({**variables, **wrong}), rotation="now", certificate="now")
        assert words in str(error.value)
        assert not error.value.temporary


def test_a_certificate_for_other_login_names_is_told_with_both(
    site: SimulatedSite, variables: dict[str, str], client: dict[str, str]
) -> None:
    site.authentik.change_user(access.USER, email="first.last@sim.test")
    try:
        settings = access.settings_of({**variables, **client})
        report = refresh(settings)
    finally:
        site.authentik.change_user(access.USER, email=access.EMAIL)
    assert any(
        "for the login names firstlast, first.last, first.last@sim.test, not for SLURM_EDGE_NODE_USER=xy12345"
        in warning
        for warning in report.warnings
    ), report.warnings
    assert any("not for SLURM_EDGE_NODE_USER=xy12345" in note for note in check_health(settings).notes)


def test_a_user_without_email_is_told(site: SimulatedSite, variables: dict[str, str]) -> None:
    site.authentik.change_user(access.USER, email="")
    try:
        with pytest.raises(MisconfiguredError, match="lacks email"):
            ensure_certificate(access.settings_of(variables))
    finally:
        site.authentik.change_user(access.USER, email=access.EMAIL)


def test_without_step_on_path_it_is_told(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MisconfiguredError, match="ASC_STEP_CLIENT=step, but there is no `step` on PATH"):
        ensure_certificate(access.settings_of({**variables, "ASC_STEP_CLIENT": "step"}))


def test_a_refusal_of_the_ca_is_told_and_costs_few_tokens(
    site: SimulatedSite, variables: dict[str, str], client: dict[str, str]
) -> None:
    settings = access.settings_of({**variables, **client})
    refresh(settings, certificate="no")
    key = key_of(variables)
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-b", "1024", "-N", "", "-f", key], check=True)
    before, served = key.read_bytes(), len(site.authentik.requests())
    with pytest.raises(RefusedError, match="at least 2048 bits") as error:
        ensure_certificate(settings)
    assert not error.value.temporary
    tokens = [each for each in site.authentik.requests()[served:] if each.path.startswith("/application/o/token/")]
    assert 1 <= len(tokens) <= 3
    assert key.read_bytes() == before
    assert not certificate_path(key).exists()


def test_a_token_that_has_expired_when_it_reaches_the_ca_is_told(
    site: SimulatedSite, variables: dict[str, str], client: dict[str, str]
) -> None:
    settings = access.settings_of({**variables, **client})
    refresh(settings, certificate="no")
    site.authentik.set_lifetimes(access_token=-600)
    with pytest.raises(ClockError, match="the clocks differ"):
        ensure_certificate(settings)


# Many at once, and for long

ENSURE = """\
import sys
from resources import SUPERCOMPUTER_SITE_OVERRIDES
from resources.auth import ensure_certificate
from resources.settings import load_settings
settings = load_settings(SUPERCOMPUTER_SITE_OVERRIDES)
sys.stdin.readline()
print(ensure_certificate(settings).valid_before)
"""


def test_processes_and_threads_at_once_ask_for_one_certificate(site: SimulatedSite, variables: dict[str, str]) -> None:
    processes = [access.start(ENSURE, variables) for _ in range(8)]
    settings = access.settings_of(variables)
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(ensure_certificate(settings))) for _ in range(8)]
    for thread in threads:
        thread.start()
    said = access.release(processes)
    for thread in threads:
        thread.join()
    assert len(set(said)) == 1
    assert len(found) == 8
    assert len(set(found)) == 1
    assert len(access.made_here(site.authentik)) == 2
    passwords = [each for each in site.authentik.requests() if each.path.startswith("/application/o/token/")]
    assert len(passwords) == 2  # one proves the new app password, one is for the certificate


def test_certificates_of_twenty_seconds_are_kept_alive_for_three_minutes(
    site: SimulatedSite, variables: dict[str, str], client_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One connection stays open all the time, others come and go; nobody is ever without a valid certificate."""
    monkeypatch.setenv("HOME", str(client_home))
    site.certificate_authority.set_validity("20s")
    settings, ends = access.settings_of(variables), set()
    begun = time.monotonic()
    with connect(settings, ensure_certificate) as lasting:
        while time.monotonic() < begun + 180:
            with connect(settings, ensure_certificate) as passing:
                assert passing.run("true", hide=True).ok
            certificate = ensure_certificate(settings)
            assert certificate
            assert certificate.valid(datetime.now(UTC))
            ends.add(certificate.valid_before)
            answer = lasting.run("sleep 1; echo still here", hide=True)  # paces the loop, too
            assert answer.stdout.endswith("still here\n")
    assert 11 <= len(ends) <= 16  # each is renewed after two thirds of its life


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
    file, key = Path(variables["ASC_AUTHENTIK_CREDENTIALS_FILE"]), key_of(variables)
    done = script("--rotate-credentials")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"Replaced both secrets in {file} with the bootstrap API token.\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert not certificate_path(key).exists()  # stops before talking to step
    done = script(ASC_AUTHENTIK_API_TOKEN=None)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(
        f"New certificate {certificate_path(key)}, got with the stored app password: for xy12345"
    )
    assert logs_in(site, variables)
    first = certificate_path(key).read_text()
    done = script("--rotate-credentials", "--refresh-step-after-rotate", ASC_AUTHENTIK_API_TOKEN=None)
    assert done.returncode == 0
    assert "with the stored API token" in done.stdout
    assert "New certificate" in done.stdout
    assert certificate_path(key).read_text() != first
    assert len(access.made_here(site.authentik)) == 2


@pytest.mark.parametrize("zone", ["Europe/Vienna", "America/New_York", "UTC"])
def test_times_are_right_in_every_time_zone(script: Script, zone: str) -> None:
    assert script(TZ=zone).returncode == 0
    items = json.loads(script("--status", "--json", TZ=zone).stdout)["items"]
    assert items["certificate"]["remaining_hours"] == pytest.approx(16, abs=0.1)
    assert items["api_token"]["remaining_hours"] == pytest.approx(30 * 24, abs=0.1)
    assert items["certificate"]["valid_until"].endswith("+00:00")


def test_the_script_tells_how_access_is(script: Script, variables: dict[str, str], site: SimulatedSite) -> None:
    done = script("--status", ASC_AUTHENTIK_API_TOKEN=None)
    assert done.returncode == 1
    assert "broken. No access to" in done.stdout
    assert script().returncode == 0
    done = script("--status")
    assert done.returncode == 0
    assert "xy12345@" in done.stdout
    assert ": ok. next refresh at 20" in done.stdout
    for words in ("certificate", "API token", "app password", "15 h 59 min", "29 d 23 h"):
        assert words in done.stdout
    document = json.loads(script("--status", "--json").stdout)
    assert document["verdict"] == "ok"
    assert document["items"]["certificate"]["remaining_hours"] == pytest.approx(16, abs=0.1)
    assert document["items"]["api_token"]["remaining_hours"] == pytest.approx(30 * 24, abs=0.1)
    age_certificate(site, variables)
    with site.faults.certificate_authority_down():
        assert refresh(access.settings_of(variables)).warnings
    done = script("--status")
    assert done.returncode == 3
    assert "failing. the certificate could not be renewed since" in done.stdout


def test_the_script_ends_with_the_codes_of_its_help(
    script: Script, variables: dict[str, str], site: SimulatedSite
) -> None:
    for wrong in (["--refresh-step-after-rotate"], ["--json"], ["--status", "--rotate-credentials"], ["--no-such"]):
        assert script(*wrong).returncode == 2
    assert script(SLURM_EDGE_NODE_PORT="ssh").returncode == 2
    assert script(ASC_AUTHENTIK_API_TOKEN=None).returncode == 1
    with site.faults.authentik_down():
        assert script("--rotate-credentials").returncode == 3


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
    site: SimulatedSite, variables: dict[str, str], client: dict[str, str], tmp_path: Path
) -> None:
    step, arguments = tmp_path / "step", tmp_path / "arguments"  # it is too short-lived to be seen each time
    step.write_text(f'#!/bin/sh\necho "step $*" > {arguments}\nexec {site.certificate_authority.step} "$@"\n')
    step.chmod(0o755)
    chosen = {**variables, **client, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    with access.watch_command_lines() as seen:
        process = access.start(access.KILLED_AT_STEP, chosen, "1000", "now", "now")
        out, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    secrets = access.secrets_of(site.authentik)
    assert any("resources.auth" in line for line in seen)  # it does look
    if client["ASC_STEP_CLIENT"] == "step":
        seen.add(arguments.read_text())
        assert any(line.startswith("step ssh certificate ") for line in seen)
    assert not [secret for secret in secrets if any(secret in line for line in (*seen, out, errors))]
    for path in key_of(variables).parent.iterdir():
        text, mode = path.read_text(errors="replace"), path.stat().st_mode & 0o777
        if mode & 0o077:
            assert not [secret for secret in secrets if secret in text]
            assert "PRIVATE KEY" not in text
