"""The calls of `compute.run` of one step: each has a name of its own, whatever the order in which threads make them."""

import threading
from collections import Counter
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import dagster as dg

from dagster_sbatch.run.submission import family_of


class StepCalls:
    """The calls that one execution of a step has made so far, in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._twins: Counter[str] = Counter()
        self._families: set[str] = set()

    def begin(self, root: str, step: str, digest: str) -> "Call":
        """Register a call.

        Args:
            root: id of the first run of which this one is a retry or a re-execution.
            step: Dagster's key of the step.
            digest: of everything that decides the call's result.
        """
        with self._lock:
            number = self._twins.total()
            family = family_of(root, step, digest, self._twins[digest])
            self._twins[digest] += 1
            self._families.add(family)
        return Call(self, family, number)

    @property
    def begun(self) -> int:
        """The number of calls so far."""
        return self._twins.total()

    def claim_once(self, family: str) -> bool:
        """Register a family of attempts for one call to act on; False if a call of this step has it already."""
        with self._lock:
            if family in self._families:
                return False
            self._families.add(family)
            return True


@dataclass(frozen=True)
class Call:
    """One call of `compute.run`.

    Attributes:
        step: all calls of its step.
        family: first part of the submission keys of its attempts. Of calls that are equal in everything, each has its
            own; which of them gets which does not matter.
        number: how many calls of the step began before it.
    """

    step: StepCalls
    family: str
    number: int


_steps: "WeakKeyDictionary[dg.OpExecutionContext, StepCalls]" = WeakKeyDictionary()
_lock = threading.Lock()


def calls_of(context: dg.OpExecutionContext) -> StepCalls:
    """Return the calls of a step; a retry of the step in the same process begins with none."""
    with _lock:
        return _steps.setdefault(context, StepCalls())


def step_key(context: dg.OpExecutionContext) -> str:
    """Return Dagster's key of a step: the path of its op, and the mapping key of a dynamic output."""
    mapping = context.get_mapping_key()
    return f"{context.op_handle}[{mapping}]" if mapping else str(context.op_handle)
