"""The submit plugin of the simulated site: each mode of MUSICA's, as docs/simulated-site.md lists them."""

import re
import shlex

import pytest

from slurm_in_a_box import CERTIFICATE_USER, CPU_PARTITION, GPU_PARTITION, SimulatedSite

pytestmark = pytest.mark.cluster

CPU = (f"--partition={CPU_PARTITION}", f"--qos={CPU_PARTITION}")
GPU = (f"--partition={GPU_PARTITION}", f"--qos={GPU_PARTITION}")
FULL_CPU_NODES = "sbatch: applying job settings for >> full cpu node(s) <<\nsbatch: setting --ntasks-per-node=190\n"
FULL_GPU_NODES = "sbatch: applying job settings for >> full gpu node(s) <<\n"
REFUSAL = "sbatch: error: Batch job submission failed: Requested node configuration is not available\n"
VANILLA = "#!/bin/sh\n#ASC --vanilla\nexec sleep 1000\n"


def submit(slurm_site: SimulatedSite, script: str, *options: str) -> tuple[str, str]:
    """Submit a script as a user does; return the job's id, or "", and what sbatch printed on stderr."""
    command = f"printf %s {shlex.quote(script)} | sbatch --parsable {shlex.join(options)}"
    done = slurm_site.run_on_login(CERTIFICATE_USER, command, check=False)
    return "".join(re.findall(r"^\d+$", done.stdout, re.MULTILINE)), done.stderr


def granted(slurm_site: SimulatedSite, job: str) -> dict[str, str]:
    """Return what a job has been given, in the words of scontrol(1)."""
    slurm_site.wait_for_job(int(job), "RUNNING")
    words = slurm_site.cluster.query("scontrol", "--oneliner", "show", "job", job).split()
    shown = dict(word.split("=", 1) for word in words if "=" in word)
    gpus = re.findall(r"gres/gpu=(\d+)", shown.get("AllocTRES", shown.get("TRES", "")))
    return {
        "nodes": shown["NumNodes"],
        "tasks": shown["NumTasks"],
        "hardware threads": shown["NumCPUs"],
        "shared": shown["OverSubscribe"],
        "gpus": "".join(gpus),
        "memory": shown.get("MinMemoryNode", ""),
    }


@pytest.mark.parametrize(
    ("options", "says", "expected"),
    [
        pytest.param(
            (*CPU, "--nodes=2"), FULL_CPU_NODES, ("2", "380", "760", "NO", "", ""), id="-N on CPU nodes: full nodes"
        ),
        pytest.param(
            (*CPU, "--ntasks=4", "--mem=4G"), "", ("1", "4", "4", "OK", "", "4G"), id="-n and --mem: part of a CPU node"
        ),
        pytest.param(
            (*GPU, "--nodes=1", "--gres=gpu:4"), FULL_GPU_NODES, ("1", "4", "352", "NO", "4", ""), id="-N and 4 GPUs"
        ),
        pytest.param(
            (*GPU, "--nodes=2", "--gres=gpu:h100:4", "--ntasks-per-node=4", "--threads-per-core=1"),
            FULL_GPU_NODES,
            ("2", "8", "704", "NO", "8", ""),
            id="-N and 4 GPUs, with the layout that the plugin sets",
        ),
        pytest.param(
            (*GPU, "--nodes=1", "--ntasks=1", "--gres=gpu:4"),
            FULL_GPU_NODES,
            ("1", "1", "352", "NO", "4", ""),
            id="-N and 4 GPUs for one task",
        ),
        pytest.param(
            (*GPU, "--gres=gpu:2", "--cpus-per-task=22"),
            "",
            ("1", "1", "22", "OK", "2", "375G"),
            id="1 to 3 GPUs: part of a GPU node, memory in proportion",
        ),
    ],
)
@pytest.mark.smoke
def test_options_choose_a_mode(
    slurm_site: SimulatedSite, options: tuple[str, ...], says: str, expected: tuple[str, ...]
) -> None:
    job, errors = submit(slurm_site, "#!/bin/sh\nexec sleep 1000\n", *options)
    assert errors == says
    assert tuple(granted(slurm_site, job).values()) == expected


@pytest.mark.parametrize(
    "options",
    [
        CPU,
        (*CPU, "--ntasks=4"),
        (*CPU, "--ntasks=4", "--mem-per-cpu=1G"),
        (*CPU, "--ntasks=4", "--mem=4G", "--cpus-per-task=2"),
        (*CPU, "--nodes=1", "--ntasks=1"),
        (*CPU, "--nodes=1", "--cpus-per-task=2"),
        (*CPU, "--nodes=2", "--ntasks-per-node=2"),
        GPU,
        (*GPU, "--gres=gpu:4"),
        (*GPU, "--gpus=2"),
        (*GPU, "--nodes=1", "--gres=gpu:2"),
        (*GPU, "--gres=gpu:1", "--ntasks=2"),
        (*GPU, "--gres=gpu:1", "--ntasks-per-node=2"),
        (*GPU, "--nodes=1", "--gres=gpu:4", "--cpus-per-task=88"),
        (*GPU, "--nodes=1", "--gres=gpu:4", "--ntasks-per-node=2"),
    ],
    ids=" ".join,
)
def test_layout_that_fits_no_mode_is_refused_and_accepted_with_vanilla(
    slurm_site: SimulatedSite, options: tuple[str, ...]
) -> None:
    assert submit(slurm_site, "#!/bin/sh\nhostname\n", *options) == ("", REFUSAL)
    job, errors = submit(slurm_site, VANILLA, *options, "--hold")
    if options == GPU:
        assert "QOSMinGRES" in errors  # Slurm's own rule
    else:
        assert job.isdecimal()


def test_with_vanilla_the_layout_is_what_the_options_say(slurm_site: SimulatedSite) -> None:
    layout = ("--nodes=1", "--gres=gpu:4", "--ntasks-per-node=1", "--cpus-per-task=88", "--threads-per-core=1")
    job, errors = submit(slurm_site, VANILLA, *GPU, *layout)
    assert errors == ""
    assert tuple(granted(slurm_site, job).values()) == ("1", "1", "176", "OK", "4", "")


@pytest.mark.parametrize("script", ["hostname\n#ASC --vanilla\n", "#ASC --vanilla-please\n", "# ASC --vanilla\n"])
def test_vanilla_is_a_line_of_its_own_before_the_first_command(slurm_site: SimulatedSite, script: str) -> None:
    assert submit(slurm_site, f"#!/bin/sh\n\n# comment\n{script}hostname\n", *CPU) == ("", REFUSAL)


@pytest.mark.parametrize(("options", "cores"), [(CPU, 190), ((*GPU, "--gres=gpu:1"), 176)], ids=["CPU", "GPU"])
@pytest.mark.smoke
def test_a_node_gives_its_cores_less_those_that_slurm_keeps(
    slurm_site: SimulatedSite, options: tuple[str, ...], cores: int
) -> None:
    one_node = (*options, "--threads-per-core=1")
    job, _ = submit(slurm_site, VANILLA, *one_node, f"--cpus-per-task={cores}")
    assert granted(slurm_site, job)["hardware threads"] == str(2 * cores)
    assert submit(slurm_site, VANILLA, *one_node, f"--cpus-per-task={cores + 1}") == ("", REFUSAL)


@pytest.mark.parametrize(
    ("account", "qos", "refused"),
    [
        ("p71234", "", False),
        ("p75678", "", False),
        ("p75678", "fast_", False),
        ("p70001", "idle_", False),
        ("p70001", "", True),
        ("p70001", "dev_", True),
    ],
)
def test_a_project_without_budget_may_use_idle_nodes_only(
    slurm_site: SimulatedSite, account: str, qos: str, refused: bool
) -> None:
    options = (CPU[0], f"--qos={qos}{CPU_PARTITION}", "--nodes=1", "--time=5", f"--account={account}", "--hold")
    job, errors = submit(slurm_site, VANILLA, *options)
    assert ("Invalid qos specification" in errors) is refused
    assert bool(job) is not refused
