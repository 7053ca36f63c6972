"""A real `dagster dev` in a folder of its own, and what a browser would ask of it, over GraphQL."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from slurm_in_a_box import wait_until
from support import ROOT

ENDED = {"SUCCESS", "FAILURE", "CANCELED"}


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true value of the condition.

    Raises:
        SiteError: it did not come true in time.
    """
    return wait_until(condition, what, seconds)


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter if it ends while its file is read
        return True


def workload_processes(data_root: Path) -> list[int]:
    """Living processes that descend from a workload with that data root, whatever group they have put themselves in."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            variables = (folder / "environ").read_bytes().split(b"\0")
            pipes = any(variable.startswith(b"DAGSTER_PIPES_") for variable in variables)
            if pipes and f"DATA_ROOT={data_root}".encode() in variables and not gone(int(folder.name)):
                found.append(int(folder.name))
    return found


DAGSTER_DEV = (sys.executable, "-m", "dagster", "dev")


class DagsterDev:
    """`dagster dev`, or another command, started in `folder`, which holds dagster.yaml and workspace.yaml."""

    def __init__(
        self,
        folder: Path,
        environment: dict[str, str],
        command: Sequence[str] = DAGSTER_DEV,
    ) -> None:
        self.folder = folder
        self.log = folder.parent / "dagster-dev.log"
        self.data_root = Path(environment["DATA_ROOT"])
        self.environment = environment
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._spared: psutil.Process | None = None
        self.url = ""

    def start(self) -> None:
        """Start it and wait until every code location is loaded."""
        with socket.socket() as claim:  # nobody else gets the port meanwhile; the webserver, too, binds it for reuse
            claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            claim.bind(("127.0.0.1", 0))
            port = claim.getsockname()[1]
            self.url = f"http://127.0.0.1:{port}"
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    [*self._command, "--port", str(port)],
                    cwd=self.folder,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            wait_for(self._loaded, 300, f"dagster dev has loaded; see {self.log}")

    def _loaded(self) -> bool:
        assert self._process is not None and self._process.poll() is None, self.log.read_text()
        try:
            answer = self.ask("{ workspaceOrError { ... on Workspace { locationEntries { loadStatus } } } }")
        except httpx.HTTPError:
            return False
        entries = answer["workspaceOrError"].get("locationEntries", [])
        return bool(entries) and all(entry["loadStatus"] == "LOADED" for entry in entries)

    def stop(self) -> None:
        """As Ctrl-C does: SIGINT to the group. pytest shows the log if the test has failed."""
        if self._spared is not None:
            with suppress(psutil.NoSuchProcess):
                self._spared.kill()
        if self._process is None:
            return
        print(self.log.read_text())
        os.killpg(self._process.pid, signal.SIGINT)
        try:
            self._process.wait(60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def terminate_alone(self) -> None:
        """SIGTERM to its own process, as `kill PID` does; return when its webserver and its daemon have ended, too."""
        assert self._process is not None
        main = psutil.Process(self._process.pid)
        services = [each for each in main.children() if "grpc" not in each.cmdline()]
        main.terminate()
        self._process.wait(60)
        _, alive = psutil.wait_procs(services, timeout=60)
        assert alive == []
        self._process = None

    def kill(self, spared: psutil.Process | None = None) -> None:
        """As a power cut does: SIGKILL to it and all that it started, perhaps but for one process."""
        assert self._process is not None
        main = psutil.Process(self._process.pid)
        doomed = [each for each in (main, *main.children(recursive=True)) if each != spared]
        for each in doomed:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        self._process.wait()
        psutil.wait_procs(doomed, timeout=20)
        self._process, self._spared = None, spared

    def run_with_tag(self, name: str, value: str) -> str:
        """The id of the newest run with a tag; empty if there is none."""
        query = """
            query Tagged($filter: RunsFilter!) {
              runsOrError(filter: $filter) { ... on Runs { results { runId } } }
            }"""
        tags = [{"key": name, "value": value}]
        found: list[dict[str, Any]] = self.ask(query, filter={"tags": tags})["runsOrError"]["results"]
        return str(found[0]["runId"]) if found else ""

    def re_execution_of(self, run_id: str) -> str:
        """The id of the run that re-executes another; empty if there is none."""
        return self.run_with_tag("dagster/parent_run_id", run_id)

    def backfill(self, asset: str, partitions: Sequence[str]) -> str:
        """Request a backfill of partitions as the UI's *Launch backfill* does; the id of its run, which is one."""
        mutation = """
            mutation Backfill($parameters: LaunchBackfillParams!) {
              launchPartitionBackfill(backfillParams: $parameters) {
                __typename ... on LaunchBackfillSuccess { backfillId }
            } }"""
        parameters = {"assetSelection": [{"path": [asset]}], "partitionNames": list(partitions), "fromFailure": False}
        answer = self.ask(mutation, parameters=parameters)["launchPartitionBackfill"]
        assert answer["__typename"] == "LaunchBackfillSuccess", answer
        found = wait_for(
            lambda: self.run_with_tag("dagster/backfill", answer["backfillId"]), 120, "the backfill has its run"
        )
        return str(found)

    def cancel_backfill_of(self, run_id: str) -> None:
        """Cancel the backfill of a run as the UI does."""
        query = "query Tags($id: ID!) { runOrError(runId: $id) { ... on Run { tags { key value } } } }"
        tags = {tag["key"]: tag["value"] for tag in self.ask(query, id=run_id)["runOrError"]["tags"]}
        mutation = "mutation End($id: String!) { cancelPartitionBackfill(backfillId: $id) { __typename } }"
        answer = self.ask(mutation, id=tags["dagster/backfill"])["cancelPartitionBackfill"]
        assert answer["__typename"] == "CancelBackfillSuccess", answer

    def re_execute_from_failure(self, run_id: str) -> str:
        """Re-execute a run as *From failure* in the UI does; the id of the new run."""
        mutation = """
            mutation Again($parameters: ReexecutionParams!) {
              launchRunReexecution(reexecutionParams: $parameters) {
                __typename ... on LaunchRunSuccess { run { runId } }
            } }"""
        parameters = {"parentRunId": run_id, "strategy": "FROM_FAILURE"}
        answer = self.ask(mutation, parameters=parameters)["launchRunReexecution"]
        assert answer["__typename"] == "LaunchRunSuccess", answer
        return str(answer["run"]["runId"])

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        """The data of a GraphQL answer."""
        body = {"query": query, "variables": variables}
        # Without `verify`, httpx reads all certificates of this machine first: 20 ms, for a question that needs none.
        response = httpx.post(f"{self.url}/graphql", json=body, timeout=60, verify=False)
        answer = response.json()
        assert "errors" not in answer, answer
        data: dict[str, Any] = answer["data"]
        return data

    def launch(self, *assets: str, location: str = "musica_pipelines", **tags: str) -> str:
        """Launch a run over assets as the UI does; its id. Double underscores in tag names stand for slashes."""
        return self._launch(location, {"assetSelection": [{"path": [asset]} for asset in assets]}, tags)

    def execute_check(self, asset: str, check: str) -> str:
        """Execute a check of the project's code location as the UI's *Execute* does; the id of the run."""
        checks = [{"assetKey": {"path": [asset]}, "name": check}]
        return self._launch("musica_pipelines", {"assetSelection": [], "assetCheckSelection": checks}, {})

    def _launch(self, location: str, selection: dict[str, Any], tags: dict[str, str]) -> str:
        selector = {
            "repositoryLocationName": location,
            "repositoryName": "__repository__",
            "jobName": "__ASSET_JOB",
            **selection,
        }
        parameters = {
            "selector": selector,
            "runConfigData": {},
            "executionMetadata": {"tags": [{"key": k.replace("__", "/"), "value": v} for k, v in tags.items()]},
        }
        mutation = """
            mutation Launch($parameters: ExecutionParams!) {
              launchRun(executionParams: $parameters) { __typename ... on LaunchRunSuccess { run { runId } } }
            }"""
        answer = self.ask(mutation, parameters=parameters)["launchRun"]
        assert answer["__typename"] == "LaunchRunSuccess", answer
        return str(answer["run"]["runId"])

    def status(self, run_id: str) -> str:
        """Of a run."""
        query = "query Status($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"
        return str(self.ask(query, id=run_id)["runOrError"]["status"])

    def wait(self, run_id: str, seconds: float = 180) -> str:
        """The status with which a run ended."""
        wait_for(lambda: self.status(run_id) in ENDED, seconds, f"run {run_id} has ended")
        return self.status(run_id)

    def terminate(self, run_id: str) -> None:
        """As the UI's Terminate does."""
        mutation = "mutation End($id: String!) { terminateRun(runId: $id) { __typename } }"
        assert self.ask(mutation, id=run_id)["terminateRun"]["__typename"] == "TerminateRunSuccess"

    def messages(self, run_id: str) -> list[str]:
        """Of a run's events."""
        query = """
            query Messages($id: ID!) {
              logsForRun(runId: $id) { ... on EventConnection { events { ... on MessageEvent { message } } } }
            }"""
        return [event["message"] for event in self.ask(query, id=run_id)["logsForRun"]["events"]]

    def materializations(self, asset: str, partition: str | None = None) -> list[dict[str, Any]]:
        """Newest first: `runId`, `partition` and whole numbers by label."""
        query = """
            query Events($path: [String!]!, $partitions: [String!]) {
              assetOrError(assetKey: {path: $path}) { ... on Asset {
                assetMaterializations(partitions: $partitions) {
                  runId partition metadataEntries { label ... on IntMetadataEntry { intValue } }
            } } } }"""
        partitions = None if partition is None else [partition]
        answer = self.ask(query, path=[asset], partitions=partitions)["assetOrError"]
        return [
            {
                "runId": event["runId"],
                "partition": event["partition"],
                **{entry["label"]: entry["intValue"] for entry in event["metadataEntries"] if "intValue" in entry},
            }
            for event in answer["assetMaterializations"]
        ]


@contextmanager
def beside_location(
    file: Path,
    folder: Path,
    environment: Mapping[str, str],
    name: str = "probe",
    adapt: Callable[[str], str] = lambda text: text,
    projects_own: bool = False,
) -> Iterator[DagsterDev]:
    """`dagster dev` as the project configures it, with another code location, until the end of the block.

    Args:
        file: defines the location.
        folder: where it is started; it is made.
        environment: its variables, beside PATH and LANG.
        name: of the location.
        adapt: gets the text of the project's dagster.yaml, and returns what is used instead.
        projects_own: whether the project's code location is loaded, too; each takes two processes more.
    """
    folder.mkdir()
    (folder / "dagster.yaml").write_text(adapt((ROOT / "dagster.yaml").read_text()))
    listed = (ROOT / "workspace.yaml").read_text() if projects_own else "load_from:\n"
    listed += f"  - python_file: {{relative_path: {file}, location_name: {name}}}\n"
    (folder / "workspace.yaml").write_text(listed)
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    server = DagsterDev(folder, {**kept, **environment})
    try:
        server.start()
        yield server
    finally:
        server.stop()
