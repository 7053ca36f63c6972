"""Folders that appear whole or not at all."""

import contextlib
import json
import os

from dagster_sbatch.slurm.gateway.agent.disk import check, lock, own, unique

HERE = "environment.json"


class Refused(Exception):
    pass


def tell(**fields):
    print(json.dumps(fields), flush=True)


@contextlib.contextmanager
def locked(folder):
    """One at a time; what was begun and not finished is nobody's then."""
    own(folder)
    path = os.path.join(folder, ".lock")
    with open(path, "w") as file:
        try:
            lock(file, path, wait=False)
        except BlockingIOError:
            tell(progress="waiting for another deployment to this folder")
            lock(file, path)
        for place in (folder, os.path.join(folder, "packages")):
            for name in os.listdir(place) if os.path.isdir(place) else ():
                if name.endswith((".new", ".old")):
                    remove_tree(os.path.join(place, name))
                elif name.endswith(".part"):
                    with contextlib.suppress(FileNotFoundError):  # whoever wrote it has put it in place
                        os.unlink(os.path.join(place, name))
        yield


def trust(folder):
    """Refuse a folder of environments that others own or can write to, and those in it that many environments share."""
    for name in ("packages", "wheels"):
        check(os.path.join(folder, name))
    check(folder)


def remove_tree(path):
    import shutil  # loading it takes longer than most runs have a use for it

    for folder, _, _ in os.walk(path):
        os.chmod(folder, 0o700)
    shutil.rmtree(path)


def seal(path):
    """No file is added below a folder any more, byte code of Python included."""
    for folder, _, _ in os.walk(path):
        os.chmod(folder, 0o500)


@contextlib.contextmanager
def making(path):
    """A folder that appears as `path`, sealed, once all went well.

    Its name until then is of this process alone: a child of one that was killed may still be writing.
    """
    new = unique(path) + ".new"
    os.makedirs(new, 0o700)
    try:
        yield new
        seal(new)
        os.rename(new, path)
    except BaseException:
        remove_tree(new)
        raise


def touch(path):
    """Note that an environment is used now; whether it is there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def drop(path):
    os.rename(path, path + ".old")
    remove_tree(path + ".old")
