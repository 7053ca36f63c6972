"""The commands for people: each explains itself and finds the project's environment; the pixi tasks call them."""

import ast
import contextlib
import fcntl
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

from slurm_in_a_box import wait_until
from support import ROOT

SCRIPTS = sorted(path for path in (ROOT / "scripts").iterdir() if not path.name.startswith("_") and path.is_file())
TASKS = tomllib.loads((ROOT / "pixi.toml").read_text())["tasks"]


def run(command: list[str], **options: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_explains_itself_from_any_folder(script: Path, tmp_path: Path) -> None:
    assert os.access(script, os.X_OK)
    done = run([sys.executable, str(script), "--help"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"usage: scripts/{script.name}" in done.stdout
    assert "exit codes" in done.stdout.lower()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["-n", "WORKERS", "--dist", "loadfile"]),
        (["unit", "-x"], ["-m", "not cluster and not local", "-x", "-n", "WORKERS", "--dist", "loadfile"]),
        (["smoke", "-n", "1"], ["-m", "smoke", "-n", "1"]),
        (["tests/unit/test_scripts.py::test_it"], ["tests/unit/test_scripts.py::test_it"]),
        (["-k", "unit", "--pdb"], ["-k", "unit", "--pdb"]),
    ],
)
def test_the_tests_run_in_parallel_unless_the_options_say_otherwise(
    words: list[str], expected: list[str], tmp_path: Path
) -> None:
    (tmp_path / "pytest").mkdir()
    (tmp_path / "pytest" / "__init__.py").touch()
    (tmp_path / "pytest" / "__main__.py").write_text("import json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    command = [sys.executable, str(ROOT / "scripts" / "test"), *words]
    done = run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    workers = str(min(2 * (os.cpu_count() or 1), 8))
    assert json.loads(done.stdout) == [workers if word == "WORKERS" else word for word in expected]


def test_what_is_no_test_is_named() -> None:
    """pytest's workers say nothing about it."""
    done = run([sys.executable, str(ROOT / "scripts" / "test"), "unti", "-x"])
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == "scripts/test: 'unti' is neither unit nor smoke, nor a file or folder of tests\n"


OF_COPIES = {
    "dagster_sbatch.commands": "costs demo deploy_environment dev docs doctor job lock preview "
    "refresh_step_auth upgrade",
    "dagster_sbatch.commands.signals": "interrupt_once",
    "slurm_in_a_box.command_line": "main",
}
"""What scripts and tests import beside the public API."""


def test_what_copies_import_of_the_engine_stays() -> None:
    """A copy keeps its scripts and tests after an upgrade: they need each name that a template has ever imported."""
    skeleton = ROOT / "scripts" / "_skeleton"
    files = [*SCRIPTS, *(path for path in skeleton.rglob("*") if path.is_file() and path.parent.name != "__pycache__")]
    imported: dict[str, set[str]] = {}
    for path in (path for path in files if path.suffix in ("", ".py") and path != ROOT / "scripts" / "new_project"):
        with contextlib.suppress(SyntaxError):  # no Python
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[2]:
                    imported.setdefault(node.module, set()).update(each.name for each in node.names)
    engine = {
        name: names for name, names in imported.items() if name.startswith(("dagster_sbatch.", "slurm_in_a_box."))
    }
    assert engine == {name: set(names.split()) for name, names in OF_COPIES.items()}
    for module, names in OF_COPIES.items():
        for name in names.split():
            assert hasattr(importlib.import_module(module), name) or importlib.import_module(f"{module}.{name}")


@pytest.mark.parametrize("name", TASKS)
def test_a_pixi_task_is_a_command_that_exists(name: str) -> None:
    program, script = TASKS[name]["cmd"].split()
    assert program == "python"
    assert ROOT / script in SCRIPTS


def test_pixi_asks_for_the_python_that_the_project_supports() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert tomllib.loads((ROOT / "pixi.toml").read_text())["dependencies"]["python"] == project["requires-python"]


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
    ours["UV_REQUIRE_HASHES"] = "1"  # the project itself has none
    done = run([sys.executable, "scripts/show"], cwd=copy, env={"PATH": f"{tools}:/usr/bin:/bin", **ours})
    assert "uv venv" in done.stderr
    given = (tools / "uv.environment").read_text().splitlines()
    assert "UV_REQUIRE_HASHES=0" in given
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
    code = "import sys; sys.path.insert(0, 'scripts'); import _environment as e; e._sign()\n"
    code += "e.STAMP.write_text(e._wanted())"
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
    done = run([sys.executable, "scripts/show"], cwd=ready, env=environment)
    assert done.stdout == f"{ready}/.venv []\n", done.stderr


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
    assert said.read_text().startswith(f"Another script is setting up {ready}/.venv. Waiting for it ...\n")
    assert (it.returncode, "(exit code 3)" in said.read_text()) == (1, True)


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


def test_pip_installs_into_the_projects_environment_whatever_the_user_prefers(copy: Path) -> None:
    """Many sites recommend `user = true` in pip.conf, over which variables prevail."""
    (copy / "backend.py").write_text(BACKEND)
    (copy / "pyproject.toml").write_text(PYPROJECT)
    (copy / "pip.conf").write_text("[install]\nuser = true\n")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(copy), "PIP_NO_INDEX": "1"}
    environment |= {"PIP_CONFIG_FILE": f"{copy}/pip.conf", "PIP_USER": "1", "PIP_TARGET": "elsewhere"}
    environment |= {"PIP_REQUIRE_HASHES": "1", "PIP_DRY_RUN": "1"}
    done = run([sys.executable, "scripts/show"], cwd=copy, env=environment)
    assert done.stdout == f"{copy}/.venv []\n", done.stderr
    assert list((copy / ".venv").glob("lib/python*/site-packages/copy-0.dist-info"))


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
