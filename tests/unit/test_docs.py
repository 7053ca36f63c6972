"""What the documentation says is true."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

from resources.settings import ROOT, Settings

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
HEAD = """\
# Settings

Values come from the process environment, else from `.env` at the root of the repository, else from one file of `envs/`:
`.env.development`, or for the `*_supercomputer` deployments `.env.<SLURM_SUPERCOMPUTER_SITE>`. Blank means unset, `~`
your home. A file that holds a secret must be yours alone (`chmod 600`). An unknown variable in a file whose name
begins with `SLURM_`, `ASC_` or `DAGSTER_DEPLOYMENT` is an error. This table is made from `resources/settings.py`.

`SLURM_PARTITION`, `SLURM_QOS`, `SLURM_ACCOUNT` and `SLURM_RESERVATION` are also variables of `srun`, with the same
meaning. Where a module or profile exports one of them on the machine on which Dagster runs, that value wins over the
file, as any variable of the process environment does. `scripts/preview ASSET` shows the result; `unset` the variable if
it is not meant.

| variable | meaning | default | example |
|---|---|---|---|
"""


def settings_page() -> str:
    rows = []
    for field in Settings.model_fields.values():
        default = "" if field.default is None else f"`{field.default}`"
        example = (field.examples or [""])[0]
        rows.append(f"| `{field.validation_alias}` | {field.description} | {default} | `{example}` |\n")
    return HEAD + "".join(rows)


def test_the_table_of_variables_is_current() -> None:
    path = ROOT / "docs" / "settings.md"
    if os.environ.get("UPDATE_DOCS"):
        path.write_text(settings_page())
    assert path.read_text() == settings_page()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    for path in re.findall(
        r"`((?:scripts|docs|envs|tests|resources|jobs|musica_pipelines|requirements)/[\w./-]*)", text
    ):
        assert (ROOT / path).exists() or path.endswith("count_planes.py"), path


def test_the_architecture_page_names_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for module in (ROOT / "resources").iterdir():
        if not module.name.startswith("__pycache__"):
            assert module.name in text, module.name


def test_the_readmes_asset_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two listings of "Write your own asset", put together and materialised."""
    import dagster as dg

    from resources import build_resources
    from resources.compute import ComputeResource
    from resources.launchers import ScriptLauncher
    from resources.slurm import SlurmRequest

    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    workload, asset = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len((workload + asset).splitlines()) < 20
    program = ROOT / "musica_pipelines" / "workloads" / "count_planes.py"
    names: dict[str, Any] = {
        "dg": dg,
        "ComputeResource": ComputeResource,
        "ScriptLauncher": ScriptLauncher,
        "SlurmRequest": SlurmRequest,
    }
    names["WORKLOADS"] = tmp_path
    (tmp_path / "flight_delays").symlink_to(program.parent / "flight_delays")
    (tmp_path / "count_planes.py").write_text(workload)
    exec(compile(asset, "README.md", "exec"), names)
    result = dg.materialize([names["count_planes"]], resources=build_resources())
    (event,) = result.asset_materializations_for_node("count_planes")
    assert event.metadata["planes"].value == 3322
