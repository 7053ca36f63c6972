"""Run the workload as the tasks of srun: one process per rank, as PyTorch and MPI programs need it."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, PositiveInt

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.launchers.base import Launcher
from dagster_sbatch.slurm.request import SlurmRequest, word

_FOLDER = Path(__file__).parent / "job"
_FILES = {f"srun/{path.name}": path.read_text() for path in sorted(_FOLDER.glob("*.py"))}
_PROGRAM = "ranks.py"
_PYTHON_OPTIONS = ("-B", "-E", "-s", "-S", "-X", "utf8")  # only Python's own modules, and those beside the program
_GPUS_PER_TASK = re.compile(r"per_task:(\d+)")


_MPI = word(r"[a-z0-9_]+", "write a type that `srun --mpi=list` prints, for instance pmix")
_CPU_BIND = word(r"[a-z_]+([:,][\w,:*.-]+)?", "write what srun's --cpu-bind takes, for instance cores")
_GPU_BIND = word(r"[a-z_]+([:,][\w,:*.-]+)?", "write what srun's --gpu-bind takes, for instance per_task:1")


class SrunLauncher(Launcher):
    """Runs the workload `ntasks_per_node` times on every node, as the tasks of one `srun`.

    Each process has RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, so PyTorch's
    `init_process_group(init_method="env://")` works without torchrun. For MPI programs, `mpi` names srun's MPI type.

    Rank 0 reports to Dagster. The other ranks can open a Pipes session, too: they get the same extras and partitions,
    and their reports are ignored. Their output is labelled `[rank 3]`. If a rank fails, all others are ended, and the
    step fails with the error of that rank. In `development`, as many processes run on this machine; with `mpi`, the
    `mpiexec` of this machine starts them.

    Example:
        launcher=SrunLauncher(), request=SlurmRequest(nodes=2, ntasks_per_node=4, gpus_per_node=4)
    """

    key: ClassVar[str] = "srun"
    own_variables: ClassVar[frozenset[str]] = frozenset("RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT".split())

    mpi: Annotated[str, _MPI] | None = Field(
        None, description="srun's --mpi: a type that `srun --mpi=list` prints, for instance pmix; default: the site's."
    )
    cpu_bind: Annotated[str, _CPU_BIND] | None = Field(
        None, description="srun's --cpu-bind, for instance cores; default: srun's own."
    )
    gpu_bind: Annotated[str, _GPU_BIND] = Field(
        "none",
        description="srun's --gpu-bind. none: each task sees all GPUs that the job has on its node; per_task:1: one of "
        "its own.",
    )
    end_time_limit: PositiveInt = Field(
        600,
        description="Seconds that the other ranks can continue after the first rank has ended; then the job fails and "
        "names one that still runs. Without effect in `development` with `mpi`.",
    )

    def check(self, request: SlurmRequest) -> None:  # noqa: D102 - see Launcher
        if self.gpu_bind == "none":
            return
        tasks, gpus = request.ntasks_per_node, request.gpus_per_node
        bound = _GPUS_PER_TASK.fullmatch(self.gpu_bind)
        needed = tasks * int(bound[1]) if bound else 1
        if gpus < needed:
            raise ConfigurationError(
                f"gpu_bind={self.gpu_bind!r} with ntasks_per_node={tasks} and gpus_per_node={gpus}: there are too few "
                f"GPUs per node. Request gpus_per_node={needed}, or let all tasks see all GPUs with gpu_bind='none'"
            )

    def files(self, request: SlurmRequest) -> dict[str, str]:  # noqa: ARG002, D102 - see Launcher
        return dict(_FILES)

    def render(self, request: SlurmRequest, command: Sequence[str]) -> str:  # noqa: D102 - see Launcher
        gpus, step = request.gpus_per_node, self.step_options(request)
        # --gpu-bind=none is the default, but with it Slurm 22.05 sets no CUDA_VISIBLE_DEVICES.
        step += [f"--gpu-bind={self.gpu_bind}"] if gpus and self.gpu_bind != "none" else []
        step += [f"--cpu-bind={self.cpu_bind}"] if self.cpu_bind else []
        step += [f"--mpi={self.mpi}"] if self.mpi else []
        step += [f"--wait={self.end_time_limit}"]
        program = f'"$PYTHON" {shlex.join(_PYTHON_OPTIONS)} "$run_directory/srun/{_PROGRAM}"'
        return (
            f"{self.render_threads(request)}\n# Every rank runs this before the workload.\n"
            f"# shellcheck disable=SC2317\n{self.render_pre_start_function()}"
            f"{program} job {shlex.join([*step, *command])}"
        )

    def local_command(self, request: SlurmRequest, command: Sequence[str]) -> list[str]:  # noqa: D102 - see Launcher
        step = [f"--ntasks={request.nodes * request.ntasks_per_node}", f"--gpu-bind={self.gpu_bind}"]
        step += [f"--mpi={self.mpi}"] if self.mpi else []
        step += [f"--wait={self.end_time_limit}"]
        return [sys.executable, *_PYTHON_OPTIONS, str(_FOLDER / _PROGRAM), "local", *step, *command]
