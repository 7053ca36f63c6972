"""Modules of a request: names, the job script, and `development`. The tests with Lmod itself are in tests/cluster."""

import os
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.inspect.asset_preview import preview_asset
from dagster_sbatch.launchers import ScriptLauncher
from dagster_sbatch.project import Project
from dagster_sbatch.run.adoption import inputs_of
from dagster_sbatch.run.array import JobArray
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.run.plan import Plan
from dagster_sbatch.run.workload import Workload
from dagster_sbatch.slurm import Site, SlurmRequest, allocate, load_site, render_job_script
from dagster_sbatch.slurm.modules import explain_modules
from resources import PROJECT
from support.array_asset import ArrayAsset
from support.workload_asset import PIPES, materialize
from unit.test_job_script import read_events, run_as_slurm_would

UNKNOWN = """\
Lmod has detected the following error: The following module(s) are unknown:
"Nosuch/9"

Please check the spelling or version number. Also try "module spider ..."
"""
"""What Lmod 8.6 and 8.7 print."""
SITE = load_site({"musica": {"modules": ["GCC/14.3.0"]}}, "musica")


@pytest.mark.parametrize(
    ("modules", "text"),
    [
        ("GCC", "'GCC' is not a list. Write for instance modules=['GCC/14.3.0', 'OpenMPI']"),
        ({"GCC"}, "is not a list"),
        (["GCC OpenMPI"], "'GCC OpenMPI' is not the name of a module. Write one name per element, without commands"),
        (["module load GCC"], "is not the name of a module"),
        (["--force"], "is not the name of a module"),
        (["-GCC"], "is not the name of a module"),  # Lmod would unload it
        (["GCC;rm -r ~"], "is not the name of a module"),
        (["$(id)"], "is not the name of a module"),
        (["a\n#SBATCH --uid=0"], "is not the name of a module"),
        (["GCC\n"], "is not the name of a module"),
        (["../GCC"], "is not the name of a module"),
        ([""], "is not the name of a module"),
        ([14], "14 is not the name of a module"),
        (["GCC", "OpenMPI", "GCC"], "'GCC' is listed twice. Remove one of them"),
    ],
)
def test_names_that_are_none_say_what_to_write(modules: Any, text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^SlurmRequest: modules: ") as error:
        SlurmRequest(modules=modules)
    assert text in str(error.value)
    with pytest.raises(ConfigurationError, match=r"^SUPERCOMPUTER_SITE_OVERRIDES\['musica'\]\['modules'\]: "):
        load_site({"musica": {"modules": modules}}, "musica")


def test_names_of_centres_are_accepted() -> None:
    names = ("ASC/2025.06", "Python/3.13.5-GCCcore-14.3.0", "netCDF-C++4/4.3.1", "py-numpy@1.26", "mpi/openmpi/5", "_x")
    assert SlurmRequest(modules=list(names)).modules == names


@pytest.mark.parametrize(
    ("site", "modules", "loaded"),
    [
        (SITE, None, ("GCC/14.3.0",)),
        (SITE, ["OpenMPI"], ("OpenMPI",)),
        (SITE, [], ()),
        (PROJECT.load_site("musica"), None, None),
    ],
)
def test_the_modules_of_a_request_replace_those_of_the_site(site: Site, modules: Any, loaded: Any) -> None:
    request = allocate(SlurmRequest(modules=modules), site).request
    assert request.modules == loaded
    script = render_job_script(request, site, job_name="k", about={}, environment={}, body="true")
    assert script.startswith("#!/bin/bash -l\n" if loaded else "#!/bin/bash\n")
    assert ("module" in script.replace("of a module's Python", "")) == bool(loaded)


def test_modules_decide_the_result_of_a_job() -> None:
    def inputs(modules: list[str] | None) -> dict[str, str]:
        workload = Workload(Path("/root/a.py"), Path("/root"), None, ())
        allocation = allocate(SlurmRequest(modules=modules), PROJECT.load_site("musica"))
        plan = Plan(Project(Path("/root")), workload, ScriptLauncher(), Site(), allocation, {}, {}, ())
        return inputs_of(plan, {}, {}, None)

    assert inputs([]) == inputs(None)
    assert len({inputs(modules)["modules"] for modules in (["a", "b"], ["b", "a"], ["a"], [])}) == 4


def run_with(folder: Path, module: str, setup: tuple[str, ...] = (), body: str = "env") -> tuple[str, str, Any, str]:
    """Run a job script whose login shell has such a function `module`; return its output, its end and the cause."""
    (folder / ".bash_profile").write_text(f"unset BASH_ENV\n{module}")
    site = Site(setup_commands=setup)
    text = render_job_script(
        SlurmRequest(modules=["GCC/14.3.0", "Nosuch/9"]), site, job_name="k", about={}, environment={}, body=body
    )
    (folder / "cause").touch()
    done = run_as_slurm_would(folder, text)
    return done.stdout, done.stderr, read_events(folder)[-1]["code"], (folder / "cause").read_text()


def test_they_are_loaded_together_after_the_setup_commands(tmp_path: Path) -> None:
    """The files of a site may read unset variables. What a module prints is on stderr. PYTHONHOME goes no further."""
    module = 'set -u; module() { echo hi $USER_OF_NOTHING >&2; export PYTHONHOME=/m; export SEEN="$STACK $*"; }\n'
    out, err, code, cause = run_with(tmp_path, module, ("export STACK=2026",))
    assert "SEEN=2026 load GCC/14.3.0 Nosuch/9\n" in out
    assert "\nPYTHONHOME=" not in out
    assert (err, code, cause) == ("hi\n", 0, "")


def test_commands_of_a_login_profile_do_not_replace_those_of_the_script(tmp_path: Path) -> None:
    """A `cd` that lists the folder and fails where there is nothing to activate, an alias, and a trap."""
    profile = """\
cd() { builtin cd "$@" && ls && [ -e .venv ]; }
shopt -s expand_aliases
alias mkdir='mkdir -v'
set -E
trap 'exit 9' ERR
module() { :; }
"""
    assert run_with(tmp_path, profile, body="mkdir made; false; exit 3") == ("", "", 3, "")


def test_a_missing_module_ends_the_job_before_the_workload(tmp_path: Path) -> None:
    module = f"module() {{ echo before >&2; cat >&2 <<'END'\n{UNKNOWN}END\nfalse; }}\n"
    out, err, code, cause = run_with(tmp_path, module, body="echo ran")
    assert (out, err, code) == ("", f"before\n{UNKNOWN}", 1)
    expected = explain_modules(os.uname().nodename, ["GCC/14.3.0", "Nosuch/9"], 1, f"before\n{UNKNOWN}")
    assert cause == expected + "\n"
    assert cause.splitlines()[0].endswith(
        ' could not load the modules GCC/14.3.0, Nosuch/9. The following module(s) are unknown: "Nosuch/9"'
    )
    assert cause.splitlines()[-1] == "module spider"


def test_a_machine_without_lmod_says_so(tmp_path: Path) -> None:
    out, err, code, cause = run_with(tmp_path, "unset -f module\n", body="echo ran")
    assert (out, code) == ("", 1)
    assert "module: command not found" in err
    assert cause == explain_modules(os.uname().nodename, ["GCC/14.3.0", "Nosuch/9"], 127, err) + "\n"
    assert "There is no command module: the machine has no Lmod" in cause


def test_a_preview_shows_them() -> None:
    @dg.asset
    def probe(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        return compute.run(
            context,
            workload=Path(__file__),
            launcher=ScriptLauncher(),
            request=SlurmRequest(modules=["GCC/14.3.0", "OpenMPI"]),
        ).get_materialize_result()

    (shown,) = preview_asset(dg.Definitions([probe], resources={"compute": ComputeResource.of(PROJECT)}), "probe")
    assert shown.summary["modules"] == "GCC/14.3.0, OpenMPI (with Lmod, in the job)"
    assert "\nmodule load GCC/14.3.0 OpenMPI 2>modules.log\n" in shown.script


# ---- development

LMOD = """\
#!/bin/sh
[ "$1 $2 $3" = "bash load GCC/14.3.0" ] || { echo "wrong: $*" >&2; echo false; exit; }
[ "$MODULEPATH" = /modules ] && [ -z "$A_SECRET" ] || { echo "wrong environment" >&2; echo false; exit; }
echo 'echo a module says hello'
echo 'export PATH="/of/module:$PATH" SOLVER="a = b
c" PYTHONHOME=/nowhere PYTHONPATH=/nowhere'
"""
PROGRAM = (
    PIPES
    + """
    import os
    words = [os.environ.get(name, "") for name in ("SOLVER", "PATH", "A_SECRET")]
    words.append("".join(name for name in os.environ if "hello" in name))
    pipes.report_asset_materialization(metadata={"words": words})
"""
)


@pytest.fixture
def lmod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "lmod"
    path.write_text(LMOD)
    path.chmod(0o755)
    for name, value in {"LMOD_CMD": str(path), "MODULEPATH": "/modules", "A_SECRET": "x"}.items():
        monkeypatch.setenv(name, value)
    return path


def run_here(folder: Path, capfd: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    """Run a workload on this machine; return what it sees, and the step's log."""
    folder = folder / "workloads"
    folder.mkdir()
    outcome = materialize(PROGRAM, folder, request=SlurmRequest(modules=["GCC/14.3.0"]))
    assert outcome.error == ""
    (metadata,) = outcome.materializations[None]
    return metadata["words"], capfd.readouterr().err


@pytest.mark.usefixtures("lmod")
def test_development_loads_them_if_the_machine_has_lmod(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (solver, path, secret, printed), log = run_here(tmp_path, capfd)
    assert (solver, path.partition(":")[0], secret, printed) == ("a = b\nc", "/of/module", "", "")
    assert "modules" not in log


def test_development_runs_without_those_that_the_machine_lacks(
    tmp_path: Path, lmod: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lmod.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{UNKNOWN}END\necho false\n")
    (solver, *_), log = run_here(tmp_path, capfd)
    assert solver == ""
    assert "WARNING" in log
    assert "Lmod on this machine could not load the modules GCC/14.3.0. The following module(s) are unknown:" in log


def test_development_says_once_that_the_machine_has_no_lmod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the run has several tasks."""
    monkeypatch.delenv("LMOD_CMD", raising=False)
    report = "pipes.report_asset_materialization()"
    array = ArrayAsset(tmp_path, report, JobArray(), request=SlurmRequest(modules=["GCC/14.3.0"]))
    done = array.run("2013-01-01", "2013-01-02")
    assert (done.error, len(done.once)) == ("", 2)
    said = "These modules are not loaded: GCC/14.3.0. This machine has no Lmod."
    assert [line.startswith(said) for line in done.log].count(True) == 1
