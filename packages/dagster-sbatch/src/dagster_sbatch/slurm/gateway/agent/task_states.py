"""Slurm's view of an array job's tasks, by index. Waiting tasks share a record; cancelled ones may have none."""

import re

OVER = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT".split()
)
RANGE = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?")


def indices(text):
    """Return the indices in a text of Slurm, such as `3`, `[2-9,12%4]` or `0-8:2`."""
    found = set()
    for first, last, step in RANGE.findall(text.partition("%")[0]):
        found.update(range(int(first), int(last or first) + 1, int(step or 1)))
    return found


def ranges(found):
    """Return indices as such a text."""
    parts, first, last = [], None, None
    for index in sorted(found) + [None]:
        if first is not None and index == last + 1:
            last = index
            continue
        if first is not None:
            parts.append(str(first) if first == last else "%d-%d" % (first, last))
        first = last = index
    return ",".join(parts)


def by_job(rows):
    """Return squeue's rows (id, state, reason, start, key of the run, account) by job, without the id.

    The rows of an array job become one: its state is RUNNING as long as a task runs, its reason that of the waiting
    tasks. It ends with the indices of the tasks that are not over, by state.
    """
    jobs, arrays = {}, {}
    for name, *row in rows:
        job, array, text = name.partition("_")
        if array:
            arrays.setdefault(job, []).append((indices(text), row))
        else:
            jobs[job] = row
    for job, tasks in arrays.items():
        active = {}
        for numbers, row in tasks:
            if row[0] not in OVER:
                active.setdefault(row[0], set()).update(numbers)
        waiting = [row for _, row in tasks if row[0] == "PENDING"]
        running = [row for _, row in tasks if row[0] not in OVER and row[0] != "PENDING"]
        state, reason, start, *rest = (running or waiting or [tasks[-1][1]])[0]
        if waiting:
            reason, start = waiting[0][1:3]
        jobs[job] = [state, reason, start] + rest + [{name: ranges(numbers) for name, numbers in active.items()}]
    return jobs
