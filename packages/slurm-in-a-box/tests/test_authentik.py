"""The stand-in for authentik answers as the real one did, and can be steered. It needs neither root nor Slurm."""

import base64
import datetime
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from slurm_in_a_box import AuthentikServer, Disturbance

EXCHANGES = [
    json.loads(line)
    for line in (Path(__file__).with_name("authentik-exchanges.jsonl")).read_text(encoding="utf-8").splitlines()
]
USER, ADMIN = "xy12345", "akadmin"
TIME_TOLERANCE = 5.0
# Values that are new in every installation. For these it counts that they are there, and of the same type.
_NEW_EACH_TIME = {"key", "uid", "request_id", "kid", "n"}
_LEFT_OUT_OF_THE_RECORDING = {"user_obj", "avatar"}
_CERTIFICATE_OF_THE_KEY = {"x5c", "x5t", "x5t#S256"}  # the real one publishes these as well; OIDC does not ask for them
_TIME = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d\.\d+(\+00:00|Z)")


@pytest.fixture
def authentik(tmp_path: Path) -> Iterator[AuthentikServer]:
    with AuthentikServer(tmp_path) as server:
        server.control.create_user(ADMIN, name="authentik Default Admin", superuser=True)
        server.control.create_user(USER, "xy12345@lab.test", "X Y")
        yield server


@pytest.fixture
def client(authentik: AuthentikServer) -> Iterator[httpx.Client]:
    key = authentik.control.create_token(USER, "api", "first")
    with httpx.Client(base_url=authentik.base_url, headers={"Authorization": f"Bearer {key}"}) as client:
        yield client


def test_answers_as_recorded_from_a_real_authentik(authentik: AuthentikServer) -> None:
    control = authentik.control
    # Lab set-up of the recording: the user's first token was made by the admin.
    control.create_token(ADMIN, "api", "authentik-bootstrap-token")
    control.create_token(USER, "api", "xy12345-api", viewable=False)
    control.set_lifetimes(token=30 * 60)
    keys: dict[str, str] = {"unknown": "no-such-key"}
    offset = 0.0
    differences = []
    with httpx.Client(base_url=authentik.base_url) as client:
        for exchange in EXCHANGES:
            wanted = _timestamp(exchange["at"]) - time.time()
            control.advance_clock(wanted - offset)
            offset = wanted
            for operation, arguments in exchange.get("before", ()):
                getattr(control, operation)(**arguments)
            keys |= {token.identifier: token.key for token in control.tokens()}
            answer = _send(client, exchange, keys)
            if exchange["path"] == "/application/o/token/" and answer.status_code == 200:
                keys["id_token"] = answer.json()["id_token"]
            received = answer.json() if answer.content else None
            found = _differences(exchange["response"], received, authentik.base_url)
            if answer.status_code != exchange["status"]:
                found.append(f"status {answer.status_code}, recorded {exchange['status']}")
            differences += [f"{exchange['label']}: {difference}" for difference in found]
    assert differences == []
    assert len(EXCHANGES) > 100


def _send(client: httpx.Client, exchange: dict[str, Any], keys: dict[str, str]) -> httpx.Response:
    headers = {"Authorization": f"Bearer {keys[exchange['bearer']]}"} if exchange["bearer"] else {}
    password = {"password": keys[exchange["password_of"]]} if "password_of" in exchange else {}
    body = {**exchange["body"], **password} if exchange["body"] is not None else None
    form = {**exchange["form"], **password} if exchange["form"] is not None else None
    return client.request(exchange["method"], exchange["path"], headers=headers, json=body, data=form)


def _differences(recorded: Any, received: Any, base_url: str, where: str = "") -> list[str]:
    """Compare two answers: fields and values, but for what cannot be the same twice; times within a tolerance."""
    name = where.rpartition(".")[2]
    if name in _LEFT_OUT_OF_THE_RECORDING:
        return []
    if type(recorded) is not type(received):
        return [f"{where}: {received!r}, recorded {recorded!r}"]
    if isinstance(recorded, dict):
        fields = set(recorded) - _CERTIFICATE_OF_THE_KEY
        found = [f"{where}: fields {sorted(received)}, recorded {sorted(fields)}"] if fields != set(received) else []
        for field in fields & set(received):
            found += _differences(recorded[field], received[field], base_url, f"{where}.{field}")
        return found
    if isinstance(recorded, list) and len(recorded) == len(received):
        pairs = enumerate(zip(recorded, received, strict=True))
        return [each for i, (a, b) in pairs for each in _differences(a, b, base_url, f"{where}.{i}")]
    if name in _NEW_EACH_TIME or recorded == "<JWT>" or (name == "pk" and isinstance(recorded, str)):
        return []
    if isinstance(recorded, str):
        times = [[_timestamp(each[0]) for each in _TIME.finditer(text)] for text in (recorded, received)]
        close = all(abs(a - b) < TIME_TOLERANCE for a, b in zip(*times, strict=False))
        if len(times[0]) == len(times[1]) and close:
            recorded, received = _TIME.sub("TIME", recorded), _TIME.sub("TIME", received)
        recorded = recorded.replace("http://127.0.0.1:9300", base_url)
    return [] if recorded == received else [f"{where}: {received!r}, recorded {recorded!r}"]


def _timestamp(text: str) -> float:
    return datetime.datetime.fromisoformat(text).timestamp()


def test_tokens_expire_by_a_clock_that_can_be_moved(authentik: AuthentikServer, client: httpx.Client) -> None:
    authentik.control.set_lifetimes(token=30 * 24 * 3600)
    key = authentik.control.create_token(USER, "api", "month")
    month = {"Authorization": f"Bearer {key}"}
    authentik.control.advance_clock(29 * 24 * 3600)
    assert client.get("/api/v3/core/users/me/", headers=month).status_code == 200
    authentik.control.advance_clock(2 * 24 * 3600)
    assert client.get("/api/v3/core/users/me/", headers=month).status_code == 403
    assert [token.identifier for token in authentik.control.tokens(USER)] == ["first"]


def test_restart_keeps_tokens_clock_and_record(
    authentik: AuthentikServer, client: httpx.Client, tmp_path: Path
) -> None:
    client.post("/api/v3/core/tokens/", json={"identifier": "kept", "intent": "api"}).raise_for_status()
    authentik.control.advance_clock(60)
    authentik.stop()
    with pytest.raises(httpx.ConnectError):
        client.get("/api/v3/core/users/me/")
    authentik.start()
    assert client.get("/api/v3/core/users/me/").json()["user"]["username"] == USER
    authentik.stop()
    with AuthentikServer(tmp_path) as successor:
        assert {token.identifier for token in successor.control.tokens(USER)} == {"first", "kept"}
        assert successor.store.clock_offset == 60
        assert [request.path for request in successor.control.requests()] == [
            "/api/v3/core/tokens/",
            "/api/v3/core/users/me/",
        ]


def test_every_served_request_is_kept(authentik: AuthentikServer, client: httpx.Client) -> None:
    client.get("/api/v3/core/tokens/?identifier=first")
    client.post("/application/o/token/", data={"client_id": "other"})
    listing, token = authentik.control.requests()
    assert (listing.method, listing.path, listing.status) == ("GET", "/api/v3/core/tokens/?identifier=first", 200)
    assert listing.authorization == client.headers["Authorization"]
    assert listing.response["results"][0]["identifier"] == "first"
    assert (token.body, token.status) == ("client_id=other", 400)


@pytest.mark.parametrize(("kind", "created"), [("slow", False), ("late", True), ("lost", True), ("error", False)])
def test_disturbances_act_before_or_after_the_deed(
    authentik: AuthentikServer, client: httpx.Client, kind: Any, created: bool
) -> None:
    authentik.control.disturb(Disturbance(kind, seconds=60, status=502, method="POST", path="/tokens/", times=1))
    request = {"identifier": "disturbed", "intent": "api"}
    if kind == "error":
        assert client.post("/api/v3/core/tokens/", json=request).status_code == 502
    else:
        with pytest.raises((httpx.ReadTimeout, httpx.RemoteProtocolError)):
            client.post("/api/v3/core/tokens/", json=request, timeout=1)
    assert ("disturbed" in {token.identifier for token in authentik.control.tokens()}) is created
    assert client.post("/api/v3/core/tokens/", json={**request, "identifier": "next"}).status_code == 201


def test_jwt_times_are_the_machines_own_unless_skewed(authentik: AuthentikServer) -> None:
    password = authentik.control.create_token(USER, "app_password", "login")
    authentik.control.advance_clock(-1000)

    def issued_at() -> float:
        form = {"grant_type": "client_credentials", "client_id": "musica-step", "username": USER, "password": password}
        token = httpx.post(authentik.token_url, data=form).raise_for_status().json()["access_token"]
        claims = token.split(".")[1]
        return float(json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))["iat"])

    assert abs(issued_at() - time.time()) < TIME_TOLERANCE
    authentik.control.set_jwt_skew(120)
    assert abs(issued_at() - time.time() - 120) < TIME_TOLERANCE


def test_an_administrator_deletes_all_tokens_of_a_user(authentik: AuthentikServer, client: httpx.Client) -> None:
    authentik.control.create_token(ADMIN, "api", "admins")
    authentik.control.delete_tokens(USER)
    assert [token.identifier for token in authentik.control.tokens()] == ["admins"]
    assert client.get("/api/v3/core/users/me/").status_code == 403


def test_reset_keeps_users_alone(authentik: AuthentikServer, client: httpx.Client) -> None:
    authentik.control.advance_clock(60)
    client.get("/api/v3/core/users/me/")
    authentik.control.disturb(Disturbance("error"))
    authentik.control.reset()
    assert authentik.control.tokens() == []
    assert authentik.control.requests() == []
    assert authentik.store.clock_offset == 0
    assert client.get("/api/v3/core/users/me/").json() == {"detail": "Token invalid/expired"}
    assert authentik.control.create_token(USER, "api", "again")


def test_users_that_are_denied_inactive_or_without_rights_are_answered_as_by_the_real_one(
    authentik: AuthentikServer, client: httpx.Client
) -> None:
    control = authentik.control
    password = control.create_token(USER, "app_password", "login")

    def log_in(password: str) -> httpx.Response:
        form = {"grant_type": "client_credentials", "client_id": "musica-step", "username": USER, "password": password}
        return httpx.post(authentik.token_url, data=form)

    wrong = log_in("wrong").json()["error_description"]
    control.change_user(USER, allowed=False)
    assert log_in(password).json()["error_description"] == wrong
    assert client.get("/api/v3/core/users/me/").status_code == 200
    control.change_user(USER, allowed=True, active=False)
    assert log_in(password).json()["error_description"] == wrong
    assert client.get("/api/v3/core/users/me/").json() == {"detail": "Token invalid/expired"}
    control.change_user(USER, active=True, views_keys=False)
    client.post("/api/v3/core/tokens/", json={"identifier": "crashed", "intent": "api"}).raise_for_status()
    answer = client.get("/api/v3/core/tokens/crashed/view_key/")
    assert (answer.status_code, answer.json()["detail"]) == (403, "You do not have permission to perform this action.")
    assert client.delete("/api/v3/core/tokens/crashed/").status_code == 204
    control.reset()
    control.create_token(USER, "app_password", "again")
    assert log_in(control.tokens(USER)[0].key).status_code == 200
