"""What the documentation says is true."""

import ast
import os
import re
from pathlib import Path
from typing import Any

import pytest

from dagster_sbatch.auth.keys import fingerprint
from dagster_sbatch.settings import Settings
from dagster_sbatch.sites.musica import MUSICA
from dagster_sbatch.ssh.host_key import parse_authority
from support import ENGINE, ROOT

ENGINE_DOCS = ROOT / "packages" / "dagster-sbatch" / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "scripts" / "_skeleton" / "README.md",
    *sorted(ROOT.glob("packages/*/docs/*.md")),
    *sorted(ROOT.glob("packages/*/README.md")),
]
SLURM = ("sacct", "sbatch", "scancel", "sinfo", "squeue", "sshare")
AVOIDED = re.compile(
    r"\b(mend(s|ed)?|passed\s+over|taken\s+up|(is|are|was|were)\s+told|go(es)?\s+(along|on)|what\s+of|word\s+of\s+its\s+end)\b",
    re.IGNORECASE,
)
"""Words that a newcomer reads twice: write repair, skip, adopt, report, continue."""
HEAD = """\
# Settings

Each setting is a variable. The first of these places that has the variable gives its value:

1. the process environment
2. `.env` at the root of the repository
3. one file of `envs/`: `.env.development`, or for the `*_supercomputer` deployments `.env.<SLURM_SUPERCOMPUTER_SITE>`

A blank value means that the variable is not set, and `~` means your home. If a file holds a secret, nobody else may
read it (`chmod 600`). An unknown variable in these files is an error if it begins with `SLURM_`, `ASC_` or
`DAGSTER_DEPLOYMENT`. The table below is made from `dagster_sbatch.settings`.

**Dagster's own commands read `.env` differently.** With `dagster`, its services and their runs, the variables of `.env`
replace those of the process environment. `scripts/dev` does not start if the two differ. Before you call `dagster`
yourself, or use the units of [long-running](long-running.md), remove from `.env` all variables that your shell or the
units set, such as `DAGSTER_DEPLOYMENT` and `DAGSTER_HOME`.

**Which deployment is it?** It is `development`, unless the process environment or `.env` sets `DAGSTER_DEPLOYMENT`. The
file `.env.<SLURM_SUPERCOMPUTER_SITE>` sets it as well, but that line is used only

- by commands that are always about the supercomputer, such as `scripts/doctor` and `scripts/preview`;
- by other commands if the process environment or `.env` sets `SLURM_SUPERCOMPUTER_SITE`, but not `DAGSTER_DEPLOYMENT`.

**Variables that Slurm knows, too.** `SLURM_PARTITION`, `SLURM_QOS`, `SLURM_ACCOUNT` and `SLURM_RESERVATION` are also
variables of `srun`, with the same meaning. If a module or your shell's profile exports one of them on the machine where
Dagster runs, this value is used instead of the one in the file. `scripts/preview ASSET` shows the result. If you do not
want that value, `unset` the variable.

| variable | meaning | default | example |
|---|---|---|---|
"""


def settings_page() -> str:
    rows = []
    for field in Settings.model_fields.values():
        value = str(field.default).lower() if isinstance(field.default, bool) else field.default
        default = "" if value is None else f"`{value}`"
        example = (field.examples or [""])[0]
        rows.append(f"| `{field.validation_alias}` | {field.description} | {default} | `{example}` |\n")
    return HEAD + "".join(rows)


def test_the_table_of_variables_is_current() -> None:
    path = ENGINE_DOCS / "settings.md"
    if os.environ.get("UPDATE_DOCS"):
        path.write_text(settings_page())
    assert path.read_text() == settings_page()


def anchors(page: Path) -> set[str]:
    """Where links into a page can lead: its headings, as GitHub and GitLab write them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text()
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
        if "://" not in target:
            there = page.parent / target if target else page
            assert there.exists(), target
            assert page.parent != ENGINE_DOCS or ".." not in target, target  # a copy has these pages alone
            assert not anchor or anchor in anchors(there), f"{target}#{anchor}"
    for path in re.findall(
        r"`((?:packages|dagster_sbatch|slurm_in_a_box|benchmarks|scripts|docs|envs|tests|resources|jobs|musica_pipelines|requirements)/[\w./-]*)",
        text,
    ):
        assert any(
            (base / path).exists()
            for base in (ROOT, ROOT / "scripts" / "_skeleton", *ROOT.glob("packages/*"), *ROOT.glob("packages/*/src"))
        ) or path.endswith("planes.py"), path


def test_texts_have_no_words_that_a_newcomer_reads_twice() -> None:
    folders = ["musica_pipelines", "jobs", "resources", "scripts", "packages/*/src", "packages/*/benchmarks"]
    programs = [path for folder in folders for place in ROOT.glob(folder) for path in place.rglob("*")]
    kinds = (".py", ".sh", ".md", "")
    texts = [*PAGES, *(path for path in programs if path.is_file() and path.suffix in kinds)]
    assert len(texts) > 200
    found = [(str(path), match[0]) for path in texts for match in AVOIDED.finditer(path.read_text())]
    assert found == []


def test_the_musica_page_has_the_host_authority_and_its_fingerprint() -> None:
    text = (ENGINE_DOCS / "musica.md").read_text()
    (line,) = MUSICA["host_authorities"]
    assert f"```\n{line}\n```" in text
    assert f"```\n{fingerprint(parse_authority(line).key)}\n```" in text


def test_the_architecture_page_names_every_module() -> None:
    text = (ENGINE_DOCS / "architecture.md").read_text()
    for module in ENGINE.iterdir():
        if not module.name.startswith("__") and module.name != "py.typed":
            assert module.name in text, module.name


def slurm_commands() -> set[str]:
    """The commands of Slurm that the agent starts, each with what it shows."""
    commands = set[str]()
    for path in (ENGINE / "slurm" / "gateway" / "agent").glob("*.py"):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            words = [str(node.value) for node in call.args if isinstance(node, ast.Constant)]
            if getattr(call.func, "id", "") == "listed":
                words = ["sacctmgr", "show", *words]
            if words and words[0] in ("scontrol", "sacctmgr"):
                shown = [word for word in words if word.isalpha()][:3]
                commands |= {" ".join(shown)} if len(shown) == 3 or "ping" in shown else set()
            elif words and words[0] in SLURM:
                commands.add(" ".join([words[0], *(word for word in words if word == "--test-only")]))
    return commands


def test_the_login_node_page_names_each_command_of_slurm() -> None:
    rows = re.findall(r"^\| (`s[^|]*) \|", (ENGINE_DOCS / "login-node.md").read_text(), re.MULTILINE)
    listed = {re.sub(r" -\w [A-Z]+| -A", "", each) for row in rows for each in re.findall(r"`(s[^`/]*)`", row)}
    assert listed == slurm_commands()


def test_the_readmes_asset_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two listings of "Write your own asset", put together and materialised."""
    import dagster as dg

    from resources import build_resources

    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    workload, asset = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len((workload + asset).splitlines()) < 30
    names: dict[str, Any] = {"__file__": str(tmp_path / "assets" / "planes.py")}
    folder = tmp_path / "workloads"
    folder.mkdir()
    (folder / "flight_delays").symlink_to(ROOT / "musica_pipelines" / "workloads" / "flight_delays")
    (folder / "count_planes.py").write_text(workload)
    exec(compile(asset, "README.md", "exec"), names)
    result = dg.materialize([names["count_planes"]], resources=build_resources())
    (event,) = result.asset_materializations_for_node("count_planes")
    assert event.metadata["planes"].value == 3322
