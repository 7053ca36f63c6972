"""Users, tokens, settings and clock of the stand-in, in one file that outlives it. All keys are test values."""

import dataclasses
import datetime
import json
import secrets
import string
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_KEY_LENGTH = 60
_KEY_LETTERS = string.ascii_letters + string.digits


def new_key() -> str:
    """Return a secret in authentik's form: 60 letters and digits."""
    return "".join(secrets.choice(_KEY_LETTERS) for _ in range(_KEY_LENGTH))


@dataclass
class User:
    """A user.

    Attributes:
        maximum_lifetime: seconds that an app password of this user may live if it asks; None for the server's default.
        token_expires: false makes new API tokens of this user live for ever.
        groups: names of its groups.
        active: false refuses its tokens and app passwords, in the words for wrong ones.
        allowed: false refuses its app passwords, in the same words: no binding lets it use the application.
        views_keys: false leaves new tokens without the right to view their keys, as a crash between saving a token and
            granting it does.
    """

    pk: int
    username: str
    email: str
    name: str
    superuser: bool = False
    groups: list[str] = field(default_factory=list)
    maximum_lifetime: float | None = None
    token_expires: bool = True
    active: bool = True
    allowed: bool = True
    views_keys: bool = True
    uid: str = field(default_factory=lambda: secrets.token_hex(32))


@dataclass
class Token:
    """An API token (intent `api`) or an app password (intent `app_password`).

    Attributes:
        expires: seconds since the epoch, by the stand-in's clock.
        key_viewers: primary keys of the users other than admins that may view the key: who made it for itself.
    """

    identifier: str
    intent: str
    user: int
    expires: float
    description: str = ""
    expiring: bool = True
    key_viewers: list[int] = field(default_factory=list)
    key: str = field(default_factory=new_key)
    pk: str = field(default_factory=lambda: str(uuid.uuid4()))


@dataclass
class Settings:
    """What an administrator sets; all in seconds.

    Attributes:
        token_lifetime: of API tokens, and of app passwords that ask for none: 30 minutes on a fresh installation.
        access_token_lifetime: of the JWTs of the token endpoint.
        jwt_skew: how far the times in JWTs are ahead of the machine's clock.
    """

    token_lifetime: float = 30 * 60
    access_token_lifetime: float = 60 * 60
    jwt_skew: float = 0.0


@dataclass
class Store:
    """The state of the stand-in. The caller saves every change with `save()`.

    Attributes:
        clock_offset: seconds that its clock is ahead of the machine's.
    """

    file: Path
    users: list[User] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    settings: Settings = field(default_factory=Settings)
    clock_offset: float = 0.0

    @classmethod
    def load(cls, file: Path) -> "Store":
        """Read what was saved, or begin with nothing."""
        if not file.exists():
            return cls(file)
        data = json.loads(file.read_text(encoding="utf-8"))
        return cls(
            file,
            [User(**user) for user in data["users"]],
            [Token(**token) for token in data["tokens"]],
            Settings(**data["settings"]),
            data["clock_offset"],
        )

    def save(self) -> None:
        """Write everything to the file, atomically."""
        data = dataclasses.asdict(self)
        del data["file"]
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(data), encoding="utf-8")
        new.replace(self.file)

    def now(self) -> float:
        """Seconds since the epoch by the stand-in's clock."""
        return datetime.datetime.now(datetime.UTC).timestamp() + self.clock_offset

    def user(self, pk: int) -> User:
        """Return the user of that primary key; raises StopIteration for an unknown one."""
        return next(user for user in self.users if user.pk == pk)

    def user_named(self, username: str) -> User | None:
        """Return the user of that login name."""
        return next((user for user in self.users if user.username == username), None)

    def token_named(self, identifier: str) -> Token | None:
        """Return the token of that identifier, whoever owns it."""
        return next((token for token in self.tokens if token.identifier == identifier), None)

    def use_token(self, key: str, intent: str, username: str | None = None) -> User | None:
        """Return whom a secret authenticates, or None. The first use of an expired token deletes it, as in authentik.

        Args:
            username: where given, the token must be this user's.
        """
        token = next((token for token in self.tokens if token.key == key and token.intent == intent), None)
        if token is None:
            return None
        owner = self.user(token.user)
        if username is not None and owner.username != username:
            return None
        if not owner.active:
            return None
        if token.expiring and token.expires <= self.now():
            self.tokens.remove(token)
            self.save()
            return None
        return owner

    def expire_tokens(self) -> None:
        """Do as authentik's background worker: expired API tokens get a new key, expired app passwords vanish."""
        for token in tuple(self.tokens):
            if token.expiring and token.expires <= self.now():
                if token.intent == "api":
                    token.key = new_key()
                    token.expires = self.now() + self.settings.token_lifetime
                else:
                    self.tokens.remove(token)
        self.save()

    def add_user(self, username: str, email: str, name: str, superuser: bool = False) -> User:
        """Add a user and return it."""
        user = User(max((user.pk for user in self.users), default=2) + 1, username, email, name, superuser)
        self.users.append(user)
        self.save()
        return user

    def token_as_json(self, token: Token) -> dict[str, Any]:
        """Return a token as the API shows it: never with its key."""
        owner = self.user(token.user)
        return {
            "pk": token.pk,
            "managed": None,
            "identifier": token.identifier,
            "intent": token.intent,
            "user": token.user,
            "user_obj": {"pk": owner.pk, "username": owner.username, "name": owner.name, "email": owner.email},
            "description": token.description,
            "expires": iso_time(token.expires),
            "expiring": token.expiring,
        }


def iso_time(timestamp: float) -> str:
    """Return a time as the API writes it."""
    return (
        datetime.datetime.fromtimestamp(timestamp, datetime.UTC)
        .isoformat(timespec="microseconds")
        .replace("+00:00", "Z")
    )
