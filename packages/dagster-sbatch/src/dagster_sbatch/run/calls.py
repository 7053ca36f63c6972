"""The calls of `compute.run` of one step, and the names of their jobs, in whatever order threads make the calls."""

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import dagster as dg

from dagster_sbatch.run.digests import digest_of

LONGEST_NAME = 40
"""Characters of a step's key in the names of its jobs."""


def step_key(context: dg.OpExecutionContext) -> str:
    """Return Dagster's key of a step: the path of its op, and the mapping key of a dynamic output."""
    mapping = context.get_mapping_key()
    return f"{context.op_handle}[{mapping}]" if mapping else str(context.op_handle)


def step_prefix(root: str, step: str) -> str:
    """Return the beginning of the submission keys of a step, in the run `root`, its retries and its re-executions."""
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", step)[:LONGEST_NAME].strip("-_")
    return f"{slug or 'step'}-{digest_of([root, step], 10)}"


@dataclass(frozen=True)
class Call:
    """One call of `compute.run`.

    Attributes:
        step: all calls of its step.
        family: first part of the submission keys of its attempts. Calls that are equal in everything have different
            ones; which call has which does not matter.
        number: how many calls of the step began before it.
    """

    step: "StepCalls"
    family: str
    number: int


class StepCalls:
    """The calls that one execution of a step has made so far, in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._twins: Counter[str] = Counter()
        self._families: set[str] = set()
        self._preparing = 0

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Prepare a call of which it is not known yet which job it may adopt."""
        with self._lock:
            self._preparing += 1
        try:
            yield
        finally:
            with self._lock:
                self._preparing -= 1

    @property
    def are_prepared(self) -> bool:
        """Whether no call is being prepared."""
        return not self._preparing

    def begin(self, root: str, step: str, digest: str) -> Call:
        """Register a call; `root` is the first run, `digest` that of everything that decides the call's result."""
        with self._lock:
            number = self._twins.total()
            family = f"{step_prefix(root, step)}-{digest_of([digest, self._twins[digest]], 10)}"
            self._twins[digest] += 1
            self._families.add(family)
        return Call(self, family, number)

    @property
    def begun(self) -> int:
        """The number of calls so far."""
        return self._twins.total()

    def claim_once(self, family: str) -> bool:
        """Register a family of attempts, or another thing, for one call to act on; False if a call has it already."""
        with self._lock:
            if family in self._families:
                return False
            self._families.add(family)
            return True


_steps: "WeakKeyDictionary[dg.OpExecutionContext, StepCalls]" = WeakKeyDictionary()
_lock = threading.Lock()


def calls_of(context: dg.OpExecutionContext) -> StepCalls:
    """Return the calls of a step; a retry of the step in the same process begins with none."""
    with _lock:
        return _steps.setdefault(context, StepCalls())
