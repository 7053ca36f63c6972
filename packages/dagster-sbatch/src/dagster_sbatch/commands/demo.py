"""Materialise assets in one run or in several, and show the progress: for `scripts/demo` and the tests of a project.

The runs are in a child process with this file as its program. The parent reads its log.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import dagster as dg
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from dagster_sbatch.commands.command_line import entry_point
from dagster_sbatch.inspect.asset_preview import RANGE_TAGS
from dagster_sbatch.run.interrupts import handled_stops

FAILED_LINES = 40
REASONS = "These assets were not materialised:"
"""A line that the child prints. If the run fails, the lines after it are shown; without it, the last FAILED_LINES."""
WIDTH = 40  # characters of what is shown of a running asset
# 2013-11-22 10:00:00 +0000 - dagster - INFO - JOB - RUN ID - [PID - ] STEP - MESSAGE
EVENT = re.compile(r" - dagster - [A-Z]+ - \w+ - [0-9a-f-]{36} - (?:\d+ - )?(?P<step>\w+) - (?P<message>.*)")
Values = list[dict[str, Any]]  # the metadata of an asset's newest materializations: one entry per partition, or one


def numbers(_: str, values: Values) -> dict[str, str]:
    """Return the numbers that an asset reported last, as the column `result`."""
    found = {name: value for each in values[:1] for name, value in each.items() if type(value) in (int, float)}
    return {"result": ", ".join(f"{name} {value:.6g}" for name, value in found.items())}


class Run(NamedTuple):
    """A run of some assets; `first` and `last` are partition keys, empty for assets without partitions."""

    assets: list[str]
    first: str = ""
    last: str = ""


def run_of_job(defs: dg.Definitions, name: str) -> list[Run]:
    """Return one run of all assets of a job, over all its partitions."""
    job = defs.resolve_job_def(name)
    keys = job.partitions_def.get_partition_keys() if job.partitions_def else [""]
    return [Run([key.to_user_string() for key in job.asset_layer.selected_asset_keys], keys[0], keys[-1])]


def runs_of_each(defs: dg.Definitions, selection: dg.AssetSelection) -> list[Run]:
    """Return one run of each asset that the project makes, upstream assets first, with its newest partition.

    An asset that has no partition yet gets no run. Assets that one function makes together get one.
    """
    graph = defs.resolve_asset_graph()
    chosen, runs = selection.resolve(graph), {}
    with dg.DagsterInstance.ephemeral() as instance:
        for key in graph.toposorted_asset_keys:
            asset = graph.get(key)
            partitions = asset.partitions_def
            newest = partitions.get_partition_keys(dynamic_partitions_store=instance)[-1:] if partitions else [""]
            if key in chosen and asset.is_materializable and newest:
                together = sorted(each.to_user_string() for each in asset.execution_set_asset_keys)
                runs[together[0]] = Run(together, newest[0], newest[0])
    return list(runs.values())


def execute(
    defs: dg.Definitions,
    runs: Iterable[Run],
    instance: dg.DagsterInstance,
    run_config: Mapping[str, Any] | None = None,
    *,
    raise_on_error: bool = True,
) -> Iterator[dg.ExecuteInProcessResult]:
    """Execute runs in this process, without a daemon; yield the result of each."""
    job = defs.resolve_implicit_global_asset_job_def()
    for run in runs:
        several = run.first != run.last
        yield job.execute_in_process(
            instance=instance,
            asset_selection=[dg.AssetKey.from_user_string(asset) for asset in run.assets],
            partition_key=None if several else run.first or None,
            tags=dict(zip(RANGE_TAGS, run[1:], strict=True)) if several else None,
            run_config=dict(run_config or {}),
            raise_on_error=raise_on_error,
        )


@entry_point()
def materialise(
    location: str,
    runs: Sequence[Run] | str,
    where: str,
    home: Path,
    *,
    figures: Callable[[str, Values], dict[str, str]] = numbers,
    variables: Mapping[str, str] | None = None,
    run_config: Mapping[str, Any] | None = None,
) -> int:
    """Materialise assets, and print a table of what they reported. The first run that fails is the last.

    `runs`: runs, or the name of a job for `run_of_job`. `where`: for people: where the workloads run. `home`: Dagster's
    home; the log is `.dagster/demo.log` in it. `figures`: returns columns of the table: heading and text, from an
    asset's name and values. `variables`: more environment variables of the runs; `development` without them.
    Returns the exit code: 0 if every asset was materialised, 1 if one failed or there is none, 130 after Ctrl-C or
    SIGTERM.
    """
    # The person's own settings of a supercomputer are not for this run.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "ASC_"))}
    own = {"DAGSTER_HOME": str(home), "DAGSTER_DEPLOYMENT": "development", "PYTHONUTF8": "1", **(variables or {})}
    defs = import_module(location).defs
    runs = run_of_job(defs, runs) if isinstance(runs, str) else runs
    chosen = {dg.AssetKey.from_user_string(asset) for run in runs for asset in run.assets}
    keys = [key for key in defs.resolve_asset_graph().toposorted_asset_keys if key in chosen]
    console, log = Console(), home / ".dagster" / "demo.log"
    if not keys:
        console.print("No asset is selected. Select at least one, where the project defines its jobs.")
        return 1
    log.parent.mkdir(exist_ok=True)
    console.print(f"Materialising the assets {where}:", soft_wrap=True)
    command = [sys.executable, "-m", "dagster_sbatch.commands.demo", location, json.dumps(runs), json.dumps(run_config)]
    code, seconds = _follow(console, command, {**kept, **own}, log, {key.to_python_identifier(): key for key in keys})
    if not code:
        with dg.DagsterInstance.from_config(str(home)) as instance:
            console.print(_table({key: _values(instance, defs, key) for key in keys}, seconds, figures))
    return code


def _follow(
    console: Console, command: list[str], variables: dict[str, str], log: Path, steps: dict[str, dg.AssetKey]
) -> tuple[int, dict[dg.AssetKey, float]]:
    """Run the child and show where it is; return its exit code and how long each asset took, in seconds."""
    last: deque[str] = deque(maxlen=FAILED_LINES)
    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.fields[asset]:<15}{task.description}"),
        TimeElapsedColumn(),
    )
    # In a session of its own the child does not get the terminal's Ctrl-C: it comes here, and is passed on once.
    child = subprocess.Popen(
        command,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    interrupts: list[int] = []

    def interrupt(number: int) -> None:
        interrupts.append(number)
        child.send_signal(signal.SIGINT)

    with (
        handled_stops(interrupt),
        Progress(*columns, console=console) as progress,
        log.open("w", encoding="utf-8") as file,
    ):
        tasks = {step: progress.add_task("", asset=key.to_user_string(), total=1, start=False)
                 for step, key in steps.items()}  # fmt: skip
        with child:
            assert child.stdout is not None
            for line in child.stdout:
                file.write(line)
                last.append(line)
                if line.rstrip() == REASONS:
                    last = deque()  # keeps all lines that follow
                _show(progress, tasks, EVENT.search(line))
        for task in () if child.returncode else tasks.values():  # Dagster may lose the last lines of a step
            progress.update(task, completed=1)
    seconds = {steps[step]: progress.tasks[task].finished_time or 0.0 for step, task in tasks.items()}
    if interrupts:
        console.print("Interrupted; nothing is left running.")
        return 130, seconds
    if child.returncode:
        console.print("".join(last), markup=False, highlight=False, end="", soft_wrap=True)
        console.print(f"[red]Not all assets were materialised.[/red] The whole log is {log}", soft_wrap=True)
        return 1, seconds
    return 0, seconds


def _show(progress: Progress, tasks: Mapping[str, TaskID], event: "re.Match[str] | None") -> None:
    """Update the line of the asset that an event of the run is about."""
    if event is None or event["step"] not in tasks:
        return
    task, message = tasks[event["step"]], event["message"]
    if message.startswith("STEP_START"):
        progress.start_task(task)
    elif message.startswith("STEP_SUCCESS"):
        progress.update(task, completed=1)
    elif " - " not in message and "[pipes]" not in message:
        shown = message if len(message) <= WIDTH else f"{message[: WIDTH - 1]}…"
        progress.update(task, description=f"{shown:<{WIDTH}}")


def _values(instance: dg.DagsterInstance, defs: dg.Definitions, key: dg.AssetKey) -> Values:
    """Return the metadata of an asset's newest materializations."""
    partitions = defs.resolve_asset_graph().get(key).partitions_def
    limit = len(partitions.get_partition_keys()) if partitions else 1
    events = [record.asset_materialization for record in instance.fetch_materializations(key, limit=limit).records]
    return [{name: value.value for name, value in event.metadata.items()} for event in events if event]


def _table(
    found: Mapping[dg.AssetKey, Values],
    seconds: Mapping[dg.AssetKey, float],
    figures: Callable[[str, Values], dict[str, str]],
) -> Table:
    rows = {key.to_user_string(): values for key, values in found.items()}
    columns = {asset: figures(asset, values) for asset, values in rows.items()}
    headings = list(dict.fromkeys(heading for row in columns.values() for heading in row))
    table = Table(
        "asset", "time", *headings, title=f"Materialised in {sum(seconds.values()):.0f} s", title_justify="left"
    )
    for (asset, row), taken in zip(columns.items(), seconds.values(), strict=True):
        table.add_row(asset, f"{taken:.1f} s", *(row.get(heading, "") for heading in headings))
    return table


def _run(location: str, runs: str, run_config: str) -> int:
    """Execute runs in this process, the child, up to the first one that fails."""
    defs, wanted = import_module(location).defs, [Run(*each) for each in json.loads(runs)]
    with dg.DagsterInstance.get() as instance:
        for done in execute(defs, wanted, instance, json.loads(run_config), raise_on_error=False):
            if not done.success:
                print(REASONS)
                for failed in (event.step_failure_data for event in done.all_events if event.is_step_failure):
                    own = failed.user_failure_data  # of a Failure, which needs no stack
                    print(own.description if own else failed.error_display_string)
                return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(_run(*sys.argv[1:]))
