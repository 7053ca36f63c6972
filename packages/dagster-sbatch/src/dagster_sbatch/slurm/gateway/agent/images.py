"""What is wrong with the image of a container. The agent asks it before a job, and the job as a program.

usage: images.py COMMAND IMAGE DATA_ROOT SOURCE...   (in the run directory, on the first node)

It checks that there is such a command, that IMAGE is one, and that each SOURCE, which the container will have, exists;
it makes DATA_ROOT. Exit code 1: something is wrong; `cause` and stderr say what. Standard library, Python 3.6.
"""

import os
import shutil
import sys

HEAD = 2048  # bytes
SIF, SQUASHFS, EXT3 = (32, b"SIF_MAGIC"), (0, b"hsqs"), (1080, b"\x53\xef")  # offset, bytes there


def problem_of(path):
    """Return why no container can run from an image, as far as its first bytes show; empty if nothing is wrong."""
    host = os.uname()[1]
    try:
        if os.path.isdir(path):
            known = bool({"bin", "usr"} & set(os.listdir(path)))
        else:
            with open(path, "rb") as file:
                head = file.read(HEAD)
            known = any(head[at : at + len(magic)] == magic for at, magic in (SIF, SQUASHFS, EXT3))
    except (FileNotFoundError, NotADirectoryError):
        return "There is no container image %s on %s. Copy it to there, or correct Container(...)." % (path, host)
    except PermissionError:
        return "You may not read the container image %s on %s. Ask its owner to permit that." % (path, host)
    if known:
        return ""
    return (
        "%s on %s is no container image: it is neither a SIF or squashfs file, nor a folder with a system in it. "
        "Build or pull it again, or correct Container(...)." % (path, host)
    )


def problem_here(command, image, data_root, sources):
    """Return why no container can start on this node; empty if nothing is wrong."""
    host = os.uname()[1]
    if not shutil.which(command):
        return (
            "There is no %s on %s, which runs containers. Load its module with SlurmRequest(modules=[...]), "
            'or name the command in the site\'s entry: "container_runtime": {"command": ...}.' % (command, host)
        )
    os.makedirs(data_root, exist_ok=True)
    for source in sources:
        if not os.path.exists(source):
            return "The container should have %s, and %s has no such path. Correct Container(binds=...)." % (
                source,
                host,
            )
    return problem_of(image)


def image(_, ask, __):
    """Return what is wrong with an image."""
    return {"problem": problem_of(ask["path"])}


if __name__ == "__main__":
    cause = problem_here(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
    with open("cause", "w") as file:
        file.write(cause)
    sys.exit(cause or 0)
