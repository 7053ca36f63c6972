"""Files: sent and fetched in pieces."""

import hashlib
import os

from .disk import RequestError, inode_of, open_locked

CHUNK = 1 << 18


def hash_of(path):
    found = hashlib.sha256()
    with open(path, "rb") as file:
        for data in iter(lambda: file.read(CHUNK), b""):
            found.update(data)
    return found.hexdigest()


# Requests


def part_of(ask):
    path = ask["path"]
    return path, "%s.%s.part" % (path, ask["sha256"][:16])


def put(_, ask, __):
    """Write the next bytes of a file that a client sends, from `at` on; return how many there are.

    A request without bytes asks only for that; a whole file counts only with the right content. The last bytes give the
    file its name.
    """
    path, part = part_of(ask)
    data = ask.get("data", b"")
    if not data and inode_of(path) and os.path.getsize(path) == ask["bytes"] and hash_of(path) == ask["sha256"]:
        return {"at": ask["bytes"]}
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    with os.fdopen(open_locked(part, 0 if data else os.O_CREAT), "r+b") as file:  # two clients may send the same one
        at = file.seek(0, os.SEEK_END)
        if data and at != ask["at"]:
            raise RequestError("temporary", "%s: a piece does not follow the one before" % path)
        file.write(data)
        file.flush()
        at += len(data)
        return complete(file, ask) if at >= ask["bytes"] else {"at": at}


def complete(file, ask):
    """Give a file that was sent to its end its name; it is sent anew if it is not what the client has."""
    path, part = part_of(ask)
    os.fsync(file.fileno())
    if hash_of(part) != ask["sha256"]:
        os.unlink(part)
        raise RequestError("temporary", "%s did not arrive as it was sent" % path)
    os.rename(part, path)
    return {"at": ask["bytes"]}


def get(_, ask, say):
    """Send a file from an offset on, then the hash of the whole; bytes that are appended meanwhile do not count."""
    path, at = ask["path"], ask["at"]
    found, done = hashlib.sha256(), 0
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            while done < size:
                data = file.read(min(CHUNK, size - done))
                if not data:
                    raise RequestError("temporary", "%s has become shorter" % path)
                found.update(data)
                done += len(data)
                new = data[-(done - at) :] if done > at else b""
                if new:
                    say(new, file=path)
    except FileNotFoundError as error:
        raise RequestError("refused", "%s: %s" % (path, error.strerror))
    return {"sha256": found.hexdigest(), "bytes": size}
