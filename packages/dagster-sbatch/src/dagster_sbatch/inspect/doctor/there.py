"""Checks on the login node."""

from dagster_sbatch.auth import ensure_certificate
from dagster_sbatch.inspect.doctor.finding import Facts, Verdict, broken, ok, warning
from dagster_sbatch.inspect.doctor.storage import Room, parse_room
from dagster_sbatch.inspect.doctor.survey import take_survey
from dagster_sbatch.ssh import SshError, connect

LEAST_FREE_KIB, LEAST_FREE_FILES = 1 << 20, 10_000
OLDEST_PYTHON = (3, 6)
"""For what runs on the login node; workloads have an environment of their own."""
LONGEST_TEMPORARY = 40
"""Characters. Ray puts sockets below it, whose paths may have 107 (unix(7))."""
WANTED_FILES = 65536


def check_login(facts: Facts) -> Verdict:
    """Log in, and ask the login node everything that the checks after this one judge."""
    settings, site = facts.settings, facts.site
    try:
        connection = connect(settings, ensure_certificate, site.host_authorities)
        facts.connection = facts.until_the_end.enter_context(connection)
    except SshError as error:
        return broken(str(error), "do what the error says; scripts/refresh_step_auth.py --status shows the certificate")
    try:
        facts.survey = take_survey(
            facts.connection, str(settings.deployment_base_path), site.python_candidates, site.setup_commands
        )
    except OSError as error:
        return broken(str(error), "try again; check what your login shell does on the login node")
    return ok(f"{settings.edge_node_user} at {settings.edge_node_host}")


def check_slurm(facts: Facts) -> Verdict:
    """Find Slurm's commands, and ping its controller."""
    missing = facts.survey["commands"].text.split()
    if missing:
        fix = "load the module that has them in setup_commands of SUPERCOMPUTER_SITE_OVERRIDES, or ask the centre"
        return broken(f"not on PATH of the login node: {', '.join(missing)}", fix)
    controller = facts.survey["controller"]
    if controller.code or " UP" not in controller.text.upper().replace(" IS", " "):
        return broken(controller.text, "slurmctld does not answer: wait, or ask the centre")
    return ok(controller.text.splitlines()[0])


def check_partitions(facts: Facts) -> Verdict:
    """Compare the site's entry with Slurm's partitions."""
    there = _parse_partitions(facts.survey["partitions"].text)
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


def check_storage(facts: Facts) -> Verdict:
    """Show the room in the user's own folders."""
    survey, found, full = facts.survey, [], []
    for name in ("HOME", "DATA", "SCRATCH"):
        if f"path {name}" in survey:
            room = parse_room(survey[f"room {name}"].text, survey["quota"].text)
            found.append(f"${name} {survey[f'path {name}'].text}: {room}")
            if _is_short(room):
                full.append(f"${name}")
    if full:
        return warning("\n".join(found), f"make room in {' and '.join(full)}: remove what you do not need there")
    return ok("\n".join(found))


def check_folder(facts: Facts) -> Verdict:
    """Check that SLURM_DEPLOYMENT_BASE_PATH can be written to and has room."""
    base, above = facts.survey["base"].text, facts.survey["folder"].text
    write = facts.survey["write"]
    if write.code:
        fix = "choose another SLURM_DEPLOYMENT_BASE_PATH, or make room (your quota?)"
        return broken(f"{above} cannot be written to: {write.text}", fix)
    room = parse_room(facts.survey["room"].text, facts.survey["quota"].text)
    if _is_short(room):
        return warning(f"{above}: {room}", "make room there: scripts/deploy_environment.py --help says how")
    there = "" if above == base else "; the first run makes it"
    return ok(f"{base}: {room}{there}")


def _is_short(room: Room) -> bool:
    """Whether little is left; what is not known is no alarm."""
    return (room.kib is not None and room.kib < LEAST_FREE_KIB) or (
        room.files is not None and room.files < LEAST_FREE_FILES
    )


def check_python(facts: Facts) -> Verdict:
    """Find an interpreter for the agent on the login node."""
    said = {each: facts.survey[f"python {each}"] for each in facts.site.python_candidates}
    for candidate, answer in said.items():
        if answer.code == 0 and tuple(map(int, answer.text.split("."))) >= OLDEST_PYTHON:
            return ok(f"{candidate} is {answer.text}")
    oldest = ".".join(map(str, OLDEST_PYTHON))
    fix = f"name one of at least {oldest} in python_candidates of SUPERCOMPUTER_SITE_OVERRIDES"
    return broken(f"none of {', '.join(said)} is there on the login node", fix)


def check_temporary_folder(facts: Facts) -> Verdict:
    """Check the length of TMPDIR."""
    path = facts.survey["temporary"].text
    if len(path) > LONGEST_TEMPORARY:
        fix = f"let TMPDIR have {LONGEST_TEMPORARY} characters at most: Ray's sockets lie below it"
        return warning(f"{path} has {len(path)} characters", fix)
    return ok(path)


def check_open_files(facts: Facts) -> Verdict:
    """Check the hard limit on open files."""
    limit = facts.survey["files"].text
    if limit.isdecimal() and int(limit) < WANTED_FILES:
        found = f"{limit} on the login node, less than the {WANTED_FILES} that Ray wants"
        return warning(found, "compute nodes may give more; jobs raise theirs as far as they may")
    return ok(limit)


def _parse_partitions(text: str) -> dict[str, dict[str, str]]:
    """Parse `scontrol --oneliner show partition`, by partition."""
    rows = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in text.splitlines()]
    return {row["PartitionName"]: row for row in rows if "PartitionName" in row}
