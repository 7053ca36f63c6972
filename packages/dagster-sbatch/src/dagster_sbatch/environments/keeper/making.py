"""Making environments: packages from wheels, and own code over them."""

import binascii
import hashlib
import json
import os
import time

from dagster_sbatch.slurm.gateway.agent.disk import store

from .files import HERE, Refused, locked, making, remove_tree, tell, touch
from .interpreters import choose, dotted, in_setup, run, skeleton

FORMAT = 1  # part of every name: a new way of making environments makes new ones
COMPILERS = 4  # processes, on a machine that is shared
VERIFY = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"


def hash_of(*parts):
    return hashlib.sha256(json.dumps((FORMAT,) + parts, sort_keys=True).encode()).hexdigest()[:16]


def describe(ask):
    """The environment that is asked for: its name, and all that the name stands for."""
    found = choose(ask)
    given = found.pop("given")
    content = {name: ask[name] for name in ("asked", "code", "modules", "setup")}
    content.update(kind="path" if ask["asked"] else "wheelhouse", interpreter=found, lock=None, layer=None)
    if not ask["asked"]:
        minor = found["version"].split(".")[:2]
        content.update(lock=ask["lock"], layer=hash_of(ask["lock"], minor, found["machine"], found["glibc"]))
    name = hash_of(content)
    path = os.path.join(ask["folder"], name)
    python = given if ask["asked"] else os.path.join(path, "bin", "python")
    return dict(content, name=name, python=python, workloads=os.path.join(path, "workloads"))


def look(ask):
    """The environment, whether it is ready, and whether its packages are installed."""
    content = describe(ask)
    ready = touch(os.path.join(ask["folder"], content["name"]))
    layer = content["layer"]
    installed = ready or not layer or os.path.isdir(os.path.join(ask["folder"], "packages", layer))
    return {"environment": content, "ready": ready, "installed": installed}


def lacking(ask):
    """Those of some wheels (place below the folder of wheels, by their content) that are not there."""
    return {"lacking": [place for place in ask["wheels"] if not os.path.exists(wheel(ask, place))]}


def wheel(ask, place):
    return os.path.join(ask["folder"], "wheels", place)


def publish(ask):
    """Make an environment, unless it is there."""
    with locked(ask["folder"]):
        content = describe(ask)
        path = os.path.join(ask["folder"], content["name"])
        if not touch(path):
            if content["layer"]:
                install(ask, content)
            with making(path) as new:
                assemble(ask, content, new)
                verify(ask, content, new)
    return {"environment": content}


def install(ask, content):
    """Install wheels into a folder of packages, unless they are."""
    path = os.path.join(ask["folder"], "packages", content["layer"])
    if os.path.isdir(path):
        return
    with making(path) as new:
        python = skeleton(new, content["interpreter"])
        library = os.path.join(new, "lib", "python" + dotted(content["interpreter"]["version"].split(".")[:2]))
        os.makedirs(os.path.join(library, "site-packages"))
        os.symlink("lib", os.path.join(new, "lib64"))  # where some distributions put compiled modules
        unpack(ask, python, os.path.join(new, "requirements.txt"))
        tell(progress="compiling")
        compiler = (python, "-I", "-m", "compileall", "-q", "-j", str(COMPILERS), library)
        in_setup(ask, 'exec "$@"', *compiler)  # it fails where a file is only a template for one
        remove_tree(os.path.join(new, "bin"))  # its commands name this folder; programs are started by `python -m`
        os.unlink(os.path.join(new, "pyvenv.cfg"))
        store(os.path.join(new, "packages.json"), {"wheels": sorted(ask["wheels"])})


def unpack(ask, python, listed):
    """Install all wheels with the pip that is among them."""
    places = sorted(ask["wheels"])
    with open(listed, "w") as file:
        file.writelines("%s --hash=sha256:%s\n" % (wheel(ask, place), ask["wheels"][place]) for place in places)
    pip = [wheel(ask, place) for place in places if os.path.basename(place).startswith("pip-")]
    if not pip:
        raise Refused("the lock has no pip, which installs the others there: it belongs to the cluster group")
    tell(progress="installing %d wheels" % len(places))
    options = ["--no-index", "--no-deps", "--require-hashes", "--no-cache-dir", "--no-compile", "--requirement", listed]
    options += ["--disable-pip-version-check", "--no-input", "--no-warn-script-location", "--quiet"]
    # -I and --isolated: neither a module's PYTHONPATH nor the user's pip.conf has a say.
    run(ask, python, "-I", os.path.join(pip[0], "pip"), "--isolated", "install", *options)


def assemble(ask, content, new):
    """Put an environment together: interpreter, links to the packages, code."""
    if content["layer"]:
        skeleton(new, content["interpreter"])
        packages = os.path.join("..", "packages", content["layer"])
        for name in os.listdir(os.path.join(new, packages)):
            if name not in ("packages.json", "requirements.txt"):
                os.symlink(os.path.join(packages, name), os.path.join(new, name))
    for name, text in ask["files"].items():
        path = os.path.join(new, "workloads", name)
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        with open(path, "wb") as file:
            file.write(binascii.a2b_base64(text))
    store(os.path.join(new, HERE), dict(content, made=time.time()))


def verify(ask, content, new):
    """Refuse an environment that cannot import what every workload needs."""
    tell(progress="verifying")
    python = os.path.join(new, "bin", "python") if content["layer"] else content["python"]
    run(ask, python, "-I", "-c", VERIFY, *content["modules"])
