"""What login and compute nodes share: the homes, $DATA and $SCRATCH; what each compute node has for itself; modules."""

import shutil
from pathlib import Path

from .host import run_on_host
from .layout import PROJECT_FOLDER, USERS, Layout

HOME_SIZE, HOME_FILES = "8g", 1_000_000
"""Quota of all homes together. They lie on a tmpfs, so their content takes memory."""
_PROFILE = f"""\
# The site's places for each of its users.
if [ "$(id -u)" -ge {USERS[0].uid} ]; then
    export DATA=/data/{PROJECT_FOLDER}/$(id -un) SCRATCH=/scratch/{PROJECT_FOLDER}/$(id -un)
fi
"""
_CSH_PROFILE = f"""\
if ( `id -u` >= {USERS[0].uid} ) then
    setenv DATA /data/{PROJECT_FOLDER}/`id -un`
    setenv SCRATCH /scratch/{PROJECT_FOLDER}/`id -un`
endif
"""
_MODULES_PROFILE = """\
# Lmod, for shells that read this file alone: no BASH_ENV and no exported function give `module` to others.
export MODULEPATH={modules}
case $(readlink /proc/$$/exe) in
    */bash) . /usr/share/lmod/lmod/init/bash; export -fn module ml; unset BASH_ENV;;
    *) . /usr/share/lmod/lmod/init/sh;;
esac >/dev/null
"""
MODULE, MODULE_PYTHON = "Python/site", "site-python3"
"""A module, and the interpreter that is found in no other way."""
_MODULE = """\
whatis("A Python")
prepend_path("PATH", "{folder}/bin")
setenv("EBROOTPYTHON", "{folder}")
-- As many such modules do. It is of use to no other Python.
setenv("PYTHONHOME", "{folder}")
"""
STACK, SOLVER = "Stack/2026.1", "Solver/1.2"
"""A module that makes others visible, as centres order theirs by release or by compiler, and one of these."""
_STACK = """\
whatis("Software of a release")
prepend_path("MODULEPATH", "{folder}")
"""
_SOLVER = """\
whatis("A program, its library and its Python packages")
prepend_path("PATH", "{folder}/bin")
prepend_path("LD_LIBRARY_PATH", "{folder}/lib")
-- Packages for the module's own Python. To another one they are in the way.
prepend_path("PYTHONPATH", "{folder}/python")
setenv("EBROOTSOLVER", "{folder}")
"""
_EPILOG = """\
#!/bin/sh
# slurmd runs it as root when a job has ended: it removes the files of the job's user from /local, unless another job
# of that user still runs on the node.
ps -u "$SLURM_JOB_UID" -o pid= >/dev/null || find /local -mindepth 1 -user "$SLURM_JOB_UID" -delete
"""


class Storage:
    """The shared file systems of a site. Each has a known size, so that it can be filled by making it small."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._shared = (layout.home, layout.data, layout.scratch)

    def configure(self) -> None:
        """Write what the login profile says of them, the modules, and the epilog of jobs."""
        profiles = self._layout.machine_etc / "profile.d"
        (profiles / "storage.sh").write_text(_PROFILE, encoding="utf-8")
        (profiles / "storage.csh").write_text(_CSH_PROFILE, encoding="utf-8")
        modules, software = self._layout.state / "modules", self._layout.state / "software" / MODULE
        (profiles / "lmod.sh").write_text(_MODULES_PROFILE.format(modules=modules), encoding="utf-8")
        (software / "bin").mkdir(parents=True)
        (software / "bin" / MODULE_PYTHON).symlink_to("/usr/bin/python3")
        (modules / MODULE).parent.mkdir(parents=True)
        (modules / f"{MODULE}.lua").write_text(_MODULE.format(folder=software), encoding="utf-8")
        self._add_stack(modules)
        self._layout.epilog.write_text(_EPILOG, encoding="ascii")
        self._layout.epilog.chmod(0o755)

    def _add_stack(self, modules: Path) -> None:
        """Write the module STACK, and SOLVER with its files, which only those see who have loaded STACK."""
        software, hidden = self._layout.state / "software" / SOLVER, self._layout.state / "stack"
        for name in ("bin", "lib", "python"):
            (software / name).mkdir(parents=True)
        (software / "bin" / "solver").write_text(f'#!/bin/sh\necho "{SOLVER} on $(uname -n)"\n', encoding="ascii")
        (software / "bin" / "solver").chmod(0o755)
        (software / "python" / "dagster_pipes.py").write_text("raise SystemExit('of a module')\n", encoding="ascii")
        for folder, module, text in ((modules, STACK, _STACK), (hidden, SOLVER, _SOLVER)):
            (folder / module).parent.mkdir(parents=True)
            (folder / f"{module}.lua").write_text(
                text.format(folder=hidden if module == STACK else software), encoding="utf-8"
            )

    def mount(self) -> bool:
        """Mount them unless they are there, before any machine starts; return whether the homes are new and empty."""
        new = not self._layout.home.is_mount()
        for folder in self._shared:
            if not folder.is_mount():
                folder.mkdir(exist_ok=True)
                options = f"size={HOME_SIZE},nr_inodes={HOME_FILES},mode=755"
                run_on_host("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder))
        return new

    def unmount(self) -> None:
        """Unmount those that are there; what is on them is lost."""
        for folder in self._shared:
            if folder.is_mount():
                run_on_host("umount", str(folder))

    def restore_project(self) -> None:
        """Empty every user's folders in $DATA and $SCRATCH."""
        for shared in (self._layout.data, self._layout.scratch):
            project = shared / PROJECT_FOLDER
            shutil.rmtree(project, ignore_errors=True)
            for user in USERS:
                folder = project / user.name
                folder.mkdir(parents=True)
                folder.chmod(0o700)
                shutil.chown(folder, user.uid, user.uid)

    def limit_home(self, size: str = HOME_SIZE, files: int = HOME_FILES) -> None:
        """Change the quota of the homes.

        Args:
            size: a number of bytes, or with `m` or `g` behind it.
            files: the most files and folders.
        """
        run_on_host("mount", "-o", f"remount,size={size},nr_inodes={files}", str(self._layout.home))
