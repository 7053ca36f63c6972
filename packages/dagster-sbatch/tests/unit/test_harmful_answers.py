"""Answers that a server, or somebody in between, sends to do harm: the call ends, and memory stays free."""

import base64
import gzip
import json
import socket
import ssl
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, repeat
from pathlib import Path

import pytest

from dagster_sbatch.auth import AccessError, UnavailableError
from dagster_sbatch.auth.authentik import Authentik, request_oidc_token
from dagster_sbatch.auth.http import Http, HttpAnswer
from support import access
from support.tls import self_signed

OK = b"HTTP/1.1 200 OK\r\n"
BOMB = gzip.compress(gzip.compress(b" " * 1_000_000 + b"{}"))
ODD = {
    "endless": chain([b"\r\n"], repeat(b"x" * 99_999)),
    "a bomb": [b"Content-Encoding: gzip, gzip\r\nContent-Length: %d\r\n\r\n%b" % (len(BOMB), BOMB)],
    "deep": [b"\r\n", b"[" * 99_999],
    "not now": [b"Date: Mon, 30 Nov 2026 10:00:00 +99999999999999\r\n\r\n<html>"],
}


@contextmanager
def answering(pieces: Iterable[bytes], pause: float = 0.0, certificate: Path | None = None) -> Iterator[str]:
    """The address of a server that answers one request with these bytes."""
    context, given_up = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), threading.Event()
    if certificate:
        context.load_cert_chain(certificate)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            accepted = listening.accept()[0]
            with (
                suppress(OSError),
                context.wrap_socket(accepted, server_side=True) if certificate else accepted as client,
            ):
                client.recv(65536)
                for piece in pieces:
                    client.sendall(piece)
                    given_up.wait(pause)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"{'https' if certificate else 'http'}://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            given_up.set()
            thread.join()


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_answer_is_one_of_another_server(kind: str) -> None:
    """Whoever is on the way to the certificate authority can send it: its root is fetched from anybody."""
    with answering(chain([OK], ODD[kind])) as url, pytest.raises(AccessError, match="no JSON"):
        Http().call("GET", url, tries=1)


@pytest.mark.parametrize("tls", [False, True])
def test_a_head_that_comes_too_slowly_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tls: bool
) -> None:
    certificate = self_signed(tmp_path / "certificate.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setattr("dagster_sbatch.auth.http.HEAD_SECONDS", 0.5, raising=False)
    slowly = [OK, *([b"x: y\r\n"] * 100), b"\r\n{}"]
    with answering(slowly, 0.05, certificate if tls else None) as url, pytest.raises(UnavailableError):
        Http().call("GET", url, tries=1)


def test_the_words_of_a_server_are_part_of_one_line() -> None:
    answer = HttpAnswer(404, json.loads('{"detail": "no\\n\\u001b[2J\\u009b2JRun this"}'), None)
    assert answer.reason == "HTTP 404: no??[2J?2JRun this"


@pytest.mark.parametrize("claims", [b"[" * 99_999, b'{"email": "a@b.c", "iat": %d, "exp": 1}' % 2**60])
def test_a_token_that_cannot_be_read_is_told_as_such(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, claims: bytes
) -> None:
    answer = HttpAnswer(200, {"id_token": f"e30.{base64.urlsafe_b64encode(claims).decode()}.x"}, None)
    monkeypatch.setattr(Http, "call", lambda *_, **__: answer)
    with pytest.raises(AccessError, match="is missing or cannot be read"):
        request_oidc_token(access.settings_of(access.environment("http://127.0.0.1:1", tmp_path)), "x", Http())


def test_a_time_that_no_clock_has_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = HttpAnswer(201, {"expires": "0001-01-01T00:00:00+01:00"}, None)
    monkeypatch.setattr(Http, "call", lambda *_, **__: answer)
    with pytest.raises(AccessError, match="did not say when it expires"):
        Authentik("https://auth.example", "token", Http()).create("name", "api")


def test_an_email_is_part_of_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is the comment of a certificate in its file."""
    claims = b'{"email": "a@b.c\\nssh-rsa AAAA\\ud800", "iat": 1, "exp": 2}'
    answer = HttpAnswer(200, {"id_token": f"e30.{base64.urlsafe_b64encode(claims).decode()}.x"}, None)
    monkeypatch.setattr(Http, "call", lambda *_, **__: answer)
    settings = access.settings_of(access.environment("http://127.0.0.1:1", tmp_path))
    assert request_oidc_token(settings, "x", Http()).email == "a@b.c?ssh-rsa AAAA?"
