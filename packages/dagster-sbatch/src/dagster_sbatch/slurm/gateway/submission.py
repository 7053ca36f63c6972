"""A run directory's files as a request carries them."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

Files = Mapping[str, str | bytes]
"""Content by name; one is `job.sh`."""


def submission(run: str, files: Files | None, options: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a request that submits a run.

    Args:
        run: the run directory.
        files: None: it exists already.
        options: for sbatch, before the script's own.
    """
    request: dict[str, Any] = {"run": run, "options": list(options)}
    if files is not None:
        request["files"] = {
            name: content if isinstance(content, str) else {"base64": base64.b64encode(content).decode()}
            for name, content in files.items()
        }
    return request
