"""Wheels are fetched and built here, by the real pip, without any index."""

from pathlib import Path

import pytest

from dagster_sbatch.environments.lockfile import Interpreter, read_lock
from dagster_sbatch.environments.wheels import Wheel, gather_wheels
from dagster_sbatch.errors import ConfigurationError
from slurm_in_a_box import wait_until
from support.dagster_dev import gone
from support.environments import make_source, make_wheels

WORKING = [
    "cp312-cp312-manylinux_2_28_x86_64",
    "cp312-cp312-manylinux2014_x86_64",
    "cp312-cp312-manylinux1_x86_64",
    "cp39-abi3-manylinux_2_17_x86_64",
    "py3-none-any",
]
"""Tags of wheels for Python 3.12 and glibc 2.28."""
NOT_WORKING = [
    "cp312-cp312-manylinux_2_29_x86_64",
    "cp311-cp311-manylinux_2_17_x86_64",
    "cp313-abi3-manylinux_2_17_x86_64",
    "cp312-cp312-manylinux_2_28_aarch64",
    "cp312-cp312-musllinux_1_2_x86_64",
    "cp312-cp312-linux_x86_64",
]
PYTHON = Interpreter("/usr/bin/python3.12", "3.12.4", "x86_64", "2.28")


@pytest.fixture(autouse=True)
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only index that pip reads."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def gather(text: str, tmp_path: Path, name: str = "one") -> list[Wheel]:
    lock = tmp_path / "lock.txt"
    lock.write_text(text)
    (tmp_path / name).mkdir()
    return gather_wheels(read_lock(lock), PYTHON, tmp_path / name, lambda: None)


def test_wheels_are_chosen_for_the_python_and_the_glibc_there(index: Path, tmp_path: Path) -> None:
    lock = "".join(make_wheels(index, f"package{number}", [tag, *NOT_WORKING]) for number, tag in enumerate(WORKING))
    found = [wheel.path.name.removesuffix(".whl").partition("-1.0-")[2] for wheel in gather(lock, tmp_path)]
    assert found == WORKING


def test_source_is_built_into_the_same_wheel_each_time(index: Path, tmp_path: Path) -> None:
    text = make_source(index, "tiny")
    (one,), (two,) = gather(text, tmp_path), gather(text, tmp_path, "two")
    assert one.path.name == "tiny-1.0-py3-none-any.whl"
    assert (one.digest, one.size) == (two.digest, two.size)
    assert one.place == f"{one.digest[:16]}/tiny-1.0-py3-none-any.whl"


def test_another_content_than_the_locks_is_refused(index: Path, tmp_path: Path) -> None:
    text = make_source(index, "tiny")
    make_source(index, "tiny", ballast=1)
    with pytest.raises(ConfigurationError, match=r"(?s)pip download for .*HASH"):
        gather(text, tmp_path)


def test_what_was_compiled_for_this_machine_is_refused(index: Path, tmp_path: Path) -> None:
    text = make_source(index, "tiny", tag="py3-none-linux_x86_64")
    with pytest.raises(ConfigurationError, match=r"does not work with Python 3\.12\.4 and glibc 2\.28.*SLURM_PYTHON"):
        gather(text, tmp_path)


def test_a_version_that_does_not_exist_is_reported_in_pips_words(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"(?s)pip download for .*No matching distribution found for nothing.*pip config list"
    ):
        gather("nothing==1 --hash=sha256:aa\n", tmp_path)


def test_an_exception_of_alive_ends_the_work(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dagster_sbatch.environments.wheels.POLL_SECONDS", 0.01)

    def stop() -> None:
        raise InterruptedError

    lock = tmp_path / "lock.txt"
    lock.write_text(make_source(index, "tiny"))
    with pytest.raises(InterruptedError):
        gather_wheels(read_lock(lock), PYTHON, tmp_path, stop)


BUILD = """
import os, time
open({path!r} + ".part", "w").write(str(os.getpid()))
os.rename({path!r} + ".part", {path!r})
time.sleep(600)
"""


def test_a_build_that_is_interrupted_leaves_nothing_running(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dagster_sbatch.environments.wheels.POLL_SECONDS", 0.01)
    pid, lock, temporary = tmp_path / "pid", tmp_path / "lock.txt", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    lock.write_text(make_source(index, "tiny", first=BUILD.format(path=str(pid))))

    def stop_the_build() -> None:
        if pid.exists():
            raise InterruptedError

    with pytest.raises(InterruptedError):
        gather_wheels(read_lock(lock), PYTHON, tmp_path, stop_the_build)
    wait_until(lambda: gone(int(pid.read_text())), "the build has ended", 10)
    assert list(temporary.iterdir()) == []
