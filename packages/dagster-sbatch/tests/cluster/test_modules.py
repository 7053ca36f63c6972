"""Modules with the real Lmod: every launcher sees them, and a missing one ends the job at once, by its name."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch.inspect.asset_preview import preview_asset
from dagster_sbatch.inspect.dry_run import try_script
from dagster_sbatch.inspect.remote_runs import open_runs
from dagster_sbatch.launchers import (
    BatchScriptLauncher,
    CommandLauncher,
    Launcher,
    ScriptLauncher,
    SrunLauncher,
)
from dagster_sbatch.run.array import JobArray
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.sites import SITES
from dagster_sbatch.slurm import SlurmRequest
from resources import PROJECT
from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite
from slurm_in_a_box.storage import MODULE, SOLVER, STACK
from support.array_asset import ArrayAsset
from support.background import Background
from support.programs import make
from support.ray_run import NO_DASHBOARD
from support.workload_asset import PIPES, Outcome, materialize

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("on_supercomputer")]
MODULES = (STACK, SOLVER)
SHORT: dict[str, Any] = {"time_limit": "00:10:00", "mem": "1G", "modules": MODULES}
TWO: dict[str, Any] = {**SHORT, "nodes": 2, "nodelist": "n4001,n4002"}
SEES = """
    import os, subprocess
    solver = lambda: subprocess.run(["solver"], capture_output=True, text=True).stdout.strip()
    library = os.environ["LD_LIBRARY_PATH"].split(":")[0].removeprefix(os.environ["EBROOTSOLVER"])
"""
SCRIPT = PIPES + SEES + "    pipes.report_asset_materialization(metadata={'solver': solver(), 'library': library})\n"
RANKS = (
    "import pathlib, time\n"
    + PIPES
    + SEES
    + """
    folder = pathlib.Path("ranks")
    folder.mkdir(exist_ok=True)
    (folder / os.environ["RANK"]).write_text(solver())
    if os.environ["RANK"] == "0":
        while not (folder / "1").exists() or not (folder / "1").read_text():
            time.sleep(0.1)
        words = [(folder / rank).read_text() for rank in "01"]
        pipes.report_asset_materialization(metadata={"solver": ", ".join(words), "library": library})
"""
)
RAY = (
    PIPES
    + SEES
    + """
    import ray
    ray.init(log_to_driver=False, logging_level="ERROR")
    task = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(solver)
    words = set()
    while len(words) < 2:
        words |= set(ray.get([task.remote() for _ in range(4)]))
    pipes.report_asset_materialization(metadata={"solver": ", ".join(sorted(words)), "library": library})
"""
)
PROGRAM = """\
#!/bin/bash
pipes materialize --metadata solver="$(solver)" --metadata library="${LD_LIBRARY_PATH#$EBROOTSOLVER}"
"""


def start(folder: Path, **wanted: tuple[str, Launcher, dict[str, Any]]) -> dict[str, Background]:
    """Start a run of each workload in the background, once all of them are written: each run sends the whole folder."""
    paths = {name: make(folder, text, f"{name}_workload") for name, (text, _, _) in wanted.items()}

    def run(name: str, launcher: Launcher, request: dict[str, Any]) -> Outcome:
        return materialize(paths[name], folder, launcher=launcher, request=SlurmRequest(**request))

    return {name: Background(partial(run, name, launcher, request)) for name, (_, launcher, request) in wanted.items()}


def test_the_programs_of_every_launcher_see_them(workloads: Path) -> None:
    """A module's PYTHONPATH, which would end each of them at its first import, does not reach the workload's Python."""
    runs = start(
        workloads,
        script=(SCRIPT, ScriptLauncher(), SHORT),
        command=(PROGRAM, CommandLauncher(), SHORT),
        batch_script=(PROGRAM, BatchScriptLauncher(), SHORT),
        srun=(RANKS, SrunLauncher(), TWO),
        ray=(RAY, NO_DASHBOARD, TWO),
    )
    outcomes = {name: run.outcome(240) for name, run in runs.items()}
    for name, outcome in outcomes.items():
        assert outcome.error == "", name
        (metadata,) = outcome.materializations[None]
        assert metadata["library"].startswith("/lib"), name
        nodes = [word.removeprefix(f"{SOLVER} on ") for word in metadata["solver"].split(", ")]
        assert nodes == ["n4001", "n4002"] if name in ("srun", "ray") else len(nodes) == 1, name


def test_a_module_that_cannot_be_loaded_ends_the_job_at_once_by_its_name(workloads: Path, tmp_path: Path) -> None:
    """Of an array, once for all tasks. Each error has what Lmod says, and the workload does not run."""
    missing, hidden = {**SHORT, "modules": (STACK, "Nosuch/9")}, {**SHORT, "modules": (SOLVER,)}
    runs = start(workloads, missing=(SCRIPT, ScriptLauncher(), missing), hidden=(SCRIPT, ScriptLauncher(), hidden))
    array = ArrayAsset(tmp_path / "array", "print('the task runs')", JobArray(), request=SlurmRequest(**missing))
    failed = array.run("2013-01-01", "2013-01-03")
    errors = [failed.error, *(run.outcome().error for run in runs.values())]
    assert "3 tasks (2013-01-01, 2013-01-02, 2013-01-03): n400" in failed.error
    assert "the task runs" not in "".join(failed.log)
    expected = [(f"{STACK}, Nosuch/9", "Nosuch/9")] * 2 + [(SOLVER, SOLVER)]
    for (listed, name), error in zip(expected, errors, strict=True):
        assert f" could not load the modules {listed}. The" in error
        assert f'"{name}"' in error
        assert "Correct modules=[...] of the request or of the site." in error
        assert "\nmodule spider\n" in error


def test_a_site_has_modules_for_requests_that_name_none(
    site: SimulatedSite, workloads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come after its setup commands, in each task of an array, too; --test-only loads them on the login node.

    Such a job has a login shell. The profile may go to another folder.
    """
    (site.layout.home / CERTIFICATE_USER.name / ".bash_profile").write_text("cd /\n")
    monkeypatch.setitem(SITES["musica"], "setup_commands", [f"module load {STACK}"])
    monkeypatch.setitem(SITES["musica"], "modules", [SOLVER])
    other = "    import os\n    words = {name: os.environ.get(f'EBROOT{name}', '') for name in ('PYTHON', 'SOLVER')}\n"
    other = PIPES + other + "    pipes.report_asset_materialization(metadata=words)\n"
    run = start(workloads, other=(other, ScriptLauncher(), {**SHORT, "modules": [MODULE]}))["other"]
    plain = SlurmRequest(**{name: value for name, value in SHORT.items() if name != "modules"})
    report = "    pipes.report_asset_materialization(metadata={'solver': solver()})"
    array = ArrayAsset(tmp_path / "array", f"{SEES}\n{report}", JobArray(), request=plain)
    done = array.run("2013-01-01", "2013-01-02")
    tried = [try_modules(modules) for modules in (None, [MODULE, SOLVER], ["Nosuch/9"])]
    outcome = run.outcome()
    assert done.error == ""
    assert all(metadata["solver"].startswith(f"{SOLVER} on n400") for metadata in done.once.values())
    assert len(done.once) == 2
    assert tried[:2] == [(True, ""), (True, "")]
    accepted, said = tried[2]
    assert not accepted
    assert re.match(r'login0[12] could not load the modules Nosuch/9. The following .* unknown: "Nosuch/9"\n', said)
    assert outcome.error == ""
    (metadata,) = outcome.materializations[None]
    assert (metadata["PYTHON"].rpartition("/software/")[2], metadata["SOLVER"]) == (MODULE, "")


def try_modules(modules: list[str] | None) -> tuple[bool, str]:
    """Return what `scripts/preview --test-only` says of a request, without Slurm's part."""

    @dg.asset
    def probe(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        request = SlurmRequest(modules=modules, time_limit="5")
        return compute.run(
            context, workload=Path(__file__), launcher=ScriptLauncher(), request=request
        ).get_materialize_result()

    definitions = dg.Definitions(assets=[probe], resources={"compute": ComputeResource.of(PROJECT)})
    (shown,) = preview_asset(definitions, "probe")
    with open_runs(PROJECT.load_settings(), PROJECT, 60) as runs:
        accepted, said = try_script(runs.gateway, shown, runs.gateway.projects())
    return accepted, "" if accepted else said
