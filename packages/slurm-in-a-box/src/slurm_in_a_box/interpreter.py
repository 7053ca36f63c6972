"""Give the site's users a Python environment: the one that runs this process, mounted read-only on the machines.

Its byte code is compiled here, because users cannot write it there: each process of Ray would spend seconds on it.
"""

import compileall
import sys
import sysconfig
from pathlib import Path

from .host import locked
from .layout import Layout


def interpreter(layout: Layout) -> Path:
    """Path of the interpreter, as the site's machines for users see it."""
    return layout.state / "python" / "bin" / "python3"


def make(layout: Layout) -> None:
    """Make a virtual environment around two empty folders, on which machines mount the interpreter and its packages."""
    folder = layout.state / "python"
    base, packages = _places(layout)
    compile_packages(Path(sysconfig.get_path("purelib")))
    for path in (folder / "bin", base, packages):
        path.mkdir(parents=True, exist_ok=True)
    text = f"home = {base}/bin\ninclude-system-site-packages = false\n"
    (folder / "pyvenv.cfg").write_text(text, encoding="utf-8")
    interpreter(layout).symlink_to(base / "bin" / _name())
    # `ldconfig` on a machine enters it into the loader's cache: libpython's own place may be hidden from users.
    libraries = layout.machine_etc / "ld.so.conf.d" / "00-python.conf"
    libraries.write_text(f"{base}/lib\n", encoding="utf-8")


def mounts(layout: Layout) -> list[str]:
    """Return what the machines mount, in pairs of source and target: the installation of Python, and the packages."""
    base, packages = _places(layout)
    return [sys.base_prefix, str(base), sysconfig.get_path("purelib"), str(packages)]


def compile_packages(packages: Path) -> None:
    """Compile the byte code of all packages, unless that was done after the last change of the folder.

    It takes a minute, so sites that start at the same time wait for the first of them.
    """
    done = packages / ".compiled"
    with locked(packages / ".compiling"):
        if not done.exists() or done.stat().st_mtime < packages.stat().st_mtime:
            compileall.compile_dir(packages, quiet=2, workers=0)  # it fails where a file is only a template for one
            done.touch()


def _name() -> str:
    return f"python{sys.version_info.major}.{sys.version_info.minor}"


def _places(layout: Layout) -> tuple[Path, Path]:
    folder = layout.state / "python"
    return folder / "base", folder / "lib" / _name() / "site-packages"
