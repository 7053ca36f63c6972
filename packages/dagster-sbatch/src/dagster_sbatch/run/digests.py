"""Digests of values that decide a result."""

import hashlib
import json
from typing import Any


def check_json(name: str, value: Any) -> None:
    """Check that the workload can get a value as JSON, and that the value has a digest.

    Raises ValueError: it is not JSON, or the keys of a dictionary in it are of several types.
    """
    try:
        json.dumps(value, sort_keys=True)
    except (TypeError, ValueError) as error:
        reason = f"{error}. Convert it to numbers, strings, lists and dictionaries"
        if "'<' not supported" in str(error):  # the keys cannot be sorted
            reason = "a dictionary in it has keys of several types. Use strings"
        raise ValueError(f"{name} cannot be sent to the workload as JSON: {reason}") from None


def digest_of(value: Any, length: int = 16) -> str:
    """Return a digest of a JSON value; it is stored instead of the value, which may be private."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]
