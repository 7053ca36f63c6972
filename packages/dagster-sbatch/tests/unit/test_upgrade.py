"""What `scripts/upgrade` prints of a changelog, and that an interrupted upgrade leaves the project as it was."""

import errno
import os
import shutil
import signal
import stat
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

from dagster_sbatch.commands import lock
from dagster_sbatch.commands.signals import STOPS
from dagster_sbatch.commands.upgrade import KEPT, changes_between, go_back, main, upgrade
from dagster_sbatch.commands.vendored import wheels_in, wheels_named
from dagster_sbatch.errors import ConfigurationError
from support.upgrades import kill_at, make_wheel


@pytest.mark.parametrize(
    ("one", "other", "changes"),
    [
        ("1.10.0", "1.0.0", "1.2.0 (2027)\n- two\n  twice\n\n1.1.0\n- one"),
        ("1.10.0", "1.1.0", "1.2.0 (2027)\n- two\n  twice"),
        ("1.1.0", "1.2.0", "1.2.0 (2027)\n- two\n  twice"),
        ("1.10.0", "1.2.0", ""),
        ("1.2.0", "1.2.0", ""),
        ("1.0.0 zero", "1.0.0", "1.0.0\n- zero"),  # two builds of a version, as of a clone of the template
    ],
)
def test_what_changed_between_two_engines(one: str, other: str, changes: str, tmp_path: Path) -> None:
    assert changes_between(make_wheel(tmp_path, *one.split()), make_wheel(tmp_path / "other", other)) == changes


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What an upgrade reads and writes of a project; its dependencies are resolved without uv."""

    def resolve(root: Path) -> dict[Path, str]:
        (wheel,) = wheels_named(root, "pyproject.toml").values()
        return {root / "requirements" / name: wheel.requirement for name in ("dev.txt", "cluster-extra.txt")}

    monkeypatch.setattr(lock, "resolve", resolve)
    handlers = {number: signal.signal(number, signal.default_int_handler) for number in STOPS}
    folder = tmp_path / "project"
    folder.mkdir()
    old = make_wheel(folder / "vendor", "1.0.0")
    (folder / "requirements").mkdir()
    for name in ("dev.txt", "cluster-extra.txt"):
        (folder / "requirements" / name).write_text(old.requirement)
    for name, group in {"pyproject.toml": "[dependency-groups]\ncluster-extra = []\n", "pixi.toml": ""}.items():
        (folder / name).write_text(f'dagster-sbatch = {{ path = "{old.source}" }}\n{group}')
    yield folder
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def newer(tmp_path: Path) -> str:
    return str(make_wheel(tmp_path / "new", "1.1.0").path)


def state(project: Path) -> dict[str, bytes]:
    """The project's files, less its scripts and those of the engine before."""
    files = {str(path.relative_to(project)): path.read_bytes() for path in project.rglob("*") if path.is_file()}
    return {name: content for name, content in files.items() if name != KEPT and not name.startswith("scripts/")}


def engines(project: Path) -> set[str]:
    """The versions of the engine that the project's files name; each is in vendor/."""
    names = ("pyproject.toml", "pixi.toml", "requirements/dev.txt", "requirements/cluster-extra.txt")
    wheels = [wheels_named(project, name)["dagster-sbatch"] for name in names]
    assert all(wheel.path.is_file() for wheel in wheels)
    return {wheel.version for wheel in wheels}


def run_main(project: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str, test: str = "", install: str = "") -> int:
    """Run the command in a project whose tests, and the installation of its engine, are Python programs."""
    (project / "scripts").mkdir(exist_ok=True)
    (project / "scripts" / "upgrade").write_text(f"import os, signal, sys\n{install}\n")
    (project / "scripts" / "test").write_text(f"import os, signal, sys\n{test}\n")
    monkeypatch.setattr(sys, "argv", ["upgrade", *arguments])
    return main(project)


def test_an_interrupted_upgrade_leaves_the_project_as_it_was(
    project: Path, newer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever presses Ctrl-C presses it again."""
    seen = []

    def interrupt(root: Path) -> None:
        seen.append((root / "pixi.toml").read_text())
        (root / "requirements" / "dev.txt").write_text("half a fi")
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(lock, "resolve", interrupt)
    before = state(project)
    assert run_main(project, monkeypatch, newer) == 130
    assert seen == ['dagster-sbatch = { path = "./vendor/dagster_sbatch-1.1.0-py3-none-any.whl" }\n']
    assert state(project) == before
    assert capsys.readouterr().err == "Interrupted. Nothing was changed.\n"


def test_an_interrupt_while_files_are_replaced_waits_for_the_end(
    project: Path, newer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def interrupted(path: Path, missing_ok: bool = False) -> None:
        signal.raise_signal(signal.SIGINT)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", interrupted)
    with suppress(KeyboardInterrupt):
        upgrade(project, newer, project.parent)
    assert engines(project) == {"1.1.0"}
    assert list(wheels_in(project / "vendor")) == ["dagster-sbatch"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("recover", ["--back", "again"])
def test_a_killed_upgrade_can_be_left(recover: str, project: Path, newer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed before each of its changes of the project, in turn."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow, and without it the same changes are made
    before = state(project)
    for moment in range(1, 100):
        process = os.fork()
        if process == 0:
            kill_at(moment, project)
            upgrade(project, newer, project.parent)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        versions = engines(project)
        if recover == "again" and len(versions) == 1:
            upgrade(project, newer, project.parent)
            assert engines(project) == {"1.1.0"}
        elif recover == "again":
            with pytest.raises(ConfigurationError, match=r"interrupted(.|\n)*--back(.|\n)*git restore vendor"):
                upgrade(project, newer, project.parent)
        if versions != {"1.0.0"} or recover == "again":
            go_back(project)
            assert state(project) == before
        if code == 0:
            break
    assert moment > 10


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_upgrade_to_the_same_version_is_never_mixed_with_another(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wheel's name is the same, its content is not. Back from the next engine leads to one of the two, whole."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    same, third = make_wheel(project.parent / "same", "1.0.0"), make_wheel(project.parent / "new", "1.1.0")
    with zipfile.ZipFile(same.path, "a") as archive:
        archive.writestr("dagster_sbatch/fix.py", "")
    refused = 0
    for moment in range(1, 100):
        copy = Path(shutil.copytree(project, project.parent / f"copy-{moment}"))
        process = os.fork()
        if process == 0:
            kill_at(moment, copy)
            upgrade(copy, str(same.path), copy.parent)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        try:
            upgrade(copy, str(third.path), copy.parent)
        except ConfigurationError as error:
            assert "an upgrade was interrupted" in str(error)
            refused += 1
        go_back(copy)
        (wheel,) = wheels_in(copy / "vendor").values()
        assert (copy / "requirements" / "dev.txt").read_text() == wheel.requirement
        if code == 0:
            break
    assert moment > 10
    assert refused


def test_without_space_nothing_is_changed(project: Path, newer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "write", full)
    before = state(project)
    with pytest.raises(OSError, match="No space left"):
        upgrade(project, newer, project.parent)
    assert state(project) == before


@pytest.mark.parametrize("name", ["vendor", "requirements"])
def test_a_read_only_folder_is_named_by_its_path_in_the_project(
    name: str, project: Path, newer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dependencies are resolved in a copy of the project, which can be written to. For root everything can."""
    (project / name).chmod(0o555)
    (project / "requirements" / "dev.txt").chmod(0o444)
    write = lock.resolve

    def resolve(root: Path) -> dict[Path, str]:
        paths = (root / "vendor", root / "requirements", root / "requirements" / "dev.txt")
        assert [path.name for path in paths if not path.stat().st_mode & stat.S_IWUSR] == []
        return write(root)

    monkeypatch.setattr(lock, "resolve", resolve)
    with nullcontext() if os.geteuid() == 0 else pytest.raises(PermissionError, match=str(project / name)):
        upgrade(project, newer, project.parent)


def test_the_file_that_cannot_be_written_is_named(project: Path, newer: str) -> None:
    """Several files are open by then."""
    name = Path(newer).name
    (project / "vendor" / f".{name}.new").mkdir()
    with pytest.raises(OSError, match=f"{project}/vendor/{name}"):
        upgrade(project, newer, project.parent)


@pytest.mark.parametrize("arguments", [["--back"], ["1.1.0"]])
def test_an_engine_of_a_package_index_is_not_replaced(
    arguments: list[str], project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(project / "vendor")
    (project / "pyproject.toml").write_text('dependencies = ["dagster-sbatch>=1"]\n')
    assert run_main(project, monkeypatch, *arguments) == 1
    assert "Ask for another version in pyproject.toml, then run:\n  scripts/lock\n" in capsys.readouterr().err


def test_going_back_resolves_only_if_the_requirements_have_changed(
    project: Path, newer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, folders = state(project), list[Path]()
    upgrade(project, newer, project.parent)
    with monkeypatch.context() as patched:
        patched.setattr(lock, "resolve", folders.append)
        go_back(project)
    assert state(project) == before
    assert folders == []
    upgrade(project, newer, project.parent)
    with (project / "pyproject.toml").open("a") as file:
        file.write('polars = "*"\n')
    (project.parent / "beside").write_text("with polars")  # as a requirement's path may lead to
    monkeypatch.setattr(lock, "resolve", lambda root: {Path("dev.txt"): (root / "../beside").read_text()})
    go_back(project)
    assert (project / "requirements" / "dev.txt").read_text() == "with polars"
    assert (project / "pyproject.toml").read_text() == before["pyproject.toml"].decode() + 'polars = "*"\n'


@pytest.mark.parametrize("moment", ["install", "test"])
def test_an_interrupt_of_the_tests_leaves_the_new_engine(
    moment: str, project: Path, newer: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The tests end by themselves; what to do by hand is printed before them."""
    interrupt = "os.kill(os.getppid(), signal.SIGINT); import time; time.sleep(0.5); print('tests end')"
    assert run_main(project, monkeypatch, newer, **{moment: interrupt}) == 130
    printed = capfd.readouterr()
    assert "by hand:\n\n1.1.0\n- one\n\n" in printed.out
    assert ("Running the tests:\ntests end\n" in printed.out) == (moment == "test")
    assert "Interrupted. The engine is replaced, but not tested. Run the tests:\n  scripts/test\n" in printed.err
    assert engines(project) == {"1.1.0"}


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0"])
def test_an_engine_that_cannot_be_installed_is_not_kept(
    version: str, project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not even --back could start: a script sets up the environment first."""
    wheel, before = make_wheel(project.parent / "new", version), state(project)
    with zipfile.ZipFile(wheel.path, "a") as archive:
        archive.writestr("dagster_sbatch/new.py", "")
    assert run_main(project, monkeypatch, str(wheel.path), install="sys.exit('no such package')") == 1
    assert capfd.readouterr().err.endswith(
        "no such package\n\ndagster-sbatch cannot be installed; the reason is above.\nNothing was changed.\n"
    )
    assert state(project) == before
    assert run_main(project, monkeypatch, "--back") == 1


@pytest.mark.parametrize("back", [False, True])
def test_what_a_person_writes_meanwhile_is_kept(
    back: bool, project: Path, newer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resolving the dependencies takes long enough to edit a file, or to start the command once more."""
    if back:
        upgrade(project, newer, project.parent)
        with (project / "pyproject.toml").open("a") as file:
            file.write("a = 1\n")
    pixi = project / "pixi.toml"
    monkeypatch.setattr(lock, "resolve", lambda _: pixi.write_text(f"{pixi.read_text()}numpy = '*'\n") and {})
    with pytest.raises(ConfigurationError, match=r"^pixi\.toml changed while this command ran\. Run it again\.$"):
        go_back(project) if back else upgrade(project, newer, project.parent)
    assert pixi.read_text().endswith("numpy = '*'\n")
    assert engines(project) == {"1.1.0" if back else "1.0.0"}


def test_an_older_engine_says_what_to_undo(
    project: Path, newer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The changelog of the newer one has it."""
    upgrade(project, newer, old := project.parent)
    assert run_main(project, monkeypatch, str(make_wheel(old, "1.0.0").path)) == 0
    assert "undo them by hand:\n\n1.1.0\n- one\n" in capsys.readouterr().out
    assert run_main(project, monkeypatch, "--back") == 0
    assert "also make them by hand:\n\n1.1.0\n- one\n" in capsys.readouterr().out
    for left_out in ("zero", "-"):  # two builds of one version
        upgrade(project, str(make_wheel(old, "1.0.0", left_out).path), old)
    assert run_main(project, monkeypatch, "--back") == 0
    assert "undo them by hand:\n\n1.0.0\n- zero\n" in capsys.readouterr().out


@pytest.mark.parametrize("damaged", ["wheel", "kept"])
def test_damaged_content_changes_nothing(damaged: str, project: Path, newer: str) -> None:
    """The archive's directory is whole, what it lists is not."""
    if damaged == "kept":
        upgrade(project, newer, project.parent)
    path, content = (Path(newer), project / KEPT)[damaged == "kept"], zlib.compress(b"word " * 99, wbits=-15)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dagster_sbatch-1.1.0.dist-info/METADATA", b"word " * 99)
    path.write_bytes(path.read_bytes().replace(content, b"\xff" * len(content)))
    before = state(project)
    with pytest.raises(ConfigurationError, match="cannot be read: Error -3"):
        go_back(project) if damaged == "kept" else upgrade(project, newer, project.parent)
    assert state(project) == before


def test_a_wheel_that_was_renamed_changes_nothing(project: Path, newer: str) -> None:
    renamed = Path(newer).rename(project.parent / "dagster_sbatch-3.0.0-py3-none-any.whl")
    before = state(project)
    with pytest.raises(
        ConfigurationError, match=r"has no dagster_sbatch-3\.0\.0\.dist-info/METADATA: it is another package's"
    ):
        upgrade(project, str(renamed), project.parent)
    assert state(project) == before


def test_a_terminated_upgrade_ends_its_tests(
    project: Path, newer: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    terminate = "os.kill(os.getppid(), signal.SIGTERM); signal.pause()"
    assert run_main(project, monkeypatch, newer, test=terminate) == 130
    assert "replaced, but not tested" in capfd.readouterr().err


@pytest.mark.parametrize("back", [False, True])
def test_with_pixi_the_tests_run_with_the_new_engine(
    back: bool, project: Path, newer: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """pixi installs the new wheel before it runs anything; a script within its environment does not."""
    if back:
        upgrade(project, newer, project.parent)
    tools = project.parent / "tools"
    tools.mkdir()
    (tools / "pixi").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tools / "pixi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setattr(sys, "prefix", str(project / ".pixi" / "envs" / "default"))
    assert run_main(project, monkeypatch, "--back" if back else newer) == 0
    wanted = f"run\n--manifest-path\n{project}/pixi.toml\npython\n{project}/scripts/test\n"
    assert f"Running the tests:\n{wanted}" in capfd.readouterr().out


def test_files_from_before_1980_are_kept(project: Path, newer: str) -> None:
    """As in images and archives whose times are set to 0; a zip file cannot have such a time."""
    for path in [project / "pyproject.toml", *(project / "vendor").iterdir()]:
        os.utime(path, (0, 0))
    before = state(project)
    upgrade(project, newer, project.parent)
    go_back(project)
    assert state(project) == before


def test_a_damaged_archive_of_the_engine_before_changes_nothing(
    project: Path, newer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    upgrade(project, newer, project.parent)
    (project / KEPT).write_text("half a fi")
    assert run_main(project, monkeypatch, "--back") == 1
    error = capsys.readouterr().err
    assert f"{KEPT} cannot be read" in error
    assert "\n  git restore --source COMMIT vendor requirements pyproject.toml pixi.toml\n" in error
    assert error.endswith("Nothing was changed.\n")
    assert engines(project) == {"1.1.0"}


def test_a_file_that_a_project_does_not_have_is_not_restored(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """git would restore none."""
    (project / "pixi.toml").unlink()
    shutil.rmtree(project / "vendor")
    assert run_main(project, monkeypatch, "--back") == 1
    assert "Restore it:\n  git restore vendor requirements pyproject.toml\nNothing" in capsys.readouterr().err
