"""Checks over one connection to the agent on the login node: projects, jobs, each asset's own job script."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from dagster_sbatch.auth import AccessError
from dagster_sbatch.environments import Environments
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.inspect.doctor.finding import Facts, Verdict, broken, ok, warning
from dagster_sbatch.inspect.preview import NotPreviewedError, find_submitting, preview_asset, try_script
from dagster_sbatch.inspect.runs import open_runs
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm.gateway import RefusedError, StoppedError
from dagster_sbatch.ssh import SshError

SECONDS = 240.0
"""For the agent to answer everything; Slurm takes some seconds for each job script."""
FAILURES = (AccessError, SshError, RefusedError, StoppedError)


def check_projects(facts: Facts) -> Verdict:
    """Open the connection; say which projects the user has, and which of them is charged."""
    settings = facts.settings
    try:
        facts.runs = facts.until_the_end.enter_context(open_runs(settings, facts.project, SECONDS))
        facts.projects = projects = facts.runs.gateway.projects()
    except FAILURES as error:
        return broken(_describe(error), "try again")
    charged = projects.charged(settings.account)
    if not projects.qos:
        return warning("the accounting does not answer, or knows no project of yours", "try again; ask the centre")
    source = "SLURM_ACCOUNT" if settings.account else "SBATCH_ACCOUNT there" if projects.exported else "your default"
    found = f"{', '.join(sorted(projects.qos))}; jobs are charged to {charged} ({source})"
    if charged not in projects.qos:
        return broken(f"{charged} ({source}) is not a project of yours", f"yours are {', '.join(sorted(projects.qos))}")
    mine = projects.qos[charged]
    if settings.qos and mine and settings.qos not in mine:
        fix = (
            f"set SLURM_QOS to one of {', '.join(sorted(mine))}, or SLURM_ACCOUNT to another project; "
            "one whose budget is used up may use the idle_ ones only"
        )
        return broken(f"project {charged} may not use SLURM_QOS={settings.qos}", fix)
    wanted = {qos for partition in facts.site.partitions.values() for qos in partition.qos}
    lacking = sorted(wanted - mine) if mine else []
    return warning(f"{found}, without QoS {', '.join(lacking)}", "assets cannot use those") if lacking else ok(found)


def check_jobs(facts: Facts) -> Verdict:
    """Look for jobs of runs that this Dagster does not know."""
    try:
        going = [run for run in facts.runs.all() if run.job and not run.end and facts.runs.look(run)[0]]
    except FAILURES as error:
        return broken(_describe(error), "try again; scripts/job lists what is there")
    strange = [f"{run.job} ({run.about.asset})" for run in going if not facts.instance.has_run(run.about.run)]
    if strange:
        fix = "leave them to the other Dagster that submitted them; if there is none: scripts/job JOB cancel"
        return warning(f"of runs that this Dagster does not know: {', '.join(strange)}", fix)
    return ok(f"{len(going)} waiting or running")


def check_environment(facts: Facts) -> Verdict:
    """Find what production runs."""
    settings = facts.settings
    if settings.deployment != "production_supercomputer":
        return ok(f"a run on {settings.deployment} makes its own")
    try:
        base = str(settings.deployment_base_path)
        published = Environments(facts.runs.gateway, base, facts.site).published()
    except FAILURES as error:
        return broken(_describe(error), "try again")
    if published is None:
        return broken("nothing has been published: runs are refused", "scripts/deploy_environment.py")
    revision = f", revision {published.revision}" if published.revision else ""
    return ok(f"published at {published.at:%Y-%m-%d %H:%M} UTC{revision}")


def try_job_scripts(facts: Facts) -> Iterator[tuple[str, Verdict]]:
    """Ask Slurm about each asset's own job script, with `sbatch --test-only`; of a partitioned asset, the last one."""
    definitions = facts.definitions or dg.Definitions()
    for name, partition in find_submitting(definitions, facts.instance):
        command = f"scripts/preview {name}" + (f" --partition '{partition}'" if partition else "")
        try:
            with _deployment(facts.settings):
                previews = preview_asset(definitions, name, partition)
        except NotPreviewedError as error:
            yield f"asset {name}", warning(f"not tried: {error}", command)
            continue
        except ConfigurationError as error:
            yield f"asset {name}", broken(f"its run would be refused: {error}", f"correct the asset; {command}")
            continue
        for preview in previews:
            try:
                accepted, said = try_script(facts.runs.gateway, preview, facts.projects)
            except FAILURES as error:
                yield f"asset {name}", broken(_describe(error), "try again")
                return
            step = preview.summary["step"]
            label = f"asset {name}" if step == name else f"asset {name}, {step}"
            yield label, ok(said) if accepted else broken(said, f"correct the asset's request; {command} --test-only")


def _describe(error: Exception) -> str:
    return str(error) or f"the login node has not answered everything within {SECONDS:.0f} s"


@contextmanager
def _deployment(settings: Settings) -> Iterator[None]:
    """Let `load_settings` read those of the supercomputer, also where DAGSTER_DEPLOYMENT is `development` or unset."""
    before = os.environ.get("DAGSTER_DEPLOYMENT", "")
    os.environ["DAGSTER_DEPLOYMENT"] = settings.deployment if settings.on_supercomputer else "staging_supercomputer"
    try:
        yield
    finally:
        os.environ["DAGSTER_DEPLOYMENT"] = before
