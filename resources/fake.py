"""A `compute` for unit tests: it checks what an asset asks for, runs nothing, and reports what the test says."""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
from dagster_pipes import PIPES_PROTOCOL_VERSION, PipesContextData, PipesMessage
from pydantic import Field

from resources.compute import ComputeResource
from resources.errors import ConfigurationError
from resources.failures import failure
from resources.launchers import Launcher
from resources.plan import Plan, make_plan
from resources.results import StepContext
from resources.settings import Settings
from resources.slurm import SlurmRequest


@dataclass(frozen=True)
class Call:
    """One call of `compute.run`.

    Attributes:
        plan: the workload, the launcher, the request as Slurm would get it (`plan.allocation.request`), and `env`.
        extras: as passed.
    """

    plan: Plan
    extras: Mapping[str, Any]


_calls: dict[str, list[Call]] = {}


class FakeCompute(ComputeResource):
    """Stands in for `compute`. Neither settings nor dotenv files are read, and nothing is connected to.

    Example:
        compute = FakeCompute(site_overrides=SUPERCOMPUTER_SITE_OVERRIDES, metadata={"rows": 3})
        result = dg.materialize([counts], resources={"compute": compute}, partition_key="2013-01")
        assert compute.calls[0].plan.allocation.request.cpus_per_task == 2
    """

    metadata: dict[str, Any] = Field({}, description="What each workload reports of each of its assets.")
    failed_checks: list[str] = Field([], description="Names of declared asset checks that do not pass; all others do.")
    name: str = Field("", description="Tells it from others. Dagster copies resources; the copies have the same calls.")

    def __init__(self, **fields: Any) -> None:
        super().__init__(**{"name": uuid.uuid4().hex, **fields})

    @property
    def calls(self) -> list[Call]:
        """The calls so far, the first one first."""
        return _calls.setdefault(self.name, [])

    def run(
        self,
        context: StepContext | dg.AssetCheckExecutionContext,
        *,
        workload: Path | str,
        launcher: Launcher,
        args: Sequence[str] = (),
        request: SlurmRequest | None = None,
        extras: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> dg.PipesClientCompletedInvocation:
        """Check and note the call, and report as a workload would; see `ComputeResource.run`.

        Raises:
            Failure: `compute.run` would have refused the call.
        """
        step = context.op_execution_context if isinstance(context, dg.AssetCheckExecutionContext) else context
        try:
            wanted = SlurmRequest() if request is None else request
            settings = Settings.model_construct()
            plan = make_plan(settings, self.site_overrides, workload, launcher, wanted, args=args, env=env)
        except ConfigurationError as error:
            raise failure(step.op_def.name, str(error), final=True) from None
        self.calls.append(Call(plan, dict(extras or {})))
        reader = _Direct()
        with dg.open_pipes_session(step, _Nowhere(), reader) as session:
            for method, params in self._reports(step):
                reader.report(method, params)
        return dg.PipesClientCompletedInvocation(session)

    def _reports(self, step: StepContext) -> Iterator[tuple[str, dict[str, Any]]]:
        """What a workload would report: a method of Dagster Pipes and its parameters."""
        metadata = {name: {"raw_value": value, "type": "__infer__"} for name, value in self.metadata.items()}
        for key in step.selected_asset_keys:
            named = {"asset_key": key.to_escaped_user_string()}
            yield "report_asset_materialization", {**named, "data_version": None, "metadata": metadata}
        for check in step.selected_asset_check_keys:
            named = {"asset_key": check.asset_key.to_escaped_user_string(), "check_name": check.name}
            passed = check.name not in self.failed_checks
            yield "report_asset_check", {**named, "passed": passed, "severity": "ERROR", "metadata": {}}


class _Nowhere(dg.PipesContextInjector):
    """No workload reads the context."""

    @contextmanager
    def inject_context(self, context: PipesContextData) -> Iterator[dict[str, Any]]:  # noqa: ARG002
        yield {}

    def no_messages_debug_text(self) -> str:
        return "There is no workload: this is a FakeCompute."


class _Direct(dg.PipesMessageReader):
    """Hands messages to Dagster in this process."""

    def __init__(self) -> None:
        self._handler: dg.PipesMessageHandler | None = None

    @contextmanager
    def read_messages(self, handler: dg.PipesMessageHandler) -> Iterator[dict[str, Any]]:
        self._handler = handler
        self.report("opened", {"extras": {}})
        yield {}
        self.report("closed", {})

    def report(self, method: str, params: Mapping[str, Any]) -> None:
        assert self._handler is not None, "the Pipes session is not open"
        message: PipesMessage = {"__dagster_pipes_version": PIPES_PROTOCOL_VERSION, "method": method, "params": params}
        self._handler.handle_message(message)

    def no_messages_debug_text(self) -> str:
        return "There is no workload: this is a FakeCompute."
