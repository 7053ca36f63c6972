"""What is wrong with the image of a container, and which image it is. The agent asks it, and the job as a program.

usage: images.py COMMAND IMAGE DATA_ROOT SOURCE...   (on the first node)

It checks that there is such a command, that IMAGE is one and the one with which the job was submitted, and that the
container can have DATA_ROOT, which it makes, and each SOURCE. Exit code 1: something is wrong; 75: a path cannot be
read now. `cause`, in the working directory, and stderr say what. Standard library, Python 3.6.
"""

import hashlib
import json
import os
import re
import stat
import struct
import sys
from contextlib import suppress

HEAD = 2048  # bytes, which apptainer reads as well to recognize an image
SIF, SQUASHFS, EXT3 = (32, b"SIF_MAGIC\0"), (0, b"hsqs"), (1080, b"\x53\xef")  # offset, bytes there
# The global header of a SIF file (sif.go of apptainer/sif): start line, magic, version, CPU, ID of the image, created,
# changed, descriptors that are free and all, offset and size of these, and of the data, with which the file ends.
SIF_HEADER = struct.Struct("<32s10s3s3s16s8q")
INPUT = "container image"  # its name among the inputs of a run
RECORD = "submitted_with.json"  # of the run directory: has the inputs
UNBINDABLE = re.compile(r"[,:^\\\n]|^\s|\s$")  # what apptainer takes for syntax in --bind, or removes


def problem_of(path):
    """Return why no container can run from an image, as far as its beginning shows; empty if nothing is wrong."""
    host = os.uname()[1]
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            known = bool({"bin", "usr"} & set(os.listdir(path)))
        else:
            head, status = begin(path)
            known = len(head) == HEAD and any(is_at(head, magic) for magic in (SIF, SQUASHFS, EXT3))
            data_end = sum(SIF_HEADER.unpack_from(head)[-2:]) if known and is_at(head, SIF) else 0
            missing = data_end - status.st_size
            if missing > 0:
                return (
                    "The container image %s on %s is not complete: %d bytes at its end are missing. "
                    "Wait until it is copied, or copy it again." % (path, host, missing)
                )
    except (FileNotFoundError, NotADirectoryError):
        return "There is no container image %s on %s. Copy it there, or correct Container(...)." % (path, host)
    except PermissionError:
        return "You may not read the container image %s on %s. Ask its owner to permit that." % (path, host)
    if known:
        return ""
    return (
        "%s on %s is not a container image: it is neither a SIF or squashfs file, nor a folder with a system in it. "
        "Build or pull it again, or correct Container(...)." % (path, host)
    )


def identity_of(path):
    """Return a text that tells an image from any other that was or will be under its path.

    It reads no more than the beginning of a file. That of a SIF file has a random ID and the time of the last change,
    unless the build was to be reproducible; then, and for other files, the size and the time of modification count, as
    for rsync. Of a folder, the times of the folder and of what lies directly in it count.
    """
    if stat.S_ISDIR(os.stat(path).st_mode):
        with os.scandir(path) as entries:
            times = sorted((entry.name, entry.stat(follow_symlinks=False).st_mtime_ns) for entry in entries)
        facts = [os.stat(path).st_mtime_ns, times]
    else:
        head, status = begin(path)
        facts = [status.st_size, head.hex()]
        if not (is_at(head, SIF) and any(SIF_HEADER.unpack_from(head)[4])):
            facts.append(status.st_mtime_ns)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def begin(path):
    """Return the first bytes of a file, and its status."""
    with open(path, "rb") as file:
        return file.read(HEAD), os.fstat(file.fileno())


def is_at(head, magic):
    offset, text = magic
    return head[offset : offset + len(text)] == text


def unbindable(paths):
    """Return why a container cannot have some paths; empty if it can."""
    for path in paths:
        if UNBINDABLE.search(path):
            text = "A container cannot have %r: apptainer reads commas, colons, ^ and backslashes in the path of a "
            return (text + "folder as syntax, and drops spaces at its ends. Use another folder.") % path
    return ""


def problem_here(command, image, data_root, sources):
    """Return why no container can start on this node; empty if nothing is wrong."""
    import shutil  # loading it takes longer than most runs have a use for it

    host = os.uname()[1]
    if not shutil.which(command):
        return (
            "There is no %s on %s, which runs containers. Load its module with SlurmRequest(modules=[...]), "
            'or name the command in the site\'s entry: "container_runtime": {"command": ...}.' % (command, host)
        )
    os.makedirs(data_root, exist_ok=True)
    for source in sources:
        try:
            os.stat(source)
        except (FileNotFoundError, NotADirectoryError):
            text = "The container should have %s, and %s has no such path. Correct Container(binds=...)."
            return text % (source, host)
    return unbindable([data_root, *sources]) or problem_of(image) or change_of(image)


def change_of(image):
    """Return what to do if the image is another one than when the job was submitted; empty if it is the same."""
    run = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with open(os.path.join(run, RECORD)) as file:
        submitted = json.load(file)["inputs"][INPUT]
    if submitted == identity_of(image):
        return ""
    return (
        "The container image %s has changed since this job was submitted, and its result would be recorded as that of "
        "the former image. Run it again: a new job uses the image as it is now. While jobs wait, put a new image under "
        "a new name." % image
    )


def image(_, ask, __):
    """Return what is wrong with an image, or with the folders of its container; if nothing is, its identity."""
    problem = unbindable([ask["data_root"], ask["runs"]]) or problem_of(ask["path"])
    return {"problem": problem, "identity": "" if problem else identity_of(ask["path"])}


if __name__ == "__main__":
    code = 1
    try:
        cause = problem_here(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
    except OSError as error:
        code = 1 if isinstance(error, PermissionError) else os.EX_TEMPFAIL
        text = (
            "The container cannot have %s on %s: %s. If that happens again, correct Container(...) or ask the centre."
        )
        cause = text % (error.filename or sys.argv[2], os.uname()[1], error.strerror)
    if cause:
        print(cause, file=sys.stderr)
    with suppress(OSError), open("cause", "w") as file:  # the disk is full; the exit code counts all the same
        file.write(cause)
    if cause:
        sys.exit(code)
