"""Runs of an array asset in processes of their own that can be killed, with a Dagster instance that outlives them."""

import json
from pathlib import Path
from typing import Any

import dagster as dg

from support import ROOT
from support.array_asset import ArrayOutcome
from support.forked import Forked
from support.instances import make_instance
from support.step import start

PROGRAM = """\
import json, os, sys
from pathlib import Path
from dagster_sbatch import JobArray, SlurmRequest
from support.array_asset import ArrayAsset

folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
request = SlurmRequest(**options["request"])
asset = ArrayAsset(folder, (folder / "tasks.py").read_text(), JobArray(**options["array"]), request=request)
outcome = asset.run(*options["range"], of=options["of"], from_failure=options["from_failure"])
for each in sum(outcome.metadata.values(), []):
    each.update({name: str(value) for name, value in each.items() if isinstance(value, tuple)})  # a table
text = json.dumps(vars(outcome) | {"checks": {}, "failure": {}}, default=str)
(folder / f"outcome-{os.getpid()}").write_text(text)
"""


class ArrayProcess:
    """The asset of `support.array_asset`; each start is a run, or a re-execution of the one before."""

    def __init__(self, folder: Path, variables: dict[str, str], workload: str, first: str, last: str) -> None:
        self._folder, self._range = folder, (first, last)
        make_instance(folder / "dagster")  # a kill may come before the program has made it
        (folder / "program.py").write_text(PROGRAM)
        self.change(workload)
        tests = Path(__file__).parents[1]
        self._variables = {**variables, "PYTHONPATH": f"{ROOT}:{tests}"}
        self.array: dict[str, Any] = {}
        self.request: dict[str, Any] = {}

    def change(self, workload: str) -> None:
        """Write another workload."""
        (self._folder / "tasks.py").write_text(workload)

    def start(self, *, of: str | None = None, from_failure: bool = False) -> Forked:
        """Start a run, or the re-execution of another one."""
        calls = {"array": self.array, "request": self.request, "range": self._range}
        options = {**calls, "of": of, "from_failure": from_failure}
        number = len(list(self._folder.glob("log-*")))
        command = [str(self._folder / "program.py"), str(self._folder), json.dumps(options)]
        files = self._folder / f"out-{number:03}", self._folder / f"log-{number:03}"
        return start(command, self._variables, *files)

    def outcome(self, process: Forked, seconds: float = 180) -> ArrayOutcome:
        """The outcome of a run that ends by itself."""
        assert process.wait(seconds) == 0, self.log
        return ArrayOutcome(**json.loads((self._folder / f"outcome-{process.pid}").read_text()))

    @property
    def log(self) -> str:
        """What Dagster has logged in the latest run."""
        return sorted(self._folder.glob("log-*"))[-1].read_text()

    @property
    def output(self) -> str:
        """What the latest run has written to its stdout."""
        return sorted(self._folder.glob("out-*"))[-1].read_text()

    def renew_readings(self, *partitions: str) -> None:
        """Record that another run has materialized partitions of the asset that this one reads."""
        with dg.DagsterInstance.from_config(str(self._folder / "dagster")) as instance:
            for partition in partitions:
                instance.report_runless_asset_event(dg.AssetMaterialization("readings", partition=partition))

    def step_succeeded(self, run_id: str | None) -> bool:
        """Return whether the step of a run has succeeded; a kill may come between that and the end of its process."""
        if run_id is None:
            return False
        with dg.DagsterInstance.from_config(str(self._folder / "dagster")) as instance:
            return bool(instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.STEP_SUCCESS).records)

    def half_stored(self, run_id: str | None) -> int:
        """Return how many partitions are stored in a run's own file only, and not in that of all runs.

        A kill may come between the two. Such a partition looks like one that a person has wiped: its task runs again.
        """
        if run_id is None:
            return 0
        with dg.DagsterInstance.from_config(str(self._folder / "dagster")) as instance:
            events = instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION)
            stored = {event.asset_materialization.partition for event in events if event.asset_materialization}
            return len(stored - instance.get_materialized_partitions(dg.AssetKey("probe")))

    def runs(self) -> list[str]:
        """Ids of all runs, the latest first."""
        with dg.DagsterInstance.from_config(str(self._folder / "dagster")) as instance:
            return [record.dagster_run.run_id for record in instance.get_run_records()]
