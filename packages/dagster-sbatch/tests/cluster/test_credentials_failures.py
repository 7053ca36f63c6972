"""Servers that are away, wrong or of another time: what works is kept, and who has to act is named."""

import ipaddress
import json
import logging
import ssl
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dagster_sbatch import clock
from dagster_sbatch.auth import (
    AccessError,
    BootstrapError,
    ClockError,
    RejectedError,
    UnavailableError,
    check_health,
    ensure_certificate,
    refresh,
)
from dagster_sbatch.auth.keys import certificate_path
from slurm_in_a_box import Disturbance, SimulatedSite
from support import access

pytestmark = pytest.mark.cluster


def test_a_folder_that_cannot_be_written_to_keeps_what_works(
    site: SimulatedSite, variables: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    settings = access.settings_of({**variables, "ASC_AUTHENTIK_CREDENTIALS_FILE": str(tmp_path / "file" / "auth.env")})
    access.age_certificate(site, variables)
    report = refresh(settings)
    assert report.certificate
    assert "cannot be used" in report.warnings[0]
    certificate_path(access.key_of(variables)).unlink()
    with pytest.raises(BootstrapError, match="Not a directory"):
        ensure_certificate(settings)


def test_a_ca_that_is_down_keeps_what_works(
    site: SimulatedSite, variables: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    settings = access.settings_of(variables)
    with site.faults.certificate_authority_down():
        with pytest.raises(UnavailableError, match=rf"{site.certificate_authority.url}.*refused"):
            ensure_certificate(settings)
        passwords = [each.body for each in site.authentik.requests() if each.path.startswith("/application/o/token/")]
        assert len(passwords) >= 3  # a fresh token for each try
        access.age_certificate(site, variables)
        with caplog.at_level(logging.WARNING, "dagster_sbatch.auth"):
            assert ensure_certificate(settings)
        assert not caplog.messages  # it has just failed, and is not asked again at once
        report = refresh(settings)
        assert report.issued_with is None
        assert "the certificate could not be replaced" in report.warnings[0]
        health = check_health(settings)
        assert health.verdict == "failing"
        assert health.failing["certificate"].count == 2
    assert refresh(settings).issued_with == "stored"
    assert check_health(settings).verdict == "ok"


def test_an_authentik_that_is_down_keeps_what_works(site: SimulatedSite, variables: dict[str, str]) -> None:
    settings = access.settings_of(variables)
    refresh(settings)
    access.age_certificate(site, variables)
    with site.faults.authentik_down():
        report = refresh(settings)
        assert report.certificate
        assert report.issued_with is None
        assert site.identity_provider.url in report.warnings[0]
        certificate_path(access.key_of(variables)).unlink()
        with pytest.raises(UnavailableError):
            ensure_certificate(settings)
    assert refresh(settings).issued_with == "stored"


@pytest.mark.parametrize("kind", ["slow", "late", "error", "lost"])
def test_an_authentik_that_is_slow_or_fails_once_is_borne(
    site: SimulatedSite, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("dagster_sbatch.auth.http.TRY_SECONDS", 2.0)
    disturbance = Disturbance(kind, seconds=3, path="/application/o/token/", times=1)  # type: ignore[arg-type]
    with site.faults.authentik_disturbed(disturbance):
        assert refresh(access.settings_of(variables)).issued_with == "stored"


def test_clocks_that_differ_are_told_as_such(site: SimulatedSite, variables: dict[str, str]) -> None:
    settings = access.settings_of(variables)
    refresh(settings)
    access.age_certificate(site, variables)
    site.authentik.set_jwt_skew(120)
    report = refresh(settings)
    assert report.certificate
    assert report.issued_with is None
    assert "the clocks differ: authentik issued the token at" in report.warnings[0]
    certificate_path(access.key_of(variables)).unlink()
    with pytest.raises(ClockError) as error:
        refresh(settings)
    assert error.value.temporary
    site.authentik.set_jwt_skew(0)
    assert refresh(settings).issued_with == "stored"


def test_a_machine_whose_clock_is_wrong_is_told(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, site: SimulatedSite
) -> None:
    monkeypatch.setattr(clock, "now", lambda: datetime.now(UTC) - timedelta(hours=2))
    with pytest.raises(ClockError, match=r"but this machine's clock shows .*\. Set this machine's clock"):
        ensure_certificate(access.settings_of(variables))


def test_a_token_that_has_expired_when_it_reaches_the_ca_is_told(
    site: SimulatedSite, variables: dict[str, str]
) -> None:
    settings = access.settings_of(variables)
    refresh(settings, certificate="no")
    site.authentik.set_lifetimes(access_token=-600)
    with pytest.raises(ClockError, match="the clocks differ"):
        ensure_certificate(settings)


def test_wrong_addresses_and_client_ids_are_told_as_such(variables: dict[str, str], site: SimulatedSite) -> None:
    refresh(access.settings_of(variables), certificate="no")
    base = site.identity_provider.url
    for wrong, words in (
        ({"ASC_OIDC_CLIENT_ID": "nobody"}, "authentik does not know ASC_OIDC_CLIENT_ID=nobody"),
        ({"ASC_OIDC_TOKEN_URL": f"{base}/application/o/other/"}, "ASC_OIDC_TOKEN_URL="),
        ({"ASC_STEP_CA_URL": base}, "Check ASC_STEP_CA_URL and ASC_STEP_FINGERPRINT"),
        ({"ASC_OIDC_USERNAME": "somebody"}, "has the credentials of 'xy12345', not of ASC_OIDC_USERNAME=somebody"),
    ):
        with pytest.raises(AccessError) as error:
            refresh(access.settings_of({**variables, **wrong}), rotation="now", certificate="now")
        assert words in str(error.value)
        assert not error.value.temporary


def test_a_certificate_for_other_login_names_is_told_with_both(site: SimulatedSite, variables: dict[str, str]) -> None:
    site.authentik.change_user(access.USER, email="first.last@sim.test")
    try:
        settings = access.settings_of(variables)
        report = refresh(settings)
    finally:
        site.authentik.change_user(access.USER, email=access.EMAIL)
    assert any(
        "for the login names firstlast, first.last, first.last@sim.test, not for SLURM_EDGE_NODE_USER=xy12345"
        in warning
        for warning in report.warnings
    ), report.warnings
    assert any("not for SLURM_EDGE_NODE_USER=xy12345" in note for note in check_health(settings).notes)


def test_a_refusal_of_the_ca_is_told_and_costs_few_tokens(site: SimulatedSite, variables: dict[str, str]) -> None:
    settings = access.settings_of(variables)
    refresh(settings, certificate="no")
    key = access.key_of(variables)
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-b", "1024", "-N", "", "-f", key], check=True)
    before, served = key.read_bytes(), len(site.authentik.requests())
    with pytest.raises(RejectedError, match="at least 2048 bits") as error:
        ensure_certificate(settings)
    assert not error.value.temporary
    tokens = [each for each in site.authentik.requests()[served:] if each.path.startswith("/application/o/token/")]
    assert 1 <= len(tokens) <= 3
    assert key.read_bytes() == before
    assert not certificate_path(key).exists()


def test_a_wrong_fingerprint_stops_before_the_token_leaves(site: SimulatedSite, variables: dict[str, str]) -> None:
    refresh(access.settings_of(variables), certificate="no")
    wrong = {"ASC_STEP_FINGERPRINT": "0" * 64}
    with pytest.raises(AccessError, match="ASC_STEP_FINGERPRINT=0000"):
        ensure_certificate(access.settings_of({**variables, **wrong}))


def test_a_ca_with_another_root_than_it_says_is_not_spoken_to(
    site: SimulatedSite, variables: dict[str, str], tmp_path: Path
) -> None:
    """Somebody in between answers with a root of his own."""
    server = _Impostor(tmp_path, site)
    try:
        with pytest.raises(AccessError, match="somebody intercepts the connection"):
            ensure_certificate(access.settings_of({**variables, "ASC_STEP_CA_URL": server.url}))
        assert server.posts == 0
    finally:
        server.stop()


class _Impostor:
    """Answers `/root/...` with the certificate that it serves itself."""

    def __init__(self, folder: Path, site: SimulatedSite) -> None:
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


def test_another_name_of_authentik_is_told_with_the_issuer_that_it_makes(
    site: SimulatedSite, variables: dict[str, str]
) -> None:
    """authentik derives the issuer from the name that it is called by; the authority knows one."""
    base = site.identity_provider.url
    address = base.removeprefix("http://").partition(":")[0]
    other = base.replace(address, str(int(ipaddress.ip_address(address))))  # the same, for a resolver
    token_url = {"ASC_OIDC_TOKEN_URL": f"{other}/application/o/token/"}
    with pytest.raises(RejectedError) as error:
        ensure_certificate(access.settings_of({**variables, **token_url}))
    text = str(error.value)
    assert f"issuer (iss) is {other}/application/o/musica-step/; " in text and "audience (aud) is musica-step" in text
    assert f"ASC_OIDC_TOKEN_URL={other}/" in text
