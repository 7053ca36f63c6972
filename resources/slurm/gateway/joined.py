"""Several modules as the source of one program, for where nothing is installed."""

import zlib
from collections.abc import Sequence
from pathlib import Path

_JOIN = """\
import sys, types
package = sys.modules[%(name)r] = types.ModuleType(%(name)r)
package.__path__ = []
for name, text in %(modules)r:
    module = sys.modules[%(name)r + "." + name] = types.ModuleType(%(name)r + "." + name)
    module.__package__ = %(name)r
    exec(compile(text, %(name)r + "/" + name + ".py", "exec"), module.__dict__)
globals().update(vars(module))
"""


def join(folder: Path, modules: Sequence[str]) -> bytes:
    """Make some modules of a folder a package over there, too; the program has the names of the last.

    Args:
        folder: it names the package.
        modules: each after those that it uses.

    Returns:
        The source, compressed with zlib: a connection that is new takes few packets at once.
    """
    texts = [(name, (folder / f"{name}.py").read_text(encoding="utf-8")) for name in modules]
    return zlib.compress((_JOIN % {"name": folder.name, "modules": texts}).encode(), 9)
