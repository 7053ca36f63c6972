"""The batch script: golden texts, quoting, and what bash makes of it."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from dagster_sbatch.launchers import (
    BatchScriptLauncher,
    CommandLauncher,
    Launcher,
    RayLauncher,
    ScriptLauncher,
    SrunLauncher,
)
from dagster_sbatch.run.messages import JOB_STARTED
from dagster_sbatch.run.workload import LONGEST, fits
from dagster_sbatch.slurm import ArrayShape, Site, SlurmRequest, allocate, load_site, render_job_script, render_start
from resources import PROJECT
from slurm_in_a_box import wait_until

GOLDEN = Path(__file__).parent / "golden"
SITE = PROJECT.load_site("musica")
AWKWARD = """a'; echo "foo" $HOME `id` \\ é"""
WITHOUT_PRIVILEGES = () if os.geteuid() else ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
"""As the job of a user, whom a folder without write permission stops; root is not stopped."""


def render(
    launcher: Launcher,
    request: SlurmRequest,
    site: Site = SITE,
    data: str = "/d",
    variables: dict[str, str] | None = None,
    command: Sequence[str] = ("work load.py",),
    *,
    run: str = ".",
    array: ArrayShape | None = None,
) -> str:
    complete = allocate(request, site).request
    body = launcher.with_site(site.launchers).render(complete, command)
    environment = {"PYTHON": sys.executable, "DATA_ROOT": data}
    return render_job_script(
        complete,
        site,
        job_name="counts-2013-01",
        about={"asset": "a b"},
        environment=environment,
        start=render_start(variables or {}),
        run=run,
        body=body,
        array=array,
    )


ARRAYS = {"array": ArrayShape(1000, max_running=50)}
CASES = {
    "script": (ScriptLauncher(), SlurmRequest(cpus_per_task=2, mem="8G", time_limit="10", options=["--mail-type=END"])),
    "command": (CommandLauncher(pre_start_commands=["ulimit -n 65536"]), SlurmRequest(cpus_per_task=2)),
    "batch-script": (BatchScriptLauncher(), SlurmRequest(nodes=2, ntasks_per_node=4, time_limit="10")),
    "ray": (RayLauncher(object_store_memory="64G"), SlurmRequest(nodes=2, gpus_per_node=4, time_limit="02:00:00")),
    "ray-one-node": (
        RayLauncher(network_interface="ib0", ray_start_args=["--include-dashboard=false"]),
        SlurmRequest(),
    ),
    "srun": (
        SrunLauncher(mpi="pmix", cpu_bind="cores", gpu_bind="per_task:1", pre_start_commands=["ulimit -n 65536"]),
        SlurmRequest(nodes=2, ntasks_per_node=4, gpus_per_node=4, time_limit="02:00:00"),
    ),
    "modules": (ScriptLauncher(), SlurmRequest(cpus_per_task=2, time_limit="10", modules=["GCC/14.3.0", "OpenMPI"])),
    "array": (ScriptLauncher(), SlurmRequest(cpus_per_task=2, time_limit="10")),
}


@pytest.mark.parametrize("name", CASES)
def test_the_script_is_the_golden_one(name: str) -> None:
    """With UPDATE_GOLDEN=1 the golden files are written anew; look at the difference before you commit."""
    text = render(*CASES[name], array=ARRAYS.get(name)).replace(sys.executable, "/environment/bin/python")
    path = GOLDEN / f"{name}.sh"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", CASES)
def test_the_script_is_clean(name: str, shellcheck: str, tmp_path: Path) -> None:
    path = tmp_path / "job.sh"
    path.write_text(render(*CASES[name], array=ARRAYS.get(name)))
    done = subprocess.run([shellcheck, "--severity=style", str(path)], capture_output=True, text=True, check=False)
    assert done.stdout == ""
    assert done.returncode == 0


def program(folder: Path, name: str = "work load.py") -> Path:
    """Return the path of a workload whose command is its name alone: it lies in the folder in which it runs."""
    (folder / "work").mkdir()
    return folder / "work" / name


def run_as_slurm_would(folder: Path, text: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    (folder / "job.sh").write_text(text)
    (folder / "job.sh").chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "17", "HOME": str(folder), **variables}
    for name in ("stdout", "stderr"):
        (folder / name).touch()
    return subprocess.run(
        [*WITHOUT_PRIVILEGES, "bash", "-c", "exec ./job.sh"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def read_events(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "events").read_text().splitlines()]


def test_the_script_runs_the_workload_and_records_its_end(tmp_path: Path) -> None:
    text = "import os, sys\nprint(os.environ['DATA_ROOT'])\nsys.exit(3)\n"
    program(tmp_path).write_text(text)
    done = run_as_slurm_would(tmp_path, render(*CASES["script"], data=AWKWARD))
    assert done.returncode == 3
    assert done.stdout == AWKWARD + "\n"
    started, ended = read_events(tmp_path)
    assert "started" in started
    messages = (tmp_path / "messages.jsonl").read_text()
    assert json.loads(messages) == {"method": JOB_STARTED}
    assert messages.startswith("\n")
    assert (ended["code"], ended["began"]) == (3, started["time"])
    assert ended["sizes"] == {"messages.jsonl": len(messages), "stdout": 0, "stderr": 0}


@pytest.mark.parametrize(
    "removed", [["stdout"], ["stderr"], ["messages.jsonl"], ["messages.jsonl", "stdout", "stderr"]]
)
def test_a_workload_may_remove_its_own_output(removed: list[str], tmp_path: Path) -> None:
    program(tmp_path).write_text(f"import os, sys\nfor each in {removed}: os.remove('../' + each)\nsys.exit(3)\n")
    run_as_slurm_would(tmp_path, render(*CASES["script"]))
    sizes = {"messages.jsonl": len('\n{"method": "job_started"}\n'), "stdout": 0, "stderr": 0}
    ended = read_events(tmp_path)[-1]
    assert (ended["code"], ended["sizes"]) == (3, {name: sizes[name] for name in sizes if name not in removed})


@pytest.mark.parametrize(
    ("bash", "told"),
    [
        ("", None),
        ("unset EPOCHREALTIME EPOCHSECONDS", None),  # as before bash 5
        ("unset EPOCHREALTIME; EPOCHREALTIME=1795633537,344380", 1795633537.34438),  # where 1,5 is one and a half
    ],
)
def test_times_are_told_with_any_bash_and_locale(bash: str, told: float | None, tmp_path: Path) -> None:
    program(tmp_path).write_text("import os\nprint(os.environ['SLURM_JOB_END_TIME'])\n")
    (tmp_path / "bash").write_text(bash)
    before = time.time()
    done = run_as_slurm_would(tmp_path, render(*CASES["script"]), BASH_ENV=str(tmp_path / "bash"))
    times = [event["time"] for event in read_events(tmp_path)]
    assert len(times) == 2
    assert all(each == told if told else isinstance(each, float) and each > before - 1 for each in times)
    assert int(done.stdout) > before


@pytest.mark.parametrize("mark", ["end", "failed", "cancelled"])
def test_a_job_that_is_requeued_when_no_step_follows_it_ends_at_once(mark: str, tmp_path: Path) -> None:
    """By an administrator: the step has another attempt, or is over. Before that, Slurm may start it again."""
    program(tmp_path).write_text("print('works')\n")
    text = render(*CASES["script"])
    assert [run_as_slurm_would(tmp_path, text).stdout for _ in range(2)] == ["works\n", "works\n"]
    before = read_events(tmp_path)
    (tmp_path / mark).touch()
    done = run_as_slurm_would(tmp_path, text)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (len(before), read_events(tmp_path)) == (4, before)


def test_a_job_that_appears_after_its_cancellation_does_nothing(tmp_path: Path) -> None:
    """Slurm has accepted it though sbatch reported an error. The run stays one that has no job."""
    (tmp_path / "cancelled").touch()
    done = run_as_slurm_would(tmp_path, render(*CASES["script"]))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "job").is_symlink()


def test_variables_and_arguments_reach_the_workload_and_not_the_script(tmp_path: Path) -> None:
    """As nobody should name them, but a script must bear it."""
    text = "import json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))\n"
    program(tmp_path).write_text(text)
    variables = {"BASH_ENV": "/none", "IFS": "a", "RANDOM": "r", "UID": "u", "code": "7", "now": "then", "X": AWKWARD}
    variables["LONG"] = "y" * (LONGEST - len(render_start(variables).encode()) - len(" LONG=") - 1)
    assert fits(render_start(variables))
    arguments = [AWKWARD, "-m", "--nodes=2", "", "*", "y" * (LONGEST - 1)]
    assert fits(arguments[-1])
    script = (ScriptLauncher(), SlurmRequest())
    done = run_as_slurm_would(tmp_path, render(*script, variables=variables, command=["work load.py", *arguments]))
    received, environment = json.loads(done.stdout)
    assert received == arguments
    assert {name: environment[name] for name in variables} == variables
    assert (done.stderr, read_events(tmp_path)[-1]["code"]) == ("", 0)


def test_a_workload_that_calls_exit_cannot_skip_the_record(tmp_path: Path) -> None:
    site = load_site({}, "musica")
    request = allocate(SlurmRequest(), site).request
    text = render_job_script(request, site, job_name="k", about={}, environment={}, body="exit 5")
    assert run_as_slurm_would(tmp_path, text).returncode == 5
    assert read_events(tmp_path)[-1]["code"] == 5


def test_a_second_job_of_the_same_run_steps_back(tmp_path: Path) -> None:
    program(tmp_path).write_text("print('ran')\n")
    (tmp_path / "job").symlink_to("16")
    done = run_as_slurm_would(tmp_path, render(*CASES["script"]))
    assert (done.returncode, done.stdout) == (0, "")
    assert not (tmp_path / "events").exists()


@pytest.mark.parametrize("name", ["job", "messages.jsonl"])
def test_a_job_that_can_neither_claim_its_run_nor_say_that_it_starts_fails(name: str, tmp_path: Path) -> None:
    """The disk is full, say: it must not end as if another job had its work, nor count reports of an earlier start."""
    program(tmp_path).write_text("print('works')\n")
    (tmp_path / "messages.jsonl").symlink_to("/dev/full")
    (tmp_path / name).touch()
    done = run_as_slurm_would(tmp_path, render(*CASES["script"]))
    assert (done.returncode, done.stdout, (tmp_path / "events").exists()) == (1, "", name != "job")


@pytest.mark.parametrize("limit", ["64", "99999999"])
def test_a_pre_start_command_that_fails_is_reported_and_skipped(tmp_path: Path, limit: str) -> None:
    program(tmp_path, "w.py").write_text("import resource\nprint(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n")
    launcher = ScriptLauncher(pre_start_commands=[f"ulimit -n {limit}"])
    script = "ulimit -n 128\n" + render(launcher, SlurmRequest(), command=["w.py"])
    done = run_as_slurm_would(tmp_path, script)
    assert done.returncode == 0
    assert done.stdout == ("64\n" if limit == "64" else "128\n")
    assert ("failed on" in done.stderr) == (limit != "64")


@pytest.mark.parametrize(
    ("command", "does", "reported"),
    [
        ("touch done &", "done", False),
        ("touch done; false # a comment", "done", True),
        ("cat >done <<EOF\nline\nEOF", "done", False),
        ("export NAME='a b'", "", False),
        ("if true", "", True),
        ("echo 'a", "", True),
        ("false é ' \"'\" $(", "", True),
    ],
)
def test_any_pre_start_command_can_fail_and_the_job_continues(
    command: str, does: str, reported: bool, tmp_path: Path
) -> None:
    lines = ScriptLauncher(pre_start_commands=[command]).render_pre_start()
    done = run_as_slurm_would(tmp_path, f'#!/bin/bash\n{lines}\nwait\necho "$NAME" next')
    assert done.stdout == ("a b next\n" if "NAME" in command else " next\n")
    assert (f"{command}: failed on " in done.stderr) == reported
    assert not does or (tmp_path / does).exists()


def test_setup_commands_of_the_site_come_before_python_in_a_login_shell(tmp_path: Path) -> None:
    """Only login shells have `module`. Neither the profile nor these commands change where the job runs."""
    folder = tmp_path / AWKWARD
    folder.mkdir()
    (folder / ".bash_profile").write_text("cd /\nprovide() { export MODULE=$1; }\n")
    site = load_site({"musica": {"setup_commands": ["provide loaded", "cd /usr"]}}, "musica")
    program(folder, "w.py").write_text("import os\nprint(os.environ['MODULE'], os.getcwd())\n")
    text = render(ScriptLauncher(), SlurmRequest(), site, command=["w.py"], run=str(folder))
    done = run_as_slurm_would(folder, text)
    assert (done.stdout, done.returncode) == (f"loaded {folder}/work\n", 0), done.stderr
    assert read_events(folder)[-1]["code"] == 0


def test_nothing_of_the_home_or_of_a_module_shadows_the_packages_of_the_environment(tmp_path: Path) -> None:
    """P-18: ~/.local came first, and a PYTHONHOME of a module kept Python from starting."""
    python = os.path.realpath(sys.executable)
    shadow = tmp_path / ".local" / "lib" / "python{}.{}".format(*sys.version_info[:2]) / "site-packages"
    shadow.mkdir(parents=True)
    (shadow / "a_module.py").write_text("raise SystemExit('shadow')\n")
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "a_module.py").write_text("WORD = 'right'\n")
    program(tmp_path, "w.py").write_text(
        f"import subprocess, sys\nsys.path.append({str(tmp_path / 'packages')!r})\nimport a_module\n"
        "print(a_module.WORD, subprocess.run([sys.executable, '-c', 'import a_module']).returncode)\n"
    )
    site = load_site({"musica": {"setup_commands": ["export PYTHONHOME=/nonexistent"]}}, "musica")
    text = render(ScriptLauncher(), SlurmRequest(), site, command=["w.py"]).replace(sys.executable, python)
    done = run_as_slurm_would(tmp_path, text, PYTHONSAFEPATH="1")
    assert (done.stdout, done.returncode) == ("right 1\n", 0), done.stderr
    assert "shadow" not in done.stderr
    assert "No module named 'a_module'" in done.stderr  # where nothing shadows it, it is not found at all


@pytest.mark.parametrize("disk", ["there", "missing", "a file", "read-only"])
def test_temporary_files_lie_on_the_disk_of_the_node_if_it_can_be_written_to(tmp_path: Path, disk: str) -> None:
    path = tmp_path / "disk"
    if disk == "a file":
        path.touch()
    elif disk != "missing":
        path.mkdir(0o555 if disk == "read-only" else 0o777)
    site = SITE.model_copy(update={"local_disk": str(path)})
    program(tmp_path, "w.py").write_text("import tempfile\nprint(tempfile.gettempdir())\n")
    done = run_as_slurm_would(
        tmp_path, render(ScriptLauncher(), SlurmRequest(), site, command=["w.py"]), TMPDIR="/of/a/profile"
    )
    expected = str(path) if disk == "there" else "/tmp"
    assert (done.stdout, done.stderr) == (f"{expected}\n", "")
    assert read_events(tmp_path)[0]["temporary"] == expected
    assert disk != "there" or list(path.iterdir()) == []


def test_every_field_of_the_request_is_rendered() -> None:
    request = SlurmRequest(
        nodes=2, ntasks_per_node=3, cpus_per_task=4, gpus_per_node=1, mem_per_cpu="2G", time_limit="5", partition="p",
        qos="q", account="a", reservation="r", constraint="c", exclude="n1", nodelist="n[2-3]", exclusive=True,
        dependency="afterok:1", options=["--nice=5"],
    )  # fmt: skip
    text = render_job_script(request, Site(), job_name="key", about={}, environment={}, body="true")
    options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert options == [
        "--job-name=key", "--comment=key=key", "--nodes=2", "--ntasks-per-node=3", "--cpus-per-task=4", "--gres=gpu:1",
        "--mem-per-cpu=2G", "--time=00:05:00", "--partition=p", "--qos=q", "--account=a", "--reservation=r",
        "--constraint=c", "--exclude=n1", "--nodelist=n[2-3]", "--exclusive", "--dependency=afterok:1", "--nice=5",
        "--output=stdout", "--error=stderr", "--open-mode=append", "--export=NONE",
        "--signal=B:USR1@30",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), ["--threads-per-core=1"]),
        (("--nice=5",), ["--threads-per-core=1"]),
        (("--threads-per-core=2",), ["--threads-per-core=2"]),
        (("--hint=multithread",), ["--hint=multithread"]),  # sbatch refuses it beside --threads-per-core
    ],
)
def test_an_asset_that_chooses_hardware_threads_wins(options: tuple[str, ...], expected: list[str]) -> None:
    site = Site(threads_per_core=1)
    text = render_job_script(SlurmRequest(options=options), site, job_name="k", about={}, environment={}, body="true")
    directives = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert [option for option in directives if option.startswith(("--threads", "--hint"))] == expected


def test_the_header_of_the_site_stands_between_the_shebang_and_the_directives() -> None:
    site = Site(script_header=("#ASC --vanilla", "# another"))
    text = render_job_script(SlurmRequest(), site, job_name="k", about={}, environment={}, body="true")
    assert text.splitlines()[:4] == ["#!/bin/bash", "#ASC --vanilla", "# another", "#SBATCH --job-name=k"]


@pytest.mark.parametrize("name", ["", "a b", "a\n#SBATCH --uid=0", "-x", "é"])
def test_a_job_name_is_a_plain_word(name: str) -> None:
    with pytest.raises(ValueError, match="not a job name"):
        render_job_script(SlurmRequest(), Site(), job_name=name, about={}, environment={}, body="true")


def test_paths_are_quoted() -> None:
    assert shlex.quote(AWKWARD) in ScriptLauncher().render(SlurmRequest(), [AWKWARD])
    assert shlex.quote(AWKWARD) in RayLauncher().render(SlurmRequest(), [AWKWARD])
    assert shlex.quote(AWKWARD) in SrunLauncher().render(SlurmRequest(), [AWKWARD])


@pytest.mark.parametrize(
    ("runtime", "trap", "heard"),
    [
        ("python3.12", "trap 'echo saving' USR1", True),
        ("python3.12", "", False),
        ("R", "trap 'echo .RData; exit 2' USR1", False),  # as R 4.2 does
        ("node", "trap 'echo Debugger listening' USR1", False),  # as Node.js 20 does, for all users of the machine
        ("beam.smp", "trap 'echo erl_crash.dump; exit 1' USR1", False),
    ],
)
def test_a_warning_reaches_a_workload_that_handles_it_itself_and_no_other(
    runtime: str, trap: str, heard: bool, tmp_path: Path
) -> None:
    shutil.copy("/bin/bash", tmp_path / runtime)
    program(tmp_path).write_text(f"{trap}\necho ready\nuntil [ -e ../go ]; do sleep 0.02; done\nexit 7\n")
    (tmp_path / "job.sh").write_text(render(*CASES["script"]).replace(sys.executable, str(tmp_path / runtime)))
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "17", "HOME": str(tmp_path)}
    with (tmp_path / "stdout").open("w") as out, (tmp_path / "stderr").open("w") as err:
        process = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=environment, stdout=out, stderr=err)
    wait_until(lambda: (tmp_path / "stdout").read_text() == "ready\n", "the workload is ready")
    process.send_signal(signal.SIGUSR1)
    wait_until(lambda: "time limit: 60 s left" in (tmp_path / "stderr").read_text(), "the warning")
    if heard:
        wait_until(lambda: "saving" in (tmp_path / "stdout").read_text(), "the workload has heard it")
    (tmp_path / "go").touch()
    assert process.wait(60) == 7
    assert heard or (tmp_path / "stdout").read_text() == "ready\n"
    assert read_events(tmp_path)[-1]["code"] == 7
