"""A step in a process of its own that can be killed, with a Dagster instance that outlives it."""

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from support import ROOT
from support.forked import Forked
from support.instances import make_instance

PROGRAM = """\
import json, os, sys, time
from pathlib import Path
import dagster as dg
from resources import build_resources
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch import launchers
from dagster_sbatch.slurm import SlurmRequest

FOLDER = Path(__file__).parent
CALL = json.loads((FOLDER / "call.json").read_text())
CONTAINER = launchers.Container(CALL["container"]) if CALL["container"] else None
LAUNCHER = getattr(launchers, CALL["launcher"])(container=CONTAINER)
REQUEST = SlurmRequest(**CALL["request"])

@dg.asset
def files():
    pass  # what the next asset reads, if CALL says so

@dg.asset(deps=[files] if CALL["upstream"] else [])
def probe(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    (FOLDER / f"begun-{os.getpid()}").touch()
    workload = FOLDER / "workloads" / "workload.py"
    done = compute.run(
        context, workload=workload, launcher=LAUNCHER, request=REQUEST, extras=CALL["extras"], env=CALL["env"]
    )
    if not (FOLDER / "hold").exists():
        return done.get_materialize_result()
    (FOLDER / "held").touch()
    time.sleep(600)

def make_job():
    job = dg.define_asset_job("all", selection="*", executor_def=dg.in_process_executor)
    assets = [files, probe] if CALL["upstream"] else [probe]
    return dg.Definitions(assets=assets, jobs=[job], resources=build_resources()).resolve_job_def("all")

if __name__ == "__main__":
    parent = dg.ReexecutionOptions(sys.argv[1], sys.argv[2:] or None) if sys.argv[1:] else None
    job = dg.reconstructable(make_job)
    instance, tags = dg.DagsterInstance.get(), {}
    if parent:  # the UI and the daemon set it
        tags["dagster/root_run_id"] = instance.get_run_by_id(sys.argv[1]).root_run_id or sys.argv[1]
    with instance, dg.execute_job(job, instance, tags=tags, reexecution_options=parent) as result:
        metadata = {}
        for event in result.filter_events(lambda event: event.event_type_value == "ASSET_MATERIALIZATION"):
            for name, value in event.materialization.metadata.items():
                metadata[name] = str(value) if isinstance(value, dg.TableMetadataValue) else value.value
        failed = [event for event in result.all_events if event.is_step_failure]
        errors = [event.step_failure_data.error_display_string for event in failed]
        (FOLDER / f"result-{os.getpid()}").write_text(json.dumps([result.success, errors, metadata]))
"""


class Step:
    """A workload in `folder/workloads`, and a program; each start is a run, or a re-execution of the one before."""

    def __init__(self, folder: Path, variables: dict[str, str], workload: str, program: str = PROGRAM) -> None:
        self._folder = folder
        home = folder / "dagster"
        make_instance(home)
        (folder / "workloads").mkdir()
        (folder / "step.py").write_text(program)
        self.change(workload)
        self.call()
        self._variables = {**variables, "DAGSTER_HOME": str(home), "PYTHONPATH": str(ROOT)}

    def change(self, workload: str) -> None:
        """Write another workload."""
        (self._folder / "workloads" / "workload.py").write_text(workload)

    def call(
        self,
        extras: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
        launcher: str = "ScriptLauncher",
        container: str | None = None,
        *,
        upstream: bool = False,
        **request: Any,
    ) -> None:
        """Let the next start pass other arguments to `compute.run`; `upstream`: after the asset `files`."""
        call: dict[str, Any] = {"extras": extras or {}, "env": env or {}, "launcher": launcher}
        call |= {"container": container, "upstream": upstream}
        call["request"] = {"time_limit": "00:30:00", **request}
        (self._folder / "call.json").write_text(json.dumps(call))

    def hold(self) -> None:
        """Let the next start stay in its asset when it has the result."""
        (self._folder / "hold").touch()

    def held(self) -> bool:
        """Whether it is there; the starts after it do not stay."""
        if not (self._folder / "held").exists():
            return False
        (self._folder / "hold").unlink(missing_ok=True)
        return True

    def runs(self) -> list[str]:
        """Ids of all runs, the oldest first."""
        with dg.DagsterInstance.from_config(str(self._folder / "dagster")) as instance:
            return [record.dagster_run.run_id for record in instance.get_run_records()][::-1]

    def materializations(self) -> int:
        """How many materializations of its asset Dagster has stored."""
        with dg.DagsterInstance.from_config(str(self._folder / "dagster")) as instance:
            return len(instance.fetch_materializations(dg.AssetKey("probe"), limit=10).records)

    def materialize(self, asset: str) -> None:
        """Record a materialization of an asset, as of another run."""
        with dg.DagsterInstance.from_config(str(self._folder / "dagster")) as instance:
            instance.report_runless_asset_event(dg.AssetMaterialization(asset))

    def start(self, *steps: str, again: bool) -> Forked:
        """Start a run; `again` makes it a re-execution of the latest one: of all steps, or of these."""
        parent = [*self.runs()[-1:], *steps] if again else []
        number = len(list(self._folder.glob("log-*")))
        files = self._folder / f"out-{number}", self._folder / f"log-{number}"
        return start([str(self._folder / "step.py"), *parent], self._variables, *files)

    def begun(self, process: Forked) -> bool:
        """Whether its asset has begun."""
        return (self._folder / f"begun-{process.pid}").exists()

    def result(self, process: Forked) -> tuple[bool, str, dict[str, Any]]:
        """Of one that ends by itself: success, the text of its failure, the metadata of its materialization."""
        assert process.wait(180) == 0, self.log
        success, errors, metadata = json.loads((self._folder / f"result-{process.pid}").read_text())
        return success, "\n".join(errors), metadata

    @property
    def log(self) -> str:
        """What Dagster has logged in the latest run."""
        return sorted(self._folder.glob("log-*"))[-1].read_text()

    @property
    def output(self) -> str:
        """What the latest run has written to its stdout."""
        return sorted(self._folder.glob("out-*"))[-1].read_text()


Process = Forked | subprocess.Popen[bytes]
_started: list[Process] = []


def start(command: Sequence[str], variables: Mapping[str, str], output: Path, log: Path) -> Forked:
    """Start a Python program that ends with the test at the latest; the arguments are those of `Forked`."""
    process = Forked(command, variables, output, log)
    _started.append(process)
    return process


def ends_with_test(process: "subprocess.Popen[bytes]") -> "subprocess.Popen[bytes]":
    """Have a process, with its process group if it leads one, end with the test at the latest; return it."""
    _started.append(process)
    return process


def kill_all() -> None:
    """End what still runs: a test has failed."""
    while _started:
        process = _started.pop()
        if process.poll() is not None:
            continue
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
        kill(process)


def kill(process: Process) -> None:
    """End it as a power cut does."""
    process.send_signal(signal.SIGKILL)
    process.wait()
