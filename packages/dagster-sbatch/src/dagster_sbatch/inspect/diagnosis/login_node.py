"""Checks of what the login node's survey says."""

from time import monotonic

from dagster_sbatch.inspect.diagnosis.finding import Facts, Finding, broken, ok, warning
from dagster_sbatch.inspect.diagnosis.room import Room, parse_room
from dagster_sbatch.inspect.remote_runs import open_runs
from dagster_sbatch.slurm.gateway.link import AgainError

SECONDS = 240.0  # for the agent to answer all requests; Slurm takes some seconds for each job script
SURVEY_SECONDS = 120.0  # for the login, and the survey, whose commands have 90 s together
LEAST_FREE_KIB, LEAST_FREE_FILES = 1 << 20, 10_000
LONGEST_TEMPORARY = 40  # characters. Ray creates sockets below it, and the path of a socket has at most 107 (unix(7))
WANTED_FILES = 65536


def check_login(facts: Facts) -> Finding:
    """Log in, start the agent, and take the survey that the checks below read."""
    settings, fix = facts.settings, "do what the message says; or try again, and check what your login shell does"
    told: list[str] = []  # such as what to ask of a login shell that hangs
    facts.runs = facts.until_the_end.enter_context(open_runs(settings, facts.project, SECONDS, told.append))
    request = {"do": "survey.survey", "path": str(settings.deployment_base_path)}
    try:
        answers = facts.runs.gateway.exchange([request], until=monotonic() + SURVEY_SECONDS)
        facts.survey = next(answers, (0, {}, b""))[1]
    except AgainError as error:
        return broken(str(error), fix)
    if not facts.survey:
        return broken("\n".join([f"the login node has not answered within {SURVEY_SECONDS:.0f} s", *told[-1:]]), fix)
    return ok("this machine" if settings.on_login_node else f"{settings.edge_node_user} at {settings.edge_node_host}")


def check_slurm(facts: Facts) -> Finding:
    """Check that Slurm's commands are there and that its controller answers."""
    missing = facts.survey["missing"]
    if missing:
        fix = "in setup_commands of SUPERCOMPUTER_SITE_OVERRIDES, load the module that has them; or ask the centre"
        return broken(f"not on PATH of the login node: {', '.join(missing)}", fix)
    code, text = facts.survey["controller"]
    if code or " UP" not in text.upper().replace(" IS", " "):
        return broken(text, "slurmctld does not answer: wait, or ask the centre")
    return ok(text.splitlines()[0])


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
            fix = f"correct SUPERCOMPUTER_SITE_OVERRIDES; the partition allows {', '.join(allowed)}"
            return broken(f"partition {partition} does not allow QoS {', '.join(refused)}", fix)
    down = [partition for partition in facts.site.partitions if there[partition].get("State") != "UP"]
    if down:
        return warning(f"not UP: {', '.join(down)}", "wait: jobs there start when the centre opens the partition")
    return ok(", ".join(facts.site.partitions))


def check_storage(facts: Facts) -> Finding:
    """Check the room in the user's own folders."""
    folders = {name: path for name, (path, _) in facts.survey["rooms"].items() if name != "base"}
    rooms = {name: _room(facts, name) for name in folders}
    found = "\n".join(f"${name} {folders[name]}: {room}" for name, room in rooms.items())
    full = [f"${name}" for name, room in rooms.items() if _is_short(room)]
    if full:
        return warning(found, f"free space in {' and '.join(full)}: remove what you do not need there")
    return ok(found)


def check_folder(facts: Facts) -> Finding:
    """Check that SLURM_DEPLOYMENT_BASE_PATH can be written to and has room."""
    base, above, refusal = (facts.survey[name] for name in ("base", "above", "refusal"))
    if refusal:
        fix = "choose another SLURM_DEPLOYMENT_BASE_PATH, or free space (is your quota full?)"
        return broken(f"{above} cannot be written to: {refusal}", fix)
    room = _room(facts, "base")
    if _is_short(room):
        return warning(f"{above}: {room}", "free space there: scripts/deploy_environment.py --help says how")
    return ok(f"{base}: {room}{'' if above == base else '; the first run creates it'}")


def _room(facts: Facts, name: str) -> Room:
    return parse_room(facts.survey["rooms"][name][1], facts.survey["quota"])


def _is_short(room: Room) -> bool:
    """Return whether little room is left; unknown room is not short."""
    lefts = (room.kib, LEAST_FREE_KIB), (room.files, LEAST_FREE_FILES)
    return any(left is not None and left < least for left, least in lefts)


def check_temporary_folder(facts: Facts) -> Finding:
    """Check the length of TMPDIR."""
    path = facts.survey["temporary"]
    if len(path) > LONGEST_TEMPORARY:
        fix = f"set TMPDIR to a path of at most {LONGEST_TEMPORARY} characters: Ray creates sockets below it"
        return warning(f"{path} has {len(path)} characters", fix)
    return ok(path or "TMPDIR is not set")


def check_open_files(facts: Facts) -> Finding:
    """Check the hard limit on open files."""
    limit = facts.survey["files"]
    if 0 <= limit < WANTED_FILES:  # less than 0: there is none
        found = f"{limit} on the login node, less than the {WANTED_FILES} that Ray wants"
        return warning(found, "compute nodes may allow more; jobs raise their limit as far as the node allows")
    return ok(str(limit) if limit >= 0 else "unlimited")
