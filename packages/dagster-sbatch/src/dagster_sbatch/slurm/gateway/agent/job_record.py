"""The job's own record: what a job, or a task of an array job, writes about itself in its folder."""

import os
import re

from .disk import parse, read

MESSAGES = "messages.jsonl"
STREAMS = (MESSAGES, "stdout", "stderr")
EVENTS, CAUSE = "events", "cause"
LONGEST_CAUSE = 10000  # characters: Dagster stores it with several events
HALF = re.compile(rb'.+(?=\{"(?:started|code|idle)": )', re.S)
"""Half a record, as a full disk or a node without power leaves it: the next record follows in the same line."""


def events_of(folder):
    """Return the job's own records of its latest start by name; a requeued job starts again.

    started, end  of the job script
    idle          of the sampler: for how many seconds the GPUs have been idle; it writes that once
    """
    events = {}
    for line in read(os.path.join(folder, EVENTS)).split(b"\n")[:-1]:  # the last piece is not a whole line yet
        event = parse(line, "time") or parse(HALF.sub(b"", line), "time") or {}
        if "started" in event:
            events = {"started": event}
        elif "code" in event:
            events["end"] = event
        elif "idle" in event:
            events["idle"] = event
    return events


def node_of(events):
    """Return the first node of the latest start; empty if there was none."""
    return events.get("started", {}).get("started", "")


def cut_short(events):
    """Return whether a job has recorded that it was cut short: Slurm ends it, or runs it again."""
    return "end" in events and events["end"]["code"] is None


def cause_of(folder):
    """Return why the job failed, as something in it has recorded; empty if nothing has. A long text is cut."""
    text = read(os.path.join(folder, CAUSE)).decode(errors="replace").strip()
    more = len(text) - LONGEST_CAUSE
    return text if more <= 0 else "%s\n[... %d characters left out ...]" % (text[:LONGEST_CAUSE], more)
