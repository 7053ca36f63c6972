"""Run a workload in a container: apptainer or singularity around the Python that starts it."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import dagster_pipes
from pydantic import AfterValidator, Field

from dagster_sbatch.errors import CheckedModel, ConfigurationError
from dagster_sbatch.setting_paths import check_remote_path, expand_here, to_shell
from dagster_sbatch.slurm.gateway.agent import images
from dagster_sbatch.slurm.request import SlurmRequest
from dagster_sbatch.slurm.site import ContainerRuntime

FOLDER = "container"  # in the run directory
_START = Path(__file__).parent / "job" / "start.sh"
_PIPES = Path(dagster_pipes.__file__).parent
_FILES = {
    f"{FOLDER}/{_START.name}": _START.read_text(),
    f"{FOLDER}/images.py": Path(images.__file__).read_text(),
    **{f"{FOLDER}/{_PIPES.name}/{path.name}": path.read_text() for path in sorted(_PIPES.glob("*.py"))},
}
_GPU_OPTIONS = frozenset({"--nv", "--nvccli", "--rocm"})
_NOT_OPTIONS = {
    **dict.fromkeys(("--bind", "--mount"), "Use binds=."),
    **dict.fromkeys(("--pwd", "--cwd"), "A workload runs in a folder of its run directory."),
    **dict.fromkeys(
        ("--cleanenv", "--containall", "--compat"), "Without the variables of the job, the workload cannot report."
    ),
    "--pid": "The job could not warn the workload before the time limit.",
}


def _image(text: str) -> str:
    if "://" in text:
        raise ValueError(
            f"{text!r} is an address, and a job needs a file. Pull it once:\napptainer pull image.sif {text}"
        )
    return _path(text) if text.startswith(("/", "~", "$")) else _plain(text)


def _plain(text: str) -> str:
    if not text or re.search(r"[\0\n]", text):
        raise ValueError(f"{text!r} is not a path")
    return text


def _path(text: str) -> str:
    return check_remote_path(_plain(text))


def _bind(text: str) -> str:
    source, *target = text.split(":")
    _path(source)
    if (
        any(map(images.UNBINDABLE.search, [source, *target]))
        or (target and not target[0].startswith("/"))
        or target[1:] not in ([], ["ro"], ["rw"])
    ):
        raise ValueError(
            f"{text!r} is not a bind. Write /folder, /folder:/place/in/the/image, or /folder:/place:ro, without "
            "commas, other colons, ^, backslashes and spaces at the ends, which apptainer reads as syntax"
        )
    return text


def _option(text: str) -> str:
    name = text.partition("=")[0]
    if not re.fullmatch(r"--[a-z][a-z-]*(=\S+)?", text):
        raise ValueError(f"{text!r} is not of the form '--name=value' or '--name'")
    if name in _NOT_OPTIONS:
        raise ValueError(f"{name} cannot be an option here. {_NOT_OPTIONS[name]}")
    return text


def _python(text: str) -> str:
    if not re.fullmatch(r"/[^\0\n=]+|[A-Za-z0-9_./+-]+", text):
        raise ValueError(f"{text!r} is not a program. Write the name or the absolute path of a Python, without options")
    return text


class Container(CheckedModel):
    """An image in which the workload runs, by apptainer or singularity.

    The Python of the image runs the workload, with the packages of the image and not those of requirements/cluster.txt.
    `dagster_pipes` is always there. The container has the run directory, the folder of the code, DATA_ROOT and the
    node's local disk, with the same paths as outside, and the variables of the job. If you put another image under the
    same path, a step does not adopt a job of an earlier attempt that ran in the former image.

    In `development`, the container is used if this machine has the command and the image; otherwise the workload runs
    without it, and the run's log says so.

    Example:
        launcher=ScriptLauncher(container=Container("$DATA/pytorch.sif"))

    Raises:
        ConfigurationError: a field is unknown or has a wrong value.
    """

    image: Annotated[str, AfterValidator(_image)] = Field(
        description="A SIF or squashfs file, or a folder, on the supercomputer: an absolute path, one that begins with "
        "~, $HOME, $DATA or $SCRATCH, or one below DATA_ROOT."
    )
    binds: tuple[Annotated[str, AfterValidator(_bind)], ...] = Field(
        (), description="Further folders that the container has: /folder, /folder:/place/in/image, /folder:/place:ro."
    )
    options: tuple[Annotated[str, AfterValidator(_option)], ...] = Field(
        (), description="Further options of `apptainer exec`, each as --name or --name=value."
    )
    python: Annotated[str, AfterValidator(_python)] = Field(
        "python3",
        description="The Python of the image, 3.10 or newer: a name on the image's PATH, or a path in the image.",
    )

    def __init__(self, image: str, **fields: Any) -> None:
        super().__init__(image=image, **fields)

    def check(self, request: SlurmRequest, runtime: ContainerRuntime) -> None:
        """Refuse a request for GPUs that the container would not have.

        Raises ConfigurationError: says what to change.
        """
        if request.gpus_per_node and not _GPU_OPTIONS.intersection(self._options(request, runtime)):
            raise ConfigurationError(
                f"gpus_per_node={request.gpus_per_node} in a container without an option for GPUs: the workload would "
                "not find them. Write Container(..., options=['--nv']), or set gpu_options in the site's entry."
            )

    def remote_image(self, data_root: str) -> str:
        """Return the path of the image on the supercomputer; it may begin with ~ or a variable."""
        return self.image if self.image.startswith(("/", "~", "$")) else f"{data_root}/{self.image}"

    def local_image(self, data_root: Path) -> Path | None:
        """Return the path of the image on this machine; None if there is none."""
        try:
            path = data_root / expand_here(self.image)
        except ValueError:  # a variable that is not set here
            return None
        return path if path.exists() else None

    @staticmethod
    def local_problem(image: Path, folders: Sequence[Path]) -> str:
        """Return why no container can run from an image of this machine; empty if one can.

        `folders`: that the container needs beside the run directory.
        """
        problem = images.unbindable(map(str, folders))  # type: ignore[no-untyped-call]
        return str(problem or images.problem_of(str(image)))  # type: ignore[no-untyped-call]

    def render_check(self, runtime: ContainerRuntime, run: str) -> str:
        """Return the line of bash that ends the job if the container cannot start; `run`: the run directory."""
        program = shlex.quote(f"{run}/{FOLDER}/images.py")
        sources = [to_shell(bind.split(":")[0]) for bind in self.binds]
        words = [shlex.quote(runtime.command), self._image_word(), '"$DATA_ROOT"', *sources]
        return f'"$PYTHON" -I -S {program} {" ".join(words)} || exit'

    def render_start(self, request: SlurmRequest, runtime: ContainerRuntime, run: str, code: str) -> str:
        """Return the functions of bash with which launchers start the workload; see `Launcher.render`.

        `request`: after `allocate`. `run`: path of the run directory, with `files`. `code`: that of the code root.
        """
        own = ['"$DATA_ROOT"', '"$TMPDIR"', shlex.quote(run), shlex.quote(code)]
        binds = " ".join(f"--bind {word}" for word in [*own, *map(_bind_word, self.binds)])
        options = shlex.join(self._options(request, runtime))
        command = shlex.quote(runtime.command)
        start = f"sh {shlex.quote(f'{run}/{FOLDER}/{_START.name}')}"
        python = f"{shlex.quote(code)} {shlex.quote(self.python)} -u"
        return f"""\
# Becomes a program in the container. It keeps the variables of the job, except PATH, LD_LIBRARY_PATH and what the image
# sets; the image does not set these two.
# shellcheck disable=SC2317  # the functions below call it
in_container() {{
  exec {f"{command} exec {options}".rstrip()} --pwd "$PWD" {binds} {self._image_word()} \\
    env "DATA_ROOT=$DATA_ROOT" "TMPDIR=$TMPDIR" "$@"
}}
# Becomes the image's Python with the variables of the asset; the script itself does not have them.
# shellcheck disable=SC2317  # the launcher's commands call it
run_python() {{ in_container {start} {python} "$@"; }}
export -f in_container run_python
# Starts the workload. If it handles SIGUSR1, it gets that signal when the time limit is near.
# shellcheck disable=SC2317  # the launcher's commands call it
run_workload() {{
  local code=0
  ( in_container {start} --workload {python} "$@" ) || code=$?
  [ -e workload.pid ] || [ -s cause ] ||
    echo {shlex.quote(f"The container did not start: {runtime.command} ended before the workload.")} \\
      "Its exit code is $code. The last lines of stderr say why." >cause
  return "$code"
}}"""

    def local_command(
        self,
        request: SlurmRequest,
        runtime: ContainerRuntime,
        image: Path,
        run: Path,
        command: Sequence[str],
        folders: Sequence[Path],
    ) -> list[str]:
        """Return the command that runs a workload of this machine in the container.

        `run`: the run directory, with `files`. `command`: what runs it without the container; it begins with this
        machine's Python. `folders`: that the container needs beside `run`: DATA_ROOT, the code root, others.
        """
        binds = [f"--bind={each}" for each in (run, *folders, *(self._local_bind(bind) for bind in self.binds))]
        options = [*self._options(request, runtime), f"--pwd={run}", *binds]
        data_root, code, *_ = folders
        program = ["sh", str(run / FOLDER / _START.name), "--workload", str(code), self.python]
        start = ["env", f"DATA_ROOT={data_root}", *program]
        return [runtime.command, "exec", *options, str(image), *start, *command[1:]]

    @staticmethod
    def files(env: Mapping[str, str]) -> dict[str, str]:
        """Return the files that a container needs, by name in the run directory.

        `env`: variables for the workload alone. All users of a node can read the arguments of apptainer.
        """
        words = shlex.join(["exec", "env", *(f"{name}={value}" for name, value in env.items())])
        return {f"{FOLDER}/variables.sh": f'with_variables() {{ {words} "$@"; }}\n', **_FILES}

    def _options(self, request: SlurmRequest, runtime: ContainerRuntime) -> list[str]:
        gpus = runtime.gpu_options if request.gpus_per_node else ()
        return list(dict.fromkeys([*gpus, *runtime.options, *self.options]))

    def _image_word(self) -> str:
        """Return the image as a word of bash in the job script."""
        below = not self.image.startswith(("/", "~", "$"))
        return f'"$DATA_ROOT"/{shlex.quote(self.image)}' if below else to_shell(self.image)

    @staticmethod
    def _local_bind(bind: str) -> str:
        source, *target = bind.split(":")
        return ":".join([str(expand_here(source)), *target])


def _bind_word(bind: str) -> str:
    source, *target = bind.split(":")
    return to_shell(source) + "".join(f":{shlex.quote(part)}" for part in target)
