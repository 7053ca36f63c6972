"""What is there: what production runs, what else lies there, and what may go."""

import json
import os
import time

from dagster_sbatch.slurm.gateway.agent.disk import load, read, store

from .files import HERE, Refused, drop, locked, remove_tree, touch

PUBLISHED = "published.json"
NEEDED = ("name", "kind", "python", "workloads", "asked", "lock", "code", "interpreter", "layer")  # of HERE
GRACE = 3600.0  # seconds in which a run may have looked, and not be submitted yet


def history(folder):
    """Return what production has run, the latest last."""
    path = os.path.join(folder, PUBLISHED)
    try:
        found = json.loads(read(path).decode() or "[]")
        entries = found["history"] if isinstance(found, dict) else found
        return [entry for entry in entries if "name" in entry and "at" in entry]
    except (ValueError, KeyError, TypeError):
        raise Refused(
            "%s cannot be read: it is damaged. Remove it, then publish again with scripts/deploy_environment.py:\n"
            "  rm '%s'" % (path, path)
        )


def published(ask):
    """The environment that production runs, as it was made, and what was said when it was published; none yet: None."""
    entries = history(ask["folder"])
    if not entries:
        return {"environment": None}
    path = os.path.join(ask["folder"], entries[-1]["name"])
    content = load(os.path.join(path, HERE), *NEEDED)
    if not touch(path) or not content:
        raise Refused("%s was published and is not there any more, or its %s cannot be read" % (path, HERE))
    return {"environment": content, "entry": entries[-1]}


def announce(ask):
    """Let production run an environment from now on."""
    with locked(ask["folder"]):
        entries = history(ask["folder"])
        if not touch(os.path.join(ask["folder"], ask["name"])):
            raise Refused("there is no environment %s" % ask["name"])
        new = not entries or entries[-1]["name"] != ask["name"]
        if new:
            keep(ask["folder"], entries + [dict(ask["about"], name=ask["name"], at=time.time())])
    return {"new": new}


def keep(folder, entries):
    store(os.path.join(folder, PUBLISHED), {"history": entries})


def roll_back(ask):
    """Let production run the environment before this one again."""
    with locked(ask["folder"]):
        entries = history(ask["folder"])
        if len(entries) < 2:
            raise Refused("nothing was published before what is now: there is nothing to go back to")
        before = entries[-2]
        if not touch(os.path.join(ask["folder"], before["name"])):
            raise Refused("environment %s, the one before, is not there any more" % before["name"])
        keep(ask["folder"], entries[:-1])
    return {"entry": before}


def environments(folder):
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        content = load(os.path.join(folder, name, HERE), *NEEDED) if not name.endswith((".new", ".old")) else None
        if content:
            yield content, os.stat(os.path.join(folder, name)).st_mtime


def inventory(ask):
    """Every environment, and when it was used last; the names of those that were published, the latest last."""
    entries = history(ask["folder"])
    rows = [{"environment": content, "used": used} for content, used in environments(ask["folder"])]
    return {"found": rows, "published": [entry["name"] for entry in entries]}


def remove(ask):
    """Remove some environments, then packages and wheels that no other needs."""
    folder, removed = ask["folder"], []
    with locked(folder):
        kept = [entry["name"] for entry in history(folder)][-2:]  # now, and to go back to
        for content, used in list(environments(folder)):
            name = content["name"]
            if name in ask["names"] and name not in kept and time.time() - used > GRACE:
                drop(os.path.join(folder, name))
                removed.append(name)
        layers = {content["layer"] for content, _ in environments(folder)}
        packages, wheels = os.path.join(folder, "packages"), os.path.join(folder, "wheels")
        for layer in os.listdir(packages) if removed and os.path.isdir(packages) else ():
            if layer not in layers:
                drop(os.path.join(packages, layer))
        needed = {place.split("/")[0] for layer in layers if layer for place in needs(packages, layer)}
        for name in os.listdir(wheels) if removed and os.path.isdir(wheels) else ():
            if name not in needed and time.time() - os.stat(os.path.join(wheels, name)).st_mtime > GRACE:
                remove_tree(os.path.join(wheels, name))
    return {"removed": removed}


def needs(packages, layer):
    return (load(os.path.join(packages, layer, "packages.json"), "wheels") or {"wheels": []})["wheels"]
