"""Checks through the agent on the login node: projects, locks, jobs, the environment, each asset's job script."""

import uuid

import dagster as dg

from dagster_sbatch.environments.deployed import Environments, read_specs
from dagster_sbatch.environments.groups import DEFAULT
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.inspect.asset_preview import NotPreviewedError, preview_asset, supercomputer_deployment
from dagster_sbatch.inspect.diagnosis.finding import Facts, Finding, broken, ok, warning
from dagster_sbatch.inspect.dry_run import ask_usage, try_script
from dagster_sbatch.inspect.remote_runs import open_runs
from dagster_sbatch.slurm.gateway import charged_project
from dagster_sbatch.slurm.outcome import idle_only

LOCK_SECONDS = 60.0
LOCK_TRIES = 6  # connections to open: each may reach the login node that holds the lock
LOCK_FAMILY = "lock-test"


def check_projects(facts: Facts) -> Finding:
    """Check the user's projects, and which of them is charged."""
    settings = facts.settings
    facts.projects = projects = facts.runs.gateway.projects()
    facts.usage = ask_usage(facts.runs.gateway, settings)
    charged = charged_project(settings.account, projects.default)
    if not projects.qos:
        return warning("the accounting does not answer, or knows no project of yours", "try again; ask the centre")
    source = "SLURM_ACCOUNT" if settings.account else "SBATCH_ACCOUNT there" if projects.exported else "your default"
    found = f"{', '.join(sorted(projects.qos))}; jobs are charged to {charged} ({source})"
    if charged not in projects.qos:
        fix = f"set SLURM_ACCOUNT to one of {', '.join(sorted(projects.qos))}"
        return broken(f"{charged} ({source}) is not a project of yours", fix)
    mine = projects.qos[charged]
    if settings.qos and mine and settings.qos not in mine:
        fix = f"set SLURM_QOS to one of {', '.join(sorted(mine))}{idle_only(mine)}, or SLURM_ACCOUNT to another project"
        return broken(f"project {charged} may not use SLURM_QOS={settings.qos}", fix)
    wanted = {qos for partition in facts.site.partitions.values() for qos in partition.qos}
    lacking = sorted(wanted - mine) if mine else []
    return warning(f"{found}, without QoS {', '.join(lacking)}", "assets cannot use those") if lacking else ok(found)


def check_locks(facts: Facts) -> Finding:
    """Check that a lock on one login node is seen on another: two Dagsters must not act on the same run."""
    with open_runs(facts.settings, facts.project, LOCK_SECONDS) as runs:
        if runs.gateway.claim(runs.folder, LOCK_FAMILY, uuid.uuid4().hex, "scripts/doctor").held_by:
            return ok("another doctor is checking them at the moment")
        return _try_to_lock(facts, runs.gateway.ping())


def _try_to_lock(facts: Facts, holder: str) -> Finding:
    for _ in range(LOCK_TRIES):
        with open_runs(facts.settings, facts.project, LOCK_SECONDS) as runs:
            host = runs.gateway.ping()
            if runs.gateway.claim(runs.folder, LOCK_FAMILY, uuid.uuid4().hex, "scripts/doctor").held_by is None:
                return warning(
                    f"a file lock of {holder} is not seen on {host}: two Dagsters could act on the same run, or "
                    "make the same environment",
                    "set SLURM_DEPLOYMENT_BASE_PATH to a folder on another file system, or SLURM_EDGE_NODE_HOST to one "
                    "login node; or ask the centre to switch on locks for the whole cluster",
                )
        if host != holder:
            return ok(f"{host} respects a file lock of {holder}")
    return ok(f"file locks work on {holder}; no other login node was reached to compare")


def check_jobs(facts: Facts) -> Finding:
    """Check for jobs of runs that this Dagster does not know."""
    waiting = [run for run in facts.runs.all() if run.job and not run.end and facts.runs.gateway.state(run.path)[0]]
    strange = [run for run in waiting if not any(map(facts.instance.has_run, run.followers))]
    if strange:
        jobs = ", ".join(f"{run.job} ({run.about.asset})" for run in strange)
        fix = "if another Dagster has submitted them, leave them alone; if none has: scripts/job JOB cancel"
        return warning(f"of runs that this Dagster does not know: {jobs}", fix)
    return ok(f"{len(waiting)} waiting or running")


def check_environment(facts: Facts) -> Finding:
    """Check that the environment of each group can be made or, in production, that what is here is published."""
    settings, publish = facts.settings, "scripts/deploy_environment.py"
    try:
        specs = read_specs(facts.project, settings)
    except ConfigurationError as error:
        return broken(str(error), "do what the error says")
    environments = Environments(facts.runs.gateway, str(settings.deployment_base_path), facts.site)
    if settings.deployment != "production_supercomputer":
        if settings.python:
            environments.check_interpreter(specs[DEFAULT])
        return ok(f"a run on {settings.deployment} makes its own environment")
    published = {group: there for group in specs if (there := environments.published(group))}
    if DEFAULT not in published:
        return broken("nothing has been published, so runs are refused", publish)
    if lacking := sorted(specs.keys() - published.keys()):
        found = f"environment {', '.join(lacking)} has not been published: runs of assets that name it are refused"
        return broken(found, publish)
    differences = [each for group in specs for each in specs[group].differences_from(published[group].environment)]
    if differences:
        found = "\n".join(["what is here is not what was published: runs are refused", *dict.fromkeys(differences)])
        return broken(found, f"restore what was published, with git, or publish what is here: {publish}")
    current = published[DEFAULT]
    revision = f", revision {current.revision}" if current.revision else ""
    return ok(f"published at {current.at:%Y-%m-%d %H:%M} UTC{revision}")


def check_job_script(facts: Facts, definitions: dg.Definitions, asset: str, partition: str | None) -> Finding:
    """Ask Slurm about the job scripts of an asset with `sbatch --test-only`."""
    command = f"scripts/preview {asset}" + (f" --partition '{partition}'" if partition else "")
    try:
        with supercomputer_deployment(facts.settings):
            previews = preview_asset(definitions, asset, partition)
    except NotPreviewedError as error:
        return warning(f"not tried: {error}", command)
    except ConfigurationError as error:
        return broken(f"its run would fail: {error}", f"correct the asset. To see its job:\n  {command}")
    answers = [try_script(facts.runs.gateway, preview, facts.projects, facts.usage) for preview in previews]
    found = "\n".join(
        said if preview.step == asset else f"{preview.step}: {said}"
        for preview, (_, said) in zip(previews, answers, strict=True)
    )
    if all(accepted for accepted, _ in answers):
        return ok(found)
    other = "if all assets are refused, correct the settings or SUPERCOMPUTER_SITE_OVERRIDES"
    return broken(found, f"do what it says, or correct the asset; {other}. To ask again:\n  {command} --test-only")
