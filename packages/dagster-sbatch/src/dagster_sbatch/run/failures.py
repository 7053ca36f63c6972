"""Texts of failures: how a workload ended, and the Failure that Dagster shows."""

import re
import signal
from collections.abc import Mapping
from typing import Any

import dagster as dg

MOST_CHARACTERS = 10_000  # of an exception's message or stack: Dagster stores it with several events


def failure(step: str, cause: str, stderr: str = "", *, final: bool = False, **details: Any) -> dg.Failure:
    """Return the failure of a step. Dagster retries it if the asset has a `retry_policy`.

    `step`: the asset keys, or the name of the op. `stderr`: its last lines. `final`: whether a retry cannot help; then
    Dagster ignores the `retry_policy`.
    """
    description = f"{step}: {cause}" + (f"\n\nLast lines of stderr:\n{stderr}" if stderr else "")
    return dg.Failure(description=description, metadata=details, allow_retries=not final)


def name_exit(code: int) -> str:
    """Return how a process ended; `code`: not 0; negative is the signal that ended it, as in `subprocess`."""
    if code > 0:
        return f"ended with exit code {code}"
    cause = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = " (the system does that when memory runs out)" if cause == "SIGKILL" else ""
    return f"was killed by {cause}{hint}"


def is_success(exception: Mapping[str, Any]) -> bool:
    """Return whether a Pipes exception is the SystemExit of `sys.exit()` or `sys.exit(0)`."""
    text = str(exception.get("message") or "").strip()
    successes = ("SystemExit", "SystemExit: 0", "SystemExit: None", "SystemExit: False")
    return exception.get("name") == "SystemExit" and text in successes


def name_exception(exception: Mapping[str, Any], *, with_stack: bool) -> str:
    """Return name and message of a Pipes exception, with its stack if stderr does not show it."""
    name, message = exception.get("name") or "an exception", str(exception.get("message") or "").strip()
    # Python's messages begin with the name, after the module of an exception that is not built in
    named = re.match(rf"(\S+\.)?{re.escape(name)}(:|\n|$)", message)
    head = message if named else f"{name}: {message}".removesuffix(": ")
    stack = "".join(exception.get("stack") or [])
    return f"{head}\n\n{stack}".rstrip() if stack and with_stack else head


def shorten_exception(exception: Mapping[str, Any]) -> dict[str, Any]:
    """Shorten the texts of a Pipes exception and of its causes."""
    causes = {name: exception.get(name) and shorten_exception(exception[name]) for name in ("cause", "context")}
    stack = shorten("".join(exception.get("stack") or []))
    return {**exception, "message": shorten(str(exception.get("message") or "")), "stack": [stack], **causes}


def shorten(text: str) -> str:
    """Leave out the middle of a text that is longer than MOST_CHARACTERS."""
    left_out = len(text) - MOST_CHARACTERS
    half = MOST_CHARACTERS // 2
    return text if left_out <= 0 else f"{text[:half]}\n[... {left_out} characters left out ...]\n{text[-half:]}"
