"""The commands of the pages, as they stand there: by a person who has an account and begins with an empty home."""

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import httpx
import pytest

from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite
from support import DOWNLOADS, ROOT
from support.dagster_dev import wait_for
from tests.unit.test_pages import PAGES, commands, runner_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

HERE = str(Path(__file__).relative_to(ROOT))
FIRST = ("git clone", "cp envs/.env.musica.example", "read -rs", "scripts/deploy_environment.py\n")
"""What the others need, in this order."""
CLONE, MAKES_FILE, _, PUBLISHES = FIRST


def scripts() -> list[str]:
    """What is run here, each once, otherwise in the order of the pages. What shares a variable is one script."""
    lines = [command for page in PAGES for command in commands(page) if runner_of(command) == HERE]
    shared = re.compile(r"^read -rs .*?^unset \w+\n", re.MULTILINE | re.DOTALL)
    text = "".join(f"{line}\n" for line in lines)
    found = [*shared.findall(text), *shared.sub("", text).splitlines()]
    return sorted(dict.fromkeys(found), key=lambda script: [not begins(script, each) for each in FIRST])


def begins(script: str, beginning: str) -> bool:
    """Whether it does; one that ends a line is all of it."""
    return f"{script}\n".startswith(beginning)


class Person:
    """Types commands in a folder, with a home, `uv` and what every system has."""

    def __init__(self, site: SimulatedSite, folder: Path) -> None:
        self.site, self.folder, self.home = site, folder, folder / "home"
        (self.home / ".ssh").mkdir(parents=True, mode=0o700)
        shutil.copy(site.login.known_hosts, self.home / ".ssh" / "known_hosts")
        kept = ("LANG", "UV_", "PIP_", "SSL_", "HTTP", "http", "NO_PROXY", "no_proxy")
        self.variables = {name: value for name, value in os.environ.items() if name.startswith(kept)}
        self.variables |= {"PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}", "HOME": str(self.home), **DOWNLOADS}

    def types(self, script: str, answer: str = "") -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], cwd=self.folder, env=self.variables, input=answer,
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
        return done.stdout

    def fills_in(self) -> None:
        """The site's own values, less the token, which is typed."""
        file = self.folder / "envs" / ".env.musica"
        values = {**self.site.environment(), "DAGSTER_DEPLOYMENT": "production_supercomputer"}
        del values["ASC_AUTHENTIK_API_TOKEN"]
        values["SLURM_EDGE_NODE_KEY_PATH"] = "~/.ssh/id_musica"
        values["ASC_AUTHENTIK_CREDENTIALS_FILE"] = "~/.config/dagster-slurm/musica-auth.env"
        assert file.stat().st_mode & 0o777 == 0o600
        file.write_text("".join(f"{name}={value}\n" for name, value in values.items()))

    def starts_and_ends(self, command: str) -> None:
        """One that runs until it is ended: it loads the code location. It is started as nohup in a script starts it."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = self.folder / "dev.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                ["bash", "-c", f"trap '' INT TERM; exec {'env ' if '=' in command else ''}{command} --port {port}"],
                cwd=self.folder, env=self.variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip

        def loaded() -> bool:
            assert process.poll() is None, log.read_text()
            query = "{ repositoriesOrError { __typename ... on RepositoryConnection { nodes { name } } } }"
            try:
                answer = httpx.post(f"http://127.0.0.1:{port}/graphql", json={"query": query}, timeout=30).json()
            except httpx.TransportError:
                return False
            return bool(answer["data"]["repositoriesOrError"].get("nodes"))

        try:
            wait_for(loaded, 300, f"{command} has loaded the code location")
            assert "superseded" not in log.read_text(), "Dagster's advice for other projects"
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture
def person(site: SimulatedSite, tmp_path: Path) -> Person:
    site.authentik.set_lifetimes(token=30 * 86400.0)
    return Person(site, tmp_path)


def test_the_pages_commands_work_as_they_stand_there(person: Person, site: SimulatedSite) -> None:
    clone, *others = scripts()
    assert clone.startswith(CLONE)
    assert {True} == {any(begins(each, beginning) for each in others) for beginning in FIRST[1:]}
    person.folder = Path(person.types(f"{clone.replace('<this repository>', str(ROOT))}\npwd").strip())
    token = site.authentik.create_token(CERTIFICATE_USER.name, "api", "by-hand")
    for script in others:
        if script.endswith("scripts/dev"):
            person.starts_and_ends(script)
        elif script.endswith("--rollback"):
            person.types(f"for each in */workloads/*.py; do echo '# new' >>$each; done; {PUBLISHES}")
            person.types(f"{script}; git checkout --quiet .")
        else:
            person.types(script, f"{token}\n")
        if script.startswith(MAKES_FILE):
            person.fills_in()
    published = site.run_on_login(CERTIFICATE_USER, "ls dagster-slurm/environments").stdout
    assert "published.json" in published
