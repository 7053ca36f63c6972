"""Checks of what the login node's survey says."""

import re
from contextlib import nullcontext

from dagster_sbatch.auth import ensure_certificate
from dagster_sbatch.inspect.diagnosis.finding import Facts, Finding, broken, ok, warning
from dagster_sbatch.inspect.diagnosis.survey import Room, parse_room, take_survey
from dagster_sbatch.ssh import connect

LEAST_FREE_KIB, LEAST_FREE_FILES = 1 << 20, 10_000
OLDEST_PYTHON = (3, 6)  # needed by what the client runs on the login node; workloads have their own environment
LONGEST_TEMPORARY = 40  # characters. Ray creates sockets below it, and the path of a socket has at most 107 (unix(7))
WANTED_FILES = 65536
_VERSION = re.compile(r"\b(\d+)\.(\d+)\Z")


def check_login(facts: Facts) -> Finding:
    """Log in, and take the survey that the checks below read."""
    settings, site = facts.settings, facts.site
    here = nullcontext() if settings.on_login_node else None
    try:
        with here or connect(settings, ensure_certificate, site.host_authorities) as connection:
            base = str(settings.deployment_base_path)
            facts.survey = take_survey(connection, base, site.python_candidates, site.setup_commands)
    except OSError as error:
        return broken(str(error), "try again; check what your login shell does on the login node")
    return ok("this machine" if here else f"{settings.edge_node_user} at {settings.edge_node_host}")


def check_slurm(facts: Facts) -> Finding:
    """Check that Slurm's commands are there and that its controller answers."""
    missing = facts.survey["commands"].text.split()
    if missing:
        fix = "load the module that has them in setup_commands of SUPERCOMPUTER_SITE_OVERRIDES, or ask the centre"
        return broken(f"not on PATH of the login node: {', '.join(missing)}", fix)
    controller = facts.survey["controller"]
    if controller.code or " UP" not in controller.text.upper().replace(" IS", " "):
        return broken(controller.text, "slurmctld does not answer: wait, or ask the centre")
    return ok(controller.text.splitlines()[0])


def check_partitions(facts: Facts) -> Finding:
    """Compare the facts about the site with Slurm's partitions."""
    code, text = facts.survey["partitions"]
    if code:
        return broken(text or "no answer to `scontrol show partition`", "try again later, or ask the centre")
    rows = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in text.splitlines()]
    there = {row["PartitionName"]: row for row in rows if "PartitionName" in row}
    for partition, wanted in facts.site.partitions.items():
        if partition not in there:
            fix = f"correct SUPERCOMPUTER_SITE_OVERRIDES; the cluster has {', '.join(sorted(there))}"
            return broken(f"there is no partition {partition}", fix)
        allowed = there[partition].get("AllowQos", "ALL").split(",")
        refused = [qos for qos in wanted.qos if allowed != ["ALL"] and qos not in allowed]
        if refused:
            fix = f"correct SUPERCOMPUTER_SITE_OVERRIDES; it takes {', '.join(allowed)}"
            return broken(f"partition {partition} does not take QoS {', '.join(refused)}", fix)
    down = [partition for partition in facts.site.partitions if there[partition].get("State") != "UP"]
    if down:
        return warning(f"not UP: {', '.join(down)}", "jobs wait until the centre opens it")
    return ok(", ".join(facts.site.partitions))


def check_storage(facts: Facts) -> Finding:
    """Check the room in the user's own folders."""
    folders = [name for name in ("HOME", "DATA", "SCRATCH") if f"path {name}" in facts.survey]
    rooms = {name: _room(facts, f"room {name}") for name in folders}
    found = "\n".join(f"${name} {facts.survey[f'path {name}'].text}: {room}" for name, room in rooms.items())
    full = [f"${name}" for name, room in rooms.items() if _is_short(room)]
    if full:
        return warning(found, f"make room in {' and '.join(full)}: remove what you do not need there")
    return ok(found)


def check_folder(facts: Facts) -> Finding:
    """Check that SLURM_DEPLOYMENT_BASE_PATH can be written to and has room."""
    base, above, write = (facts.survey[name] for name in ("base", "folder", "write"))
    if write.code:
        fix = "choose another SLURM_DEPLOYMENT_BASE_PATH, or make room (your quota?)"
        return broken(f"{above.text} cannot be written to: {write.text}", fix)
    room = _room(facts, "room")
    if _is_short(room):
        return warning(f"{above.text}: {room}", "make room there: scripts/deploy_environment.py --help says how")
    return ok(f"{base.text}: {room}{'' if above.text == base.text else '; the first run creates it'}")


def _room(facts: Facts, name: str) -> Room:
    return parse_room(facts.survey[name].text, facts.survey["quota"].text)


def _is_short(room: Room) -> bool:
    """Return whether little room is left; unknown room is not short."""
    return (room.kib is not None and room.kib < LEAST_FREE_KIB) or (
        room.files is not None and room.files < LEAST_FREE_FILES
    )


def check_python(facts: Facts) -> Finding:
    """Check that the login node has an interpreter for the agent."""
    for candidate in facts.site.python_candidates:
        code, text = facts.survey[f"python {candidate}"]
        version = _VERSION.search(text)  # what stderr says may stand before it
        if code == 0 and version and tuple(map(int, version.groups())) >= OLDEST_PYTHON:
            return ok(f"{candidate} is {version[0]}")
    oldest = ".".join(map(str, OLDEST_PYTHON))
    fix = "name another one in python_candidates of SUPERCOMPUTER_SITE_OVERRIDES, or load one in setup_commands"
    candidates = ", ".join(facts.site.python_candidates)
    return broken(f"none of {candidates} is Python {oldest} or newer on the login node", fix)


def check_temporary_folder(facts: Facts) -> Finding:
    """Check the length of TMPDIR."""
    path = facts.survey["temporary"].text
    if len(path) > LONGEST_TEMPORARY:
        fix = f"set TMPDIR to a path of at most {LONGEST_TEMPORARY} characters: Ray creates sockets below it"
        return warning(f"{path} has {len(path)} characters", fix)
    return ok(path)


def check_open_files(facts: Facts) -> Finding:
    """Check the hard limit on open files."""
    limit = facts.survey["files"].text
    if limit.isdecimal() and int(limit) < WANTED_FILES:
        found = f"{limit} on the login node, less than the {WANTED_FILES} that Ray wants"
        return warning(found, "compute nodes may allow more; jobs raise their limit as far as the node allows")
    return ok(limit)
