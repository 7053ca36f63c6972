"""What the agent removes from the folder of environments while others use it; its functions run in this process."""

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from dagster_sbatch.slurm.gateway.agent import releases
from dagster_sbatch.slurm.gateway.agent.building import HERE
from dagster_sbatch.slurm.gateway.agent.disk import RequestError, store
from dagster_sbatch.slurm.gateway.agent.server import find

LONG_AGO = 1_000_000_000.0
WHEEL = "0123/tiny-1.0-py3-none-any.whl"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an old environment, its packages, and their wheel; nothing else needs these."""
    folder = tmp_path / "environments"
    layer = wanted(folder)["environment"]["layer"]
    packages = folder / "packages" / layer
    for path in (packages, (folder / "wheels" / WHEEL).parent):
        path.mkdir(parents=True)
    (folder / "wheels" / WHEEL).touch()
    store(str(packages / "packages.json"), {"wheels": [WHEEL]})
    for path in (packages, (folder / "wheels" / WHEEL).parent):
        os.utime(path, (LONG_AGO, LONG_AGO))
    make_environment(folder, "old", layer)
    return folder


def make_environment(folder: Path, name: str, layer: str | None) -> None:
    (folder / name).mkdir()
    store(str(folder / name / HERE), {**dict.fromkeys(releases.NEEDED), "name": name, "layer": layer})
    os.utime(folder / name, (LONG_AGO, LONG_AGO))


def ask(folder: Path, verb: str, **fields: Any) -> Any:
    return find(verb)(None, {**fields, "folder": str(folder)}, lambda **_: None)


def wanted(folder: Path) -> Any:
    """Ask for an environment with the same packages and other code, as each run does."""
    python = {"asked": None, "python": None, "asked_by": "SLURM_PYTHON", "candidates": [sys.executable]}
    content = {"lock": "a lock", "modules": [], "setup": [], "code": {"main.py": "new"}}
    return ask(folder, "building.find", **python, **content, oldest=[3, 11], newest=[3, 99])


def remains(folder: Path, name: str = "old") -> list[str]:
    """Remove an environment, and what only it needs; return what is left."""
    assert ask(folder, "releases.remove", names=[name])["removed"] == [name]
    return [name for name in ("packages", "wheels") if any((folder / name).iterdir())]


def remove_old_files(folder: Path) -> None:
    """As a site does it on a file system that is not for keeping files: the folders stay."""
    for path, _, names in os.walk(folder):
        Path(path).chmod(0o700)
        for name in names:
            Path(path, name).unlink()


def test_an_environment_whose_old_files_were_removed_is_made_again(tmp_path: Path) -> None:
    python = {"asked": sys.executable, "python": sys.executable, "asked_by": "SLURM_PYTHON", "candidates": []}
    content: dict[str, Any] = {"lock": None, "modules": [], "setup": [], "code": {"a/main.py": "digest"}}
    fields = {**python, **content, "oldest": [3, 11], "newest": [3, 99]}
    folder = tmp_path / "environments"
    for _ in range(2):
        assert not ask(folder, "building.find", **fields)["ready"]
        made = ask(folder, "building.build", **fields, wheels={}, files={"a/main.py": "cHJpbnQoKQ=="})["environment"]
        assert ask(folder, "building.find", **fields)["ready"]
        assert Path(made["workloads"], "a/main.py").read_text() == "print()"
        remove_old_files(folder / made["name"])
    assert [path.name for path in folder.iterdir() if not path.name.startswith(".")] == [made["name"]]


def test_packages_whose_old_files_were_removed_are_not_used(folder: Path) -> None:
    """Production says so, since it runs only what was published."""
    layer = wanted(folder)["environment"]["layer"]
    store(
        str(folder / "old" / HERE), {**dict.fromkeys(releases.NEEDED), "name": "old", "layer": layer, "python": "/bin"}
    )
    ask(folder, "releases.publish", groups={"": "old"}, about={})
    assert ask(folder, "releases.published", group="")["environment"]["name"] == "old"
    assert wanted(folder)["installed"]
    remove_old_files(folder / "packages")
    assert not wanted(folder)["installed"]
    with pytest.raises(RequestError, match=r"not whole any more.* Publish again:\nscripts/deploy_environment.py$"):
        ask(folder, "releases.published", group="")


def test_what_nobody_needs_is_removed_with_the_last_environment(folder: Path) -> None:
    assert remains(folder) == []


def test_what_an_upload_has_left_is_removed_though_no_environment_is(folder: Path) -> None:
    """Its client was stopped before it could make one."""
    left = folder / "wheels" / "89ab"
    left.mkdir()
    (left / "huge-1.0-py3-none-any.whl.0123456789abcdef.part").touch()
    os.utime(left, (LONG_AGO, LONG_AGO))
    assert ask(folder, "releases.remove", names=[])["removed"] == []
    assert [path.name for path in (folder / "wheels").iterdir()] == ["0123"]


def test_packages_that_a_client_has_found_stay_until_it_has_built_its_environment(folder: Path) -> None:
    assert wanted(folder)["installed"]
    assert remains(folder) == ["packages"]


def test_a_wheel_that_a_client_does_not_send_again_stays_until_it_has_built_its_environment(folder: Path) -> None:
    assert ask(folder, "building.missing", wheels=[WHEEL, "4567/new-1.0-py3-none-any.whl"])["missing"] == [
        "4567/new-1.0-py3-none-any.whl"
    ]
    assert remains(folder) == ["wheels"]


def test_a_file_that_cannot_be_removed_yet_blocks_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client of NFS renames a file that one of its programs has open, and refuses to remove that."""
    unlink, is_open = os.unlink, True

    def unlink_on_nfs(path: Any, *, dir_fd: int | None = None) -> None:
        if not is_open or not str(path).endswith(("lib.so", ".nfs01")):
            unlink(path, dir_fd=dir_fd)
        elif str(path) == ".nfs01":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        else:
            os.rename(path, ".nfs01", src_dir_fd=dir_fd, dst_dir_fd=dir_fd)

    (packages,) = (folder / "packages").iterdir()
    for place in (folder / "old", packages):
        (place / "lib.so").touch()
        os.utime(place, (LONG_AGO, LONG_AGO))
    monkeypatch.setattr(os, "unlink", unlink_on_nfs)
    assert remains(folder) == ["packages"]
    left = {*folder.glob("*.old"), *(folder / "packages").iterdir()}
    for place in left:
        os.utime(place, (LONG_AGO, LONG_AGO))
    make_environment(folder, "other", None)
    assert remains(folder, "other") == ["packages"]
    assert {*folder.glob("*.old"), *(folder / "packages").iterdir()} == left
    is_open = False
    ask(folder, "releases.publish", groups={}, about={})
    assert [*folder.glob("*.old"), *(folder / "packages").iterdir()] == []
