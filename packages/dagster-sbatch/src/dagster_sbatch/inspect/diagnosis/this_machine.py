"""Checks of this machine, and of the network up to the login node."""

import os
import socket
from pathlib import Path

import dagster as dg

from dagster_sbatch import clock
from dagster_sbatch.auth import check_health, ensure_certificate
from dagster_sbatch.auth.keys import fingerprint
from dagster_sbatch.configuration import check_configuration
from dagster_sbatch.errors import ConfigurationError, describe_instance_error
from dagster_sbatch.inspect.diagnosis.finding import Facts, Finding, broken, ok, warning
from dagster_sbatch.ssh.client_config import Hop, read_route
from dagster_sbatch.ssh.host_key import CERT_AUTHORITY, KnownHosts, trusted_entries

TCP_SECONDS = 10.0


def check_settings(facts: Facts) -> Finding:
    """Check the settings, and the sites in SUPERCOMPUTER_SITE_OVERRIDES."""
    try:
        facts.settings = settings = check_configuration(facts.project, supercomputer=True)
        facts.site = facts.project.load_site(settings.supercomputer_site)
    except ConfigurationError as error:
        return broken(str(error), "correct the settings; `scripts/docs settings` has all of them")
    found = (settings.deployment, settings.supercomputer_site, settings.edge_node_user)
    return ok(", ".join(filter(None, found)))


def check_dagster_home(facts: Facts) -> Finding:
    """Open Dagster's instance; a dagster.yaml elsewhere must retry and monitor runs as the project's own does."""
    home = os.environ.get("DAGSTER_HOME", "")
    own = facts.project.root / "dagster.yaml"
    fix = f"unset DAGSTER_HOME, or copy {own} to that folder"
    is_own = not home or Path(home).resolve() == facts.project.root
    try:
        facts.instance = instance = facts.until_the_end.enter_context(facts.open_instance())
    except Exception as error:  # noqa: BLE001 - each file and database has errors of its own
        found = f"DAGSTER_HOME={home} cannot be used: {describe_instance_error(error)}"
        return broken(found, f"correct {own}, or what it names" if is_own else fix)
    if is_own:
        return ok(str(facts.project.root))
    settings = {
        "run_retries": instance.run_retries_enabled,
        "run_monitoring": instance.run_monitoring_enabled,
        "ForkingRunLauncher": type(instance.run_launcher) is not dg.DefaultRunLauncher,
    }
    lacking = [name for name, enabled in settings.items() if not enabled]
    if lacking:
        return warning(f"DAGSTER_HOME={home} has a dagster.yaml without {' and '.join(lacking)}", fix)
    return ok(home)


def check_credentials(facts: Facts) -> Finding:
    """Check what this machine has to get a certificate with, without asking a server."""
    health = check_health(facts.settings)
    if health.verdict in ("broken", "failing"):
        make = broken if health.verdict == "broken" else warning
        advice = "do what these lines say; if they say nothing to do, wait: the refresh is retried automatically"
        return make(health.summary, advice)
    return ok(health.summary)


def check_certificate(facts: Facts) -> Finding:
    """Get a valid certificate, renewed if that is due."""
    certificate = ensure_certificate(facts.settings)
    if certificate is None:
        return ok("none: a plain key")
    return ok(f"for {', '.join(certificate.principals)}, until {clock.written(certificate.valid_before)}")


def check_name(facts: Facts) -> Finding:
    """Resolve the name of the jump host, or of the login node if there is none."""
    try:
        hop = _first_hop(facts)
    except ConfigurationError as error:
        return broken(str(error), "correct ~/.ssh/config; `scripts/docs ssh` lists the options that are read")
    try:
        found = socket.getaddrinfo(hop.host, hop.port, type=socket.SOCK_STREAM)
    except OSError as error:
        return broken(f"{hop.host}: {error.strerror}", "check SLURM_EDGE_NODE_HOST, and this machine's network")
    return ok(f"{hop.host} is {', '.join(sorted({str(address[4][0]) for address in found}))}")


def check_port(facts: Facts) -> Finding:
    """Connect to the jump host or login node, and read its greeting."""
    hop = _first_hop(facts)
    maintenance = "check whether the centre announces a maintenance"
    try:
        connection = socket.create_connection((hop.host, hop.port), TCP_SECONDS)
    except TimeoutError:
        return broken(
            f"{hop} does not answer within {TCP_SECONDS:.0f} s: this network does not reach it",
            "connect from a network that the centre admits, such as your university's, or start the centre's VPN; "
            f"if you have done so, {maintenance}",
        )
    except OSError as error:
        fix = f"check this machine's network and SLURM_EDGE_NODE_PORT; {maintenance}"
        return broken(f"{hop}: {error.strerror or error}", fix)
    try:
        with connection:
            greeting = connection.recv(64).decode(errors="replace").strip()
    except OSError as error:
        return broken(f"{hop} accepts a connection, but sends nothing: {error.strerror or error}", maintenance)
    if not greeting.startswith("SSH-"):
        return broken(f"{hop} is not an SSH server: {greeting!r}", "check SLURM_EDGE_NODE_PORT")
    return ok(f"{hop} answers: {greeting}")


def check_host_authority(facts: Facts) -> Finding:
    """Show which authority or key the login node's key must match, and where to compare it."""
    login, _ = read_route(facts.settings)
    known = KnownHosts.read(login.known_hosts, facts.site.host_authorities)
    entries = trusted_entries(known, login.host, login.port)
    if not entries:
        return warning(f"no host key is known for {login.host}", "`scripts/docs ssh`: What you have to do once")
    kinds = {CERT_AUTHORITY: "authority", "": "key"}
    found = ", ".join(f"{kinds[each.marker]} {fingerprint(each.key)} of {each.place}" for each in entries)
    found = found.replace(str(Path.home()), "~")
    page = facts.site.documentation
    return ok(f"{found}; compare it with {page}" if page and set(entries) & set(known.site_authorities) else found)


def _first_hop(facts: Facts) -> Hop:
    login, jump = read_route(facts.settings)
    return jump or login
