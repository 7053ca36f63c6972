"""Warnings about the user's files, each told once a process, however often a connection is made."""

import functools
import logging

_log = logging.getLogger("dagster_sbatch.ssh")


@functools.cache
def warn_once(text: str) -> None:
    """Log a warning unless the same has been logged before."""
    _log.warning(text)
