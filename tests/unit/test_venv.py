"""The project's environment: made when it is missing or out of date, and left alone otherwise."""

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from slurm_in_a_box import wait_until
from support import ROOT

WITHOUT_PRIVILEGES = () if os.geteuid() else ("setpriv", "--bounding-set=-all", "--inh-caps=-all")


def run(command: list[str], **options: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)  # type: ignore[call-overload, no-any-return]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A project that has no environment yet, with nothing in it but a script."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "requirements").mkdir()
    shutil.copy(ROOT / "scripts" / "_environment.py", tmp_path / "scripts")
    (tmp_path / "requirements" / "dev.txt").write_text("")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "copy"\nversion = "0"\n')
    script = tmp_path / "scripts" / "show"
    script.write_text("import _environment\n_environment.activate()\nimport sys\nprint(sys.prefix, sys.argv[1:])\n")
    return tmp_path


def test_pixi_is_used_where_it_is_found(copy: Path) -> None:
    tools = copy / "tools"
    tools.mkdir()
    (tools / "pixi").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tools / "pixi").chmod(0o755)
    environment = {"PATH": f"{tools}:/usr/bin:/bin"}
    done = run([sys.executable, "scripts/show", "a b", "$HOME"], cwd=copy, env=environment)
    wanted = ["run", "--manifest-path", f"{copy}/pixi.toml", "python", f"{copy}/scripts/show", "a b", "$HOME"]
    assert done.stdout.splitlines() == wanted


def test_uv_trusts_what_the_system_trusts(copy: Path) -> None:
    """And pip what the user's variables name. uv is used where it is found: that of another project, for instance."""
    tools = copy / "tools"
    tools.mkdir()
    (tools / "uv").write_text('#!/bin/sh\nenv > "$0.environment"; exit 3\n')
    (tools / "uv").chmod(0o755)
    ours = {"UV_SYSTEM_CERTS": "nonsense", "REQUESTS_CA_BUNDLE": "/ca.pem", "CURL_CA_BUNDLE": "/ca.pem"}
    done = run([sys.executable, "scripts/show"], cwd=copy, env={"PATH": f"{tools}:/usr/bin:/bin", **ours})
    assert "uv venv" in done.stderr
    given = (tools / "uv.environment").read_text().splitlines()
    assert {"UV_SYSTEM_CERTS=1", "UV_NATIVE_TLS=1", "REQUESTS_CA_BUNDLE=/ca.pem", "CURL_CA_BUNDLE=/ca.pem"} <= {*given}


@pytest.mark.parametrize("name", ["default", "dev"])
@pytest.mark.parametrize("detached", [False, True])
def test_within_an_environment_of_pixi_nothing_is_set_up(name: str, detached: bool, copy: Path) -> None:
    """As with `pixi run python scripts/show` and `pixi run -e dev python scripts/show`."""
    made = copy / ".pixi" / "envs" / name
    if detached:  # pixi's option `detached-environments`
        (copy / "elsewhere").mkdir()
        (copy / ".pixi").mkdir()
        made.parent.symlink_to(copy / "elsewhere")
    venv.create(made)
    done = run([str(made / "bin" / "python"), "scripts/show", "a b"], cwd=copy, env={"PATH": "/usr/bin:/bin"})
    assert done.stdout == f"{made} ['a b']\n"
    assert not (copy / ".venv").exists()


@pytest.fixture
def ready(copy: Path) -> Path:
    """The same with an environment as a set-up leaves it, on another disk; and a uv that fails."""
    venv.create(copy / "elsewhere", symlinks=True)
    (copy / ".venv").symlink_to(copy / "elsewhere")
    code = "import sys; sys.path.insert(0, 'scripts'); import _environment as e; "
    code += "e.OWNER.write_text(str(e.ROOT)); e.STAMP.write_text(e._wanted())"
    assert run([sys.executable, "-c", code], cwd=copy).returncode == 0
    (copy / "uv").write_text("#!/bin/sh\nexit 3\n")
    (copy / "uv").chmod(0o755)
    return copy


@pytest.mark.parametrize(
    ("name", "value"),
    [("VIRTUAL_ENV", "/nowhere"), ("PYTHONHOME", sys.base_prefix), ("PYTHONPATH", "others")],
)
def test_an_environment_is_used_where_it_is_current(name: str, value: str, ready: Path) -> None:
    """Whatever else is active in the shell: its packages do not hide those of the project."""
    (ready / ".venv.lock").mkdir()  # nothing has to be written, so the folder may be somebody else's
    (ready / "others").mkdir()
    (ready / "others" / "tomllib.py").write_text("raise ImportError")
    with (ready / "scripts" / "show").open("a") as script:
        script.write("import tomllib\n")
    done = run([sys.executable, "scripts/show"], cwd=ready, env={"PATH": str(ready), name: value})
    assert (done.stdout, done.stderr) == (f"{ready}/.venv []\n", "")


def test_a_folder_with_an_umlaut_works_in_any_locale(ready: Path, tmp_path: Path) -> None:
    """An editable installation names the folder in a file of the environment."""
    project = tmp_path / "hö"
    for name in ("scripts", "requirements"):
        shutil.copytree(ready / name, project / name)
    venv.create(project / ".venv", symlinks=True)
    (packages,) = project.glob(".venv/lib/python*/site-packages")
    (packages / "project.pth").write_text(f"{project}\n", encoding="utf-8")
    code = "import sys; sys.path.insert(0, 'scripts'); import _environment as e; e.STAMP.write_text(e._wanted())"
    assert run([sys.executable, "-c", code], cwd=project).returncode == 0
    with (project / "scripts" / "show").open("a") as script:
        script.write(f"print({str(project)!r} in sys.path)\n")
    done = run([sys.executable, "scripts/show"], cwd=project, env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"})
    assert (done.stdout, done.stderr) == (f"{project}/.venv []\nTrue\n", "")


@pytest.mark.parametrize("target", ["/nowhere/python3", "/bin/true"], ids=["gone", "another"])
def test_an_environment_whose_python_was_replaced_is_set_up_again(target: str, ready: Path) -> None:
    """As after an upgrade of the system."""
    python = ready / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to(target)
    done = run([sys.executable, "scripts/show"], cwd=ready, env={"PATH": str(ready)})
    assert done.returncode == 1
    assert f"Setting up {ready}/.venv failed (exit code 3)" in done.stderr


@pytest.mark.parametrize("found", ["another project's", "another tool's"])
def test_a_link_to_what_is_not_the_projects_is_left_alone(found: str, ready: Path, tmp_path: Path) -> None:
    """The second project is a copy of the first one's folder, link included: `cp -a`."""
    second = tmp_path / "second"
    for name in ("scripts", "requirements"):
        shutil.copytree(ready / name, second / name)
    (second / ".venv").symlink_to(ready / "elsewhere")
    if found == "another tool's":
        (ready / "elsewhere" / "project").unlink()
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PIP_NO_INDEX": "1"}
    done = run([sys.executable, "scripts/show"], cwd=second, env=environment)
    assert done.returncode == 1
    reason = f"the environment of {ready}" if found == "another project's" else "which has other files"
    assert done.stderr == (
        f"{second}/.venv is a link to {ready}/elsewhere, {reason}.\n"
        "Nothing was changed. Link it to an empty folder, or empty this one.\n"
    )
    assert (ready / "elsewhere" / "installed.sha256").is_file()


def test_a_failed_set_up_behind_a_link_is_done_again(copy: Path) -> None:
    (copy / ".venv").symlink_to(copy / "elsewhere")
    (copy / "uv").write_text('#!/bin/sh\nfor last; do :; done\nmkdir -p "$last"; touch "$last/half"; exit 3\n')
    (copy / "uv").chmod(0o755)
    for _ in range(2):
        done = run([sys.executable, "scripts/show"], cwd=copy, env={"PATH": f"{copy}:/usr/bin:/bin"})
        assert f"Setting up {copy}/.venv failed (exit code 3)" in done.stderr
        assert [path.name for path in (copy / "elsewhere").iterdir()] == ["project"]


def test_after_a_failed_set_up_the_former_environment_works_with_the_former_requirements(ready: Path) -> None:
    """As after a `git pull` without a network: the owner returns to the commit before."""
    wanted = ready / "requirements" / "dev.txt"
    wanted.write_text("# changed\n")
    (ready / "uv").write_text('#!/bin/sh\nfor last; do :; done\nfind "$last" -mindepth 1 -delete; exit 3\n')
    environment = {"PATH": f"{ready}:/usr/bin:/bin"}
    failed = run([sys.executable, "scripts/show"], cwd=ready, env=environment)
    assert f"Setting up {ready}/.venv failed (exit code 3)" in failed.stderr
    assert failed.stderr.endswith("The former environment is unchanged: it works with the former requirements/.\n")
    wanted.write_text("")
    done = run([sys.executable, "scripts/show"], cwd=ready, env=environment)
    assert (done.stdout, done.stderr) == (f"{ready}/.venv []\n", "")


def test_a_moved_project_keeps_its_linked_environment(ready: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("scripts", "requirements", ".venv"):
        (ready / name).rename(moved / name)
    done = run([sys.executable, "scripts/show"], cwd=moved, env={"PATH": str(ready)})
    assert f"Setting up {moved}/.venv failed (exit code 3)" in done.stderr


def test_an_active_environment_behind_a_link_does_not_replace_itself(ready: Path) -> None:
    """`activate` puts the folder that the link leads to on PATH, and uv is installed there."""
    (ready / "requirements" / "dev.txt").write_text("# changed\n")
    (ready / "uv").rename(ready / "elsewhere" / "bin" / "uv")
    (ready / "pyproject.toml").write_text(PYPROJECT)
    (ready / "backend.py").write_text(BACKEND)
    environment = {"PATH": f"{ready}/elsewhere/bin:/usr/bin:/bin", "HOME": str(ready), "PIP_NO_INDEX": "1"}
    (ready / "elsewhere" / "share" / "locked").mkdir(parents=True)  # what cannot be removed is no reason to fail
    (ready / "elsewhere" / "share" / "locked" / "file").touch()
    (ready / "elsewhere" / "share" / "locked").chmod(0o555)
    done = run([*WITHOUT_PRIVILEGES, sys.executable, "scripts/show"], cwd=ready, env=environment)
    assert done.stdout == f"{ready}/.venv []\n", done.stderr
    assert len(list((ready / "elsewhere").glob(".before-*/share/locked/file"))) == 1


def test_an_installer_that_outlives_a_killed_script_keeps_the_lock(copy: Path) -> None:
    (copy / "uv").write_text('#!/bin/sh\necho "$$" > uv.pid.new; mv uv.pid.new uv.pid; exec sleep 60\n')
    (copy / "uv").chmod(0o755)
    pid = copy / "uv.pid"
    with subprocess.Popen([sys.executable, "scripts/show"], cwd=copy, env={"PATH": f"{copy}:/usr/bin:/bin"}) as it:
        wait_until(pid.exists, "the installer runs")
        it.kill()
    installer = int(pid.read_text())
    try:
        with (copy / ".venv.lock").open("w") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(installer, signal.SIGKILL)


def test_a_folder_that_cannot_be_written_to_is_named(copy: Path) -> None:
    (copy / ".venv.lock").mkdir()
    done = run([sys.executable, "scripts/show"], cwd=copy, env={"PATH": str(copy)})
    assert done.returncode == 1
    assert done.stderr.startswith(f"Setting up {copy}/.venv failed: [Errno 21] Is a directory: '{copy}/.venv.lock'.\n")


@pytest.mark.parametrize("character", [":", "?", "%", "[", "*", "\n"])
def test_a_path_that_dagster_or_a_shell_would_misread_is_refused(character: str, copy: Path) -> None:
    odd = copy / f"a{character}b"
    shutil.copytree(copy / "scripts", odd / "scripts")
    done = run([sys.executable, "scripts/show"], cwd=odd, env={"PATH": str(copy)})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{odd} has a {character!r}, with which Dagster or PATH cannot use it. Rename that folder.\n"


def test_a_script_says_that_it_waits_for_another(ready: Path) -> None:
    (ready / "requirements" / "dev.txt").write_text("# changed\n")
    said = ready / "said"
    with (ready / ".venv.lock").open("w") as lock, said.open("w") as errors:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with subprocess.Popen(
            [sys.executable, "scripts/show"], cwd=ready, env={"PATH": str(ready)}, stderr=errors
        ) as it:
            try:
                wait_until(said.read_text, "the script says something")
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)
    assert said.read_text().startswith(
        f"Another script, such as scripts/dev, uses {ready}/.venv or is setting it up. Waiting until it ends ...\n"
    )
    assert (it.returncode, "(exit code 3)" in said.read_text()) == (1, True)


def test_an_environment_in_use_is_not_replaced(ready: Path) -> None:
    """By Dagster, whose runs would lack modules meanwhile. The program that uses it replaces the script."""
    program = "print(flush=True); import time; time.sleep(60)"
    lines = f"import os, sys\n_environment.keep()\nos.execv(sys.executable, [sys.executable, '-c', {program!r}])\n"
    (ready / "scripts" / "dev").write_text((ready / "scripts" / "show").read_text() + lines)
    (ready / ".venv.lock").touch()
    said, where = ready / "said", {"cwd": ready, "env": {"PATH": str(ready)}}
    with subprocess.Popen([sys.executable, "scripts/dev"], **where, stdout=subprocess.PIPE) as user:  # type: ignore[call-overload]
        try:
            assert user.stdout and user.stdout.readline() == b"\n"
            (ready / "requirements" / "dev.txt").write_text("# changed\n")
            with said.open("w") as errors:
                it = subprocess.Popen([sys.executable, "scripts/show"], **where, stderr=errors)  # type: ignore[call-overload]
            wait_until(said.read_text, "the script says something")
        finally:
            user.kill()
    assert it.wait() == 1
    assert said.read_text().startswith(
        f"Another script, such as scripts/dev, uses {ready}/.venv or is setting it up. Waiting until it ends ...\n"
    )


@pytest.mark.parametrize("folder", [".dagster", ".venv"])
def test_files_of_root_are_named(folder: str, ready: Path) -> None:
    """Before Dagster is started, and before an environment is made again."""
    (ready / ".dagster").mkdir()
    (ready / folder).chmod(0o555)
    if folder == ".venv":
        (ready / "requirements" / "dev.txt").write_text("# changed\n")
    with (ready / "scripts" / "show").open("a") as script:
        script.write("_environment.keep()\n")
    done = run([*WITHOUT_PRIVILEGES, sys.executable, "scripts/show"], cwd=ready)
    assert done.returncode == 1
    assert f"{ready}/{folder} cannot be written to" in done.stderr
    assert f"sudo chown -R $(id -u) {shlex.quote(str(ready))}\n" in done.stderr


def test_an_environment_that_only_root_can_use_is_set_up_again(ready: Path) -> None:
    """As after `sudo scripts/test` with a Python in root's home."""
    (ready / "elsewhere" / "bin").chmod(0)
    done = run([*WITHOUT_PRIVILEGES, sys.executable, "scripts/show"], cwd=ready, env={"PATH": f"{ready}:/usr/bin:/bin"})
    (ready / "elsewhere" / "bin").chmod(0o755)
    assert f"Setting up {ready}/.venv failed (exit code 3)" in done.stderr


def test_a_lock_file_that_is_missing_is_named(ready: Path) -> None:
    (ready / "requirements" / "dev.txt").unlink()
    done = run([sys.executable, "scripts/show"], cwd=ready, env={"PATH": str(ready)})
    text = f"{ready}/requirements/dev.txt: No such file or directory. Restore it:\n  git restore requirements\n"
    assert (done.returncode, done.stderr) == (1, text)


def test_a_script_whose_output_is_closed_runs(ready: Path) -> None:
    with (ready / "scripts" / "show").open("a") as script:
        script.write("open('ran', 'w')\n")
    done = run(["/bin/sh", "-c", 'exec "$0" scripts/show <&- >&-', sys.executable], cwd=ready)
    assert (done.returncode, done.stderr) == (0, "")
    assert (ready / "ran").exists()


BACKEND = """\
import zipfile


def build_editable(folder, *_):
    with zipfile.ZipFile(f"{folder}/copy-0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("copy-0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: copy\\nVersion: 0\\n")
        wheel.writestr("copy-0.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("copy-0.dist-info/RECORD", "")
    return "copy-0-py3-none-any.whl"
"""
"""Builds the project `copy` without a package."""
PYPROJECT = """\
[project]
name = "copy"
version = "0"
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""


def test_a_failed_set_up_shows_the_command_and_leaves_no_stamp(copy: Path) -> None:
    (copy / "requirements" / "dev.txt").write_text("no-such-package-at-all==1 --hash=sha256:00\n")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(copy), "PIP_NO_INDEX": "1"}
    done = run([sys.executable, "scripts/show"], cwd=copy, env=environment)
    assert done.returncode == 1
    assert "Setting up" in done.stderr
    assert "-m pip" in done.stderr
    assert "try again" in done.stderr
    assert not (copy / ".venv" / "installed.sha256").exists()


def test_without_ensurepip_the_error_names_the_package(copy: Path) -> None:
    """Debian's python3 without python3-venv: the module is not there."""
    code = (
        "import importlib.util, sys; sys.path.insert(0, 'scripts'); sys.argv = ['scripts/show']\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'ensurepip' else find(name, *rest)\n"
        "import _environment; _environment.activate()"
    )
    done = run([sys.executable, "-c", code], cwd=copy, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 1
    assert f"sudo apt install python3.{sys.version_info.minor}-venv" in done.stderr


def test_a_python_that_is_too_old_is_named(copy: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, 'scripts'); sys.argv = ['scripts/show']; sys.version_info = (3, 9, 2)\n"
        "import _environment; _environment.activate()"
    )
    done = run([sys.executable, "-c", code], cwd=copy, env={"PATH": str(copy)})
    assert done.returncode == 1
    assert "Python 3.11 to 3.13 is needed" in done.stderr
    assert "is 3.9" in done.stderr
