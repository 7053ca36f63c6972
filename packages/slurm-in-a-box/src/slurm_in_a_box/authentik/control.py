"""Control a running stand-in over HTTP, at an address of its own, wherever it runs."""

import dataclasses
import json
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .disturbances import Disturbance, Disturbances
from .store import Settings, Store, Token

CONTROL_PATH = "/-/simulated-site/control"
Intent = Literal["api", "app_password"]


@dataclass(frozen=True)
class ServedRequest:
    """A request that the stand-in has answered, with whatever secrets were in it (they are test values).

    Attributes:
        time: when, in seconds since the epoch by the machine's clock.
        path: with the query.
        authorization: the header, or an empty string.
        body: as it was sent.
        response: what was answered, decoded; of a `late` or `lost` one what would have been.
    """

    time: float
    method: str
    path: str
    authorization: str
    body: str
    status: int
    response: Any


class AuthentikControl:
    """Controls a running stand-in and reads its state.

    Args:
        base_url: the stand-in's address.
    """

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url

    def advance_clock(self, seconds: float) -> None:
        """Move its clock ahead (back if negative). Tokens expire by this clock.

        JWTs bear the machine's own time all the same, since step-ca compares them with that: see `set_jwt_skew`.
        """
        self._call("advance_clock", seconds=seconds)

    def set_jwt_skew(self, seconds: float) -> None:
        """Issue JWTs whose times are this many seconds ahead of the machine's clock."""
        self._call("set_jwt_skew", seconds=seconds)

    def set_lifetimes(self, token: float | None = None, access_token: float | None = None) -> None:
        """Set how long tokens (API tokens and app passwords) and the JWTs of the token endpoint live, in seconds."""
        self._call("set_lifetimes", token=token, access_token=access_token)

    def create_user(self, username: str, email: str = "", name: str = "", superuser: bool = False) -> int:
        """Create a user and return its primary key; `email` is by default the login name at `sim.test`."""
        created: int = self._call(
            "create_user", username=username, email=email or f"{username}@sim.test", name=name, superuser=superuser
        )
        return created

    def change_user(self, username: str, **fields: Any) -> None:
        """Change fields of a user: `email`, `name`, `groups`, `maximum_lifetime`, `token_expires`, `active`, `allowed`,
        `views_keys` (see store.User)."""
        self._call("change_user", username=username, fields=fields)

    def create_token(self, username: str, intent: Intent, identifier: str, viewable: bool = True) -> str:
        """Create a token as its user would in the web interface, and return its key.

        Args:
            viewable: false as if an admin had made it for the user, who may then not view its key.
        """
        key: str = self._call(
            "create_token", username=username, intent=intent, identifier=identifier, viewable=viewable
        )
        return key

    def delete_tokens(self, username: str) -> None:
        """Delete all tokens of a user."""
        self._call("delete_tokens", username=username)

    def tokens(self, username: str | None = None) -> list[Token]:
        """Return all tokens, or those of one user, with their keys."""
        known = self._call("tokens")
        users = {user["pk"]: user["username"] for user in known["users"]}
        return [Token(**token) for token in known["tokens"] if username in (None, users[token["user"]])]

    def expire_tokens(self) -> None:
        """Run authentik's background worker: expired API tokens get a new key, expired app passwords are deleted."""
        self._call("expire_tokens")

    def disturb(self, disturbance: Disturbance) -> None:
        """Add a disturbance; earlier ones take precedence."""
        self._call("disturb", **dataclasses.asdict(disturbance))

    def clear_disturbances(self) -> None:
        """End all disturbances."""
        self._call("clear_disturbances")

    def requests(self) -> list[ServedRequest]:
        """Return every request that was served, in order, also before a restart; this control's own are not kept."""
        return [ServedRequest(**request) for request in self._call("requests")]

    def reset(self) -> None:
        """Remove tokens, disturbances and the record; restore default settings and the right time.

        Users stay; each is active and allowed again.
        """
        self._call("reset")

    def _call(self, operation: str, **arguments: Any) -> Any:
        body = json.dumps({"operation": operation, "arguments": arguments}).encode()
        request = urllib.request.Request(f"{self.base_url}{CONTROL_PATH}", body, method="POST")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=30) as answer:
            return json.load(answer)


class Operator:
    """The server's side of `AuthentikControl`: one method an operation, called by name with the server's lock held."""

    def __init__(self, store: Store, record: Path, disturbances: Disturbances) -> None:
        self._store = store
        self._record = record
        self._disturbances = disturbances
        operations: tuple[Callable[..., Any], ...] = (
            self.advance_clock,
            self.set_jwt_skew,
            self.set_lifetimes,
            self.create_user,
            self.change_user,
            self.create_token,
            self.delete_tokens,
            self.tokens,
            self.requests,
            self.reset,
            store.expire_tokens,
            disturbances.clear,
        )
        self._operations: dict[str, Callable[..., Any]] = {operation.__name__: operation for operation in operations}
        self._operations["disturb"] = lambda **fields: disturbances.add(Disturbance(**fields))
        self._operations["clear_disturbances"] = self._operations.pop("clear")

    def carry_out(self, request: dict[str, Any]) -> tuple[int, Any]:
        """Carry out one operation and return an HTTP status with its result."""
        result = self._operations[request["operation"]](**request["arguments"])
        self._store.save()
        return 200, result

    def advance_clock(self, seconds: float) -> None:
        """See AuthentikControl."""
        self._store.clock_offset += seconds

    def set_jwt_skew(self, seconds: float) -> None:
        """See AuthentikControl."""
        self._store.settings.jwt_skew = seconds

    def set_lifetimes(self, token: float | None, access_token: float | None) -> None:
        """See AuthentikControl."""
        settings = self._store.settings
        settings.token_lifetime = settings.token_lifetime if token is None else token
        settings.access_token_lifetime = settings.access_token_lifetime if access_token is None else access_token

    def create_user(self, username: str, email: str, name: str, superuser: bool) -> int:
        """See AuthentikControl."""
        return self._store.add_user(username, email, name or username, superuser).pk

    def change_user(self, username: str, fields: dict[str, Any]) -> None:
        """See AuthentikControl."""
        user = self._store.user_named(username)
        for name, value in fields.items():
            setattr(user, name, value)

    def create_token(self, username: str, intent: str, identifier: str, viewable: bool) -> str:
        """See AuthentikControl."""
        owner = self._store.user_named(username)
        if owner is None:
            raise LookupError(f"no such user: {username}")
        expires = self._store.now() + self._store.settings.token_lifetime
        token = Token(identifier, intent, owner.pk, expires, key_viewers=[owner.pk] if viewable else [])
        self._store.tokens.append(token)
        return token.key

    def delete_tokens(self, username: str) -> None:
        """See AuthentikControl."""
        owner = self._store.user_named(username)
        self._store.tokens = [token for token in self._store.tokens if owner is None or token.user != owner.pk]

    def tokens(self) -> dict[str, Any]:
        """Return users and tokens."""
        return {
            "tokens": [dataclasses.asdict(token) for token in self._store.tokens],
            "users": [dataclasses.asdict(user) for user in self._store.users],
        }

    def requests(self) -> list[Any]:
        """Return the record."""
        if not self._record.exists():
            return []
        return [json.loads(line) for line in self._record.read_text(encoding="utf-8").splitlines()]

    def reset(self) -> None:
        """See AuthentikControl."""
        self._store.tokens.clear()
        for user in self._store.users:
            user.active = user.allowed = user.views_keys = True
        self._store.settings = Settings()
        self._store.clock_offset = 0.0
        self._disturbances.clear()
        self._record.unlink(missing_ok=True)
