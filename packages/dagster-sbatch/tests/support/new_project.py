"""Copies of the template, and newer engines for them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from dagster_sbatch.commands.vendored import Wheel, build_wheel
from support import ROOT

NAME, PACKAGE = "climate-runs-of-an-alpine-valley", "climate_runs_of_an_alpine_valley"
"""As long as names may be: lines get longer with it."""
SCRIPT = str(ROOT / "scripts" / "new_project")
OWN_WORKLOAD = """\
from dagster_pipes import open_dagster_pipes

with open_dagster_pipes() as pipes:
    key = pipes.partition_key if pipes.is_partition_step else ""
    pipes.report_asset_materialization(metadata={"depth": len(key)})
"""
OWN_ASSETS = """\
from pathlib import Path

import dagster as dg
from dagster_sbatch import ComputeResource, JobArray, ScriptLauncher, SlurmRequest

WORKLOAD = Path(__file__).parents[1] / "workloads" / "snow.py"
REQUEST = SlurmRequest(cpus_per_task=1, mem="200M", time_limit="00:05:00")
days = dg.DailyPartitionsDefinition("2026-11-01", end_date="2026-11-06")


@dg.asset
def stations(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    done = compute.run(context, workload=WORKLOAD, launcher=ScriptLauncher(), request=REQUEST, environment="snow")
    return done.get_materialize_result()


@dg.asset(deps=[stations], partitions_def=dg.StaticPartitionsDefinition(["north", "south"]))
def depths(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    done = compute.run(context, workload=WORKLOAD, launcher=ScriptLauncher(), request=REQUEST)
    return done.get_materialize_result()


@dg.asset(deps=[stations], partitions_def=days, backfill_policy=dg.BackfillPolicy.single_run())
def melting(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    done = compute.run(context, workload=WORKLOAD, launcher=ScriptLauncher(), request=REQUEST, array=JobArray())
    return done.get_materialize_result()
"""
CHANGE = "- `scripts/dev`: write it anew."
"""What the changelog of a newer engine asks for."""


def plain_environment(**more: str) -> dict[str, str]:
    """PATH with uv, HOME and what concerns package indexes; nothing of Dagster's or of git's."""
    kept = ("HOME", "LANG", "UV_", "PIP_", "SSL_", "HTTP", "http", "NO_PROXY", "no_proxy")
    variables = {name: value for name, value in os.environ.items() if name.startswith(kept)}
    return variables | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | more


def run_in(folder: Path, *command: str, **more: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in a folder; uv is on PATH and makes a copy's environment in seconds."""
    return subprocess.run(
        command, cwd=folder, env=plain_environment(**more), capture_output=True, text=True, timeout=500, check=False
    )


def new_project(*arguments: str, folder: Path, **more: str) -> "subprocess.CompletedProcess[str]":
    """Run the command in a folder."""
    return run_in(folder, sys.executable, SCRIPT, *arguments, **more)


def made_in(folder: Path, name: str = NAME) -> Path:
    """A copy below that folder."""
    done = new_project(f"./{name}", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder / name


def newer_engine(folder: Path, version: str, edits: dict[str, tuple[str, str]] | None = None) -> Wheel:
    """A wheel of this engine with another version, whose changelog asks for a CHANGE.

    Args:
        folder: where it is written.
        version: of the wheel.
        edits: by file of the package: a passage of it, and what stands there instead.
    """
    source = folder / "sources"
    shutil.copytree(
        ROOT / "packages" / "dagster-sbatch",
        source,
        ignore=shutil.ignore_patterns("tests", "benchmarks", "__pycache__"),
    )
    edits = {
        **(edits or {}),
        "CHANGELOG.md": ("\n## ", f"\n## {version}\n\nNew.\n\n### In your own files\n\n{CHANGE}\n\n## "),
    }
    for name, (old, new) in edits.items():
        path = source / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))
    project = source / "pyproject.toml"
    project.write_text(re.sub(r'^version = ".*"$', f'version = "{version}"', project.read_text(), flags=re.MULTILINE))
    wheel = build_wheel(source, folder)
    shutil.rmtree(source)
    return wheel


def replace_first_asset(copy: Path) -> None:
    """What an owner does first: own assets, workload and group of packages in place of the first ones, and no more."""
    package = copy / copy.name.replace("-", "_")
    for name in ("assets/estimates.py", "workloads/pi_estimate.py"):
        (package / name).unlink()
    (package / "workloads" / "snow.py").write_text(OWN_WORKLOAD)
    (package / "assets" / "valley.py").write_text(OWN_ASSETS)
    pyproject, locks = copy / "pyproject.toml", copy / "requirements"
    group = '[dependency-groups]\ncluster-snow = ["dagster-pipes", "pip"]\n'
    pyproject.write_text(pyproject.read_text().replace("[dependency-groups]\n", group))
    shutil.copy(locks / "cluster.txt", locks / "cluster-snow.txt")
    run_in(copy, "git", "add", "--all")
