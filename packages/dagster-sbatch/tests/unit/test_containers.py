"""Containers: what is refused before a run, the job script, and what bash makes of it with a program `apptainer`."""

import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster_pipes import encode_param

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.inspect.asset_preview import Preview, preview_asset
from dagster_sbatch.inspect.dry_run import try_script
from dagster_sbatch.launchers import (
    BatchScriptLauncher,
    CommandLauncher,
    Container,
    Launcher,
    RayLauncher,
    ScriptLauncher,
    SrunLauncher,
    container,
)
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.slurm import ArrayShape, ContainerRuntime, Site, SlurmRequest, load_site, render_job_script
from dagster_sbatch.slurm.gateway import Projects
from dagster_sbatch.slurm.gateway.agent.images import HEAD, INPUT, RECORD, identity_of, problem_of
from resources import PROJECT
from support.containers import SIF, put_apptainer, sif
from support.programs import make

GOLDEN = Path(__file__).parent / "golden" / "container.sh"
AWKWARD = """a'; echo "foo" $HOME `id` \\ é"""
ENV = {"COLOUR": AWKWARD, "UID": "7", "OPTIND": "first", "image": "a", "workload": "", "said": "b"}
"""With names that a shell, or the script that starts Python in the container, could have itself."""


def preview(launcher: Launcher, program: Path, request: SlurmRequest) -> Preview:
    @dg.asset
    def probe(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        done = compute.run(context, workload=program, launcher=launcher, request=request, env={"COLOUR": "dark blue"})
        return done.get_materialize_result()

    (found,) = preview_asset(dg.Definitions([probe], resources={"compute": ComputeResource.of(PROJECT)}), "probe")
    return found


def test_the_script_is_the_golden_one(shellcheck: str, tmp_path: Path) -> None:
    """With UPDATE_GOLDEN=1 it is written anew."""
    image = Container("$DATA/a b.sif", binds=["~/notes:/mnt:ro"], options=["--no-home"], python="/opt/bin/python")
    found = preview(ScriptLauncher(container=image), make(tmp_path, "pass"), SlurmRequest(gpus_per_node=1))
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(found.script)
    assert found.script == GOLDEN.read_text()
    (tmp_path / "job.sh").write_text(found.script)
    start = Path(container.__file__).parent / "job" / "start.sh"
    command = [shellcheck, "--severity=style", str(tmp_path / "job.sh"), str(start)]
    assert subprocess.run(command, capture_output=True, text=True, check=False).stdout == ""
    assert found.summary["container"] == "$DATA/a b.sif (--test-only asks whether it is there)"
    assert found.summary["python"] == "/opt/bin/python of the image"


def test_ray_needs_its_folder_in_the_container(tmp_path: Path) -> None:
    program, binds = make(tmp_path, "pass"), ["/scratch"]
    preview(RayLauncher(temp_dir="/scratch", container=Container("a.sif", binds=binds)), program, SlurmRequest())
    with pytest.raises(ConfigurationError, match=r"temp_dir='/scratch': the container .* binds=\['/scratch'\]"):
        preview(RayLauncher(temp_dir="/scratch", container=Container("a.sif")), program, SlurmRequest())


def test_gpus_need_an_option() -> None:
    gpus, image = SlurmRequest(gpus_per_node=2), Container("a.sif")
    image.check(gpus, ContainerRuntime())
    without = ContainerRuntime(gpu_options=())
    image.check(SlurmRequest(), without)
    Container("a.sif", options=["--rocm"]).check(gpus, without)
    with pytest.raises(ConfigurationError, match=r"gpus_per_node=2 in a container without an option for GPUs: .*--nv"):
        image.check(gpus, without)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"image": "docker://ubuntu"}, "Pull it once:\napptainer pull image.sif docker://ubuntu"),
        ({"image": ""}, "image: '' is no"),
        ({"image": "a.sif", "binds": [""]}, "binds.0: '' is no"),
        ({"image": "a.sif", "binds": "/notes"}, "binds: this is not a list"),
        ({"image": "$DAT/a.sif"}, r"\$DAT is unknown"),
        ({"image": "a.sif", "binds": ["notes"]}, "is not an absolute path"),
        ({"image": "a.sif", "binds": ["/a:b"]}, "is not a bind. Write /folder"),
        ({"image": "a.sif", "binds": ["/a:/b:rx"]}, "is not a bind. Write /folder"),
        ({"image": "a.sif", "binds": ["/a,/b"]}, "is not a bind. Write /folder"),
        ({"image": "a.sif", "binds": ["/a\\\\:/b"]}, "other colons, .*, backslashes and spaces at the ends"),
        ({"image": "a.sif", "binds": ["/a:/b^c"]}, "is not a bind. Write /folder"),
        ({"image": "a.sif", "binds": ["/a :/b"]}, "is not a bind. Write /folder"),
        ({"image": "a.sif", "options": ["-e"]}, "is not of the form '--name=value'"),
        ({"image": "a.sif", "options": ["--env A=B"]}, "is not of the form '--name=value'"),
        ({"image": "a.sif", "options": ["--cleanenv"]}, "--cleanenv cannot be an option here. Without the variables"),
        ({"image": "a.sif", "options": ["--compat"]}, "--compat cannot be an option here. Without the variables"),
        ({"image": "a.sif", "options": ["--bind=/a"]}, "--bind cannot be an option here. Use binds="),
        ({"image": "a.sif", "python": "/a=b/python"}, "is not a program"),
        ({"image": "a.sif", "python": "python3 -u"}, "is not a program. Write the name or the absolute path"),
        ({"image": "a.sif", "gpu": True}, "gpu: unknown field"),
    ],
)
def test_wrong_values_are_named(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        Container(**fields)


def test_a_site_names_its_command_and_an_unknown_key_is_an_error() -> None:
    entry = {"container_runtime": {"command": "singularity", "gpu_options": ["--nv", "--nvccli"]}}
    site = load_site({"here": entry}, "here")
    assert site.container_runtime.command == "singularity"
    assert "exec singularity exec --nv --nvccli --pwd" in script_of(Path("/run"), site=site, gpus_per_node=1)
    with pytest.raises(ConfigurationError, match=r"_runtime'\]\['comand'\]: unknown field; did you mean 'command'"):
        load_site({"here": {"container_runtime": {"comand": "x"}}}, "here")


CONTENTS: dict[str, bytes] = {
    "a.sif": SIF,
    "a.sqsh": b"hsqs".ljust(HEAD),
    "a.img": (bytes(1080) + b"\x53\xef").ljust(HEAD),
    "text.sif": b"the image is elsewhere\n",
    "empty.sif": b"",
    "short.sif": SIF[: HEAD - 1],
}


@pytest.mark.parametrize("name", CONTENTS)
def test_images_are_known_by_their_first_bytes(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(CONTENTS[name])
    problem = problem_of(str(path))  # type: ignore[no-untyped-call]
    assert ("is not a container image" in problem) == (name in ("text.sif", "empty.sif", "short.sif"))


def test_a_folder_with_a_system_is_an_image_and_a_missing_file_is_none(tmp_path: Path) -> None:
    assert "is not a container image" in problem_of(str(tmp_path))  # type: ignore[no-untyped-call]
    (tmp_path / "bin").symlink_to("usr/bin")
    assert problem_of(str(tmp_path)) == ""  # type: ignore[no-untyped-call]
    assert "There is no container image" in problem_of(str(tmp_path / "a.sif"))  # type: ignore[no-untyped-call]


def test_an_image_that_is_not_copied_to_its_end_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.sif"
    path.write_bytes(SIF[:-7])
    assert "is not complete: 7 bytes at its end are missing. Wait until" in problem_of(str(path))  # type: ignore[no-untyped-call]


def test_a_folder_that_apptainer_would_misread_is_refused_here_too(tmp_path: Path) -> None:
    path = tmp_path / "a.sif"
    path.write_bytes(SIF)
    assert Container.local_problem(path, [tmp_path / "a b"]) == ""
    for name in ("a,b", "a:b", "a^b", "a\\b", "a "):
        assert "apptainer reads commas, colons, ^ and" in Container.local_problem(path, [tmp_path, tmp_path / name])


def test_another_image_under_the_same_path_has_another_identity(tmp_path: Path) -> None:
    """A copy has the same one, and a new time alone changes only that of a file that has no ID in it."""
    path, folder = tmp_path / "a.sif", tmp_path / "folder"

    def identity(content: bytes, at: int) -> str:
        path.write_bytes(content)
        os.utime(path, (at, at))
        return str(identity_of(str(path)))  # type: ignore[no-untyped-call]

    squashfs = b"hsqs".ljust(HEAD)
    assert identity(sif(1), 7) == identity(sif(1), 8)
    different = [
        (sif(1), 7),
        (sif(2), 7),
        (sif(1, data=8192), 7),
        (sif(0), 7),
        (sif(0), 8),
        (squashfs, 7),
        (squashfs, 8),
    ]
    assert len({identity(content, at) for content, at in different}) == len(different)
    seen = set()
    for name in ("usr", "etc", ".singularity.d"):  # of a folder, what lies directly in it counts
        (folder / name).mkdir(parents=True)
        os.utime(folder, (7, 7))
        seen.add(identity_of(str(folder)))  # type: ignore[no-untyped-call]
    os.utime(folder / "usr", (7, 7))
    seen.add(identity_of(str(folder)))  # type: ignore[no-untyped-call]
    assert len(seen) == 4


# What bash makes of the script


def script_of(
    run: Path,
    image: Container | None = None,
    launcher: Launcher | None = None,
    site: Site | None = None,
    array: ArrayShape | None = None,
    **request: Any,
) -> str:
    image, asked, site = image or Container("an image.sif"), SlurmRequest(**request), site or Site(local_disk="/none")
    body = (launcher or ScriptLauncher()).render(asked, [f"{run}/code/work load.py", AWKWARD])
    return render_job_script(
        asked,
        site,
        job_name="k",
        about={},
        environment={"PYTHON": sys.executable, "PYTHONPATH": f"{run}/code", "DATA_ROOT": f"{run}/data"},
        body=f"{image.render_check(site.container_runtime, str(run))}\n{body}",
        start=image.render_start(asked, site.container_runtime, str(run), f"{run}/code"),
        array=array,
    )


def run_script(folder: Path, text: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run a job as Slurm would, with a program `apptainer`; the run directory has the container's files."""
    image = folder / "data" / "an image.sif"
    inputs = {INPUT: identity_of(str(image))} if image.exists() else {}  # type: ignore[no-untyped-call]
    files = {RECORD: json.dumps({"inputs": inputs}), **Container.files(ENV)}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    (folder / "job.sh").write_text(text)
    for name in ("stdout", "stderr"):
        (folder / name).touch()
    path = f"{put_apptainer(folder / 'bin')}:{os.environ['PATH']}"
    environment = {"PATH": path, "SLURM_JOB_ID": "17", "HOME": str(folder), **variables}
    command = ["bash", "job.sh"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run directory with a workload and an image in DATA_ROOT."""
    path = tmp_path / "run's dir"
    (path / "code").mkdir(parents=True)
    (path / "data").mkdir()
    (path / "data" / "an image.sif").write_bytes(SIF)
    (path / "code" / "work load.py").write_text(
        "import dagster_pipes, os, sys\nfrom pathlib import Path\n"
        "print(Path(dagster_pipes.__file__).parents[1].name, os.environ['COLOUR'], sys.argv[1])\n"
        "print(os.environ['DATA_ROOT'], os.environ['TMPDIR'], sys.path[1:3])\n"
        f"assert {{name: os.environ[name] for name in {list(ENV)}}} == {ENV}\n"
        "print(Path('../workload.pid').read_text() == f'{os.getpid()}\\n', Path.cwd().parent.name)\nsys.exit(3)\n"
    )
    return path


def test_the_workload_runs_in_the_container(folder: Path) -> None:
    """Its own process is recorded, not that of apptainer; `dagster_pipes` is that of the run directory.

    What the job and the asset set counts more than what the image sets, and is not among the arguments of apptainer.
    """
    (folder / "a python").symlink_to(sys.executable)
    image = Container("an image.sif", python=str(folder / "a python"), binds=["~/code:/code"])
    done = run_script(folder, script_of(folder, image))
    where = f"{folder}/data /tmp {[f'{folder}/code', '/of/the/image']}"
    assert done.stdout == f"container {AWKWARD} {AWKWARD}\n{where}\nTrue run's dir\n", done.stderr
    assert (done.returncode, (folder / "cause").read_text()) == (3, "")
    said = (folder / "bin" / "arguments").read_text().split("\n")
    binds = [said[place + 1] for place, word in enumerate(said) if word == "--bind"]
    assert binds == [f"{folder}/data", "/tmp", str(folder), f"{folder}/code", f"{folder}/code:/code"]
    assert said[said.index("--pwd") + 1] == str(folder)
    assert said.count(AWKWARD) == 1  # the workload's own argument
    assert f"{folder}/data/an image.sif" in said


def test_a_task_of_an_array_runs_in_its_own_folder(folder: Path) -> None:
    (folder / "context.head").write_text("{")
    (folder / "tasks.jsonl").write_text("}\n")
    (folder / "tasks.pipes").write_text("a b\n")
    (folder / "tasks" / "0").mkdir(parents=True)
    text = script_of(folder, Container("an image.sif", python=sys.executable), array=ArrayShape(1))
    done = run_script(folder, text, SLURM_ARRAY_JOB_ID="17", SLURM_ARRAY_TASK_ID="0")
    assert done.stdout.endswith("True 0\n"), done.stderr
    assert done.returncode == 3


def test_a_job_does_not_start_in_another_image_or_with_a_folder_that_apptainer_would_misread(folder: Path) -> None:
    image = Container("an image.sif", python=sys.executable)
    script = script_of(folder, image)
    late = f"cat {shlex.quote(str(folder / 'new'))} >{shlex.quote(str(folder / 'data' / 'an image.sif'))}\n"
    (folder / "new").write_bytes(sif(2))
    changed = run_script(folder, script.replace("\numask 077\n", f"\numask 077\n{late}"))
    assert changed.returncode != 0
    assert "an image.sif has changed since this job was submitted" in (folder / "cause").read_text()
    assert not (folder / "bin" / "arguments").exists()
    done = run_script(folder, script.replace("/data'", "/da,ta'"))
    assert done.returncode != 0
    assert "apptainer reads commas, colons" in (folder / "cause").read_text()


@pytest.mark.parametrize(
    ("image", "broken", "text"),
    [
        ({"image": "/none.sif"}, "", "There is no container image /none.sif on "),
        ({"image": "an image.sif", "binds": ["/none/folder"]}, "", "The container should have /none/folder, and "),
        ({"image": "an image.sif", "python": "python9"}, "", "an image.sif has no python9, and a Python of the image"),
        (
            {"image": "an image.sif", "python": "/usr/bin/false"},
            "",
            "/usr/bin/false in the image {image} does not run: ",
        ),
        (
            {"image": "an image.sif", "python": "./old"},
            "",
            "{image} is Python 2.7.18, and Dagster Pipes needs Python 3.1",
        ),
        ({"image": "an image.sif"}, "echo 'FATAL: no' >&2; exit 255", "The container did not start: apptainer ended"),
        ({"image": "an image.sif"}, "gone", "There is no apptainer on "),
    ],
)
def test_a_container_that_cannot_start_says_why(image: dict[str, Any], broken: str, text: str, folder: Path) -> None:
    script = script_of(folder, Container(**image))
    runtime = folder / "bin" / "apptainer"
    put_apptainer(runtime.parent)
    if broken == "gone":
        script = script.replace("apptainer", "apptainer9")
        text = text.replace("apptainer", "apptainer9")
    elif broken:
        runtime.write_text(f"#!/bin/bash\n{broken}\n")
    make(folder, '#!/bin/bash\n[ "${!#}" != -V ] || { echo Python 2.7.18; exit 0; }; exit 1\n', "old")
    done = run_script(folder, script)
    assert done.returncode != 0
    assert text.format(image=folder / "data" / "an image.sif") in (folder / "cause").read_text()
    assert "Traceback" not in done.stderr


def test_another_attempt_is_requested_if_a_folder_cannot_be_read_now(folder: Path) -> None:
    (folder / "loop").symlink_to("loop")  # the error of a path that is neither missing nor forbidden
    done = run_script(folder, script_of(folder, Container("an image.sif", binds=["~/loop"])))
    assert done.returncode == os.EX_TEMPFAIL
    cause = (folder / "cause").read_text()
    assert cause in done.stderr
    assert f"{folder}/loop on {platform.node()}: Too many levels of symbolic links. If that happens again, " in cause


@pytest.mark.parametrize("launcher", [SrunLauncher(), CommandLauncher(), BatchScriptLauncher(), RayLauncher()])
def test_every_other_launcher_starts_in_the_container_too(launcher: Launcher, tmp_path: Path) -> None:
    inside = launcher.model_copy(update={"container": Container("a.sif")})
    found = preview(inside, make(tmp_path, "#!/usr/bin/python3\n"), SlurmRequest())
    run, code = "<SLURM_DEPLOYMENT_BASE_PATH>/runs/preview-probe", "<hash of its content>/workloads"
    assert f"run_python() {{ in_container sh '{run}/container/start.sh' '" in found.script
    assert f"{code}' python3 -u " in found.script
    assert "export -f in_container run_python\n" in found.script


SCRIPT = """\
#!/bin/bash
#SBATCH --mem=3G
pipes log "$(pwd -P)"
if command -v module; then module load GCC; fi
no-such-command
module load GCC
"""


@pytest.mark.parametrize("launcher", [CommandLauncher(), BatchScriptLauncher()])
def test_a_script_that_asks_its_image_for_commands_of_the_machine_is_told(launcher: Launcher, folder: Path) -> None:
    """Its exit code and other errors are those of bash without a container."""
    make(folder / "code", SCRIPT, "work load.py")
    (folder / "context.json").write_text(json.dumps({"asset_keys": ["a"], "run_id": "", "extras": {}}))
    for name, text in launcher.files(SlurmRequest()).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    variables = {
        "DAGSTER_PIPES_CONTEXT": encode_param({"path": str(folder / "context.json")}),
        "DAGSTER_PIPES_MESSAGES": encode_param({"path": str(folder / "messages.jsonl")}),
        "BASH_FUNC_module%%": '() { /of/the/machine/lmod "$@"; }',  # as Lmod exports it
    }
    text = script_of(folder, Container("an image.sif", python=sys.executable), launcher)
    (put_apptainer(folder / "bin") / "sh").symlink_to("/bin/bash")  # as in images of Red Hat; dash drops functions
    done = run_script(folder, text, **variables)
    assert done.returncode == 127
    first, second, *_ = done.stderr.splitlines()
    assert first.endswith("work load.py: line 5: no-such-command: command not found")
    assert second.startswith("module: command not found. A container has the commands of its image, not those of the")
    assert (
        str(folder / "work" if isinstance(launcher, BatchScriptLauncher) else folder)
        in (folder / "messages.jsonl").read_text()
    )


class _Images:
    """A gateway to a login node without any image."""

    def image(self, path: str, data_root: str, runs: str) -> tuple[str, str]:
        return f"There is no container image {path}; {data_root}; {runs}", ""


def test_a_preview_asks_the_login_node_for_the_image(tmp_path: Path) -> None:
    found = preview(ScriptLauncher(container=Container("a.sif")), make(tmp_path, "pass"), SlurmRequest())
    answer = try_script(_Images(), found, Projects({}))  # type: ignore[arg-type]
    base = "<SLURM_DEPLOYMENT_BASE_PATH>"
    assert answer == (False, f"There is no container image {base}/data/a.sif; {base}/data; {base}/runs")
