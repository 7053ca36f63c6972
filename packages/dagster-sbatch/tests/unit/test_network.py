"""Certificates, proxies and answers of HTTP calls: what the environment says, and who has to act when one fails."""

import hashlib
import json
import ssl
import subprocess
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import certifi
import httpx
import pytest

from dagster_sbatch.auth import AccessError, UnavailableError, ensure_certificate
from dagster_sbatch.auth.authentik import OidcToken, request_oidc_token
from dagster_sbatch.auth.http import Http, HttpAnswer, proxy_for
from dagster_sbatch.auth.issuer import issue_certificate
from dagster_sbatch.slurm.gateway.channel import Channel
from dagster_sbatch.slurm.gateway.link import Link
from support import access
from support.tls import self_signed

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
NOBODY = "http://127.0.0.1:1"
"""Where nothing listens."""


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", *PROXIES, *(name.upper() for name in PROXIES)):
        monkeypatch.delenv(name, raising=False)


class Server:
    """Answers every request with what it is told, as a server or as a proxy for plain http."""

    def __init__(self, certificate: Path | None = None) -> None:
        self.status, self.body, self.seen = 200, b'{"server": "ours"}', list[str]()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.seen.append(self.path)
                self.send_response(outer.status)
                self.send_header("Content-Length", str(len(outer.body)))
                self.end_headers()
                self.wfile.write(outer.body)

            do_CONNECT = do_POST = do_GET  # noqa: N815 (the base class asks for these names)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"{'https' if certificate else 'http'}://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    return self_signed(tmp_path / "certificate.pem")


@pytest.fixture
def tls_server(certificate: Path) -> Iterator[Server]:
    made = Server(certificate)
    yield made
    made.stop()


def failure(url: str) -> AccessError:
    with pytest.raises(AccessError) as error:
        Http().call("GET", url, tries=1)
    return error.value


# Certificates


def test_only_the_root_with_the_fingerprint_is_trusted(tls_server: Server, certificate: Path, tmp_path: Path) -> None:
    """Somebody in between sends the right root, which is public, and behind it one of his own."""
    root = b""
    while len(root) % 3 == 0:  # its base64 ends with padding, after which Python read no further before 3.13.5
        pem = self_signed(tmp_path / "root.pem", "root").read_text()
        root = ssl.PEM_cert_to_DER_cert(pem[: pem.index("-----BEGIN PRIVATE")])
    own = certificate.read_text()
    sent = ssl.DER_cert_to_PEM_cert(root) + own[: own.index("-----BEGIN PRIVATE")]
    tls_server.body = json.dumps({"ca": sent}).encode()
    fingerprint = {"ASC_STEP_FINGERPRINT": hashlib.sha256(root).hexdigest(), "ASC_STEP_CA_URL": tls_server.url}
    settings = access.settings_of({**access.environment(NOBODY, tmp_path), **fingerprint})
    now = datetime.now(UTC)
    with pytest.raises(AccessError, match=r"/sign: its TLS certificate is not trusted|a root certificate with "):
        issue_certificate(
            settings, Http(), "ssh-ed25519 AAAA", OidcToken("secret", "a@b.c", now, now + timedelta(1), "iss", "aud")
        )
    assert not any(path.endswith("/sign") for path in tls_server.seen)


def test_the_authorities_of_the_environment_are_trusted(
    tls_server: Server, certificate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "its TLS certificate is not trusted" in str(failure(tls_server.url))
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert Http().call("GET", tls_server.url).data == {"server": "ours"}
    monkeypatch.setenv("SSL_CERT_FILE", "")  # blank means unset
    assert "is not trusted" in str(failure(tls_server.url))
    folder = tmp_path / "authorities"
    folder.mkdir()
    hashed = f"{_subject_hash(certificate)}.0"
    (folder / hashed).write_bytes(certificate.read_bytes())
    monkeypatch.setenv("SSL_CERT_DIR", str(folder))
    assert Http().call("GET", tls_server.url).data == {"server": "ours"}


def _subject_hash(certificate: Path) -> str:
    command = ["openssl", "x509", "-noout", "-subject_hash", "-in", str(certificate)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("kind", ["missing", "empty", "rubbish", "folder"])
def test_a_stale_list_of_authorities_is_named_and_is_not_temporary(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "stale"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_text({"empty": "", "rubbish": "not a certificate"}[kind])
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    error = failure("https://127.0.0.1:1/")
    assert isinstance(error, AccessError)
    assert not error.temporary
    assert str(error).startswith(f"The list of trusted authorities SSL_CERT_FILE={path} cannot be used: ")
    assert str(error).endswith("\n  unset SSL_CERT_FILE")


@pytest.mark.parametrize(("variable", "value"), [("SSL_CERT_FILE", certifi.where()), ("SSL_CERT_DIR", "/nonexistent")])
def test_authorities_that_do_not_know_the_server_are_named(
    tls_server: Server, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    error = failure(tls_server.url)
    assert not error.temporary
    assert "is not trusted" in str(error)
    assert str(error).endswith(f"\n  unset {variable}")


def test_a_key_log_that_cannot_be_written_does_not_matter(
    tls_server: Server, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("SSLKEYLOGFILE", "/nonexistent/keys.log")
    assert Http().call("GET", tls_server.url).status == 200


# Proxies


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_the_proxy_of_the_environment_is_used(server: Server, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, server.url.removeprefix("http://") if variable == "ALL_PROXY" else server.url)
    assert Http().call("GET", "http://auth.example.test/x").data == {"server": "ours"}
    assert server.seen == ["http://auth.example.test/x"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "127.0.0.1", "127.9.9.9", "[::1]"])
def test_no_proxy_gets_what_is_for_this_machine(server: Server, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """Plain http to it may hold a secret."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, NOBODY)
    assert Http().call("GET", server.url.replace("127.0.0.1", "localhost")).status == 200
    assert proxy_for(httpx.URL(f"http://{host}:1/")) is None
    assert proxy_for(httpx.URL(f"https://{host}/")) is None


@pytest.mark.parametrize(
    ("entry", "host", "direct"),
    [
        ("auth.example.org", "auth.example.org", True),
        ("example.com, auth.example.org", "auth.example.org", True),
        ("*", "auth.example.org", True),
        (".example.com,localhost", "auth.example.org", False),
        ("example.org", "auth.example.org", True),
        (".example.org", "auth.example.org", True),
        ("example.org:443", "auth.example.org", False),
        ("example.org:1", "auth.example.org", True),
        ("ample.org", "example.org", False),
    ],
)
def test_no_proxy_excepts_domains(monkeypatch: pytest.MonkeyPatch, entry: str, host: str, direct: bool) -> None:
    monkeypatch.setenv("https_proxy", NOBODY)
    monkeypatch.setenv("no_proxy", entry)
    assert (proxy_for(httpx.URL(f"https://{host}:1/")) is None) is direct


@pytest.mark.parametrize("scheme", ["socks5", "socks5h", "socks4", "socks", "ftp"])
def test_a_proxy_that_is_not_supported_is_named(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setenv("ALL_PROXY", f"{scheme}://user:test-password@127.0.0.1:1080")
    error = failure("https://auth.example.test/")
    assert isinstance(error, AccessError)
    assert str(error).startswith(f"The proxy ALL_PROXY={scheme}://127.0.0.1:1080 cannot be used: ")
    assert str(error).endswith("\n  export NO_PROXY=auth.example.test")


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
@pytest.mark.parametrize(
    "value",
    [
        *("http://", "http://proxy:port", "http://[::1", "two words", "http://u:test-password@a b:1"),
        *("http://proxy..test:1", f"http://{'p' * 64}.test:1", "http://127.0.0.1:65536", "http://u:\udcff@proxy:1"),
    ],
)
def test_a_malformed_proxy_is_named_without_its_password(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    error = failure("https://auth.example.test/")
    assert isinstance(error, AccessError)
    assert str(error).startswith(f"The proxy {variable.upper()}=http://")
    assert " cannot be " in str(error)
    assert "\n  export NO_PROXY=auth.example.test" in str(error)
    assert "test-password" not in str(error)


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("proxy", [NOBODY, "http://no-such-host.invalid:3128"])
def test_a_proxy_that_is_away_is_blamed_and_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, scheme: str, proxy: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy.replace("//", "//user:test-password@"))
    error = failure(f"{scheme}://auth.example.test/")
    assert not error.temporary
    assert f"The proxy ALL_PROXY={proxy} cannot be reached: " in str(error)
    assert "test-password" not in str(error)


@pytest.mark.parametrize(("status", "temporary"), [(403, False), (407, False), (502, True), (503, True), (504, True)])
def test_a_proxy_that_refuses_differs_from_one_that_cannot_reach_the_server(
    server: Server, monkeypatch: pytest.MonkeyPatch, status: int, temporary: bool
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", server.url)
    server.status, server.body = status, b"<html>"
    error = failure("https://auth.example.test/")
    assert error.temporary is temporary
    assert f"HTTPS_PROXY={server.url}" in str(error)


# A run that connects


def test_a_run_waits_for_an_outage_and_fails_at_a_stale_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What stands in the way is blamed, not the login node."""
    monkeypatch.setattr("dagster_sbatch.slurm.gateway.link.FIRST_PAUSE", 0.01)
    monkeypatch.setattr("dagster_sbatch.auth.refresh_failures.FIRST_PAUSE", timedelta(0))
    monkeypatch.setattr("dagster_sbatch.auth.refresher.ISSUE_TRIES", 1)
    monkeypatch.setattr("dagster_sbatch.auth.http.FIRST_PAUSE", 0.0)
    secret = {"ASC_OIDC_APP_PASSWORD": "test-app-password"}
    settings = access.settings_of({**access.environment("https://127.0.0.1:1", tmp_path), **secret})
    told: list[str] = []

    def heard(text: str) -> None:
        told.append(text)
        monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent/ca.pem")

    def open_channel() -> Channel:
        ensure_certificate(settings)
        raise AssertionError("there is a certificate")

    link = Link(open_channel, on_trouble=heard)
    with pytest.raises(AccessError, match=r"SSL_CERT_FILE=/nonexistent/ca\.pem cannot be used"):
        link.ask(do="describe")
    (text,) = told
    assert text.startswith(
        "no certificate to log in with: https://127.0.0.1:1/application/o/token/ cannot be reached: "
    )


# Answers


@pytest.mark.parametrize("status", [401, 403, 404, 410, 418])
def test_an_error_page_that_is_not_the_servers_own_is_temporary(server: Server, status: int) -> None:
    server.status, server.body = status, b"<html>404 page not found</html>"
    error = failure(server.url)
    assert isinstance(error, UnavailableError)
    assert f"HTTP {status}, no JSON" in str(error)
    server.body = json.dumps({"detail": "no"}).encode()
    assert Http().call("GET", server.url).status == status


def test_a_page_that_is_no_error_is_another_server(server: Server) -> None:
    server.body = b"<html>Welcome</html>"
    assert isinstance(failure(server.url), AccessError)


def test_temporary_failures_are_tried_again_and_others_are_not(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dagster_sbatch.auth.http.FIRST_PAUSE", 0.01)
    server.status = 503
    with pytest.raises(UnavailableError):
        Http().call("GET", server.url)
    assert len(server.seen) == 3
    with monkeypatch.context() as soon, pytest.raises(UnavailableError, match="no time left"):
        soon.setattr("dagster_sbatch.auth.http.BUDGET_SECONDS", 0)
        Http().call("GET", server.url)
    server.status = 302
    with pytest.raises(AccessError, match="Set the new address: "):
        Http().call("GET", server.url)
    assert len(server.seen) == 4


@pytest.mark.parametrize(
    "url",
    [
        *("http://[::1", "http://127.0.0.1:port/", "ftp://127.0.0.1/", "nowhere"),
        *("https://auth..example.test/", f"https://{'a' * 64}.test/"),
    ],
)
def test_an_address_that_is_none_is_told_as_such(url: str) -> None:
    assert isinstance(failure(url), AccessError)


def test_a_token_that_is_not_an_object_is_told_as_such(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = access.settings_of(access.environment(NOBODY, tmp_path))
    for token in ("e30.W10.x", 5):  # in base64, W10 is []
        monkeypatch.setattr(Http, "call", lambda *_, token=token, **__: HttpAnswer(200, {"id_token": token}, None))
        with pytest.raises(AccessError, match="is missing or cannot be read"):
            request_oidc_token(settings, "x", Http())
