"""Fields of the launchers: checked, and merged with the site's field by field."""

import re
from pathlib import Path

import pytest

from dagster_sbatch import launchers
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.launchers import CommandLauncher, Container, Launcher, RayLauncher, ScriptLauncher, SrunLauncher
from dagster_sbatch.slurm import SAMPLER_FILES, SlurmRequest

SITE = {"ray": {"pre_start_commands": ["ulimit -n 65536"], "ray_start_args": ["--include-dashboard=false"]}}


def test_an_open_field_comes_from_the_site_and_the_assets_own_stays() -> None:
    merged = RayLauncher(ray_start_args=["--verbose"], startup_time_limit=60).with_site(SITE)
    assert merged.pre_start_commands == ("ulimit -n 65536",)
    assert merged.ray_start_args == ("--verbose",)
    assert merged.startup_time_limit == 60


def test_a_launcher_takes_only_its_own_entry_of_the_site() -> None:
    assert ScriptLauncher().with_site(SITE).pre_start_commands == ()


def test_an_unknown_field_names_the_nearest() -> None:
    with pytest.raises(
        ConfigurationError, match="RayLauncher: ray_start_arg: unknown field; did you mean 'ray_start_args'"
    ):
        RayLauncher(ray_start_arg=["--verbose"])  # type: ignore[call-arg]


def test_an_unknown_field_in_the_site_is_an_error_too() -> None:
    with pytest.raises(ConfigurationError, match="num_gpu_per_node"):
        RayLauncher().with_site({"ray": {"num_gpu_per_node": 4}})


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"startup_time_limit": 0}, "startup_time_limit"),
        ({"object_store_memory": "lots"}, "64G"),
        ({"temp_dir": "/local/a/long/way/down/to/it"}, "at most 25 bytes"),
        ({"temp_dir": "/" + "ü" * 13}, "at most 25 bytes"),
        ({"temp_dir": "tmp"}, "not an absolute path"),
        ({"ray_start_args": ["--num-gpus=8"]}, "RayLauncher sets --num-gpus itself"),
        ({"ray_start_args": ["verbose"]}, "write --name=value"),
        ({"container": "image.sif"}, r"RayLauncher: container: write Container\(\.\.\.\)"),
        ({"ray_start_args": "--verbose"}, r"ray_start_args: this is not a list. Write \[...\], also around"),
    ],
)
def test_wrong_values_are_named(fields: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        RayLauncher(**fields)


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (SlurmRequest(gpus_per_node=4, cpus_per_task=2), "at least one CPU per GPU"),
        (SlurmRequest(ntasks_per_node=2), "RayLauncher needs 1"),
    ],
)
def test_ray_refuses_what_it_cannot_work_in(request_: SlurmRequest, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        RayLauncher().check(request_)


@pytest.mark.parametrize(
    "name", sorted(name for name in dir(launchers) if name.endswith("Launcher") and name != "Launcher")
)
def test_the_page_has_each_launcher_in_its_table_and_an_example(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "launchers.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert f"| `{name}()` |" in page
    assert any("compute.run(" in block and f"launcher={name}()" in block for block in blocks)


@pytest.mark.parametrize("launcher", [CommandLauncher(), RayLauncher(), ScriptLauncher(), SrunLauncher()])
def test_a_run_sends_the_programs_of_its_own_version_after_an_upgrade(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next attempt at a job is submitted by the code in memory, and the files of the package are others now."""
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "of another version")
    files = {**SAMPLER_FILES, **launcher.files(SlurmRequest()), **Container.files({})}
    assert "of another version" not in files.values()
    assert "sampler/sampler.py" in files
