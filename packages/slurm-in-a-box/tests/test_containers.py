"""The site's program `apptainer`: what it accepts and refuses, and what a container sees."""

import subprocess

import pytest

from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite, wait_until
from slurm_in_a_box.images import IMAGE, NOT_AN_IMAGE, OS_NAME, VARIABLES

pytestmark = pytest.mark.cluster
HOME = CERTIFICATE_USER.home
GIVEN = (
    "TMPDIR=/tmp/x",
    "COLOUR=blue",
    "APPTAINER_BIND=/of/another",
    "APPTAINERENV_SHAPE=round",
    "LD_LIBRARY_PATH=/lib",
)


def run(site: SimulatedSite, *words: str) -> tuple[int, str]:
    """Exit code and output of `apptainer exec` as a user, on a compute node."""
    done = site.machines["n4001"].run(["env", *GIVEN, "apptainer", "exec", *words], CERTIFICATE_USER, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.smoke
def test_a_container_has_its_image_what_is_bound_and_the_variables(slurm_site: SimulatedSite) -> None:
    image = str(slurm_site.layout.images / IMAGE)
    slurm_site.machines["n4001"].run(["sh", "-c", "mkdir -p a/b c && touch a/b/there c/hidden"], CERTIFICATE_USER)
    look = (
        f"cat /etc/os-release; id -u; pwd; ls {HOME} .; printenv USER COLOUR SHAPE SIZE DATA_ROOT TMPDIR PATH "
        "LD_LIBRARY_PATH; printenv APPTAINER_BIND; touch b/new; exit 7"
    )
    options = ["--bind", f"{HOME}/a/b,{HOME}/a", f"--pwd={HOME}/a", "--env=SIZE=2 m,DATA_ROOT=/here"]
    code, said = run(slurm_site, *options, image, "sh", "-c", look)
    assert said.split("\n") == [
        f'NAME="{OS_NAME}"',
        str(CERTIFICATE_USER.uid),
        f"{HOME}/a",
        ".:",
        "b",
        "",
        f"{HOME}:",
        "a",
        CERTIFICATE_USER.name,
        "blue",
        "round",
        "2 m",
        "/here",
        VARIABLES["TMPDIR"],
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "/.singularity.d/libs",
        "",
    ]
    assert code == 7
    assert slurm_site.run_on_node("n4001", f"ls {HOME}/a/b").stdout.split() == ["new", "there"]
    code, said = run(slurm_site, "--nv", image, "ls", "/home")
    assert (code, said) == (0, "WARNING: Could not find any nv files on this host!\n")


def test_what_apptainer_refuses_is_refused_in_its_words(slurm_site: SimulatedSite) -> None:
    images = slurm_site.layout.images
    image, closed = str(images / IMAGE), f"{HOME}/closed.sif"
    make = f"install -m 000 /dev/null {closed}; head -c 30000 {image} >half.sif"
    slurm_site.machines["n4001"].run(["sh", "-c", make], CERTIFICATE_USER)
    refusals = {
        (f"{HOME}/none.sif", "true"): "failed to retrieve path for /home/xy12345/none.sif: lstat",
        (str(images / NOT_AN_IMAGE), "true"): "image format not recognized",
        (f"{HOME}/half.sif", "true"): "failed to read SIF partition",
        (closed, "true"): "open /home/xy12345/closed.sif: permission denied",
        ("--bind=/none", image, "true"): "while mounting /none: mount source /none doesn't exist",
        ("--bind=/a:/b:rw:/c", image, "true"): "wrong bind syntax: /a:/b:rw:/c",
        ("--env=COLOUR", image, "true"): 'invalid argument "COLOUR" for "--env" flag: COLOUR must be formatted as',
        (image, "no-such-program"): 'FATAL:   "no-such-program": executable file not found in $PATH',
        ("--gpus", image, "true"): 'Error for command "exec": unknown flag: --gpus',
        (image,): "requires at least 2 arg(s), only received 1",
    }
    for words, text in refusals.items():
        code, said = run(slurm_site, *words)
        assert code != 0
        assert text in said


def test_its_own_process_passes_signals_on_and_ends_the_command_with_it(slurm_site: SimulatedSite) -> None:
    node, image = slurm_site.machines["n4001"], str(slurm_site.layout.images / IMAGE)
    script = "trap 'echo warned' USR1; echo $$; while :; do sleep 0.1; done"
    command = ["sh", "-c", 'echo $$; exec apptainer exec "$0" sh -c "$1"', image, script]
    with subprocess.Popen(
        node.command(command, CERTIFICATE_USER), stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout
        outer, inner = (int(process.stdout.readline()) for _ in range(2))
        assert outer != inner
        node.run(["kill", "-USR1", str(outer)])
        assert process.stdout.readline() == "warned\n"
        node.run(["kill", "-KILL", str(outer)])
    wait_until(lambda: not node.process_alive(inner), "the end of the command")
