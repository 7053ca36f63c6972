"""For tests of environments: packages that exist as source only, and locks that name them."""

import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from resources import PROJECT

_PROJECT = """\
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""
_BACKEND = '''\
"""Makes the wheel of this one package, without any tool."""
import pathlib, zipfile
NAME, TAG = {name!r}, {tag!r}
METADATA = f"Metadata-Version: 2.1\\nName: {{NAME}}\\nVersion: 1.0\\n"
WHEEL = f"Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: {{TAG}}\\n"
def build_wheel(directory, config_settings=None, metadata_directory=None):
    file = f"{{NAME}}-1.0-{{TAG}}.whl"
    with zipfile.ZipFile(pathlib.Path(directory) / file, "w") as wheel:
        def add(name, data):
            wheel.writestr(zipfile.ZipInfo(name), data)  # dated 1980
        add(f"{{NAME}}/__init__.py", pathlib.Path("module.py").read_bytes())
        add(f"{{NAME}}/ballast", pathlib.Path("ballast").read_bytes())
        add(f"{{NAME}}-1.0.dist-info/METADATA", METADATA)
        add(f"{{NAME}}-1.0.dist-info/WHEEL", WHEEL)
        add(f"{{NAME}}-1.0.dist-info/RECORD", "")
    return file
'''


def make_source(folder: Path, name: str, tag: str = "py3-none-any", ballast: int = 0, first: str = "") -> str:
    """Write a source distribution that needs nothing to be built; its line in a lock.

    Args:
        folder: where pip is to find it.
        name: of the distribution and its one module, which has a WORD.
        tag: of the wheel that it makes.
        ballast: bytes that no compression makes fewer.
        first: Python that its build executes first.
    """
    files = {
        "pyproject.toml": _PROJECT.encode(),
        "backend.py": (_BACKEND.format(name=name, tag=tag) + first).encode(),
        "module.py": b'WORD = "a package"\n',
        "ballast": os.urandom(ballast),
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
    }
    path = folder / f"{name}-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for each, data in files.items():
            about = tarfile.TarInfo(f"{name}-1.0/{each}")
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))
    return f"{name}==1.0 --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


def make_wheels(folder: Path, name: str, tags: Iterable[str]) -> str:
    """Write an empty wheel of one distribution for each tag; the distribution's line in a lock."""
    hashes = []
    for tag in tags:
        path, about = folder / f"{name}-1.0-{tag}.whl", f"{name}-1.0.dist-info"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            wheel.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
            wheel.writestr(f"{about}/RECORD", "")
        hashes.append(f"--hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}")
    return f"{name}==1.0 {' '.join(hashes)}\n"


def lines_of_the_lock(names: Iterable[str]) -> str:
    """What requirements/cluster.txt says of some packages."""
    logical = PROJECT.lock.read_text().replace("\\\n", " ").splitlines()
    return "".join(f"{line}\n" for line in logical if line.partition("==")[0] in names)
