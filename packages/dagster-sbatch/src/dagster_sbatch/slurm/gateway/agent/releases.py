"""What production runs, which environments exist, and which of them are removed."""

import json
import os
import time

from .building import HERE, PACKAGES, drop, is_whole, locked, refuse_changeable, remove_sealed
from .disk import RequestError, inode_of, load, names_in, read, status_of, store

PUBLISHED = "published.json"
NEEDED = ("name", "kind", "python", "workloads", "asked", "lock", "code", "interpreter", "layer")  # of HERE
GRACE = 3600.0  # seconds in which a run may have found an environment, and not have submitted its job yet


def history(folder):
    """Return what production has run, the latest last: in `groups`, the name of an environment for each group."""
    refuse_changeable(folder)
    path = os.path.join(folder, PUBLISHED)
    try:
        entries = json.loads(read(path).decode() or '{"history": []}')["history"]
        return [entry for entry in entries if "groups" in entry and "at" in entry]
    except (ValueError, KeyError, TypeError):
        text = "%s cannot be read: it is damaged. Remove it, then publish again with scripts/deploy_environment.py:\n"
        raise RequestError("refused", (text + "  rm '%s'") % (path, path))


def refuse_lost(folder, names):
    """Refuse a request that needs environments of which one does not exist any more."""
    for name in names:
        if not is_whole(os.path.join(folder, name), HERE):
            raise RequestError("refused", "environment %s does not exist (any more)" % name)


def keep(folder, entries):
    store(os.path.join(folder, PUBLISHED), {"history": entries})


def environments(folder):
    """Generate the content of each environment, and when it was used last."""
    for name in sorted(names_in(folder)):
        content = load(os.path.join(folder, name, HERE), *NEEDED) if not name.endswith((".new", ".old")) else None
        status = status_of(os.path.join(folder, name)) if content else None
        if status:
            yield content, status.st_mtime


def idle(folder):
    """Return the names of what lies in a folder, if there is one, and was not used lately."""
    names = [name for name in names_in(folder) if not name.endswith(".old")]
    found = [(name, status_of(os.path.join(folder, name))) for name in names]
    return [name for name, status in found if status and time.time() - status.st_mtime > GRACE]


def remove_unused(folder):
    """Remove the packages and wheels that no environment needs."""
    layers = {content["layer"] for content, _ in environments(folder)}
    packages, wheels = os.path.join(folder, "packages"), os.path.join(folder, "wheels")
    for layer in idle(packages):
        if layer not in layers:
            drop(os.path.join(packages, layer))
    needed = set()
    for layer in filter(None, layers):
        listed = load(os.path.join(packages, layer, PACKAGES), "wheels") or {"wheels": []}
        needed.update(place.split("/")[0] for place in listed["wheels"])
    for name in idle(wheels):
        if name not in needed:
            remove_sealed(os.path.join(wheels, name))


# Requests


def published(_, ask, __):
    """Return what production runs for a group, and the record of its publication; None if nothing was published."""
    entries = history(ask["folder"])
    name = entries[-1]["groups"].get(ask["group"]) if entries else None
    if not name:
        return {"environment": None}
    path = os.path.join(ask["folder"], name)
    content = load(os.path.join(path, HERE), *NEEDED)
    layer = content and content["layer"]
    packages = os.path.join(ask["folder"], "packages", layer or "")
    if not content or not is_whole(path, HERE) or (layer and not is_whole(packages, PACKAGES)):
        text = "%s was published and is not whole any more: it, %s or its packages were removed. Publish again:\n%s"
        raise RequestError("refused", text % (path, HERE, "scripts/deploy_environment.py"))
    if not inode_of(content["python"]):
        text = "%s leads to a Python that was removed from %s. Publish again:\nscripts/deploy_environment.py"
        raise RequestError("refused", text % (content["python"], os.uname()[1]))
    return {"environment": content, "entry": entries[-1]}


def publish(_, ask, say):
    """Let production run some environments from now on, one for each group."""
    folder, groups = ask["folder"], ask["groups"]
    with locked(folder, say):
        entries = history(folder)
        refuse_lost(folder, groups.values())
        new = not entries or entries[-1]["groups"] != groups
        if new:
            keep(folder, entries + [dict(ask["about"], groups=groups, at=time.time())])
    return {"new": new}


def roll_back(_, ask, say):
    """Let production run the environments before these ones again."""
    folder = ask["folder"]
    with locked(folder, say):
        entries = history(folder)
        if len(entries) < 2:
            raise RequestError("refused", "there was only one publication, so there is nothing to go back to")
        before = entries[-2]
        refuse_lost(folder, before["groups"].values())
        keep(folder, entries[:-1])
    return {"entry": before}


def inventory(_, ask, __):
    """Return every environment with the time of its last use, and what was published before and is published now."""
    entries = history(ask["folder"])
    rows = [{"environment": content, "used": used} for content, used in environments(ask["folder"])]
    return {"found": rows, "published": [entry["groups"] for entry in ([{"groups": {}}] * 2 + entries)[-2:]]}


def remove(_, ask, say):
    """Remove some environments, then packages and wheels that no other needs."""
    folder, removed = ask["folder"], []
    with locked(folder, say):
        entries = history(folder)[-2:]  # the current one, and the one to go back to
        kept = {name for entry in entries for name in entry["groups"].values()}
        for content, used in list(environments(folder)):
            name = content["name"]
            if name in ask["names"] and name not in kept and time.time() - used > GRACE:
                drop(os.path.join(folder, name))
                removed.append(name)
        remove_unused(folder)
    return {"removed": removed}
