"""What is there: what production runs, what else lies there, and what may go."""

import os
import time

from .files import HERE, Refused, drop, load, locked, remove_tree, store, touch

PUBLISHED = "published.json"
GRACE = 3600.0  # seconds in which a run may have looked, and not be submitted yet


def published(ask):
    """The environment that production runs, as it was made, and what was said when it was published; none yet: None."""
    history = load(os.path.join(ask["folder"], PUBLISHED)) or []
    if not history:
        return {"environment": None}
    path = os.path.join(ask["folder"], history[-1]["name"])
    if not touch(path):
        raise Refused("%s was published and is not there any more" % path)
    return {"environment": load(os.path.join(path, HERE)), "entry": history[-1]}


def announce(ask):
    """Let production run an environment from now on."""
    with locked(ask["folder"]):
        path = os.path.join(ask["folder"], PUBLISHED)
        history = load(path) or []
        if not touch(os.path.join(ask["folder"], ask["name"])):
            raise Refused("there is no environment %s" % ask["name"])
        new = not history or history[-1]["name"] != ask["name"]
        if new:
            store(path, history + [dict(ask["about"], name=ask["name"], at=time.time())])
    return {"new": new}


def roll_back(ask):
    """Let production run the environment before this one again."""
    with locked(ask["folder"]):
        path = os.path.join(ask["folder"], PUBLISHED)
        history = load(path) or []
        if len(history) < 2:
            raise Refused("nothing was published before what is now: there is nothing to go back to")
        before = history[-2]
        if not touch(os.path.join(ask["folder"], before["name"])):
            raise Refused("environment %s, the one before, is not there any more" % before["name"])
        store(path, history[:-1])
    return {"entry": before}


def environments(folder):
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        content = load(os.path.join(folder, name, HERE)) if not name.endswith((".new", ".old")) else None
        if content:
            yield content, os.stat(os.path.join(folder, name)).st_mtime


def inventory(ask):
    """Every environment, and when it was used last; the names of those that were published, the latest last."""
    history = load(os.path.join(ask["folder"], PUBLISHED)) or []
    rows = [{"environment": content, "used": used} for content, used in environments(ask["folder"])]
    return {"found": rows, "published": [entry["name"] for entry in history]}


def remove(ask):
    """Remove some environments, then packages and wheels that no other needs."""
    folder, removed = ask["folder"], []
    with locked(folder):
        kept = [entry["name"] for entry in load(os.path.join(folder, PUBLISHED)) or []][-2:]  # now, and to go back to
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
    return load(os.path.join(packages, layer, "packages.json")) or []
