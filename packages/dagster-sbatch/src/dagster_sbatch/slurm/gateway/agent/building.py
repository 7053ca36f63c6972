"""Building environments: packages from wheels, and the user's code over them.

    <folder>/wheels/<hash>/NAME.whl   as the client sent them
             packages/<hash>/lib/     installed wheels: one lock file, for one kind of Python
             <hash>/                  an environment: bin/python, lib -> ../packages/<hash>/lib, workloads/
             published.json           what production runs, the latest last
             .interpreter-<hash>.json the description of an interpreter

Environments and packages are built in a folder of another name, made read-only, and renamed. Whatever changes the
folder holds one lock.
"""

import binascii
import contextlib
import hashlib
import json
import os
import time

from .disk import RequestError, check, inode_of, lock, names_in, own, remove_tree, store, unique
from .interpreters import check_version, choose, dotted, in_setup, run, skeleton

HERE, PACKAGES = "environment.json", "packages.json"  # whether they are there tells whether a folder is whole
FORMAT = 1  # part of every name: a new way of building makes new environments
COMPILERS = 4  # processes, on a machine that is shared
EXECUTABLE = " x"  # end of the digest of an executable file
VERIFY = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"


def refuse_changeable(folder):
    """Refuse a folder of environments that others could change."""
    for path in (os.path.join(folder, "packages"), os.path.join(folder, "wheels"), folder):
        check(path)


@contextlib.contextmanager
def locked(folder, say):
    """Hold the lock of a folder; remove what earlier builds left unfinished."""
    own(folder)
    path = os.path.join(folder, ".lock")
    with open(path, "w") as file:
        try:
            lock(file, path, wait=False)
        except BlockingIOError:
            say(progress="waiting for another deployment to this folder")
            lock(file, path)
        for place in (folder, os.path.join(folder, "packages")):
            for name in names_in(place):
                if name.endswith((".new", ".old")):
                    remove_sealed(os.path.join(place, name))
                elif name.endswith(".part"):
                    with contextlib.suppress(FileNotFoundError):  # its writer has put it in place
                        os.unlink(os.path.join(place, name))
        yield


def remove_sealed(path):
    """Remove a folder whose folders may be read-only, or as much of it as can be."""
    for folder, _, _ in os.walk(path):
        os.chmod(folder, 0o700)
    remove_tree(path)


@contextlib.contextmanager
def making(path):
    """Make a folder that appears as `path` once all went well; then no file is added to it, byte code included.

    Its name until then is unique: a child of an agent that was killed may still be writing.
    """
    new = unique(path) + ".new"
    os.makedirs(new, 0o700)
    try:
        yield new
        for folder, _, _ in os.walk(new):
            os.chmod(folder, 0o500)
        if inode_of(path):  # what the site has left of it
            drop(path)
        os.rename(new, path)
    except BaseException:
        remove_sealed(new)
        raise


def touch(path):
    """Note that an environment, packages or a wheel are used now; return whether they exist."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def is_whole(path, mark):
    """Touch an environment or packages; return whether they exist and have their mark: a site may remove old files."""
    return bool(inode_of(os.path.join(path, mark))) and touch(path)


def drop(path):
    old = unique(path) + ".old"
    os.rename(path, old)
    remove_sealed(old)


def hash_parts(*parts):
    return hashlib.sha256(json.dumps((FORMAT,) + parts, sort_keys=True).encode()).hexdigest()[:16]


def describe(ask):
    """Return the environment of a request: its name, and all that the name stands for."""
    refuse_changeable(ask["folder"])
    found = choose(ask)
    check_version(ask, found)
    given = found.pop("given")
    content = {name: ask[name] for name in ("asked", "code", "modules", "setup")}
    content.update(kind="path" if ask["asked"] else "wheelhouse", interpreter=found, lock=None, layer=None)
    if not ask["asked"]:
        minor = found["version"].split(".")[:2]
        content.update(lock=ask["lock"], layer=hash_parts(ask["lock"], minor, found["machine"], found["glibc"]))
    name = hash_parts(content)
    path = os.path.join(ask["folder"], name)
    python = given if ask["asked"] else os.path.join(path, "bin", "python")
    return dict(content, name=name, python=python, workloads=os.path.join(path, "workloads"))


def install(ask, content, say):
    with making(os.path.join(ask["folder"], "packages", content["layer"])) as new:
        python = skeleton(new, content["interpreter"])
        library = os.path.join(new, "lib", "python" + dotted(content["interpreter"]["version"].split(".")[:2]))
        os.makedirs(os.path.join(library, "site-packages"))
        os.symlink("lib", os.path.join(new, "lib64"))  # where some distributions put compiled modules
        unpack(ask, python, os.path.join(new, "requirements.txt"), say)
        say(progress="compiling")
        compiler = (python, "-I", "-m", "compileall", "-q", "-j", str(COMPILERS), library)
        in_setup(ask, 'exec "$@"', *compiler)  # it fails for a file that is only a template of a module
        remove_sealed(os.path.join(new, "bin"))  # its commands name this folder; programs start by `python -m`
        os.unlink(os.path.join(new, "pyvenv.cfg"))
        store(os.path.join(new, PACKAGES), {"wheels": sorted(ask["wheels"])})


def unpack(ask, python, listed, say):
    """Install all wheels with the pip that is among them."""
    paths = {place: os.path.join(ask["folder"], "wheels", place) for place in sorted(ask["wheels"])}
    with open(listed, "w") as file:
        file.writelines("%s --hash=sha256:%s\n" % (path, ask["wheels"][place]) for place, path in paths.items())
    pip = [path for path in paths.values() if os.path.basename(path).startswith("pip-")]
    if not pip:
        text = "the lock has no pip, which installs the other packages on the login node. Add pip to its group"
        raise RequestError("refused", text)
    say(progress="installing %d wheels" % len(paths))
    options = ["--no-index", "--no-deps", "--require-hashes", "--no-cache-dir", "--no-compile", "--requirement", listed]
    options += ["--disable-pip-version-check", "--no-input", "--no-warn-script-location", "--quiet"]
    # -I and --isolated: neither a module's PYTHONPATH nor the user's pip.conf counts.
    run(ask, python, "-I", os.path.join(pip[0], "pip"), "--isolated", "install", *options)


def assemble(ask, content, new):
    """Put an environment together: interpreter, links to the packages, code."""
    if content["layer"]:
        skeleton(new, content["interpreter"])
        packages = os.path.join("..", "packages", content["layer"])
        for name in os.listdir(os.path.join(new, packages)):
            if name not in (PACKAGES, "requirements.txt"):
                os.symlink(os.path.join(packages, name), os.path.join(new, name))
    for name, text in ask["files"].items():
        path = os.path.join(new, "workloads", name)
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        with open(path, "wb") as file:
            file.write(binascii.a2b_base64(text))
        # Read-only: a program that wrote beside itself would change what other runs execute.
        os.chmod(path, 0o500 if ask["code"][name].endswith(EXECUTABLE) else 0o400)
    store(os.path.join(new, HERE), dict(content, made=time.time()))


def verify(ask, content, python):
    """Refuse an environment that cannot import what every workload needs."""
    command = (python, "-I", "-c", VERIFY) + tuple(content["modules"])
    if content["layer"]:
        run(ask, *command)
        return
    code, said = in_setup(ask, 'exec "$@"', *command)
    if code:
        names, why = ", ".join(content["modules"]), (said.strip().splitlines() or ["no reason was printed"])[-1]
        text = "%s=%s cannot import %s on %s: %s\nInstall these packages there, for instance with\n%s -m pip install %s"
        packages = " ".join(content["modules"]).replace("_", "-")
        values = (ask["asked_by"], ask["asked"], names, os.uname()[1], why, python, packages)
        raise RequestError("refused", text % values)


# Requests


def check_interpreter(_, ask, __):
    """Refuse an interpreter that does not run here, is too old, or cannot import what every workload needs."""
    content = describe(ask)
    verify(ask, content, content["python"])
    return {}


def find(_, ask, __):
    """Return the environment of a request, whether it is ready, and whether its packages are installed."""
    content = describe(ask)
    installed = not content["layer"] or is_whole(os.path.join(ask["folder"], "packages", content["layer"]), PACKAGES)
    ready = installed and is_whole(os.path.join(ask["folder"], content["name"]), HERE)
    return {"environment": content, "ready": ready, "installed": installed}


def missing(_, ask, __):
    """Return those of some wheels (paths below the folder of wheels) that were not sent yet."""
    refuse_changeable(ask["folder"])
    paths = {place: os.path.join(ask["folder"], "wheels", place) for place in ask["wheels"]}
    return {"missing": [place for place, path in paths.items() if not (touch(os.path.dirname(path)) and touch(path))]}


def build(agent, ask, say):
    """Build an environment, unless it exists. It has to import what every workload needs."""
    with locked(ask["folder"], say):
        found = find(agent, ask, say)
        content = found["environment"]
        if not found["ready"]:
            if not found["installed"]:
                install(ask, content, say)
            with making(os.path.join(ask["folder"], content["name"])) as new:
                assemble(ask, content, new)
                say(progress="verifying")
                verify(ask, content, os.path.join(new, "bin", "python") if content["layer"] else content["python"])
    return {"environment": content}
