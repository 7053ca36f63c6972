"""Command lines for a login node: for any login shell, and for bash after the login profile."""

import re
import shlex
from collections.abc import Sequence

_SAFE = re.compile(rb"[^A-Za-z0-9 _./=:,-]")


def for_any_shell(script: str) -> str:
    """Return a command line that runs a script of /bin/sh, whatever the user's login shell is.

    It holds nothing that a shell expands: bash, tcsh, zsh and fish pass it on as it is.
    """
    octal = _SAFE.sub(lambda found: b"\\0%03o" % found[0][0], script.encode())
    return f"""exec /bin/sh -c 'eval "$(printf %b "$0")"' '{octal.decode()}'"""


def after_login_profile(setup: Sequence[str], script: str) -> str:
    """Return a line of /bin/sh that runs a script of bash after the login profile and a site's setup commands.

    Only login shells have `module`. Neither the profile nor a setup command can read the standard input.

    Args:
        setup: the site's `setup_commands`.
        script: gets the standard input of the line.
    """
    text = "\n".join([*setup, "exec <&3 3<&-", script])
    return f"exec /bin/bash -l -c {shlex.quote(text)} bash 3<&0 </dev/null"
