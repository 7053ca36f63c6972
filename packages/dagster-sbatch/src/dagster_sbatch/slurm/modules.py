"""Environment modules (Lmod): the names in a request, the part of a job script that loads them, and its error."""

import re
import shlex
from collections.abc import Sequence
from string import Template
from typing import Annotated

from pydantic import BeforeValidator

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@=/-]*")
_EXAMPLE = "for instance modules=['GCC/14.3.0', 'OpenMPI']"
_FAILED = "could not load the modules"
_ERROR = "Lmod has detected the following error: "
_ADVICE = (
    "Correct modules=[...] of the request or of the site. On the supercomputer, this command lists valid names:\n"
    "module spider"
)
_NOT_FOUND = 127  # exit code of a shell for a command that it does not have
_NO_LMOD = (
    "There is no command module: the machine has no Lmod, or its login profile does not start it. "
    "Remove modules=[...], or start Lmod in the setup_commands of the site."
)
# `module` sets variables of the shell that calls it. Lmod and the files of sites read unset variables, so a job script
# cannot have `set -u`.
_LOAD = Template(
    """\
# The modules of the request. If Lmod cannot load one of them, it loads none, and the job ends.
module load $names 2>modules.log
loaded=$$?
said=$$(<modules.log)
[ -z "$$said" ] || printf '%s\\n' "$$said" >&2
if [ "$$loaded" != 0 ]; then
  code=1
  said=$${said#*$error} # its first paragraph; the others are general advice
  said=$${said%%$$'\\n\\n'*}
  why=$${said//$$'\\n'/ }$$'\\n'
  why+=$advice
  [ "$$loaded" != $not_found ] ||
    why=$no_lmod
  printf '%s $failed %s. %s\\n' "$$HOSTNAME" $listed "$$why" >cause
  exit 1
fi
"""
)


def _check(value: object) -> object:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(  # noqa: TRY004 - pydantic reports a ValueError
            f"{value!r} is not a list. Write {_EXAMPLE}"
        )
    for position, name in enumerate(value):
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} is not the name of a module. Write one name per element, without commands, {_EXAMPLE}"
            )
        if name in value[:position]:
            raise ValueError(f"{name!r} is listed twice. Remove one of them")
    return value


Modules = Annotated[tuple[str, ...], BeforeValidator(_check)]  # names of modules, in the order in which they are loaded


def render_modules(modules: Sequence[str]) -> str:
    """Return lines of bash that load modules; if that fails, they write the file `cause` and end the job with code 1.

    Without modules, the text is empty.
    """
    if not modules:
        return ""
    return _LOAD.substitute(
        names=shlex.join(modules),
        listed=shlex.quote(", ".join(modules)),
        failed=_FAILED,
        error=shlex.quote(_ERROR),
        advice=shlex.quote(_ADVICE),
        not_found=_NOT_FOUND,
        no_lmod=shlex.quote(_NO_LMOD),
    )


def explain_modules(host: str, modules: Sequence[str], code: int, said: str) -> str:
    """Return why modules could not be loaded, and what to change; the lines of `render_modules` write the same."""
    why = _NO_LMOD if code == _NOT_FOUND else f"{shorten_error(said)}\n{_ADVICE}"
    return f"{host} {_FAILED} {', '.join(modules)}. {why}"


def shorten_error(said: str) -> str:
    """Return the first paragraph of an error of Lmod as one line; the others are general advice."""
    return " ".join(said.rpartition(_ERROR)[2].strip().partition("\n\n")[0].split())
