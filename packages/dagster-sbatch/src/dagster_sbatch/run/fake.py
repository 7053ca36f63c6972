"""A `compute` for unit tests: it checks what an asset asks for, runs nothing, and reports what the test says."""

import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import dagster as dg
from dagster_pipes import PipesMessage
from pydantic import Field

from dagster_sbatch.run.array import PARTITION_KEYS
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.run.local import Ended
from dagster_sbatch.run.local_run import run_here
from dagster_sbatch.run.pipes import Streams
from dagster_sbatch.run.plan import Plan
from dagster_sbatch.run.results import make_message
from dagster_sbatch.settings import Settings


@dataclass(frozen=True)
class FakeCall:
    """One call of `compute.run`."""

    plan: Plan  # the workload, the launcher, the request as Slurm would get it (`plan.allocation.request`), and `env`

    @property
    def extras(self) -> Mapping[str, Any]:
        """The extras as the asset passed them."""
        return {name: value for name, value in self.plan.extras.items() if name != PARTITION_KEYS}


_calls: dict[str, list[FakeCall]] = {}


class FakeCompute(ComputeResource):
    """Stands in for `compute`. It reads neither settings nor dotenv files, and connects to nothing.

    Example:
        compute = FakeCompute(site_overrides=SUPERCOMPUTER_SITE_OVERRIDES, metadata={"rows": 3})
        result = dg.materialize([counts], resources={"compute": compute}, partition_key="2013-01")
        assert compute.calls[0].plan.allocation.request.cpus_per_task == 2
    """

    metadata: dict[str, Any] = Field({}, description="What each workload reports on each of its assets.")
    failed_checks: list[str] = Field([], description="Names of declared asset checks that do not pass; all others do.")
    name: str = Field(
        "", description="Identifies this object. Dagster copies resources; all copies record the same calls."
    )

    def __init__(self, **fields: Any) -> None:
        super().__init__(**{"name": uuid.uuid4().hex, **fields})

    @property
    def calls(self) -> list[FakeCall]:
        """The calls so far, the first one first."""
        return _calls.setdefault(self.name, [])

    def _settings(self) -> Settings:
        return Settings.model_construct()

    def _execute(
        self,
        context: dg.OpExecutionContext,
        name: str,
        settings: Settings,  # noqa: ARG002
        plan: Plan,
    ) -> dg.PipesClientCompletedInvocation:
        """Record the call, and report as a workload would, or as each task of the array."""
        self.calls.append(FakeCall(plan))

        def report(_: str, streams: Streams, __: threading.Event, turn: AbstractContextManager[Any]) -> Ended:
            with turn:
                for message in self._reports(context):
                    streams.messages.receive(message)
            return Ended(0, 0.0)

        return run_here(context, name, plan, report, {})

    def _reports(self, step: dg.OpExecutionContext) -> Iterator[PipesMessage]:
        """Yield the messages of a workload."""
        yield make_message("opened", {"extras": {}})
        for key in step.selected_asset_keys:
            params = {"asset_key": key.to_escaped_user_string(), "data_version": None, "metadata": self.metadata}
            yield make_message("report_asset_materialization", params)
        for check in step.selected_asset_check_keys:
            named = {"asset_key": check.asset_key.to_escaped_user_string(), "check_name": check.name}
            passed = check.name not in self.failed_checks
            yield make_message("report_asset_check", {**named, "passed": passed, "severity": "ERROR", "metadata": {}})
        yield make_message("closed", {})
