"""Digests of values that decide a result."""

import hashlib
import json
from typing import Any


def digest_of(value: Any, length: int = 16) -> str:
    """Return a digest of a JSON value; it is stored instead of the value, which may be private."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]
