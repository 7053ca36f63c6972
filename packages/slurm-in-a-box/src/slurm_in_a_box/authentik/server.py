"""The HTTP side of the stand-in: routes, authentication, disturbances, and the record of what was served."""

import contextlib
import json
import sys
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from . import token_api
from .control import CONTROL_PATH, AuthentikControl, Operator
from .disturbances import Disturbances
from .oidc import Provider
from .store import Store

_API = "/api/v3/core/"


class AuthentikServer:
    """The stand-in, served from threads of this process.

    Example:
        with AuthentikServer(tmp_path) as authentik:
            authentik.control.create_user("xy12345")
            httpx.get(f"{authentik.base_url}/api/v3/core/users/me/")

    Attributes:
        base_url: the value of ASC_AUTHENTIK_API_BASE, without a slash at its end.
        control: moves its clock, sets its lifetimes, disturbs it, returns what it served.
    """

    def __init__(
        self,
        folder: Path,
        host: str = "127.0.0.1",
        port: int = 0,
        application: str = "musica-step",
        client_id: str = "musica-step",
    ) -> None:
        """Prepare the server; nothing listens before `start()`.

        Args:
            folder: for users, tokens, signing key and the record of requests; a later server on it has all of them.
            port: 0 takes any free one.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.store = Store.load(folder / "authentik.json")
        self.record = folder / "requests.jsonl"
        self.disturbances = Disturbances()
        self.provider = Provider(folder / "signing_key.pem", application, client_id)
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.operator = Operator(self.store, self.record, self.disturbances)
        self._address = (host, port)
        self._server: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None

    @property
    def base_url(self) -> str:
        """Address of the running server."""
        return f"http://{self._address[0]}:{self._address[1]}"

    @property
    def token_url(self) -> str:
        """The value of ASC_OIDC_TOKEN_URL."""
        return f"{self.base_url}/application/o/token/"

    @property
    def control(self) -> AuthentikControl:
        """The control of the running server."""
        return AuthentikControl(self.base_url)

    def start(self) -> None:
        """Listen and answer; again after a `stop()` on the same port."""
        self.stopping.clear()
        handler = type("Handler", (_Handler,), {"stand_in": self})
        self._server = _Listener(self._address, handler)
        self._address = (self._address[0], self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop listening; running requests get no answer."""
        if self._server is not None and self._thread is not None:
            self.stopping.set()
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None

    def __enter__(self) -> "AuthentikServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away before its answer is not an error; others are printed on stderr."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """One request; HTTP 1.0, so that no connection outlives a stop of the server."""

    stand_in: AuthentikServer

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        url = urllib.parse.urlsplit(self.path)
        if url.path == CONTROL_PATH:
            with self.stand_in.lock:
                self._send(*self.stand_in.operator.carry_out(json.loads(body)))
            return
        disturbance = self.stand_in.disturbances.take(self.command, url.path)
        kind = disturbance.kind if disturbance else ""
        seconds = disturbance.seconds if disturbance else 0.0
        if kind == "slow" and self.stand_in.stopping.wait(seconds):
            return
        with self.stand_in.lock:
            if disturbance and kind == "error":
                answer: tuple[int, Any] = (disturbance.status, {"detail": "Simulated failure of the server."})
            else:
                answer = self._answer(url, body)
            self._keep(body, answer)
        if kind == "lost" or (kind == "late" and self.stand_in.stopping.wait(seconds)):
            return
        with contextlib.suppress(ConnectionError):  # the client had waited for long enough
            self._send(*answer)

    do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _handle  # noqa: N815  names that the base class asks for

    def _answer(self, url: urllib.parse.SplitResult, body: str) -> tuple[int, Any]:
        provider, store = self.stand_in.provider, self.stand_in.store
        base = f"http://{self.headers.get('Host')}"
        application = f"/application/o/{provider.application}/"
        route = (self.command, url.path)
        if url.path.startswith(_API):
            return self._answer_api(url, body)
        if route == ("POST", "/application/o/token/"):
            form = "application/x-www-form-urlencoded" in self.headers.get("Content-Type", "")
            return provider.token(store, base, dict(urllib.parse.parse_qsl(body)) if form else {})
        if route == ("GET", f"{application}.well-known/openid-configuration"):
            return provider.discovery(base)
        if route == ("GET", f"{application}jwks/"):
            return provider.jwks()
        return 404, {"detail": "Not found."}

    def _answer_api(self, url: urllib.parse.SplitResult, body: str) -> tuple[int, Any]:
        """Authenticate and pass on. A failure is 403, never 401: authentik names no authentication scheme to try."""
        scheme, _, key = self.headers.get("Authorization", "").partition(" ")
        if scheme != "Bearer":
            return 403, {"detail": "Authentication credentials were not provided."}
        caller = self.stand_in.store.use_token(key, "api")
        if caller is None:
            return 403, {"detail": "Token invalid/expired"}
        try:
            fields = json.loads(body) if body else {}
        except ValueError as error:
            return 400, {"detail": f"JSON parse error - {error}"}
        call = token_api.Call(self.stand_in.store, caller, dict(urllib.parse.parse_qsl(url.query)), fields)
        return token_api.answer(call, self.command, url.path.removeprefix(_API))

    def _keep(self, body: str, answer: tuple[int, Any]) -> None:
        served = {
            "time": time.time(),
            "method": self.command,
            "path": self.path,
            "authorization": self.headers.get("Authorization", ""),
            "body": body,
            "status": answer[0],
            "response": answer[1],
        }
        with self.stand_in.record.open("a", encoding="utf-8") as record:
            record.write(json.dumps(served) + "\n")

    def _send(self, status: int, document: Any) -> None:
        content = b"" if status == 204 else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: the record has every request."""
