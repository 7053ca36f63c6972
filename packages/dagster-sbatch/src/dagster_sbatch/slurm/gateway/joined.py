"""Several modules as the source of one program, for where nothing is installed."""

import zlib
from pathlib import Path

_SOURCES = Path(__file__).parents[3]
_JOIN = """\
import sys, types
for name, text in %r:
    package = name.rpartition(".")[0]
    if package not in sys.modules:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = []
    module = sys.modules[name] = types.ModuleType(name)
    module.__package__ = package
    exec(compile(text, name, "exec"), module.__dict__)
globals().update(vars(module))
"""


def join(*modules: Path) -> bytes:
    """Make some modules of this project one program, under the names that they have here.

    Args:
        modules: their files, each after those that it uses; the program has the names of the last.

    Returns:
        The source, compressed with zlib: a connection that is new takes few packets at once.
    """
    texts = [
        (".".join(path.relative_to(_SOURCES).with_suffix("").parts), path.read_text(encoding="utf-8"))
        for path in modules
    ]
    return zlib.compress((_JOIN % (texts,)).encode(), 9)
