"""Errors of requests; the shared disk: whole files, locks, and folders that nobody else can change.

Every document has a `format`. Readers use what they know of a newer one, and skip one that they cannot read.
"""

import contextlib
import errno
import fcntl
import json
import os
import stat
import threading

FORMAT = 1
# Errors of the file system that repeating the request does not fix.
FINAL = "EACCES EDQUOT EISDIR ELOOP ENAMETOOLONG ENOSPC ENOTDIR EPERM EROFS".split()
# Errors that pass by themselves: a server is away, a node is short of something. All others are `broken`.
PASSING = "EAGAIN EBUSY ECONNREFUSED ECONNRESET EHOSTDOWN EHOSTUNREACH EINTR EIO EMFILE ENETDOWN ENETUNREACH".split()
PASSING += "ENFILE ENOBUFS ENOMEM ENOTCONN EREMOTEIO ESHUTDOWN ESTALE ETIMEDOUT".split()
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class RequestError(Exception):
    """`refused`: a permanent error. `temporary`: the client repeats the request, with growing pauses.

    `full`: temporary, too: Slurm accepts no more jobs of the user now.
    """

    def __init__(self, kind, text):
        super().__init__(text)
        self.kind = kind


def kind_of(error):
    """Return the kind of an error of the file system or of a system call."""
    name = errno.errorcode.get(error.errno)
    return "refused" if name in FINAL else "temporary" if name in PASSING else "broken"


def read(path):
    """Return the content of a file; nothing if there is none."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return b""


def status_of(path):
    """Return the status of a file or folder; None if there is none.

    OSError: that cannot be known now; os.path.exists would say that there is none.
    """
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def inode_of(path):
    """Return the inode of a file or folder, as `status_of` does the status."""
    found = status_of(path)
    return found and found.st_ino


def names_in(folder):
    """Return the names of what lies in a folder; none if there is no folder.

    OSError: that cannot be known now.
    """
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def stamp_of(path):
    """Return what changes with a file, of its status; None if it cannot be found now."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_ino, found.st_size, found.st_mtime_ns]


def remove_tree(path):
    """Remove a folder, or as much of it as can be."""
    import shutil  # loading it takes longer than most runs have a use for it

    shutil.rmtree(path, ignore_errors=True)


def unique(path):
    """Return a name beside `path` that no other thread, process or login node uses."""
    return "%s.%s-%d-%d" % (path, os.uname()[1], os.getpid(), threading.get_ident())


def write(path, data):
    """Put a file in place, whole or not at all, for its owner alone."""
    part = unique(path) + ".part"
    try:
        with open(part, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(part, path)
    except OSError:
        with contextlib.suppress(OSError):  # the first error counts
            os.unlink(part)
        raise


def store(path, document):
    """Put a JSON document in place, whole or not at all."""
    write(path, json.dumps(dict(document, format=FORMAT), indent=1, sort_keys=True).encode())


def parse(data, *names):
    """Return a JSON document; None if the text is not one, or lacks one of the names."""
    try:
        found = json.loads(data.decode())
    except ValueError:
        return None
    return found if isinstance(found, dict) and all(name in found for name in names) else None


def load(path, *names):
    """Return the document in a file; None if there is none that can be read and has these names."""
    return parse(read(path), *names)


def lock(file, path, wait=True):
    """Lock an open file, for as long as it is open.

    BlockingIOError: another has it, and `wait` is not set.
    OSError: this file system has no locks; the text says what to do.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        text = "this file system has no file locks (flock: %s). Without them, two Dagsters could act on the same run. "
        text += "Set SLURM_DEPLOYMENT_BASE_PATH to a folder on another file system, such as your home, or ask the "
        text += "centre to switch on locks (for Lustre: the mount option `flock`)"
        raise OSError(error.errno, text % error.strerror, path)


def open_locked(path, flags=0, wait=True):
    """Return a descriptor of a file that is locked while it is open; whoever had the lock before may have removed it.

    BlockingIOError: another has it, and `wait` is not set.
    """
    while True:
        file = os.open(path, os.O_RDWR | flags, 0o600)
        try:
            lock(file, path, wait)
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        except OSError:
            os.close(file)
            raise
        os.close(file)


def own(folder):
    """Make a folder below the base path (and that itself) for the user alone; refuse those that others could change."""
    os.makedirs(folder, 0o700, exist_ok=True)
    check(folder)


def check(folder):
    """Refuse a folder if others own it or can write to it, or to the base path around it.

    OSError: with the command that fixes it.
    """
    base, me = os.path.dirname(folder), os.getuid()
    for path in (base, folder):
        try:
            found, given = os.stat(path), os.lstat(path)
        except FileNotFoundError:
            continue
        strangers = [each.st_uid for each in (found, given) if each.st_uid not in (me, 0)]
        sticky = found.st_uid == 0 and found.st_mode & stat.S_ISVTX
        if strangers:
            text = "user %d owns it, and could change what your jobs run. Choose another SLURM_DEPLOYMENT_BASE_PATH"
            text += ", or let an administrator run:\n  chown %d '%s'"
            raise OSError(errno.EPERM, text % (strangers[0], me, path), path)
        if found.st_mode & 0o022 and not sticky:
            text = "other users can write to it, and could change what your jobs run. Close it:\n  chmod go-w '%s'"
            raise OSError(errno.EPERM, text % path, path)
    ways = [folder]  # and the folders above; a link adds what it leads to
    for path in ways:
        above = os.path.dirname(path)
        if os.path.islink(path):
            ways.append(os.path.join(above, os.readlink(path)))
        if above != path:
            ways.append(above)
        mode = os.stat(above).st_mode if inode_of(above) else 0
        if mode & 0o002 and not mode & stat.S_ISVTX:
            text = "everybody can rename what lies in it, and so exchange %s, which has what your jobs run. Choose "
            text += "another SLURM_DEPLOYMENT_BASE_PATH, or let its owner run:\n  chmod o-w '%s'"
            raise OSError(errno.EPERM, text % (base, above), above)
