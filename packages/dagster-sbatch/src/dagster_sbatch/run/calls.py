"""The calls of `compute.run` of one step, and the names of their jobs, in whatever order threads make the calls."""

import re
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import dagster as dg

from dagster_sbatch.run.digests import digest_of

LONGEST_NAME = 40  # characters of a step's key in the names of its jobs


@dataclass(frozen=True)
class StepName:
    """What identifies a step in all runs of its job.

    Dagster divides a multi-asset into ops by the assets that a run selects, and numbers them. So the number in the key
    of a step may differ between runs.
    """

    key: str  # Dagster's key of the step: the path of its op, and the mapping key of a dynamic output
    assets: Collection[str]  # keys of its assets

    @classmethod
    def of(cls, context: dg.OpExecutionContext) -> "StepName":
        """Return the name of a step in its own run."""
        mapping = context.get_mapping_key()
        key = f"{context.op_handle}[{mapping}]" if mapping else str(context.op_handle)
        return cls(key, {key.to_user_string() for key in context.selected_asset_keys})

    def find_key(self, planned: Iterable[tuple[str, str]]) -> str:
        """Return Dagster's key of the step in a run; `planned` has steps of that run, each with an asset."""
        own, *rest = re.split(r"(?=[.\[])", self.key, maxsplit=1)
        ops = sorted({re.split(r"[.\[]", step, maxsplit=1)[0] for step, asset in planned if asset in self.assets})
        return self.key if not ops or own in ops else "".join([ops[0], *rest])


def step_prefix(root: str, step: str) -> str:
    """Return the beginning of the submission keys of a step, in the run `root`, its retries and its re-executions."""
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", step)[:LONGEST_NAME].strip("-_")
    return f"{slug or 'step'}-{digest_of([root, step], 10)}"


@dataclass(frozen=True)
class Call:
    """One call of `compute.run`."""

    step: "StepCalls"  # all calls of its step
    # First part of the submission keys of its attempts. Equal calls have different families; the order does not matter
    family: str
    number: int  # how many calls of the step began before it


class StepCalls:
    """The calls that one execution of a step has made so far, in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._twins: Counter[str] = Counter()
        self._families: set[str] = set()
        self._preparing = 0

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Mark, while this context lasts, that a call is prepared: the job that it may adopt is not known yet."""
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
