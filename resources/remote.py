"""A workload on the supercomputer, as its Dagster step sees it: claim, submit or adopt, follow to the end, judge."""

import os
import signal
import socket
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from resources.auth import AccessError, ensure_certificate
from resources.environments import Environments, RunEnvironment
from resources.errors import ConfigurationError
from resources.interrupts import run_interruptibly
from resources.pipes import MessageGuard, Session, explain_failure, failure, open_session
from resources.plan import Plan
from resources.settings import Settings
from resources.slurm import accounting
from resources.slurm.gateway import (
    Claim,
    Gateway,
    JobEnd,
    JobState,
    LostClaimError,
    RefusedError,
    StoppedError,
    Submitted,
    choose_channel,
)
from resources.slurm.outcome import explain_refusal, judge
from resources.ssh import SshError
from resources.submission import CONTEXT, MESSAGES, About, Place, family_of, files_of

HOLDER_SECONDS = 5.0
"""Between looks whether another step that acts on the same runs is gone."""
LIFE_SECONDS = 10.0
"""Between looks whether Dagster still counts this run among the living."""
CANCEL_SECONDS = 170.0
"""For cancelling a job; `cancel_timeout_seconds` of dagster.yaml is a little longer."""
MOST_RETRIES = 3
"""After what the machine did: a node that failed, a job that was preempted."""
RETRY_SECONDS = 10


class RemoteRun:
    """One call of `compute.run` on the supercomputer."""

    def __init__(
        self, context: dg.AssetExecutionContext, asset: str, settings: Settings, plan: Plan, call: int
    ) -> None:
        """`call`: which of the step's calls it is."""
        self._context, self._asset, self._settings, self._plan = context, asset, settings, plan
        partitions = list(context.partition_keys) if _is_partitioned(context) else []
        root = context.run.root_run_id or context.run_id
        keys = [key.to_user_string() for key in context.selected_asset_keys]
        self._family = family_of(root, keys, partitions, call)
        ends = sorted({*partitions[:1], *partitions[-1:]})
        self._about = About(run=context.run_id, root=root, asset=asset, partitions=" to ".join(ends))
        self._run: str | None = None
        self._job: str | None = None
        self._trouble: str | None = None
        self._project: str | None = None
        self._state: list[str] = []

    def run(self, extras: Mapping[str, Any], env: Mapping[str, str]) -> dg.PipesClientCompletedInvocation:
        """Run it to its end; see `ComputeResource.run`."""
        return run_interruptibly(lambda stop: self._work(stop, extras, env))

    def _work(
        self, stop: threading.Event, extras: Mapping[str, Any], env: Mapping[str, str]
    ) -> dg.PipesClientCompletedInvocation:
        site = self._plan.site
        channel = choose_channel(self._settings, site.python_candidates, ensure_certificate, site.host_authorities)
        gateway = Gateway(channel, stop, self._tell_trouble)
        environments = Environments(gateway, str(self._settings.deployment_base_path), self._plan.site)
        environment = RunEnvironment(environments, self._settings, self._plan.workload)
        try:
            with _watching(self._context, stop):
                environment.ask_ahead()
                claim = self._claim(gateway)
                return self._follow(gateway, claim, environment, extras, env)
        except StoppedError:
            raise self._end(gateway) from None
        except LostClaimError as error:
            raise self._failure(f"while this step was cut off, {error} took the run over and follows it") from None
        except RefusedError as error:
            raise self._failure(f"refused on the supercomputer: {self._explain(gateway, error)}") from None
        except (AccessError, SshError, ConfigurationError) as error:
            raise self._failure(f"{error}{self._goes_on}") from None
        finally:
            gateway.close()

    # To the job

    def _claim(self, gateway: Gateway) -> Claim:
        """Wait until nobody else acts on the runs of this step."""
        runs = f"{self._settings.deployment_base_path}/runs"
        token = uuid.uuid4().hex
        who = f"run {self._context.run_id}, process {os.getpid()} on {socket.gethostname()}"
        told = None
        while True:
            claim = gateway.claim(runs, self._family, token, who)
            if claim.held_by is None:
                return claim
            if told != claim.held_by:
                told = claim.held_by
                self._context.log.warning(f"{told} is at work on the same; waiting for its end")
            if gateway.stop.wait(HOLDER_SECONDS):
                raise StoppedError

    def _choose(self, claim: Claim) -> tuple[int, bool]:
        """The number of the attempt, and whether it is there already."""
        self._job = claim.job
        if claim.attempt and not claim.over:
            self._context.log.info(
                f"job {claim.job or '(just submitted)'} is on its way since an earlier run of this step: following it"
            )
            return claim.attempt, True
        end = claim.end
        if not claim.judged and end and end.code == 0 and end.state in ("COMPLETED", ""):
            self._context.log.info(f"job {claim.job} of an earlier run of this step ended well: taking its result")
            return claim.attempt, True
        self._job = None
        return claim.attempt + 1, False

    # With the job

    def _follow(
        self,
        gateway: Gateway,
        claim: Claim,
        environment: RunEnvironment,
        extras: Mapping[str, Any],
        env: Mapping[str, str],
    ) -> dg.PipesClientCompletedInvocation:
        attempt, adopt = self._choose(claim)
        self._run = run = f"{claim.runs}/{self._family}-{attempt}"
        place = None if adopt else self._place(environment, claim, run)
        with open_session(self._context, extras, f"{run}/{CONTEXT}", f"{run}/{MESSAGES}") as session:
            text = session.context_document.text
            files = files_of(self._plan, place, self._about, env, text) if place else None
            messages = MessageGuard()
            sinks = {
                MESSAGES: lambda data: messages.take(lambda: session.messages.feed(data)),
                "stdout": session.stdout.feed,
                "stderr": session.stderr.feed,
            }
            end = gateway.run(run, files, sinks, self._tell_submitted, self._tell_state)
            messages.take(session.reader.hand_over)
        self._tell_project(end.account)
        try:
            self._check(session, messages, end)
        except (dg.Failure, dg.RetryRequested):
            gateway.judged(run, well=False)
            raise
        gateway.judged(run, well=True)
        return dg.PipesClientCompletedInvocation(session.pipes, metadata=self._metadata(end))

    def _place(self, environment: RunEnvironment, claim: Claim, run: str) -> Place:
        """Where a new job finds what it needs. Its environment is made if it is not there, and if that is allowed."""
        found = environment.find(self._context.log.info)
        self._about = replace(self._about, environment=found.name)
        return Place(run, found.python, found.workloads, _data_root(self._settings, claim.home))

    def _check(self, session: Session, messages: "MessageGuard", end: JobEnd) -> None:
        """Raise what did not end well."""
        request, workload = self._plan.allocation.request, self._plan.workload
        outcome = judge(end, request)
        cause = outcome.cause if outcome else None
        if not cause and messages.error:
            cause = f"what {workload.name} reported could not be taken: {messages.error}"
        cause = cause or explain_failure(session, _exit_code(end), workload.name)
        if cause:
            error = self._failure(cause, stderr=session.stderr.tail, **self._metadata(end))
            if outcome and outcome.again and self._context.retry_number < MOST_RETRIES:
                self._context.log.warning(f"{cause}; another attempt follows")
                raise dg.RetryRequested(MOST_RETRIES, RETRY_SECONDS) from error
            raise error
        if not end.state:
            self._context.log.warning("Slurm does not know the job any more: its own record of its end is relied upon")
        if end.short:
            lost = ", ".join(f"{name} from byte {size} on" for name, size in end.short.items())
            self._context.log.warning(f"not all of the job's output arrived: {lost}; it is in {self._run}")

    # Without the job

    def _end(self, gateway: Gateway) -> dg.Failure:
        """After a stop: cancel what a user has terminated, leave what Dagster was only cut off from."""
        run = self._context.instance.get_run_by_id(self._context.run_id)
        wanted = run is None or run.status in (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED)
        if self._run is None:
            return self._failure("stopped before there was a job")
        if not wanted:
            self._context.log.info(f"stopped{self._goes_on}")
            return self._failure(f"Dagster has ended this run while its step lived on{self._goes_on}")
        gateway.stop = threading.Event()
        limit = threading.Timer(CANCEL_SECONDS, gateway.stop.set)
        limit.start()
        try:
            end = gateway.cancel(self._run)
        except (RefusedError, StoppedError, LostClaimError, AccessError, SshError) as error:
            text = f"job {self._job} could not be cancelled: {error or 'the login node cannot be reached'}"
            self._context.log.error(text)
            return self._failure(text)
        finally:
            limit.cancel()
        text = f"job {self._job} is over: {end.state}" if end else "nothing was submitted"
        self._context.log.info(f"terminated; {text}")
        return self._failure(f"terminated; {text}")

    # Words

    def _tell_submitted(self, submitted: Submitted) -> None:
        self._job = submitted.job
        self._context.log.info(f"job {submitted.job} ({submitted.how}) in {self._run}; to look at it: {self._attach}")
        for shown, command in self._plan.launcher.hints(submitted.job).items():
            self._context.log.info(f"{shown}, while it runs: {command}")

    def _explain(self, gateway: Gateway, error: RefusedError) -> str:
        try:
            return explain_refusal(str(error), self._plan.allocation.request, gateway.projects)
        except (RefusedError, StoppedError, AccessError, SshError):  # the refusal itself is what counts
            return str(error)

    def _tell_project(self, account: str) -> None:
        if account and account != self._project:
            self._project = account
            self._context.log.info(f"job {self._job} is charged to project {account}")

    def _tell_state(self, state: JobState) -> None:
        self._tell_project(state.account)
        words = [state.state]
        if state.reason != "None":
            words.append(state.reason)
        if state.start and state.state == "PENDING":
            words.append(f"expected to start at {datetime.fromtimestamp(state.start, UTC):%Y-%m-%d %H:%M:%S} UTC")
        if words != self._state:
            self._state = words
            self._context.log.info(f"job {self._job or '(just submitted)'}: {', '.join(words)}")

    def _tell_trouble(self, text: str) -> None:
        if text != self._trouble:
            self._trouble = text
            self._context.log.warning(f"{self._settings.edge_node_host}: {text}; trying again{self._goes_on}")

    @property
    def _goes_on(self) -> str:
        """What to know about the job when nobody looks at it."""
        return f"; job {self._job} goes on, and the next attempt of this step with it" if self._job else ""

    @property
    def _attach(self) -> str:
        command = f"srun --jobid={self._job} --overlap --pty bash"
        if self._settings.on_login_node:
            return command
        return f"ssh -t {self._settings.edge_node_user}@{self._settings.edge_node_host} {command}"

    def _metadata(self, end: JobEnd) -> dict[str, Any]:
        request = self._plan.allocation.request
        where = {"job_id": int(self._job or 0), "run_directory": self._run, "attach": self._attach}
        where |= self._plan.launcher.hints(self._job or "")
        slurm = {"partition": request.partition, "qos": request.qos, "account": end.account or None}
        slurm["workload"] = str(self._plan.workload)
        numbers = accounting.count(end, request)
        return {name: value for name, value in {**where, **slurm, **numbers}.items() if value is not None}

    def _failure(self, cause: str, stderr: str = "", **details: Any) -> dg.Failure:
        if self._run:
            cause += f"\n\nRun directory on {self._settings.edge_node_host}: {self._run}"
        return failure(self._asset, cause, stderr, **details)


@contextmanager
def _watching(context: dg.AssetExecutionContext, stop: threading.Event) -> Iterator[None]:
    """Set `stop` when Dagster takes the run for ended, though the step lives: nobody would look at what it does."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(LIFE_SECONDS):
            run = context.instance.get_run_by_id(context.run_id)
            if run is None or run.is_finished:
                stop.set()
                return

    watcher = threading.Thread(target=watch, name="run watcher", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _exit_code(end: JobEnd) -> int:
    """As in `subprocess`: the shell's 128 + N, where a signal N has ended the workload, becomes -N."""
    code = end.code or 0
    return 128 - code if code - 128 in set(signal.Signals) else code


def _is_partitioned(context: dg.AssetExecutionContext) -> bool:
    return bool(context.has_partition_key or context.has_partition_key_range)


def _data_root(settings: Settings, home: str) -> str:
    """DATA_ROOT as the job sees it; `home` is the user's there."""
    root = settings.data_root or f"{settings.deployment_base_path}/data"
    if root.startswith("~/"):
        return home + root[1:]
    if not root.startswith("/"):
        raise ConfigurationError(f"DATA_ROOT={root!r} is not an absolute path, as it has to be on a supercomputer")
    return root
