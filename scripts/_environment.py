"""Put a script into the project's environment, setting that up first where it is missing or out of date.

Used by every script in this folder: `import _environment; _environment.activate()`. Standard library only, and nothing
newer than Python 3.8, so that an interpreter that is too old gets an explanation instead of a SyntaxError.

pixi is used where it is found on PATH, else uv, else `python -m venv` and pip with the locked, hashed requirements.
"""

import fcntl
import hashlib
import importlib.util
import locale
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
REQUIREMENTS = ROOT / "requirements" / "dev.txt"
LOCK = ROOT / ".venv.lock"  # whoever makes .venv holds it alone; who runs long in it, with others
STAMP = VENV / "installed.sha256"  # written last: a set-up that was cut short is seen and done again
OWNER = VENV / "project"  # names the project that the environment was made for
EDITABLE = (*(str(path.parent) for path in sorted((ROOT / "packages").glob("*/pyproject.toml"))), ".")
"""What is installed from its sources: a copy has wheels in place of the packages."""
PASSED_ON = re.compile(
    r"PATH|HOME|USER|LOGNAME|LANG|LC_.*|TMPDIR|XDG_CACHE_HOME|XDG_CONFIG_HOME|LD_LIBRARY_PATH|SSL_CERT_FILE|SSL_CERT_DIR"
    r"|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|(?i:https?_proxy|all_proxy|no_proxy)"
    r"|UV_(?!(?:NO_EDITABLE|REQUIRE_HASHES|WORKING_DIR|WORKING_DIRECTORY)$).*"
    r"|PIP_(?!(?:TARGET|PREFIX|ROOT|PYTHON|DRY_RUN)$).*"
)
"""Variables that the installer gets, but none that name another place to install to, or another way. Secrets are not
among them, but those of a package index or a proxy may be."""
SYSTEM_CERTIFICATES = {"UV_SYSTEM_CERTS": "1", "UV_NATIVE_TLS": "1"}
"""uv trusts the authorities of the system, not only those that it brings; the second name is that of older versions."""
NOT_THE_USERS = {"PIP_USER": "0", "PIP_REQUIRE_HASHES": "0"}
"""Set so against the user's variables and pip.conf: no installation into ~/.local, and none of the project by hash."""
SUPPORTED = ("3.11", "3.12", "3.13")


def activate() -> None:
    """Return when running inside the project's environment; anywhere else, run the calling script again inside it.

    Raises:
        SystemExit: the environment cannot be made; the message says what to install.
    """
    # The imports that follow take seconds: Ctrl-C ends them without a traceback.
    sys.excepthook = lambda kind, *more: None if kind is KeyboardInterrupt else sys.__excepthook__(kind, *more)
    _open_streams()
    _refuse_syntax()
    prefix = Path(sys.prefix).resolve()  # links, such as to a disk with more room, count as what they point to
    if (ROOT / ".pixi" / "envs").resolve() in prefix.parents or (prefix == VENV.resolve() and _is_current()):
        return
    command = [str(Path(sys.argv[0]).resolve()), *sys.argv[1:]]
    pixi = shutil.which("pixi")
    if pixi:
        command = [pixi, "run", "--manifest-path", str(ROOT / "pixi.toml"), "python", *command]
    else:
        if not _is_current():
            _set_up()
        command = [str(PYTHON), *command]
    for variable in ("PYTHONHOME", "PYTHONPATH", "PYTHONSAFEPATH"):  # a module or a shell's profile may have set them,
        os.environ.pop(variable, None)  # for another Python. The first line of each script ignores them, too
    if locale.nl_langinfo(locale.CODESET).upper() != "UTF-8" and not str(ROOT).isascii():
        os.environ["LC_ALL"] = "C.UTF-8"  # or Python 3.11 misreads this path, which is in a file of the environment
    sys.stdout.flush()
    os.execv(command[0], command)


def restore_signals() -> None:
    """Give SIGINT and SIGTERM their default actions, for this process and those that it starts.

    A process that a script starts in the background, also with nohup, inherits that SIGINT is ignored. Dagster gives
    SIGTERM the same handler: nothing but SIGKILL would end it, nor a run of it.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def keep() -> None:
    """Let no other script replace .venv while this process runs, also as another program (exec).

    For programs that import modules late, or start others: Dagster and tests.

    Raises:
        SystemExit: Dagster's history is another user's; Dagster itself would show SQLite's error.
    """
    _refuse_files_of_root(ROOT / ".dagster")
    if Path(sys.prefix).resolve() == VENV.resolve() and LOCK.is_file():
        lock = os.open(str(LOCK), os.O_RDONLY)
        _lock(lock, fcntl.LOCK_SH)
        fcntl.fcntl(lock, fcntl.F_SETFD, 0)  # not closed by exec


def _open_streams() -> None:
    """Open /dev/null in place of standard streams that the caller has closed: Python has None for these."""
    null = fcntl.fcntl(os.open(os.devnull, os.O_RDWR), fcntl.F_DUPFD_CLOEXEC, 3)
    for descriptor, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)):
        if stream is None:
            os.dup2(null, descriptor)
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")


def _wanted() -> str:
    # The scripts in .venv/bin carry the folder: a moved one needs new ones. Another Python does not find the packages.
    places = os.fsencode(f"{ROOT}{os.path.realpath(str(PYTHON))}")
    try:
        return hashlib.sha256(REQUIREMENTS.read_bytes() + places).hexdigest()
    except OSError as error:
        raise SystemExit(f"{REQUIREMENTS}: {error.strerror}. Restore it:\n  git restore requirements") from None


def _is_current() -> bool:
    return os.access(str(PYTHON), os.X_OK) and STAMP.is_file() and STAMP.read_text() == _wanted()


def _set_up() -> None:
    """Make .venv as the lock file says; two scripts that start at once wait for each other.

    Raises:
        SystemExit: it cannot be made.
    """
    try:
        with LOCK.open("w") as lock:
            _lock(lock.fileno(), fcntl.LOCK_EX)
            if not _is_current():
                _refuse_foreign_folder()
                _refuse_files_of_root(VENV)
                _install(lock)
    except OSError as error:
        raise SystemExit(
            f"Setting up {VENV} failed: {error}.\nThe project's folder must be yours, and its disk must have room."
        ) from None


def _lock(file: int, kind: int) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        text = f"Another script, such as scripts/dev, uses {VENV} or is setting it up. Waiting until it ends ..."
        print(text, file=sys.stderr, flush=True)
        fcntl.flock(file, kind)


def _refuse_syntax() -> None:
    """Refuse a path of the project that is syntax elsewhere: in PATH, in addresses of SQLite, in alembic's settings.

    Dagster takes it for a pattern, too: with a `[` it would not find dagster.yaml, and its history would be elsewhere.

    Raises:
        SystemExit: it has such a character.
    """
    found = re.search(r"[*:?%[\n]", str(ROOT))
    if found:
        raise SystemExit(f"{ROOT} has a {found[0]!r}, with which Dagster or PATH cannot use it. Rename that folder.")


def _refuse_files_of_root(folder: Path) -> None:
    if folder.exists() and not os.access(str(folder), os.W_OK):
        raise SystemExit(
            f"{folder} cannot be written to. If a command was run as root, make its files yours again:\n"
            f"  sudo chown -R $(id -u) {shlex.quote(str(ROOT))}"
        )


def _refuse_foreign_folder() -> None:
    """Protect what a link .venv leads to: an environment is made in an empty folder, or in place of this project's.

    Raises:
        SystemExit: another project's environment is there, or other files.
    """
    target = VENV.resolve()
    if not VENV.is_symlink() or not target.is_dir() or not any(target.iterdir()):
        return
    found = "which has other files"
    if OWNER.is_file():
        owner = Path(os.fsdecode(OWNER.read_bytes()))
        if owner == ROOT or (owner / ".venv").resolve() != target:  # this project, maybe before it was moved
            return
        found = f"the environment of {owner}"
    raise SystemExit(
        f"{VENV} is a link to {target}, {found}.\nNothing was changed. Link it to an empty folder, or empty this one."
    )


def _install(lock: "IO[str]") -> None:
    """Make the environment in a folder of its own; only when all is installed, exchange it for the one before.

    The installer holds the lock, too: it may live longer than a script that is killed.
    """
    begun = time.monotonic()
    new = VENV.resolve() / ".being-made"
    uv = shutil.which("uv", path=_path_without_venv())
    print(f"Setting up {VENV} with {'uv' if uv else 'pip'} (once; a minute or two) ...", file=sys.stderr, flush=True)
    passed_on = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)}
    environment = {**passed_on, **SYSTEM_CERTIFICATES, **NOT_THE_USERS}
    new.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(str(new), ignore_errors=True)  # what a script that was killed has left: uv would refuse some of it
    OWNER.write_bytes(os.fsencode(str(ROOT)))
    for command in _uv_commands(uv, new) if uv else _pip_commands(new):
        done = subprocess.run(
            command,
            cwd=str(ROOT),
            env=environment,
            stdin=subprocess.DEVNULL,
            check=False,
            pass_fds=[lock.fileno()],
        )
        if done.returncode:
            shutil.rmtree(str(new), ignore_errors=True)
            shown = " ".join(command)
            former = " The former environment is unchanged: it works with the former requirements/."
            raise SystemExit(
                f"Setting up {VENV} failed (exit code {done.returncode}); the output is above.\n"
                f"Command: {shown}\nIt is safe to try again.{former if STAMP.is_file() else ''}"
            )
    _refuse_other_place(new, "uv" if uv else "pip")
    _exchange(new)
    print(f"Environment ready after {time.monotonic() - begun:.0f} s.", file=sys.stderr, flush=True)


def _refuse_other_place(new: Path, installer: str) -> None:
    """Name the cause if the installer has put the packages elsewhere: no option prevails over `target` in its file.

    Raises:
        SystemExit: the environment has no package but pip.
    """
    found = {path.name.split("-")[0] for path in new.glob("lib/*/*/*.dist-info")}
    if found <= {"pip", "setuptools"}:
        shutil.rmtree(str(new), ignore_errors=True)
        where = {
            "uv": "`target` from [pip] of uv.toml",
            "pip": "what `pip config list` shows of target, prefix or root",
        }
        raise SystemExit(
            f"Setting up {VENV} failed: {installer} has installed the packages elsewhere, as its configuration says.\n"
            f"Remove {where[installer]}."
        )


def _exchange(new: Path) -> None:
    """Put the files of a new environment, which lies in .venv, in place of those before.

    One by one: .venv itself may be a link, or the place of another disk. If this is cut short, the stamp is missing.
    """
    for program in (new / "bin").iterdir():
        text = b"" if program.is_symlink() else program.read_bytes()
        if text.startswith(b"#!") or program.name.startswith("activate"):  # they name their Python, or their folder
            program.write_bytes(text.replace(os.fsencode(f"/{new.name}"), b""))
    old = Path(tempfile.mkdtemp(prefix=".before-", dir=str(new.parent)))
    STAMP.unlink(missing_ok=True)
    for path in new.parent.iterdir():
        if path.name not in (new.name, OWNER.name) and not path.name.startswith(".before-"):
            path.rename(old / path.name)
    for path in new.iterdir():
        path.rename(new.parent / path.name)
    STAMP.write_text(_wanted())
    new.rmdir()
    for path in new.parent.glob(".before-*"):
        shutil.rmtree(str(path), ignore_errors=True)  # on NFS, what a program uses stays until the next time


def _path_without_venv() -> str:
    """PATH less the environment that is about to be replaced, and that has a uv of its own."""
    venv = VENV.resolve()  # also `activate` there names the folder that a link leads to
    return os.pathsep.join(
        part for part in os.environ.get("PATH", "").split(os.pathsep) if venv not in Path(part).resolve().parents
    )


def _uv_commands(uv: str, new: Path) -> "list[list[str]]":
    place = ["--quiet", "--python", str(new / "bin" / "python"), "--prefix", str(new)]  # `prefix` of uv.toml is another
    return [
        [uv, "venv", "--quiet", "--python", f">={SUPPORTED[0]},<3.14", str(new)],
        [uv, "pip", "sync", *place, "--require-hashes", str(REQUIREMENTS)],
        [uv, "pip", "install", *place, "--no-deps", "--no-build-isolation", "--no-require-hashes", *_editable()],
    ]


def _pip_commands(new: Path) -> "list[list[str]]":
    pip = [str(new / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-qq", "--no-compile"]
    return [
        [_interpreter(), "-m", "venv", "--prompt", VENV.name, str(new)],
        [*pip, "--require-hashes", "--use-pep517", "--requirement", str(REQUIREMENTS)],
        [*pip, "--no-deps", "--no-build-isolation", *_editable()],
    ]


def _editable() -> "list[str]":
    return [word for folder in EDITABLE for word in ("--editable", folder)]


def _interpreter() -> str:
    """Return a Python that the project supports and that can make virtual environments: this one, or one on PATH."""
    running = "{}.{}".format(*sys.version_info[:2])
    if running not in SUPPORTED:
        for version in reversed(SUPPORTED):
            found = shutil.which("python" + version, path=_path_without_venv())
            if found:
                return found
        raise SystemExit(
            f"Python {SUPPORTED[0]} to {SUPPORTED[-1]} is needed; {sys.executable} is {running}, and no "
            "other was found on PATH. Install one, or pixi or uv, which bring their own."
        )
    if importlib.util.find_spec("ensurepip") is None:
        raise SystemExit(
            f"{sys.executable} cannot make virtual environments: its ensurepip module is missing. "
            f"On Debian and Ubuntu:\n    sudo apt install python{running}-venv"
        )
    return sys.executable if sys.prefix == sys.base_prefix else os.path.realpath(sys.executable)
