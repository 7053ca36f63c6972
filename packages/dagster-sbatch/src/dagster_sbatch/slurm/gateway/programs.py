"""Programs for a login node: the agent, and command lines that start one there."""

import re
import shlex
import zlib
from collections.abc import Sequence
from pathlib import Path

_AGENT = """\
import sys
from importlib.machinery import ModuleSpec

TEXTS = {texts!r}


class Importer:
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=name == "agent") if name in TEXTS else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        exec(compile(TEXTS[module.__name__], module.__name__.replace(".", "/"), "exec"), module.__dict__)


sys.meta_path.insert(0, Importer())
from agent.server import serve
"""
"""A program that imports the agent's modules from itself, each when it is needed: compiling them all takes longer."""


def _join() -> bytes:
    """Return the agent's modules as one program, compressed with zlib: a new connection takes few packets at once."""
    files = Path(__file__).with_name("agent").glob("*.py")
    texts = {f"agent.{file.stem}": without_comments(file.read_text(encoding="utf-8")) for file in sorted(files)}
    texts["agent"] = texts.pop("agent.__init__")
    return zlib.compress(_AGENT.format(texts=texts).encode(), 9)


def without_comments(text: str) -> str:
    """Return a module's code without comments and docstrings, two thirds of the bytes. Lines keep their numbers."""
    docstring = re.compile(r'^( *)"""(.*?)"""', re.MULTILINE | re.DOTALL)
    code = docstring.sub(lambda found: f'{found[1]}""' + "\n" * found[2].count("\n"), text)
    return re.sub(r"(^ *|  )#.*$", "", code, flags=re.MULTILINE)


SOURCE = _join()
# Reads exactly the source; the requests that follow on stdin stay in the same buffer, for the agent.
START = (
    "import sys, zlib; sys.version_info < (3, 6) and sys.exit('it is Python ' + sys.version.split()[0]); "
    f"source = zlib.decompress(sys.stdin.buffer.read({len(SOURCE)})); "
    "names = {}; exec(compile(source, 'agent', 'exec'), names); names['serve']()"
)
NO_PYTHON = "gateway-agent: no Python"
"""Begins the line that comes instead of the agent's greeting where none of the interpreters starts."""
# Runs the first interpreter that starts. An agent ends with 0 or by a signal.
_CHOOSE = """\
for each in {pythons}; do
  command -v "$each" >/dev/null 2>&1 || continue
  "$each" -I -S -u -X utf8 -c {start}
  code=$?
  if [ $code = 0 ] || [ $code -gt 128 ]; then exit $code; fi
  echo "$each ended with exit code $code" >&2
done
"""
_SAFE = re.compile(rb"[^A-Za-z0-9 _./=:,-]")


def start_agent(pythons: Sequence[str], setup: Sequence[str]) -> str:
    """Return the script of /bin/sh that starts an agent.

    Login profiles can be slow. One is read for the setup commands, and where Slurm or Python are not found without it.
    """
    choose = _CHOOSE.format(pythons=shlex.join(pythons), start=shlex.quote(START))
    none = f"{NO_PYTHON}: none of {', '.join(pythons)} starts on"
    last = f'{choose}echo; echo {shlex.quote(none)} "$(uname -n)"'
    first = "" if setup else f"if command -v sbatch >/dev/null 2>&1; then\n{choose}fi\n"
    return first + after_login_profile(setup, last)


def for_any_shell(script: str) -> str:
    """Return a command line that runs a script of /bin/sh, whatever the user's login shell is.

    It holds nothing that a shell expands: bash, tcsh, zsh and fish pass it on as it is.
    """
    octal = _SAFE.sub(lambda found: b"\\0%03o" % found[0][0], script.encode())
    return f"""exec /bin/sh -c 'eval "$(printf %b "$0")"' '{octal.decode()}'"""


def after_login_profile(setup: Sequence[str], script: str) -> str:
    """Return a line of /bin/sh that runs a script of bash after the login profile and a site's setup commands.

    Only login shells have `module`; with POSIXLY_CORRECT they read no profile. The script alone reads the stdin.
    """
    text = "\n".join([*setup, "exec <&3 3<&-", script])
    return f"unset POSIXLY_CORRECT; exec /bin/bash -l -c {shlex.quote(text)} bash 3<&0 </dev/null"
