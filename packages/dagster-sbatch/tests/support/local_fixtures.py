"""One `dagster dev` for all tests that need one; an authentik."""

import os
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from slurm_in_a_box import AuthentikControl, AuthentikServer
from support import access
from support.background import STRESS
from support.dagster_dev import DagsterDev, beside_location
from support.programs import make

END = "2023-09-28" if STRESS or os.environ.get("UPDATE_SCREENSHOTS") else "2021-07-20"
DAYS = dg.DailyPartitionsDefinition("2021-01-01", end_date=END).get_partition_keys()
"""Partitions of the asset `weather`: 200, or 1,000 as in the documentation's picture."""

SLEEPER = """\
import os, pathlib, subprocess, time
from dagster_pipes import decode_param, open_dagster_pipes
with open_dagster_pipes() as pipes:
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)  # as Ray starts its processes
    pids, rank = f"{os.getpid()} {child.pid} {os.getpgid(0)}", os.environ.get("RANK", "0")
    folder = pathlib.Path(os.environ["DATA_ROOT"])
    folder.mkdir(exist_ok=True)
    context = decode_param(os.environ["DAGSTER_PIPES_CONTEXT"])["path"]
    (folder / f"run-directory-{pipes.run_id}").write_text(os.path.dirname(context))
    (folder / f"pids-{rank}.part").write_text(pids)
    (folder / f"pids-{rank}.part").rename(folder / f"pids-{pipes.run_id}{'-' * int(rank)}")
    time.sleep(600)
"""

RAY_SLEEPER = """\
import os, pathlib, time
import ray
from dagster_pipes import open_dagster_pipes
@ray.remote
def sleep(path, driver, supervisor):
    path.with_suffix(".part").write_text(f"{driver} {os.getpid()} {supervisor}")
    path.with_suffix(".part").rename(path)
    time.sleep(600)
with open_dagster_pipes() as pipes:
    folder = pathlib.Path(os.environ["DATA_ROOT"])
    folder.mkdir(exist_ok=True)
    ray.init(log_to_driver=False, include_dashboard=False)
    ray.get(sleep.remote(folder / f"pids-{pipes.run_id}", os.getpid(), os.getppid()))
"""

TALKER = """\
import sys
from dagster_pipes import open_dagster_pipes
with open_dagster_pipes() as pipes:
    for number in range(1000):
        print(f"line {number}")
    print("a word to stderr", file=sys.stderr)
    pipes.report_asset_materialization()
"""

PROGRAM_SLEEPER = """\
#!/bin/bash
#SBATCH --job-name=sleeper
mkdir -p "$DATA_ROOT"
sleep 600 &
echo "$$ $! $PPID" >"$DATA_ROOT/pids-$1"
wait
"""
"""It starts no further process: the tests count them."""

PROGRAM_TALKER = """\
#!/bin/bash
#SBATCH --job-name=talker
printf 'line %d\\n' {0..999}
echo 'a word to stderr' >&2
pipes materialize --metadata lines=1000
"""

WEATHER = """\
import os, pathlib, sys, time
from dagster_pipes import open_dagster_pipes
with open_dagster_pipes() as pipes:
    folder = pathlib.Path(os.environ["DATA_ROOT"])
    folder.mkdir(exist_ok=True)
    days = pipes.extras["partition_keys"]
    (folder / f"weather-{pipes.run_id}-{days[0]}").touch()
    fixed = (folder / "weather-fixed").exists()
    while days[-1] == sys.argv[1] and not (folder / "weather-seen").exists():
        time.sleep(0.1)
    for day in days:
        if day in ("2021-02-14", "2021-03-17", "2021-05-28") and not fixed:
            raise FileNotFoundError(f"no observations of {day}")
        if day == "2021-06-05" and not fixed:
            raise ValueError("temperature of 451.0 degrees")
        numbers = {"mean_temperature": 9.0 + int(day[5:7]) - int(day[8:]) / 10}
        pipes.report_custom_message({"musica.partition": {"partition": day, "metadata": numbers}})
    pipes.report_asset_materialization()
"""


@pytest.fixture(scope="session")
def dagster_dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DagsterDev]:
    """`dagster dev` with the code location of the tests, an empty home, and DATA_ROOT alone set."""
    folder = tmp_path_factory.mktemp("dagster")
    workloads, home = folder / "workloads", folder / "home"
    for path in (workloads, home):
        path.mkdir()
    (workloads / "sleeper.py").write_text(SLEEPER)
    (workloads / "ray_sleeper.py").write_text(RAY_SLEEPER)
    (workloads / "talker.py").write_text(TALKER)
    (workloads / "weather.py").write_text(WEATHER)
    make(workloads, PROGRAM_SLEEPER, "sleeper.sh")
    make(workloads, PROGRAM_TALKER, "talker.sh")
    location = Path(__file__).parents[1] / "local" / "probe_location.py"
    variables = {"HOME": str(home), "DATA_ROOT": str(folder / "data")}
    variables |= {"PROBE_WORKLOADS": str(workloads), "PROBE_END": END}
    with beside_location(location, folder / "project", variables) as started:
        yield started


@pytest.fixture
def authentik(tmp_path: Path) -> Iterator[AuthentikServer]:
    with AuthentikServer(tmp_path / "authentik") as server:
        server.control.create_user(access.USER)
        server.control.set_lifetimes(token=30 * access.DAY)
        yield server


@pytest.fixture
def control(authentik: AuthentikServer) -> AuthentikControl:
    return authentik.control


@pytest.fixture
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """DATA_ROOT of the workloads: an empty folder."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("DATA_ROOT", str(folder))
    return folder
