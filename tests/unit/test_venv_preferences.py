"""The set-up of .venv where the user's configuration of pip or uv prefers another place, or another way."""

import sys
from pathlib import Path

import pytest

from tests.unit.test_venv import BACKEND, PYPROJECT, copy, run

__all__ = ["copy"]


def make_package(copy: Path) -> None:
    (copy / "backend.py").write_text(BACKEND)
    (copy / "pyproject.toml").write_text(PYPROJECT)
    (copy / "uv").write_text(f'#!/bin/sh\nexec {sys.executable} -m uv "$@"\n')
    (copy / "uv").chmod(0o755)


def test_pip_installs_into_the_projects_environment_whatever_the_user_prefers(copy: Path) -> None:
    """Many sites recommend `user = true` in pip.conf, over which variables prevail."""
    make_package(copy)
    (copy / "pip.conf").write_text("[install]\nuser = true\n")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(copy), "PIP_NO_INDEX": "1"}
    environment |= {"PIP_CONFIG_FILE": f"{copy}/pip.conf", "PIP_USER": "1", "PIP_TARGET": "elsewhere"}
    environment |= {"PIP_REQUIRE_HASHES": "1", "PIP_DRY_RUN": "1"}
    done = run([sys.executable, "scripts/show"], cwd=copy, env=environment)
    assert done.stdout == f"{copy}/.venv []\n", done.stderr
    made = copy / ".venv"
    assert list(made.glob("lib/python*/site-packages/copy-0.dist-info"))
    assert {path.name for path in made.glob(".*")} <= {".gitignore"}
    assert f"{made}/bin/python" in (made / "bin" / "pip").read_text()
    where = run(["/bin/sh", "-c", '. .venv/bin/activate && echo "$VIRTUAL_ENV"'], cwd=copy)
    assert where.stdout == f"{made}\n"


def test_uv_installs_the_project_from_its_folder_whatever_the_user_prefers(copy: Path) -> None:
    """An image may have such variables for other projects. The project itself has no hash."""
    make_package(copy)
    (copy / "uv.toml").write_text('[pip]\nrequire-hashes = true\nprefix = "elsewhere"\n')
    places = f"{copy}:{Path(sys.executable).resolve().parent}:/usr/bin:/bin"
    environment = {"PATH": places, "HOME": str(copy), "UV_OFFLINE": "1", "UV_CONFIG_FILE": f"{copy}/uv.toml"}
    environment |= {
        "UV_REQUIRE_HASHES": "1",
        "UV_NO_EDITABLE": "1",
        "UV_WORKING_DIR": "/",
        "UV_SYSTEM_PYTHON": "1",
        "UV_PROJECT": "/",
    }
    done = run([sys.executable, "scripts/show"], cwd=copy, env=environment)
    assert done.stdout == f"{copy}/.venv []\n", done.stderr
    assert "with uv" in done.stderr
    assert list(copy.glob(".venv/lib/python*/site-packages/copy-0.dist-info"))


@pytest.mark.parametrize("installer", ["uv", "pip"])
def test_a_configuration_that_names_another_place_is_named(copy: Path, installer: str) -> None:
    make_package(copy)
    (copy / "uv.toml").write_text('[pip]\ntarget = "elsewhere"\n')
    (copy / "pip.conf").write_text("[install]\ntarget = elsewhere\n")
    environment = {"PATH": f"{copy}:/usr/bin:/bin" if installer == "uv" else "/usr/bin:/bin", "HOME": str(copy)}
    environment |= {"UV_OFFLINE": "1", "UV_CONFIG_FILE": f"{copy}/uv.toml", "PIP_CONFIG_FILE": f"{copy}/pip.conf"}
    done = run([sys.executable, "scripts/show"], cwd=copy, env=environment)
    assert done.returncode == 1
    assert f"{installer} has installed the packages elsewhere, as its configuration says.\nRemove " in done.stderr
    assert not (copy / ".venv" / "installed.sha256").exists()
