"""The calls below `/api/v3/core/`: who am I, and create, show, change, list and delete tokens.

Each takes the store, the caller and the request, and returns a status with what the body holds. The wording of every
error is authentik's own; clients depend on it.
"""

import datetime
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .store import Store, Token, User

Answer = tuple[int, Any]
_INTENTS = ("verification", "api", "recovery", "app_password")
_NOT_FOUND: Answer = (404, {"detail": "No Token matches the given query."})
_FORBIDDEN: Answer = (403, {"detail": "You do not have permission to perform this action."})
_BAD_TIME = (
    "Datetime has wrong format. Use one of these formats instead: YYYY-MM-DDThh:mm[:ss[.uuuuuu]][+HH:MM|-HH:MM|Z]."
)
_BAD_SLUG = 'Enter a valid "slug" consisting of letters, numbers, underscores or hyphens.'


class FieldError(Exception):
    """A field of the request is wrong; the argument is what the 400's body holds."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.body = {field: [message]}


@dataclass(frozen=True)
class Call:
    """One authenticated request.

    Attributes:
        query: parameters of the URL; of repeated ones the last.
        body: the JSON object that was sent, or an empty one.
    """

    store: Store
    caller: User
    query: dict[str, str]
    body: dict[str, Any]


def me(call: Call) -> Answer:
    """GET users/me/."""
    user = call.caller
    about = {
        "pk": user.pk,
        "username": user.username,
        "name": user.name,
        "is_active": True,
        "is_superuser": user.superuser,
        "groups": [{"name": group, "pk": group} for group in user.groups],
        "roles": [{"name": f"ak-managed-role--user-{user.pk}", "pk": user.uid[:32]}],
        "email": user.email,
        "avatar": "data:image/svg+xml;base64,",
        "uid": user.uid,
        "settings": {},
        "type": "internal",
        "system_permissions": [],
    }
    return 200, {"user": about}


def create(call: Call) -> Answer:
    """POST tokens/: only API tokens and app passwords, and for a user who is not an admin always its own."""
    fields = _checked(call, call.body, None)
    owner = call.caller
    if call.caller.superuser and "user" in call.body:
        owner = call.store.user(call.body["user"])
    default = call.store.now() + call.store.settings.token_lifetime
    token = Token(
        fields["identifier"],
        fields["intent"],
        owner.pk,
        fields["expires"] or default,
        fields.get("description", ""),
        call.body.get("expiring", True) if call.caller.superuser else owner.token_expires,
        [owner.pk] if owner.views_keys and not call.caller.superuser else [],
    )
    call.store.tokens.append(token)
    call.store.save()
    return 201, call.store.token_as_json(token)


def list_tokens(call: Call) -> Answer:
    """GET tokens/: the caller's own (an admin's: all), filtered, ordered and in pages."""
    query = call.query
    if query.get("intent", "api") not in _INTENTS:
        message = f"Select a valid choice. {query['intent']} is not one of the available choices."
        raise FieldError("intent", message)
    order = query.get("ordering", "identifier")
    found = [token for token in call.store.tokens if _visible(call, token) and _matches(token, query)]
    found.sort(key=lambda token: getattr(token, order.lstrip("-"), token.identifier), reverse=order.startswith("-"))
    size, page = int(query.get("page_size", 20)), int(query.get("page", 1))
    pages = max(1, -(-len(found) // size))
    if page > pages:
        return 404, {"detail": "Invalid page."}
    shown = found[(page - 1) * size : page * size]
    first = (page - 1) * size + 1 if shown else 0
    pagination = {
        "next": page + 1 if page < pages else 0,
        "previous": page - 1,
        "count": len(found),
        "current": page,
        "total_pages": pages,
        "start_index": first,
        "end_index": first + len(shown) - 1 if shown else 0,
    }
    results = [call.store.token_as_json(token) for token in shown]
    return 200, {"pagination": pagination, "results": results, "autocomplete": {}}


def show(call: Call, token: Token) -> Answer:
    """GET tokens/IDENTIFIER/: also of one that has expired and was not used since."""
    return 200, call.store.token_as_json(token)


def change(call: Call, token: Token) -> Answer:
    """PATCH tokens/IDENTIFIER/.

    Left out, `intent` is taken as `api` and `user` as the caller: so a PATCH without intent turns an app password into
    an API token with the same key, and an admin's takes the token away from its owner.
    """
    if call.body.get("user", token.user) != token.user:
        raise FieldError("user", "User cannot be changed")
    fields = _checked(call, {"identifier": token.identifier, **call.body}, token)
    if call.caller.superuser:
        token.user = call.caller.pk
    if fields["expires"] is not None:
        token.expires = fields["expires"]
    elif "expires" in call.body:
        token.expires = call.store.now() + call.store.settings.token_lifetime
    token.identifier, token.intent = fields["identifier"], fields["intent"]
    token.description = fields.get("description", token.description)
    token.expiring = call.body.get("expiring", token.expiring)
    call.store.save()
    return 200, call.store.token_as_json(token)


def delete(call: Call, token: Token) -> Answer:
    """DELETE tokens/IDENTIFIER/: a token may delete itself."""
    call.store.tokens.remove(token)
    call.store.save()
    return 204, None


def view_key(call: Call, token: Token) -> Answer:
    """GET tokens/IDENTIFIER/view_key/: refused to the owner of a token that an admin made."""
    if not call.caller.superuser and call.caller.pk not in token.key_viewers:
        return _FORBIDDEN
    return 200, {"key": token.key}


def set_key(call: Call, token: Token) -> Answer:
    """POST tokens/IDENTIFIER/set_key/: an admin's right only."""
    if not call.caller.superuser:
        return _FORBIDDEN
    token.key = call.body["key"]
    call.store.save()
    return 204, None


_COLLECTION: dict[tuple[str, str], Callable[[Call], Answer]] = {
    ("GET", "users/me/"): me,
    ("GET", "tokens/"): list_tokens,
    ("POST", "tokens/"): create,
}
_ONE_TOKEN: dict[tuple[str, str], Callable[[Call, Token], Answer]] = {
    ("GET", ""): show,
    ("PATCH", ""): change,
    ("PUT", ""): change,
    ("DELETE", ""): delete,
    ("GET", "view_key/"): view_key,
    ("POST", "set_key/"): set_key,
}


def answer(call: Call, method: str, path: str) -> Answer:
    """Answer a request to `/api/v3/core/<path>`."""
    try:
        if collection := _COLLECTION.get((method, path)):
            return collection(call)
        parts = re.fullmatch(r"tokens/([^/]+)/(.*)", path)
        one_token = _ONE_TOKEN.get((method, parts[2])) if parts else None
        if parts is None or one_token is None:
            return 404, {"detail": "Not found."}
        token = call.store.token_named(parts[1])
        if token is None or not _visible(call, token):
            return _NOT_FOUND
        return one_token(call, token)
    except FieldError as error:
        return 400, error.body


def _checked(call: Call, body: dict[str, Any], existing: Token | None) -> dict[str, Any]:
    """Check the fields of a token to be created or changed; `expires` in seconds, or None where the default holds."""
    identifier = body.get("identifier")
    if identifier is None:
        raise FieldError("identifier", "This field is required.")
    if not re.fullmatch(r"[-a-zA-Z0-9_]+", identifier):
        raise FieldError("identifier", _BAD_SLUG)
    other = call.store.token_named(identifier)
    if other is not None and other is not existing:
        raise FieldError("identifier", "Token with this identifier already exists.")
    intent = body.get("intent", "api")
    if intent not in _INTENTS:
        raise FieldError("intent", f'"{intent}" is not a valid choice.')
    if intent not in ("api", "app_password"):
        raise FieldError("intent", f"Invalid intent {intent}")
    now, settings = call.store.now(), call.store.settings
    expires = _parse_time(body.get("expires"))
    if intent == "api":
        expires = now + settings.token_lifetime
    elif expires is not None:
        latest = now + (call.caller.maximum_lifetime or settings.token_lifetime)
        if expires > latest:
            shown = datetime.datetime.fromtimestamp(latest, datetime.UTC)
            raise FieldError("expires", f"Token expires exceeds maximum lifetime ({shown} UTC).")
    checked = {"identifier": identifier, "intent": intent, "expires": expires}
    return {**checked, "description": body["description"]} if "description" in body else checked


def _parse_time(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise FieldError("expires", _BAD_TIME) from None


def _visible(call: Call, token: Token) -> bool:
    return call.caller.superuser or token.user == call.caller.pk


def _matches(token: Token, query: dict[str, str]) -> bool:
    exact = all(query.get(field, getattr(token, field)) == getattr(token, field) for field in ("identifier", "intent"))
    return exact and query.get("search", "").lower() in f"{token.identifier} {token.description}".lower()
