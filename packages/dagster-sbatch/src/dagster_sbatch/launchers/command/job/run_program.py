"""Become a program of any language, which may report to Dagster by the command `pipes`.

usage: run_program.py [--batch-script] PROGRAM [ARGUMENT...]   (started in the folder `work` of a run directory)

It opens and closes a Dagster Pipes session, and says that the exit code of the program decides about success.
`bin/pipes` in the run directory is first on the PATH. With --batch-script, the program needs no execute permission, and
the folder gets links to the files beside the script.

Exit codes: those of the program; 126 it cannot be executed, 127 it or the program of its first line does not exist.
"""

import errno
import json
import os
import platform
import re
import shlex
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path

import dagster_pipes
from dagster_pipes import DAGSTER_PIPES_MESSAGES_ENV_VAR, decode_param, open_dagster_pipes

COMMAND, CAUSE = "bin/pipes", "cause"
"""Names in the run directory. The step shows the cause, if the exit code is not 0."""
EXIT_CODE_DECIDES = "exit_code_decides"
"""Method of the line in the messages file by which a launcher says that no Pipes session is needed for success."""
MACHINES = {0x03: "i386", 0x15: "ppc64le", 0x28: "arm", 0x3E: "x86_64", 0xB7: "aarch64", 0xF3: "riscv64"}
"""`uname -m` by e_machine of an ELF file (elf.h)."""
RUN_PIPES = (
    "import runpy, sys; sys.path.append(sys.argv[1]); del sys.argv[:2]; runpy.run_path(sys.argv[0], {}, '__main__')"
)
"""Runs a program with another folder on its path: in a container, Python lacks dagster_pipes."""
LOGIN_SHELL = re.compile(r"/\S*/(env -S ?)?(ba|da|k|z)?sh (-[a-z]*l[a-z]*|--login)")
"""A first line that names a login shell, which reads the login profile; that may set PATH anew."""
AFTER_PROFILE = 'cd "$1"; PATH=$2:$PATH; shift 2; . "$0"'
"""What that shell runs after the profile: it goes to a folder, puts another one first on the PATH, runs the script."""
NOT_FOUND = "BASH_FUNC_command_not_found_handle%%"
"""The variable with the function that bash calls for a command that does not exist."""
NOT_IN_IMAGES = """() {
  case $1 in
    srun | sbatch | scontrol | module | ml | apptainer | singularity)
      echo "$1: command not found. A container has the commands of its image, not those of the machine. Remove $1" \\
        "here, or remove container= from the launcher and call apptainer exec where the image is needed." >&2 ;;
    *) echo "${BASH_SOURCE[1]}: line ${BASH_LINENO[0]}: $1: command not found" >&2 ;;
  esac
  return 127
}"""
"""Value of NOT_FOUND in a container."""
FOREIGN = {b"MZ": "Windows", b"\xcf\xfa\xed\xfe": "macOS", b"\xca\xfe\xba\xbe": "macOS"}
"""Systems by the first bytes of their programs."""


def main() -> int:
    """Prepare everything and become the program; return only if that fails."""
    batch = sys.argv[1] == "--batch-script"
    program, *arguments = sys.argv[2 if batch else 1 :]
    folder = Path.cwd().parent
    with open_dagster_pipes():  # Dagster warns of a process that opens none
        prepare_environment(folder)
    with Path(decode_param(os.environ[DAGSTER_PIPES_MESSAGES_ENV_VAR])["path"]).open("a") as file:
        file.write(json.dumps({"method": EXIT_CODE_DECIDES}) + "\n")
    command = [program, *arguments]
    try:
        if batch:
            link_files(Path(program).parent)
        refuse_missing_program(Path(program))
        first_line = read_first_line(Path(program))
        if LOGIN_SHELL.fullmatch(" ".join(first_line)):
            folders = [str(Path.cwd()), str((folder / COMMAND).parent)]
            command = [*first_line, "-c", AFTER_PROFILE, program, *folders, *arguments]
        elif batch:
            command = [*first_line, *command]
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and the program would inherit that
            signal.signal(number, signal.SIG_DFL)
        os.execv(command[0], command)
    except OSError as error:
        cause = explain(Path(program), error)
        print(cause, file=sys.stderr)
        with suppress(OSError):  # the disk is full
            (folder / CAUSE).write_text(cause)
        return 127 if error.errno == errno.ENOENT else 126


def prepare_environment(folder: Path) -> None:
    """Put `pipes` on the PATH, and set the variables of the program."""
    command = folder / COMMAND
    command.parent.mkdir(exist_ok=True)
    packages, program = Path(dagster_pipes.__file__).parents[1], Path(__file__).resolve().with_name("pipes_command.py")
    pipes = shlex.join([sys.executable, "-I", "-X", "utf8", "-c", RUN_PIPES, str(packages), str(program)])
    command.write_text(f'#!/bin/sh\nexec {pipes} "$@"\n')
    command.chmod(0o700)
    os.environ["PATH"] = f"{command.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    os.environ["PYTHON"] = sys.executable
    if os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER"):
        os.environ[NOT_FOUND] = NOT_IN_IMAGES
        for name in ("BASH_FUNC_module%%", "BASH_FUNC_ml%%"):  # they call the Lmod of the machine
            os.environ.pop(name, None)
    for name in ("PYTHONNOUSERSITE", "SLURM_EXPORT_ENV"):  # other Pythons; srun, as in a job that has its environment
        os.environ.pop(name, None)


def link_files(folder: Path) -> None:
    """Link the files of a batch script's folder into the working directory, where the script may write."""
    for path in folder.iterdir():
        with suppress(FileExistsError):  # the job was requeued
            Path(path.name).symlink_to(path)
    os.environ["SLURM_SUBMIT_DIR"] = str(Path.cwd())


def read_first_line(program: Path) -> list[str]:
    """Return the interpreter of a script, and its argument if there is one (execve(2)); nothing for a binary."""
    with program.open("rb") as file:
        line = file.readline() if file.read(2) == b"#!" else b""
    return os.fsdecode(line.strip()).split(maxsplit=1)


def refuse_missing_program(script: Path) -> None:
    """Refuse a script whose first line has env start a program that is not on the PATH.

    Raises FileNotFoundError: as if the script named that program by its path.
    """
    interpreter, *name = read_first_line(script) or [""]
    plain = name and not name[0].startswith("-") and "=" not in name[0]
    if plain and Path(interpreter).name == "env" and shutil.which(name[0]) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name[0])


def explain(program: Path, error: OSError) -> str:
    """Return why a program could not be started, and what to change."""
    head = b""
    with suppress(OSError), program.open("rb") as file:
        head = file.read(64)
    node = platform.node()
    if other := _explain_other_machine(head):
        return f"{program} was built for {other}"
    if head.startswith(b"#!"):
        return f"{program} asks for {_explain_first_line(read_first_line(program), error)}"
    if error.errno == errno.ENOENT and head:
        return f"{program} needs a loader that {node} does not have. Build it there, or link it statically."
    reasons = {
        errno.EACCES: f"may not be executed on {node}: its file system forbids it. Copy it to another one.",
        errno.ENOEXEC: f"is damaged, or no program of {platform.system()}. Build it again, or copy it again.",
    }
    return f"{program} {reasons.get(error.errno or 0, f'cannot be executed on {node}: {error.strerror}')}"


def _explain_other_machine(head: bytes) -> str:
    """Return for which other machine a program was built, and what to do; empty if it was built for this one."""
    node, machine = platform.node(), platform.machine()
    if head.startswith(b"\x7fELF") and len(head) >= 20:
        number = int.from_bytes(head[18:20], "little" if head[5] == 1 else "big")
        built_for = MACHINES.get(number, f"machine {number:#x}")
        return "" if built_for == machine else f"{built_for}, and {node} is {machine}. Build it for {machine}."
    system = next((name for start, name in FOREIGN.items() if head.startswith(start)), None)
    if system is None or system == {"Darwin": "macOS"}.get(platform.system()):
        return ""
    return f"{system}, and {node} has {platform.system()}. Build it for {machine} there."


def _explain_first_line(words: list[str], error: OSError) -> str:
    """Return which program of a script's first line is missing or cannot run, and what to do."""
    node, interpreter = platform.node(), words[0]
    if error.errno == errno.ENOENT and Path(interpreter).exists() and words[1:]:
        return (
            f"{words[1]!r} in its first line, and {node} has no such program on the PATH. "
            "Load its module, or correct that line."
        )
    lacks = f"{node} has no such file" if error.errno == errno.ENOENT else f"that is not a program on {node}"
    return f"{interpreter} in its first line, and {lacks}. Correct that line."


if __name__ == "__main__":
    raise SystemExit(main())
