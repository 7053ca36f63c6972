"""Who acts on a family of runs, and cleaning up where nobody does.

A claim is a lock on a file beside the runs, held by an agent and gone with it.
"""

import json
import os
import threading
import time

from .disk import lock, own, parse, read
from .files import remove_tree
from .runs import DAY, checked, has, latest, others

LOOK = 0.5  # seconds between looks whether this client's earlier agent has left

HELD = {}  # by path: the locks that this agent holds, as long as it lives


def take(path, holder):
    """Lock a file and write the holder into it, unless another has it; whether that worked."""
    while True:
        file = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            lock(file, path, wait=False)
            if os.path.exists(path) and os.path.samestat(os.fstat(file), os.stat(path)):
                text = json.dumps(holder).encode()
                if read(path) != text:  # a client that is back writes nothing: the disk may be full by now
                    os.pwrite(file, text.ljust(os.fstat(file).st_size), 0)
                    os.ftruncate(file, len(text))
                HELD[path] = file
                return True
        except BlockingIOError:
            os.close(file)
            return False
        except OSError:
            os.close(file)
            raise
        os.close(file)  # it was cleaned up in between


def holder_of(path):
    """Return who has it, as far as that is written yet."""
    return parse(read(path), "token", "who") or {}


def succeed(path, mine, say):
    """Take over from this client's earlier agent when that has left; tell the client if somebody else was faster."""
    while not take(path, mine):
        there = holder_of(path)
        if there and there["token"] != mine["token"]:
            say(held=there["who"])
            return
        time.sleep(LOOK)


# Requests


def hold(ask, say):
    """Make the client the one that acts on a family of runs, or tell who does.

    A client that has lost its connection has an agent here that does not know it yet: the same token is let in beside
    it, and takes over from it.
    """
    folder, family = ask["runs"], checked(ask["family"])
    own(folder)
    path, mine = os.path.join(folder, family + ".holder"), {"token": ask["token"], "who": ask["who"]}
    if path in HELD or take(path, mine):
        return {}
    there = holder_of(path)
    if there.get("token") != mine["token"]:
        return {"held": there.get("who", "somebody")}
    threading.Thread(target=succeed, args=(path, mine, say), daemon=True).start()
    return {}


def claim(ask, say):
    """The same, and the state of the latest attempt; `runs` and `data_root` are answered as absolute paths."""
    held = hold(ask, say)
    if held:
        return held
    folder = ask["runs"]
    found = latest(folder, ask["family"])
    found["others"] = others(folder, ask["family"], ask.get("related", ()))
    return dict(found, runs=folder, data_root=ask.get("data_root", ""))


def clean(ask, _):
    """Remove the runs of some names, if they are over, and what was begun and never finished."""
    folder, cleaned = ask["runs"], []
    names = os.listdir(folder) if os.path.isdir(folder) else []
    for name in names:
        path = os.path.join(folder, name)
        if name.endswith((".new", ".old")):
            if time.time() - os.stat(path).st_mtime > DAY:
                remove_tree(path)
        elif name in ask["names"] and has(path, "end"):
            os.rename(path, path + ".old")
            remove_tree(path + ".old")
            cleaned.append(name)
    left = {name.rpartition("-")[0] for name in os.listdir(folder)} if names else ()
    for name in names:
        path = os.path.join(folder, name)
        if name.endswith(".holder") and name[: -len(".holder")] not in left and take(path, {}):
            os.unlink(path)
            os.close(HELD.pop(path))
    return {"cleaned": cleaned}
